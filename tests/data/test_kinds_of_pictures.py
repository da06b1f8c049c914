"""The dtypes and ranges of images that are measured and translated, and those that are refused."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fastnce import DerainingMetrics
from fastnce.data import load_image
from fastnce.evaluate import luma, psnr, ssim
from fastnce.evaluate.quality import to_levels
from fastnce.evaluate.report import evaluate
from fastnce.networks import ResnetGenerator, Restorer, StyleGAN2Generator
from fastnce.networks.published import save_published
from fastnce.translate.files import translate_files
from fastnce.translate.load import load_translator
from fastnce.translate.translator import Translator

REFUSED = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint32, torch.bool, torch.complex64]


def levels(seed: int, peak: int = 255) -> np.ndarray:
    """Random (height, width, 3) from 0 to the peak."""
    return np.random.default_rng(seed).integers(0, peak + 1, (16, 20, 3))


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)[None]


# ---- measured ----


def test_sixteen_bits_are_measured_at_the_eight_of_a_file():
    a, b = levels(0, 65535), levels(1, 65535)
    eight = [np.floor(x * 255 / 65535 + 0.5) for x in (a, b)]
    wanted = 10 * math.log10(255**2 / np.mean((eight[0] - eight[1]) ** 2))
    (row,) = DerainingMetrics().update(tensor(a.astype(np.uint16)), tensor(b.astype(np.uint16)))
    assert row["psnr_rgb"] == pytest.approx(wanted, abs=1e-9)
    assert row["psnr_rgb"] == pytest.approx(
        peak_signal_noise_ratio(eight[1].astype(np.uint8), eight[0].astype(np.uint8)), abs=1e-9
    )
    floats = DerainingMetrics().update(tensor(a / 32767.5 - 1), tensor(b / 32767.5 - 1))
    assert floats == [row]


@pytest.mark.parametrize("dtype", REFUSED)
def test_dtypes_without_a_known_range_are_refused(dtype):
    a = tensor(levels(0)).to(torch.uint8)
    metrics = DerainingMetrics()
    for pair in ((a.to(dtype), a), (a, a.to(dtype))):
        with pytest.raises(ValueError, match=rf"must be floats from -1 to 1, uint8 or uint16, not {dtype}"):
            metrics.update(*pair)
    assert metrics.pictures == []


def test_every_float_is_measured_alike():
    a, b = levels(0), levels(1)
    wanted = 10 * math.log10(255**2 / np.mean((a - b) ** 2.0))
    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 1e-9), (torch.float16, 1e-9), (torch.bfloat16, 0.05)):
        x, y = (tensor(picture / 127.5 - 1).to(dtype) for picture in (a, b))
        assert DerainingMetrics().update(x, y)[0]["psnr_rgb"] == pytest.approx(wanted, abs=most)


def test_floats_in_another_range_are_refused():
    a = tensor(levels(0)).float()
    for picture in (a, a / 255 * 65535, a - 100, a + math.inf):
        with pytest.raises(ValueError, match=r"float pictures must lie in \[-1, 1\]; these reach from"):
            DerainingMetrics().update(picture, a / 127.5 - 1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; these reach from -1 to"):
        DerainingMetrics(value_range=(0, 1)).update(a / 255, a / 127.5 - 1)
    DerainingMetrics(value_range=(0, 255)).update(a, a + 1)
    with pytest.raises(ValueError, match="must be tensors, not ndarray"):
        DerainingMetrics().update(a.numpy(), a.numpy())
    assert math.isnan(DerainingMetrics().update(a / 127.5 - 1, a * math.nan)[0]["psnr_rgb"])  # NaN shows in the result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float16, torch.float32, torch.float64])
def test_levels_in_every_dtype(dtype):
    """`psnr`, `ssim` and `luma` take only 0 to 255, in any dtype that holds these values."""
    a, b = levels(0), levels(1)
    x, y = tensor(a).to(dtype), tensor(b).to(dtype)
    assert psnr(x, y).item() == pytest.approx(10 * math.log10(255**2 / np.mean((a - b) ** 2.0)), rel=1e-5)
    _, full = structural_similarity(
        *(p[:, :, 0].astype(float) for p in (a, b)), data_range=255, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    assert ssim(x, y)[0, 0].item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-4)
    grey = 16 + (a * [65.481, 128.553, 24.966]).sum(axis=2) / 255
    np.testing.assert_allclose(luma(x)[0, 0].numpy(), grey, rtol=1e-5)


def test_other_values_than_levels_are_refused():
    a = tensor(levels(0)).double()
    for function in (psnr, ssim):
        with pytest.raises(ValueError, match="levels must be from 0 to 255, but their minimum is -1"):
            function(a, a / 127.5 - 1)
        with pytest.raises(ValueError, match="must have the same shape"):
            function(a, a[:, :1])
        with pytest.raises(ValueError, match=r"levels must be numbers from 0 to 255, not torch\.bool"):
            function(a > 0, a > 1)


def test_levels_of_sixteen_bits_one_by_one():
    every = torch.arange(65536).to(torch.uint16).reshape(1, 1, 256, 256)
    wanted = [math.floor(value * 255 / 65535 + 0.5) for value in range(65536)]
    assert to_levels(every).flatten().tolist() == wanted


# ---- translated ----


def small() -> Translator:
    return Translator(ResnetGenerator(width=2, blocks=1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, *REFUSED])
def test_only_floats_are_translated(dtype):
    with pytest.raises(ValueError, match=rf"must be \(images, 3, height, width\), floats in \[-1, 1\], not {dtype}: "):
        small()(torch.ones(1, 3, 8, 8).to(dtype))


def test_only_tensors_are_translated(tmp_path):
    for picture, kind in (
        (Image.new("RGB", (8, 8)), "Image"),
        (np.zeros((8, 8, 3), np.uint8), "ndarray"),
        ([1], "list"),
    ):
        with pytest.raises(ValueError, match=rf"not {kind}: use fastnce\.data\.load_image\(path\)\[None\]"):
            small()(picture)
    for shape in ((3, 8, 8), (1, 1, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"pictures must be \(images, 3, height, width\), not \("):
            small()(torch.zeros(shape))
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    assert small()(load_image(tmp_path / "a.png")[None]).shape == (1, 3, 8, 9)  # as the message suggests


def test_floats_of_another_range_are_not_translated():
    for high in (255.0, 65535.0, math.inf):
        with pytest.raises(ValueError, match=r"float pictures must lie in \[-1, 1\]; these reach from 0 to"):
            small()(torch.linspace(0, 1, 192).mul(1e9).clamp(max=high).reshape(1, 3, 8, 8))


@torch.no_grad()
def test_every_float_is_translated():
    """The network's dtype determines the precision."""
    translator = small()
    x = torch.rand(1, 3, 12, 8, dtype=torch.float64) * 2 - 1
    wanted = translator.generator(x.float())
    assert torch.equal(translator(x), wanted)
    half = translator(x.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, translator.generator(x.bfloat16().float()))
    double = Translator(ResnetGenerator(width=2, blocks=1).double())
    assert torch.equal(double(x.float()), double.generator(x.float().double()).float())


@torch.no_grad()
@pytest.mark.parametrize("network", [Restorer(width=2, middle=1), StyleGAN2Generator(3, 3, 1)], ids=["r", "s"])
def test_outputs_are_clipped_as_in_a_file(network):
    """Generators without tanh: validation in training, `fastnce evaluate` and written files agree."""
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter))
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    whole = network.eval()(x)
    assert whole.abs().max() > 1.5
    assert torch.equal(Translator(network)(x), torch.clip(whole, -1, 1))


def test_an_output_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    translator, factors = small(), iter([math.nan, 1.0])
    whole = Translator._whole
    monkeypatch.setattr(Translator, "_whole", lambda self, x: whole(self, x) * next(factors))
    with pytest.raises(ValueError, match=r"a\.png: the generator's output is not finite"):
        translate_files(translator, tmp_path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]


def test_paths_may_be_text(tmp_path):
    (tmp_path / "in" / "rain").mkdir(parents=True)
    (tmp_path / "in" / "norain").mkdir()
    for seed, name in enumerate(("rain", "norain")):
        Image.fromarray(levels(seed).astype(np.uint8)).save(tmp_path / "in" / name / "a.png")
    (path,) = save_published({"G": ResnetGenerator(width=2, blocks=1)}, str(tmp_path / "published"))
    text = [os.fspath(tmp_path / name) for name in ("in/rain", "out", "in", "m.json", "m.csv", "m.png")]
    translator = load_translator(os.fspath(path))
    assert translate_files(translator, text[0], text[1]) == [tmp_path / "out" / "a.png"]
    evaluate(text[2], translator, json_file=text[3], csv_file=text[4], sheet=text[5])
    assert json.loads((tmp_path / "m.json").read_text())["data"] == text[2]


def test_a_nan_does_not_hide_a_wrong_range():
    pictures = torch.full((1, 3, 16, 16), 200.0)
    pictures[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="these reach from 200 to 200"):
        DerainingMetrics().update(pictures, pictures)


def test_levels_of_16_bits_and_wrong_arguments():
    deep = torch.tensor([0, 1000], dtype=torch.int32).to(torch.uint16).reshape(1, 1, 1, 2)
    other = torch.zeros(1, 1, 1, 2)
    assert psnr(deep, other).item() == pytest.approx(10 * math.log10(255**2 / (1000**2 / 2)))
    for wrong in ([1], torch.zeros(3, 16, 16)):
        for measure in (lambda x: psnr(x, x), lambda x: ssim(x, x), luma):
            with pytest.raises(ValueError, match="levels must be a tensor"):
                measure(wrong)
    with pytest.raises(ValueError, match="luma needs 3 channels, not 1"):
        luma(torch.zeros(1, 1, 16, 16))
