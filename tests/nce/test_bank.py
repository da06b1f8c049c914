"""NegativeBank: a queue that replaces its oldest keys first."""

from __future__ import annotations

import re

import pytest
import torch

from fastnce import NegativeBank, patch_nce


def test_starts_with_random_unit_rows():
    bank = NegativeBank(10, [4, 8])
    for keys, dim in zip(bank.keys(), (4, 8), strict=True):
        assert keys.shape == (10, dim)
        torch.testing.assert_close(keys.norm(dim=1), torch.ones(10))
        assert not keys.requires_grad


def test_the_oldest_rows_are_replaced_first_and_the_pointer_wraps():
    bank = NegativeBank(5, [1])
    for start in range(0, 12, 3):
        bank.enqueue([torch.arange(start, start + 3.0)[:, None]])
    assert sorted(bank.keys()[0].flatten().tolist()) == [7.0, 8.0, 9.0, 10.0, 11.0]
    assert bank.pointer.tolist() == [2]


def test_of_more_rows_than_the_size_the_last_are_kept():
    bank = NegativeBank(3, [1])
    bank.enqueue([torch.arange(8.0)[:, None]])
    assert sorted(bank.keys()[0].flatten().tolist()) == [5.0, 6.0, 7.0]


def test_each_layer_has_its_own_pointer_and_the_dtype_is_kept():
    bank = NegativeBank(4, [2, 2], torch.bfloat16)
    bank.enqueue([torch.ones(1, 2), torch.ones(3, 2)])
    assert bank.pointer.tolist() == [1, 3]
    stored = bank.keys()
    assert all(k.dtype == torch.bfloat16 for k in stored)


def test_a_state_dict_restores_the_bank():
    bank, other = NegativeBank(4, [3]), NegativeBank(4, [3])
    bank.enqueue([torch.randn(3, 3)])
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.keys()[0], bank.keys()[0])
    assert torch.equal(other.pointer, bank.pointer)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_keys_may_be_replaced_before_the_backward_pass(implementation):
    bank = NegativeBank(16, [8])
    q = torch.nn.functional.normalize(torch.randn(6, 8)).requires_grad_()
    k = torch.nn.functional.normalize(torch.randn(6, 8))
    expected = torch.autograd.grad(patch_nce(q, k, extra_keys=bank.keys()[0].clone()), q)[0]
    loss = patch_nce(q, k, extra_keys=bank.keys()[0], implementation=implementation)
    bank.enqueue([k])
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], expected, rtol=1e-4, atol=1e-5)


def test_enqueue_compiles_without_a_graph_break():
    bank = NegativeBank(5, [2])
    enqueue = torch.compile(bank.enqueue, fullgraph=True, backend="eager")
    for _ in range(4):
        enqueue([torch.ones(2, 2)])
    assert bank.pointer.tolist() == [3]
    assert torch.equal(bank.keys()[0], torch.ones(5, 2))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: NegativeBank(0, [2]), "size"),
        (lambda: NegativeBank(2, []), "dims"),
        (lambda: NegativeBank(2, [2], torch.int64), "dtype"),
        (lambda: NegativeBank(2, [2]).enqueue([]), "one per layer"),
        (lambda: NegativeBank(2, [2]).enqueue([torch.ones(1, 3)]), "must be"),
    ],
)
def test_wrong_arguments_are_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def unchanged(bank, make):
    """Return the message that `make` raises, after checking that the bank is unchanged."""
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)) as caught:
        make()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bank.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (torch.ones(2, 4), r"rows[1] must be (count, 3), not (2, 4)"),
        (torch.ones(3), r"rows[1] must be (count, 3), not (3,)"),
        (torch.ones(2, 3, dtype=torch.int64), "rows[1] must have a floating dtype, not torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), "rows[1] must have a floating dtype, not torch.complex64"),
        (torch.ones(2, 3, device="meta"), "rows[1] is on meta, the bank on cpu"),
        ([[1.0, 2.0, 3.0]], "rows[1] must be a tensor, not a list"),
        (None, "rows[1] must be a tensor, not None"),
    ],
)
def test_a_refused_enqueue_writes_no_layer(wrong, sentence):
    bank = NegativeBank(4, [2, 3])
    assert sentence in unchanged(bank, lambda: bank.enqueue([torch.ones(2, 2), wrong]))
    assert "rows must be a list" in unchanged(bank, lambda: bank.enqueue(torch.ones(2, 2, 3)))


@pytest.mark.parametrize("change", ["missing", "unexpected", "size", "no tensor"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_refused_load_changes_nothing(change, assign):
    bank, other = NegativeBank(4, [2, 3]), NegativeBank(4, [2, 3])
    other.enqueue([torch.ones(2, 2), torch.ones(3, 3)])
    state = dict(other.state_dict())
    if change == "missing":
        del state["pointer"]
    else:
        state |= {
            "unexpected": {"rows_2": torch.ones(4, 2)},
            "size": {"rows_1": torch.ones(5, 3)},
            "no tensor": {"rows_1": None},
        }[change]
    sentence = unchanged(bank, lambda: bank.load_state_dict(state, assign=assign))
    assert {"missing": "pointer", "unexpected": "rows_2"}.get(change, "rows_1") in sentence
    if change in ("missing", "unexpected"):
        bank.load_state_dict(state, strict=False, assign=assign)
        assert torch.equal(bank.keys()[1], other.keys()[1])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NegativeBank(2.5, [2]), "size must be a whole number of at least 1, not 2.5"),
        (lambda: NegativeBank(True, [2]), "size must be a whole number"),
        (lambda: NegativeBank(2, 3), "dims must be a list of widths, one per layer, not 3"),
        (lambda: NegativeBank(2, [3, 0]), "dims[1] must be at least 1, not 0"),
        (lambda: NegativeBank(2, [3, "4"]), "dims[1] must be a whole number of at least 1, not '4'"),
        (lambda: NegativeBank(2, [3], "float32"), "dtype must be a floating dtype, not float32"),
    ],
)
def test_wrong_constructor_arguments_are_refused(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
