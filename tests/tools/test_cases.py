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
    of_presets = {case.name for case in cases.CASES if case.preset in PRESETS}
    assert len(of_presets) == (len(PRESETS) * 3 - len(cases.LEFT_OUT)) * 3


def test_variants_change_options_of_presets():
    assert not set(cases.VARIANTS) & set(cases.SIZES)
    for name, variant in cases.VARIANTS.items():
        plain = cases.Variant(variant.preset, cases.SIZES[variant.preset])
        assert variant != plain, name
        expected = {*(f"{name}/{precision}/eager" for precision in PRECISIONS), f"{name}/bf16/parts"}
        if name.endswith("+published"):
            expected = {f"{name}/bf16/eager"}
        assert {case.name for case in cases.CASES if case.preset == name} == expected
        assert cases.find(f"{name}/bf16/eager").variant == variant
    assert cases.find("cut/bf16/parts").variant == cases.Variant("cut", cases.SIZES["cut"])


def test_every_preset_is_in_the_matrix_at_its_published_size():
    for name, size in cases.PUBLISHED.items():
        assert cases.find(f"{name}+published/bf16/eager").variant == cases.Variant(name, size)
        assert size.network == {}


def test_sizes_name_options_of_the_networks():
    for preset, size in cases.SIZES.items():
        NetworkOptions(**{**PRESETS[preset].sections.get("network", {}), **size.network})


@pytest.mark.parametrize("name", [name for name in [*cases.SIZES, *cases.VARIANTS] if "+published" not in name])
def test_every_preset_and_variant_can_be_built_at_its_size(name):
    variant = cases.Case(name, "fp32", "eager").variant
    step = build(variant.preset, variant.size.network, torch.device("cpu"), "fp32", {}, variant.options, variant.optim)
    trained = sum(p.numel() for group in step.groups.values() for p in group.parameters)
    assert trained < 3e6
    for key, value in variant.options.items():
        assert getattr(step.method.options, key) == value
    for key, value in variant.optim.items():
        assert getattr(step.options, key) == value


def test_selection_by_parts_and_wildcards():
    names = [case.name for case in cases.select(["cut", "dcd*/bf16/whole"])]
    assert {name.split("/")[0] for name in names} == {"cut", "dcdgan", "dcdgan-released"}
    assert [name for name in names if name.startswith("dcdgan/")] == ["dcdgan/bf16/whole"]
    assert sum(name.startswith("cut/") for name in names) == 9
    assert cases.select([]) == cases.CASES
    assert len(cases.select(["fp16", "fp32"])) == len(cases.CASES) - len(cases.select(["bf16"]))
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
