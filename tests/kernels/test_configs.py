"""The table of tiles: written-out cases, full coverage of kernels and architectures, unlisted architectures."""

from __future__ import annotations

import inspect
import itertools
import re
import typing
import warnings
from pathlib import Path

import pytest
import torch
from fastnce.kernels import common, configs, lookup
from fastnce.kernels.configs import Tile

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

NCE = {
    ("sm_90", BF16, 256, 2560, "unit"): Tile(32, 64, 4, 3),
    ("sm_90", BF16, 256, 2560, "checked", False, True): Tile(16, 64, 8, 2),
    ("sm_90", BF16, 256, 8192, "checked", False, True): Tile(128, 64, 8, 3),
    ("sm_90", F16, 256, 8192, "online, extra"): Tile(128, 32, 8, 3),
    ("sm_90", F32, 256, 2560, "unit", True): Tile(32, 64, 8, 2),
    ("sm_80", BF16, 256, 8191, "online"): Tile(32, 64, 8, 2),
    ("sm_100", F32, 512, 100, "any", True): Tile(16, 16, 8, 1),
    ("sm_120", BF16, 256, 8192, "any"): Tile(32, 32, 4, 2),
    ("sm_86", F32, 128, 256, "any"): Tile(16, 16, 8, 1),
    ("gfx942", BF16, 256, 8192, "unit"): Tile(32, 32, 4, 1),
    ("gfx942", F32, 128, 256, "unit"): Tile(16, 16, 4, 1),
    ("interpreter", F32, 256, 256, "any"): Tile(128, 128, 4, 1),
}
OTHERS = {
    ("project_tile", "sm_90", BF16, 256, 2560): Tile(32, 64, 8, 1),
    ("project_tile", "sm_120", F32, 256, 2560): Tile(16, 16, 16, 1),
    ("project_tile", "gfx942", F32, 64, 8192, True): Tile(16, 16, 4, 1),
    ("merge_tile", "sm_90", F32, 512): Tile(16, 16, 4, 1),
    ("weight_gradient_tile", "sm_89", F32, True): Tile(32, 64, 4, 2),
    ("layer_tile", "sm_90", 256, True, 3): Tile(64, 32, 4, 1),
    ("layer_tile", "sm_80", 24, True): Tile(32, 32, 4, 1),
    ("layer_tile", "sm_80", 3, False, 16): Tile(64, 4, 4, 1),
    ("layer_tile", "interpreter", 2, True): Tile(4096, 2, 4, 1),
    ("layer_splits", "sm_90", 8, 1000): 64,
    ("few_outputs_tile", "sm_89", F16, "weight"): Tile(64, 64, 4, 2),
    ("few_outputs_tile", "sm_120", F32, "forward", True): Tile(128, 1, 8, 3),
    ("few_outputs_pack_tile", "gfx942"): Tile(256, 1, 4, 1),
    ("rows_tile", "sm_90", 512): Tile(8, 512, 4, 1),
}


def test_cases_written_out():
    for case, tile in NCE.items():
        assert configs.nce_tile(*case) == tile, case
    for (name, *case), tile in OTHERS.items():
        assert getattr(configs, name)(*case) == tile, (name, *case)


DOMAIN = {
    "arch": (*configs.ARCHITECTURES, "interpreter"),
    "dtype": ("bfloat16", "float16", "float32", "tf32"),
    "width": (64, 128, 256, 512, 1024),
    "many_rows": (False, True),
    "form": typing.get_args(lookup.Form),
    "ragged": (False, True),
    "channels_last": (False, True),
    "wide_loads": (False, True),
    "reads": (1, 2, 3, 4, 9, 16),
}


def test_every_kernel_has_a_row_on_every_architecture_and_every_row_is_used():
    assert set(DOMAIN) == set(lookup.Row._fields[2:])
    assert {row.kernel for row in configs.TABLE} == set(typing.get_args(lookup.Kernel))
    for kernel in typing.get_args(lookup.Kernel):
        rows = [row for row in configs.TABLE if row.kernel == kernel]
        conditions = [name for name in DOMAIN if any(getattr(row, name) is not None for row in rows)]
        used = set()
        for values in itertools.product(*(DOMAIN[name] for name in conditions)):
            case = dict.fromkeys(DOMAIN) | dict(zip(conditions, values, strict=True))
            fitting = [row for row in rows if row.fits(kernel, case)]
            assert fitting, (kernel, case)
            used.add(fitting[0])
        assert not set(rows) - used, f"rows that an earlier one hides: {set(rows) - used}"


@pytest.mark.parametrize(
    ("arch", "used"),
    [
        ("sm_110", "sm_100"),
        ("sm_88", "sm_86"),
        ("sm_75", "sm_80"),
        ("sm_130", "sm_120"),
        ("gfx950", "gfx942"),
        ("gfx90a", "gfx942"),
        ("xpu", "sm_80"),
    ],
)
def test_an_architecture_that_is_not_listed_warns_once(arch, used):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, *case in (("nce_tile", BF16, 256, 2560, "unit"), ("weight_gradient_tile", F32, True)):
            assert getattr(configs, name)(arch, *case) == getattr(configs, name)(used, *case)
        configs.layer_tile(arch, 256, True)
    sentence = f"no tiles are tuned for {arch}: those of {used} are used, see kernels/configs.py"
    assert [str(w.message) for w in caught] == [sentence]


@pytest.mark.parametrize(("arch", "used"), configs.RELATIVES.items())
def test_a_relative_shares_the_tiles_in_silence(arch, used, recwarn):
    assert configs.nce_tile(arch, BF16, 256, 2560, "unit") == configs.nce_tile(used, BF16, 256, 2560, "unit")
    assert not recwarn


def test_one_row_tunes_a_kernel_for_a_new_gpu(monkeypatch, recwarn):
    row = lookup.Row("nce", Tile(48, 48, 4, 2), arch="sm_101", width=256)
    monkeypatch.setattr(configs, "TABLE", (row, *configs.TABLE))
    assert configs.nce_tile("sm_101", BF16, 256, 2560, "unit") == row.tile
    assert configs.nce_tile("sm_101", BF16, 128, 9999, "unit") == configs.nce_tile("sm_100", BF16, 128, 9999, "unit")
    assert not recwarn


def test_the_name_of_a_cuda_device_is_its_compute_capability(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (11, 0))
    assert common._architecture.__wrapped__("cuda", 0) == "sm_110"


def test_launchers_write_no_tile_constants():
    folder = Path(inspect.getsourcefile(configs)).parent
    for path in folder.glob("*.py"):
        found = re.findall(r"\b(?:num_warps|num_stages|BLOCK|B[A-Z])=\d+", path.read_text())
        assert not found, (path.name, found)
