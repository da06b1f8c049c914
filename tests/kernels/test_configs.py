"""The table of tiles: written-out cases, full coverage of kernels and architectures, unlisted architectures.

Rows for architectures outside `ARCHITECTURES` may be added to the table: every test here must pass with them.
"""

from __future__ import annotations

import inspect
import itertools
import re
import runpy
import typing
import warnings
from pathlib import Path

import pytest
import torch
from fastnce.kernels import chosen, common, configs, lookup
from fastnce.kernels.chosen import layer_tile, nce_tile
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
    ("project_tile", "sm_90", BF16, 256, 2560): Tile(64, 64, 8, 2),
    ("project_tile", "sm_90", BF16, 256, 2560, False, BF16): Tile(64, 64, 8, 2),
    ("project_tile", "sm_90", BF16, 256, 2560, False, F32): Tile(32, 64, 8, 1),
    ("project_tile", "sm_90", F32, 256, 2560, True, F32): Tile(16, 32, 8, 1),
    ("project_tile", "sm_100", F16, 256, 8192, False, F16): Tile(128, 64, 8, 2),
    ("project_tile", "sm_120", F32, 256, 2560): Tile(16, 16, 16, 1),
    ("project_tile", "gfx942", F32, 64, 8192, True): Tile(16, 16, 4, 1),
    ("merge_tile", "sm_90", F32, 512): Tile(16, 16, 4, 1),
    ("weight_gradient_tile", "sm_89", F32, 2560, True): Tile(32, 64, 4, 2),
    ("weight_gradient_tile", "sm_90", BF16, 2560): Tile(64, 64, 4, 3),
    ("weight_gradient_tile", "sm_90", BF16, 8192): Tile(128, 128, 8, 3),
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
        assert nce_tile(*case) == tile, case
    for (name, *case), tile in OTHERS.items():
        assert getattr(chosen, name)(*case) == tile, (name, *case)


KERNELS = typing.get_args(lookup.Kernel)
LISTED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""Architectures whose tiles others share in these tests, even if more are listed."""
DOMAIN = {
    "arch": (*configs.ARCHITECTURES, "interpreter"),
    "dtype": ("bfloat16", "float16", "float32", "tf32", "mixed"),
    "width": (64, 128, 256, 512, 1024),
    "many_rows": (False, True),
    "form": typing.get_args(lookup.Form),
    "ragged": (False, True),
    "channels_last": (False, True),
    "wide_loads": (False, True),
    "reads": (1, 2, 3, 4, 9, 16),
}
NEW_ROWS = {
    "sm_110": (lookup.Row("nce", Tile(48, 48, 4, 2), arch="sm_110", width=256), "sm_100"),
    "sm_110, one dtype": (
        lookup.Row("nce", Tile(48, 48, 4, 2), arch="sm_110", dtype="tf32", width=32, many_rows=True, form="any"),
        "sm_100",
    ),
    "sm_88, a layer": (lookup.Row("layer", Tile(48, 48, 4, 1), arch="sm_88", wide_loads=True, reads=(1, 5)), "sm_86"),
    "gfx1200": (lookup.Row("nce", Tile(48, 48, 4, 1), arch="gfx1200", width=range(200, 300), ragged=True), "gfx942"),
    "gfx950, a kernel of one row": (lookup.Row("draw", Tile(48, 1, 4, 1), arch="gfx950"), "gfx942"),
    "no GPU of a known family": (lookup.Row("merge", Tile(48, 48, 4, 1), arch="xpu", dtype="float32"), "sm_80"),
}
"""Rows for architectures that are not listed, with the architecture whose tiles each shares."""


def clear_caches():
    for function in [*vars(configs).values(), *vars(chosen).values()]:
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def listed(monkeypatch):
    """Rows for LISTED alone are in the table while the test runs."""
    known = (*LISTED, "interpreter")
    rows = []
    for row in configs.TABLE:
        archs = [arch for arch in known if row.names(arch)]
        if row.arch is None or archs:
            rows.append(row._replace(arch=tuple(archs) or None))
    monkeypatch.setattr(configs, "ARCHITECTURES", LISTED)
    monkeypatch.setattr(configs, "TABLE", tuple(rows))
    clear_caches()
    yield
    clear_caches()


def named_values(rows, condition):
    """The values that the rows name: each of a tuple, none of a range."""
    for row in rows:
        wanted = getattr(row, condition)
        if wanted is not None and not isinstance(wanted, range):
            yield from wanted if isinstance(wanted, tuple) else (wanted,)


def cases_of(rows):
    """Every combination of the values of those conditions that one of the rows has; None for the others."""
    conditions = [name for name in DOMAIN if any(getattr(row, name) is not None for row in rows)]
    values = [dict.fromkeys((*DOMAIN[name], *named_values(rows, name))) for name in conditions]
    for case in itertools.product(*values):
        yield dict.fromkeys(DOMAIN) | dict(zip(conditions, case, strict=True))


def assert_every_row_is_used(kernel):
    rows = [row for row in configs.TABLE if row.kernel == kernel]
    used = set()
    for case in cases_of(rows):
        arch = case.pop("arch") or "interpreter"
        row = lookup.first_row(rows, kernel, arch, configs.tuned_architecture(arch), case)
        assert row, (kernel, arch, case)
        used.add(row)
    assert not set(rows) - used, f"rows that an earlier one hides: {set(rows) - used}"


@pytest.mark.filterwarnings("ignore:only some tiles are tuned")
def test_every_kernel_has_a_row_on_every_architecture_and_every_row_is_used():
    assert set(DOMAIN) == set(lookup.Row._fields[2:])
    assert {row.kernel for row in configs.TABLE} == set(KERNELS)
    assert set(configs.ARCHITECTURES) <= set(configs.SHARED_MEMORY)
    for kernel in KERNELS:
        assert_every_row_is_used(kernel)


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
def test_an_architecture_that_is_not_listed_warns_once(arch, used, listed):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, *case in (("nce_tile", BF16, 256, 2560, "unit"), ("weight_gradient_tile", F32, 256, True)):
            assert getattr(chosen, name)(arch, *case) == getattr(chosen, name)(used, *case)
        layer_tile(arch, 256, True)
    sentence = f"no tiles are tuned for {arch}: those of {used} are used, see kernels/configs.py"
    assert [str(w.message) for w in caught] == [sentence]


@pytest.mark.parametrize(("arch", "used"), configs.RELATIVES.items())
def test_a_relative_shares_the_tiles_in_silence(arch, used, listed, recwarn):
    assert nce_tile(arch, BF16, 256, 2560, "unit") == nce_tile(used, BF16, 256, 2560, "unit")
    assert not recwarn


def test_a_row_for_a_relative_takes_effect_in_silence(listed, monkeypatch, recwarn):
    row = lookup.Row("nce", Tile(48, 48, 4, 2), arch="sm_103", width=256)
    monkeypatch.setattr(configs, "TABLE", (*configs.TABLE, row))
    assert nce_tile("sm_103", BF16, 256, 2560, "unit") == row.tile
    assert nce_tile("sm_100", BF16, 256, 2560, "unit") != row.tile
    assert nce_tile("sm_103", BF16, 128, 9999, "unit") == nce_tile("sm_100", BF16, 128, 9999, "unit")
    assert not recwarn


@pytest.mark.parametrize(("row", "used"), NEW_ROWS.values(), ids=NEW_ROWS)
def test_one_row_changes_its_cases_alone(row, used, listed, monkeypatch):
    table = configs.TABLE
    expected = {}
    for kernel in KERNELS:
        rows = [each._replace(arch=None) for each in (row, *table) if each.kernel == kernel]
        for case, arch in itertools.product(cases_of(rows), (row.arch, used)):
            conditions = {name: value for name, value in case.items() if value is not None}
            fits = row.fits(kernel, case | {"arch": arch})
            shared = configs.find_tile(kernel, used, **conditions)
            expected[kernel, arch, tuple(conditions.items())] = row.tile if fits else shared
    assert row.tile in expected.values()
    for changed in ((row, *table), (*table, row)):
        monkeypatch.setattr(configs, "TABLE", changed)
        clear_caches()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for (kernel, arch, conditions), tile in expected.items():
                assert configs.find_tile(kernel, arch, **dict(conditions)) == tile, (kernel, arch, conditions)
        sentence = f"only some tiles are tuned for {row.arch}: the others are those of {used}, see kernels/configs.py"
        assert [str(w.message) for w in caught] == [sentence]
        assert_every_row_is_used(row.kernel)


def test_shared_memory_alone_changes_no_tile(tmp_path):
    """`SHARED_MEMORY` selects what `benchmarks/aot.py` compiles. A small new entry must not select other rows."""
    text = Path(inspect.getsourcefile(configs)).read_text()
    changed = tmp_path / "configs.py"
    changed.write_text(text.replace("SHARED_MEMORY = {", 'SHARED_MEMORY = {"sm_119": 99 * 1024,'))
    names = runpy.run_path(str(changed), run_name="fastnce.kernels.configs")
    assert "sm_119" in names["SHARED_MEMORY"]
    assert (names["ARCHITECTURES"], names["TABLE"]) == (configs.ARCHITECTURES, configs.TABLE)


def test_the_name_of_a_cuda_device_is_its_compute_capability(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (11, 0))
    assert common._architecture.__wrapped__("cuda", 0) == "sm_110"


def test_launchers_write_no_tile_constants():
    folder = Path(inspect.getsourcefile(configs)).parent
    for path in folder.glob("*.py"):
        found = re.findall(r"\b(?:num_warps|num_stages|BLOCK|B[A-Z])=\d+", path.read_text())
        assert not found, (path.name, found)
