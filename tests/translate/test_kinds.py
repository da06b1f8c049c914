"""PIL images, arrays and tensors: the same kind out, and the numbers of `fastnce translate`."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.data import load_image
from fastnce.networks import ResnetGenerator, init_weights
from fastnce.translate.files import translate_files
from fastnce.translate.translator import Translator


def model(channels: int = 3, out: int = 3) -> Translator:
    torch.manual_seed(1)
    network = ResnetGenerator(channels, out, width=4, blocks=1)
    init_weights(network, "normal", 0.2)
    return Translator(network)


LEVELS = np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (21, 34), np.uint16)


def pictures() -> dict[str, Image.Image]:
    rgb = Image.fromarray(LEVELS)
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(LEVELS[:, :, 0]))
    return {
        "RGB": rgb,
        "L": rgb.convert("L"),
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "P": rgb.quantize(16),
        "1": rgb.convert("1"),
        "I;16": Image.fromarray(DEEP),
    }


@pytest.mark.parametrize(("channels", "out"), [(3, 3), (1, 1), (3, 1), (1, 3)])
@pytest.mark.parametrize("mode", pictures())
def test_pil_images_equal_translated_files(mode, channels, out, tmp_path):
    translator, picture = model(channels, out), pictures()[mode]
    picture.save(tmp_path / "a.png")
    (file,) = translate_files(translator, tmp_path / "a.png", tmp_path / "out")
    made, expected = translator.translate(picture), Image.open(file)
    assert isinstance(made, Image.Image)
    assert made.mode == expected.mode
    if mode == "I;16" and out == 3:  # the file has 8 bits of the result, rounded once
        assert np.abs(np.asarray(made).astype(int) - np.asarray(expected)).max() <= 1
    else:
        assert np.array_equal(np.asarray(made), np.asarray(expected))


def test_the_orientation_is_applied_and_the_picture_stays_as_it_was(tmp_path):
    picture = Image.fromarray(LEVELS)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    opened = Image.open(tmp_path / "a.jpg")
    before = opened.tobytes()
    made = model().translate(opened)
    assert made.size == (21, 34)
    assert opened.tobytes() == before
    assert opened.size == (34, 21)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, np.dtype(">u2")])
def test_arrays(dtype):
    translator = model()
    dtype = np.dtype(dtype)
    floats = LEVELS.astype(np.float64) / 127.5 - 1
    peak = {1: 255, 2: 65535}.get(dtype.itemsize)
    array = (LEVELS.astype(np.int64) * (peak // 255)).astype(dtype) if peak else floats.astype(dtype)
    made = translator.translate(array)
    expected = translator(torch.from_numpy(floats).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0).numpy()
    assert made.shape == array.shape
    assert made.dtype == dtype.newbyteorder("=")
    if peak:
        assert np.abs(made.astype(float) - (expected + 1) * peak / 2).max() <= 0.5 + peak * 2e-6
    else:
        assert np.abs(made - expected).max() < 1e-5
    batch = translator.translate(np.stack([array, array[::-1]]))
    np.testing.assert_allclose(batch[0].astype(float), made.astype(float), atol=1 if peak else 1e-5)  # rounding
    assert batch.shape == (2, *array.shape)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_floats_that_look_like_zero_to_one_get_a_warning(kind):
    axis = 2 if kind is np.asarray else 0
    unit = kind(np.ascontiguousarray(np.moveaxis(LEVELS.astype(np.float32) / 255, 2, axis)))
    with pytest.warns(UserWarning, match=r"values from 0 to 1 only, .* give 2 \* pictures - 1"):
        model().translate(unit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model().translate(2 * unit - 1)
        model().translate(unit * 0 - 1)


def test_grey_arrays():
    translator = model(1, 1)
    made = translator.translate(DEEP)
    assert made.shape == DEEP.shape
    assert made.dtype == np.uint16
    assert np.array_equal(translator.translate(DEEP[:, :, None])[:, :, 0], made)


def test_tensors():
    translator = model()
    floats = torch.from_numpy(LEVELS).permute(2, 0, 1).float().div(127.5).sub(1)
    made = translator.translate(floats)
    assert torch.equal(made, translator(floats[None])[0])
    assert translator.translate(floats[None].double()).dtype == torch.float64
    levels = translator.translate(torch.from_numpy(LEVELS).permute(2, 0, 1))
    assert torch.equal(levels, made.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8))
    grad = translator.translate(floats.clone().requires_grad_())
    assert not grad.requires_grad


def test_the_file_of_load_image_and_the_array_agree(tmp_path):
    Image.fromarray(LEVELS).save(tmp_path / "a.png")
    translator = model()
    made = translator.translate(LEVELS)
    expected = translator(load_image(tmp_path / "a.png")[None])[0].add(1).mul(127.5).round().to(torch.uint8)
    assert np.array_equal(made, expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        ("a.png", "a picture must be a PIL image, a NumPy array or a tensor, not 'a.png'"),
        (LEVELS.astype(np.int64), "must be uint8, uint16 or floats in [-1, 1], not torch.int64"),
        (LEVELS.astype(object), "an array must be uint8, uint16 or floats in [-1, 1], not object"),
        (LEVELS[:, :, 0], "an array of shape (21, 34) has one channel, and this model takes 3"),
        (LEVELS.transpose(2, 0, 1), "an array must be (height, width, 3) or (images, height, width, 3)"),
        (LEVELS[:0], "an array must be (height, width, 3)"),
        (LEVELS.astype(np.float32), "in [-1, 1]"),
        (torch.from_numpy(LEVELS), "a tensor must be (3, height, width)"),
        (np.full((8, 8, 3), np.nan, np.float32), "these hold NaN or infinity"),
        (torch.empty(3, 8, 8, device="meta"), "not sparse or on the meta device"),
        (torch.zeros(3, 8, 8).to_sparse(), "not sparse or on the meta device"),
        (Image.fromarray(DEEP.astype(np.float32)), "a PIL image of floats has no known range"),
        (Image.fromarray(DEEP.astype(np.int32) * 3), "must have values from 0 to 65535"),
    ],
)
def test_what_does_not_fit_is_refused(picture, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        model().translate(picture)
    assert sentence in str(caught.value)
