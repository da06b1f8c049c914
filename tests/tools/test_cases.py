"""The cases of the matrix, and their selection."""

from __future__ import annotations

import pytest
import torch

from benchmarks.step import build
from fastnce.engine.choices import PRECISIONS
from fastnce.methods import NetworkOptions
from fastnce.methods.presets import PRESETS
from tools.standin import cases
from tools.standin.__main__ import main


def test_every_preset_is_in_the_matrix_in_every_precision_and_form():
    assert set(cases.SIZES) == set(PRESETS)
    assert set(cases.PRECISIONS) == set(PRECISIONS)
    assert set(cases.FORMS.values()) == {False, True, "whole"}
    assert set(cases.LEFT_OUT) < {(preset, form) for preset in PRESETS for form in cases.FORMS}
    assert not any(form == "eager" for _, form in cases.LEFT_OUT)
    assert len({case.name for case in cases.CASES}) == (len(PRESETS) * 3 - len(cases.LEFT_OUT)) * 3


def test_sizes_name_options_of_the_networks():
    for preset, size in cases.SIZES.items():
        NetworkOptions(**{**PRESETS[preset].sections.get("network", {}), **size.network})


@pytest.mark.parametrize("preset", cases.SIZES)
def test_every_preset_can_be_built_at_its_size(preset):
    step = build(preset, cases.SIZES[preset].network, torch.device("cpu"), "fp32", {}, {})
    weights = sum(p.numel() for p in step.method.parameters())
    assert weights < 3e6


def test_selection_by_parts_and_wildcards():
    names = [case.name for case in cases.select(["cut", "dcd*/bf16/whole"])]
    assert {name.split("/")[0] for name in names} == {"cut", "dcdgan", "dcdgan-released"}
    assert [name for name in names if name.startswith("dcdgan/")] == ["dcdgan/bf16/whole"]
    assert sum(name.startswith("cut/") for name in names) == 9
    assert cases.select([]) == cases.CASES
    assert len(cases.select(["fp16"])) == len(cases.CASES) // 3
    with pytest.raises(ValueError, match="--only fp8 matches no case"):
        cases.select(["cut", "fp8"])


def test_a_case_is_found_by_its_name():
    assert cases.find("cut/bf16/parts") == cases.Case("cut", "bf16", "parts")
    with pytest.raises(ValueError, match="unknown case 'cut/bf16'"):
        cases.find("cut/bf16")


def test_the_list_needs_no_installation(capsys):
    assert main(["--list", "--only", "cut/fp32/*"]) == 0
    assert capsys.readouterr().out.split() == ["cut/fp32/eager", "cut/fp32/parts", "cut/fp32/whole"]
    assert main(["--list", "--only", "nothing"]) == 2
    assert "matches no case" in capsys.readouterr().err
