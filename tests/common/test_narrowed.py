"""16-bit copies of weights are found while they are held and right, and never otherwise."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from fastnce import PatchNCEHead
from fastnce.common.narrowed import copies_of, have_copies, narrowed
from tests.maps import DEVICE


def mlp() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (4,), (2, 4), (2,))]


def copied(weights: list[nn.Parameter]) -> list[torch.Tensor]:
    return [w.detach().bfloat16() for w in weights[::2]]


def test_copies_replace_weights_and_leave_biases():
    weights = mlp()
    copies = copied(weights)
    with narrowed(weights[::2], copies):
        found = copies_of(weights, torch.bfloat16)
        assert found is not None
        assert found[0] is copies[0]
        assert found[2] is copies[1]
        assert found[1::2] == weights[1::2]
        assert have_copies(weights)
        assert copies_of(weights, torch.float16) is None
        assert copies_of(weights, None) is None
        assert copies_of([], torch.bfloat16) is None
        assert copies_of([*weights, *mlp()], torch.bfloat16) is None  # all or none
    assert not have_copies(weights)


def test_a_changed_weight_has_no_copy():
    weights = mlp()
    with narrowed(weights[::2], copied(weights)):
        with torch.no_grad():
            weights[2].add_(1)
        assert copies_of(weights, torch.bfloat16) is None


def test_held_ones_come_back_after_an_error():
    weights, others = mlp(), mlp()

    def fail():
        with narrowed(others[::2], copied(others)):
            assert copies_of([*weights, *others], torch.bfloat16) is not None
            raise KeyError

    with narrowed(weights[::2], copied(weights)):
        with pytest.raises(KeyError):
            fail()
        assert have_copies(weights)
        assert not have_copies(others)


def test_another_thread_has_its_own():
    weights, found = mlp(), []
    with narrowed(weights[::2], copied(weights)):
        thread = threading.Thread(target=lambda: found.append(have_copies(weights)))
        thread.start()
        thread.join()
    assert found == [False]


def test_a_repeated_call_reads_no_weight_in_place_of_a_copy():
    """The plan of a call with copies of both MLPs is not for a later one that has copies of the queries' alone."""
    torch.manual_seed(0)
    head, other = (PatchNCEHead([8, 16], dim=16, patches=8, implementation="triton").to(DEVICE) for _ in range(2))
    query, key = ([torch.randn(2, c, 6, 6, device=DEVICE).bfloat16() for c in (8, 16)] for _ in range(2))

    def run(*held: PatchNCEHead) -> float:
        weights = [w for one in held for mlp in one.mlps(2) for w in mlp[::2]]
        torch.manual_seed(3)
        with torch.autocast(DEVICE.type, torch.bfloat16), narrowed(weights, [w.detach().bfloat16() for w in weights]):
            return head(query, key, key_projector=other).item()

    results = [run(head, other), run(head), run(head, other), run()]
    assert max(results) - min(results) < 1e-2
