"""Full blocks of keys are loaded without masks: same results, and only if every block is full."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fastnce.kernels import chosen, nce
from fastnce.kernels.lookup import Tile
from fastnce.kernels.planned import forget_plans

from tests.kernels.test_kernels_nce import check, launches_of, options_of
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


@pytest.fixture
def few_keys_are_peeled(monkeypatch):
    """Blocks of 64 rows against blocks of 32 keys, and no limit that spares few keys the second loop."""
    forget_plans()
    with monkeypatch.context() as patch:
        patch.setattr(nce, "PEELED_KEYS", 1)
        patch.setattr(chosen, "nce_tile", lambda *_, **__: Tile(64, 32, 4, 1))
        yield
    forget_plans()


@pytest.mark.parametrize("rows", [256, 224, 64, 32])  # the last block of rows is full, half full, and the only one
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_keys_of_other_rows_in_a_loop_of_their_own(rows, decoupled, few_keys_are_peeled, monkeypatch):
    q, k = (unit_rows(2, rows, 64, dtype=torch.bfloat16) for _ in range(2))
    with monkeypatch.context() as patch:
        assert options_of(patch, lambda: nce.nce_forward([q], [k], [], [], [], [0.07], unit=True))["PEELED"]
    forget_plans()  # of launches that were replaced
    check(q, k, unit=True, decoupled=decoupled)


@pytest.mark.parametrize("p", [1 / 160, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_confident_rows_whose_keys_come_last(p, few_keys_are_peeled):
    q, k, temperature = confident_pair(1, 160, 64, p, torch.bfloat16)
    check(q, k, temperature=temperature, unit=True)


def test_each_key_of_another_row_counts_once(few_keys_are_peeled):
    """With equal keys every logit is the same, so the sum of the negatives is the number of them."""
    rows = torch.zeros(2, 160, 64, dtype=torch.bfloat16)
    rows[..., 0] = 1
    _, negative, positive, _ = nce.nce_forward([rows], [rows], [], [], [], [0.5], unit=True)
    torch.testing.assert_close((negative - positive).exp(), torch.full((320,), 159.0), rtol=1e-5, atol=0)


def peeled(monkeypatch, *shape, arch="sm_90", problems=1, **options):
    rows = [torch.empty(*shape, dtype=torch.bfloat16, device="meta")] * problems
    temperatures = [0.07] * problems
    call = partial(nce.nce_forward, rows, rows, [], [], [], temperatures, **options)
    [launched] = launches_of(monkeypatch, call, arch).values()
    assert not launched["PEELED"] or launched["EVEN"]
    return launched["PEELED"]


def test_a_loop_of_their_own_only_where_it_pays(monkeypatch):
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"):
        assert peeled(monkeypatch, 1, 16384, 256, arch=arch, unit=True)
        assert peeled(monkeypatch, 1, 2048, 64, arch=arch, problems=5, unit=True, gradient=False)
        assert not peeled(monkeypatch, 16, 256, 256, arch=arch, unit=True)  # half of the keys would come last
        assert not peeled(monkeypatch, 1, 16384, 256, arch=arch)  # rows of any length
        assert not peeled(monkeypatch, 1, 16383, 256, arch=arch, unit=True)
        assert peeled(monkeypatch, 1, 2048, 256, arch=arch, problems=5, unit=True) == (arch != "sm_90")
    assert not peeled(monkeypatch, 1, 16384, 256, arch="gfx942", unit=True)


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
