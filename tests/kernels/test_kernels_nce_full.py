"""Full blocks of keys are loaded without masks: same results, and only if every block is full."""

from __future__ import annotations

import pytest
import torch
from fastnce.kernels import nce

from tests.kernels.test_kernels_nce import check, options_of
from tests.oracle import confident_pair, unit_rows

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("unit", [True, False])
def test_full_blocks_with_further_keys(dtype, unit):
    q, k = unit_rows(2, 256, 64, dtype=dtype), unit_rows(2, 256, 64, dtype=dtype)
    check(q, k, unit=unit, extra=unit_rows(1, 128, 64, dtype=dtype))


@pytest.mark.parametrize("p", [0.5, 0.999])
def test_full_blocks_of_confident_rows(p):
    q, k, temperature = confident_pair(1, 256, 128, p, torch.bfloat16)
    check(q, k, temperature=temperature, unit=True)


def test_full_blocks_of_strided_rows():
    """Rows that are slices of wider rows, and groups in the other order."""
    wide = unit_rows(256, 3, 128, dtype=torch.bfloat16)
    rows = wide.transpose(0, 1)[1:]  # one row per 3 * 128 elements
    assert rows.stride() == (128, 384, 1)
    check(rows, unit_rows(2, 256, 128, dtype=torch.bfloat16))
    check(unit_rows(2, 256, 128, dtype=torch.bfloat16), rows)


def even(monkeypatch, *shape, extras=None, dtype=torch.bfloat16, weight=False, stride=None):
    rows = torch.empty(1, *shape, dtype=dtype, device="meta")
    keys = rows if stride is None else rows.as_strided(rows.shape, (1, stride, 1))
    extra = [] if extras is None else [torch.empty(1, extras, shape[1], dtype=dtype, device="meta")]
    weights = [torch.empty(1, shape[0], shape[0], device="meta")] if weight else []
    return options_of(monkeypatch, lambda: nce.nce_forward([rows], [keys], extra, weights, [], [0.07]))["EVEN"]


def test_no_masks_if_every_block_is_full(monkeypatch):
    assert even(monkeypatch, 16384, 256)
    assert even(monkeypatch, 256, 64, extras=512)
    assert not even(monkeypatch, 16383, 256)
    assert not even(monkeypatch, 256, 64, extras=500)
    assert not even(monkeypatch, 256, 100)  # the tile is 128 wide
    assert not even(monkeypatch, 256, 256, dtype=torch.float32)
    assert not even(monkeypatch, 256, 256, weight=True)
    assert even(monkeypatch, 256, 256, stride=nce.LARGEST_STRIDE - 8)
    assert not even(monkeypatch, 256, 256, stride=nce.LARGEST_STRIDE)
