"""The contrast of each method with taps: the losses and gradients are those of dense features.

The kernels run in Triton's interpreter. Only the contrast is computed, on given fakes.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from fastnce.kernels import common
from torch import Tensor, nn

from fastnce.common import dispatch, first_use, taps
from fastnce.engine.recompute import recompute_blocks
from fastnce.methods import Batch, Draws
from fastnce.methods.base import tapping, together
from fastnce.networks.resnet import ResnetBlock, ResnetGenerator
from tests.engine.test_compiled import method_of, with_blocks
from tests.oracle import error

pytestmark = pytest.mark.skipif(not common.INTERPRET.value, reason="made for Triton's interpreter")

SIDE = 8
NONE: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    """The CPU counts as an accelerator, whose kernels are not checked at their first use."""
    monkeypatch.setenv("FASTNCE_CHECK_KERNELS", "0")
    monkeypatch.setattr(dispatch, "is_default", lambda device: True)
    first_use.forget()
    yield
    first_use.forget()


def contrasted(method: nn.Module, handed_out: bool) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """The contrastive losses of a method, and its gradients."""
    for generator in method.generators().values():
        generator.hands_out_taps = handed_out
    method.zero_grad()
    a, b, fake_a, fake_b = torch.rand(4, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch, draws = Batch(a, b), method.draw(random.Random(0))
    torch.manual_seed(3)
    if hasattr(method, "contrast"):
        outputs: dict[str, Any] = {"fake_A": fake_a, "fake_B": fake_b}
        losses = [*method.contrast(batch, outputs, draws)]
        losses += [(codes * torch.arange(64).cos()).sum() for codes in outputs.get("codes", [])]
    else:
        both = method.contrasts_both
        outputs = {"real": torch.cat([a, b]) if both else a, "fake": torch.cat([fake_b, fake_a]) if both else fake_b}
        outputs |= {"keys": None} | ({"idt_B": fake_a} if both else {})
        if hasattr(method, "n_loss"):
            outputs["maps"] = super(type(method), method).maps(outputs, draws)
        losses = [*method._contrast(outputs, draws)] + [outputs[name] for name in ("relation",) if name in outputs]
    torch.stack([loss * (i + 1) for i, loss in enumerate(losses)]).sum().backward()
    return losses, {name: parameter.grad for name, parameter in method.named_parameters()}


CASES = {
    "cut": NONE,
    "cut, blocks computed again": NONE,
    "fastcut, affine norms": {"flip_equivariance": False, "nce_layers": [4, 8, 9]},
    "cut, symmetric": {"symmetric": True, "nce_idt": False},
    "cut, learned temperature": {"learn_temperature": True, "nce_idt": False},
    "fastcut": {"flip_equivariance": False},
    "hneg-src": NONE,
    "negcut": {"nce_idt": False},
    "dclgan": {"nce_layers": [4, 8, 12]},
    "simdcl": {"nce_layers": [4, 8, 9]},
    "dcdgan": {"nce_layers": [4, 8, 9]},
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_dense_features(name, monkeypatch):
    preset, _, kind = name.partition(", ")
    with_blocks(1 if "again" in kind else 0, monkeypatch)
    method = method_of(
        preset, {"nce_layers": [0, 4, 8, 12], "projection": 16, **CASES[name]}, norm_affine="affine" in kind
    )
    if "again" in kind:
        assert recompute_blocks(method) == 1
    left: list[int] = []
    leave = taps.Slot.leave
    monkeypatch.setattr(
        taps.Slot, "leave", lambda slot, rows, *rest: (left.append(len(rows)), leave(slot, rows, *rest))
    )
    losses, expected = contrasted(method, False)
    assert not left
    found_losses, found = contrasted(method, True)
    assert len(left) >= 2
    for one, other in zip(found_losses, losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert sum("model.4.bias" in key or "model.8.bias" in key for key, g in found.items() if g is not None) >= 2
    for key, gradient in expected.items():
        if gradient is None:
            assert found[key] is None, key
        elif "model.4.bias" in key or "model.8.bias" in key:  # dense features add the rounding of a cancelled gradient
            assert error(found[key], gradient) < 1e-3, key
        else:
            assert error(found[key], gradient) < 1e-4, key


@pytest.mark.parametrize(
    "changes",
    [{"selection": "attention"}, {"projector": "reshape"}, {"patches": 0}],
    ids=lambda value: next(iter(value)),
)
def test_methods_that_read_whole_maps_ask_for_no_taps(changes, monkeypatch):
    with_blocks(0, monkeypatch)
    assert not method_of("cut", changes).projects_rows
    assert not method_of("qsattn", NONE).projects_rows


def test_only_our_own_generator_is_asked_for_taps():
    class Own(ResnetGenerator):
        def forward(self, x, layers=(), encode_only=False):
            return super().forward(x, layers, encode_only)

    assert tapping(ResnetGenerator(width=4, blocks=0)) == {"taps": True}
    assert tapping(ResnetGenerator(width=4, blocks=0), False) == {}
    assert tapping(Own(width=4, blocks=0)) == {}
    hooked = ResnetGenerator(width=4, blocks=0)
    hooked.register_forward_hook(lambda *_: None)
    assert tapping(hooked) == {}
    assert tapping(ResnetBlock(4)) == {}


def test_batches_that_pass_together_share_a_slot():
    generator = ResnetGenerator(width=4, blocks=0)
    images = torch.rand(2, 1, 3, SIDE, SIDE)
    (_, first), (_, second) = together(generator, list(images), independent=True, layers=[0, 4, 8], taps=True)
    assert first[1].slot is second[1].slot
    assert first[1].slot is not first[2].slot
    assert (first[1].first, second[1].first) == (0, 1)
    (_, dense), (_, other) = together(generator, list(images), independent=True, layers=[0, 4, 8])
    assert error(first[1].dense(), dense[1]) < 1e-6
    assert error(second[2].dense(), other[2]) < 1e-6


def test_given_locations_use_dense_features(monkeypatch):
    """They may repeat. The published recordings give them."""
    with_blocks(0, monkeypatch)
    method = method_of("cut", {"nce_layers": [4, 8, 12], "nce_idt": False})
    monkeypatch.setattr(taps.Slot, "leave", lambda *_: pytest.fail("rows were left in a slot"))
    ids = [[torch.tensor([1, 3, 3]) for _ in range(3)]]
    a = torch.rand(1, 3, SIDE, SIDE)
    method._contrast({"real": a, "fake": -a, "keys": None}, Draws(patch_ids=ids)).sum().backward()
    assert method.generator.model[4].bias.grad.norm() > 0
