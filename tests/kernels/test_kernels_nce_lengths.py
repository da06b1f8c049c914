"""InfoNCE of rows that need not have unit length: bounded sums, their check, and the running maximum."""

from __future__ import annotations

import pytest
import torch
from fastnce.kernels import nce

from tests.kernels.test_kernels_nce import DTYPES, check, run
from tests.oracle import DEVICE, GRADIENT_GATE, LOSS_GATE, error, oracle, unit_rows


def test_rows_that_are_not_normalised():
    check(torch.randn(1, 80, 32) / 2, torch.randn(1, 80, 32) / 2, unit=False)
    q, k = 20 * torch.randn(1, 80, 32), 20 * torch.randn(1, 80, 32)  # logits of 10^5
    truth = oracle(q, k, torch.ones(1, 80), temperature=0.07)
    loss, _, _, d_q = run(q, k, unit=False)
    assert error(loss, truth.loss) <= 1e-5
    assert d_q.isfinite().all()


def lengths_of(kind: str, rows: int) -> torch.Tensor:
    """(rows, 1): equal lengths, or other lengths for a few rows of one block of 128, or of each block."""
    if kind == "one long row":
        lengths = torch.ones(rows)
        lengths[7] = 30
    elif kind == "mixed":
        lengths = torch.tensor([1e-3, 1.0, 3.0, 30.0])[torch.arange(rows) % 4]
    else:
        lengths = torch.full((rows,), float(kind))
    return lengths[:, None]


def check_beside_online(q, k, extra, monkeypatch, **options):
    """Check the default call against the gates, and each row against twice the error with a running maximum."""
    truth = oracle(q, k, torch.ones(q.shape[:2]), extra, temperature=0.07, **options)
    loss, _, positive, d_q = run(q, k, extra, unit=False, **options)
    with monkeypatch.context() as patch:
        patch.setattr(nce, "UNIT_TEMPERATURE", torch.inf)
        online_loss, _, _, online_d_q = run(q, k, extra, unit=False, **options)
    assert error(positive, truth.positive) <= 1e-5
    assert error(d_q, truth.d_queries) <= GRADIENT_GATE[q.dtype]
    for ours, theirs, exact in ((loss, online_loss, truth.loss), (d_q, online_d_q, truth.d_queries)):
        assert (errors_of_rows(ours, exact) <= (2 * errors_of_rows(theirs, exact)).clamp(min=2e-6)).all()
    return loss, truth


def errors_of_rows(ours: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """`error` of each row: in one norm, long rows would hide short ones."""
    ours, truth = (x.detach().double().cpu() for x in (ours, truth))
    off, truth = (x.transpose(0, 1).flatten(1) for x in (ours - truth, truth))
    norms = truth.norm(dim=1)
    return off.norm(dim=1) / torch.where(norms > 0, norms, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["1e-3", "1", "3", "30", "one long row", "mixed"])
@pytest.mark.parametrize("extras", [0, 40])
def test_rows_of_any_length(kind, dtype, extras, monkeypatch):
    rows = 200  # two blocks in the interpreter
    lengths = lengths_of(kind, rows)
    q, k = ((lengths * unit_rows(1, rows, 64)).to(dtype) for _ in range(2))
    extra = (float(lengths.max()) * unit_rows(1, extras, 64)).to(dtype) if extras else None
    loss, truth = check_beside_online(q, k, extra, monkeypatch)
    assert error(loss, truth.loss) <= LOSS_GATE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0.1, 1.0, 1.5, 3.0])
def test_long_rows_with_opposite_negatives(length, dtype, monkeypatch):
    """Without the promise of unit rows, a sum that underflowed must not count as zero."""
    away = unit_rows(1, 1, 64)
    q, k = (sign * away + 0.3 * unit_rows(1, 60, 64) for sign in (1, -1))
    q, k = ((length * x / x.norm(dim=-1, keepdim=True)).to(dtype) for x in (q, k))
    check_beside_online(q, k, None, monkeypatch)
    check_beside_online(q, k, None, monkeypatch, decoupled=True)


@pytest.mark.parametrize("length", [1.0, 30.0])
def test_a_single_row_of_any_length(length):
    q = length * unit_rows(2, 1, 32)
    loss, negative, _, d_q = run(q, q, unit=False)
    assert not loss.any()
    assert (negative == -torch.inf).all()
    assert not d_q.any()
    k, extra = q.flip(0), length * unit_rows(2, 9, 32)
    truth = oracle(q, k, torch.ones(2, 1), extra, temperature=0.07)
    loss, _, _, d_q = run(q, k, extra, unit=False)
    assert error(loss, truth.loss) <= 1e-6
    assert error(d_q, truth.d_queries) <= GRADIENT_GATE[torch.float32]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts in the interpreter")
def test_only_blocks_with_long_rows_stream_their_keys_again(monkeypatch):
    online: list[bool] = []

    def counted(*args, stream=nce.stream):
        online.append(bool(args[8]))
        return stream(*args)

    monkeypatch.setattr(nce, "stream", counted)
    q, k = unit_rows(1, 300, 32), unit_rows(1, 300, 32)  # three blocks
    for lengths, unit, expected in (
        ([1.0, 1.0, 1.0], False, [False] * 3),
        ([1.0, 30.0, 1.0], False, [False, False, True, False]),
        ([1.0, 30.0, 1.0], True, [False] * 3),
    ):
        online.clear()
        run(q * torch.tensor(lengths).repeat_interleave(128)[None, :300, None], k, unit=unit)
        assert online == expected
    online.clear()
    run(q, k, unit=True, temperature=0.02)
    assert online == [True] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_opposite_negatives(dtype):
    """Every logit is far below the bound 1/T: no sum may underflow."""
    away = unit_rows(1, 1, 64)
    q = away + 0.3 * unit_rows(1, 60, 64)
    k = -away + 0.3 * unit_rows(1, 60, 64)
    q, k = ((x / x.norm(dim=-1, keepdim=True)).to(dtype) for x in (q, k))
    check(q, k)
    check(q, k, decoupled=True)
