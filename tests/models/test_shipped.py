"""The trained models that come with the package: their files, and what they do."""

from __future__ import annotations

import pytest
import torch
from skimage.data import astronaut

import fastnce
from fastnce.data.folder import as_tensor
from fastnce.data.rain import RainOptions, render_rain
from fastnce.export.card import UNKNOWN, is_untouched
from fastnce.models import folder, names
from fastnce.translate.exported import ABOUT, about, read_details

MOST = 4_000_000
"""Bytes of a model's weights."""

each_model = pytest.mark.parametrize("name", names())


def test_the_models_that_come_with_the_package():
    assert names() == fastnce.models.names() == ["derain"]
    with pytest.raises(ValueError, match="^no model 'derian' comes with fastnce: it has derain$"):
        folder("derian")


@each_model
def test_a_model_is_an_export_with_its_licence(name):
    assert sorted(path.name for path in folder(name).iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (folder(name) / "model.safetensors").stat().st_size <= MOST
    details = read_details(folder(name))
    said = about(details)
    assert set(said) == set(ABOUT)
    assert details["input"]["channels"] == details["output"]["channels"] == 3
    card = (folder(name) / "README.md").read_text(encoding="utf-8")
    assert f"\nlicense: {said['license']}\n" in card
    assert UNKNOWN not in card
    assert not is_untouched(card)
    assert {"## Use", "## Training pictures", "## Figures", "## Licence"} <= set(card.splitlines())


@each_model
def test_no_placeholder_is_left(name):
    for file in ("config.json", "README.md"):
        assert "PLACEHOLDER" not in (folder(name) / file).read_text(encoding="utf-8"), file


@pytest.fixture(scope="module")
def derain():
    return fastnce.load("derain", device="cpu")


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    """(1, 3, 192, 192) in [-1, 1]: the face of the astronaut, without rain."""
    return as_tensor(astronaut()[:192, 120:312])[None]


def measured(result: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """PSNR and SSIM on Y."""
    row = fastnce.DerainingMetrics().update(result, truth)[0]
    return row["psnr_y"], row["ssim_y"]


def test_rain_is_removed(derain, photograph):
    rainy = render_rain(photograph, RainOptions(), torch.Generator().manual_seed(0))
    before, after = measured(rainy, photograph), measured(derain(rainy), photograph)
    assert after[0] >= before[0] + 1.5
    assert after[1] > before[1]


def test_a_picture_without_rain_is_kept(derain, photograph):
    result = derain(photograph)
    assert measured(result, photograph)[0] >= 35
    assert torch.isfinite(result).all()
