"""A published CycleGAN generator with learned norms, translated here and by the network that it was published with.

The package is vintagify 0.1.2: `pip install --no-deps vintagify==0.1.2`, or set FASTNCE_VINTAGIFY to the folder of its
modules. Only its generator.py is imported. FASTNCE_SHARED is a folder with data/Rain100L. docs/proof.md states the
differences that `pytest -s` prints here.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastnce
from fastnce.commands.main import main
from fastnce.data import load_image
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import read_weights, save_published
from fastnce.translate.tiles import translate_exact
from fastnce.translate.translator import pad_to_multiple

DIFFERENCE = 1e-5
SIZES = [(256, 256), (321, 481), (133, 201), (70, 66), (512, 512)]
"""Height and width. A side that is no multiple of 4 is padded here. The package cuts every picture to 512x512."""


def folder() -> Path | None:
    if given := os.environ.get("FASTNCE_VINTAGIFY"):
        return Path(given)
    found = importlib.util.find_spec("vintagify")  # does not import it
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


PACKAGE = folder()
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="needs vintagify 0.1.2: install it, or set FASTNCE_VINTAGIFY to the folder of its modules"
)


@pytest.fixture(scope="module")
def file() -> Path:
    assert PACKAGE is not None
    return PACKAGE / "resources" / "G_A2B_epoch33.pth"


@pytest.fixture(scope="module")
def theirs(file) -> nn.Module:
    """The package's own network."""
    assert PACKAGE is not None
    spec = importlib.util.spec_from_file_location("vintagify_generator", PACKAGE / "generator.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.ResnetGenerator()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval()


@pytest.fixture(scope="module")
def ours(file):
    return fastnce.load(file)


@pytest.fixture(scope="module")
def photograph(shared):
    """A function from height and width to a part of a photograph, (1, 3, height, width)."""
    files = sorted((shared / "data" / "Rain100L" / "test" / "norain").iterdir())
    image = next(image for image in map(load_image, files) if image.shape[2] > image.shape[1])[None]

    def part(height: int, width: int) -> Tensor:
        scale = max(1.0, height / image.shape[2], width / image.shape[3])
        large = nn.functional.interpolate(image, scale_factor=scale, mode="bilinear", antialias=True)
        return large[:, :, :height, :width].contiguous()

    return part


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[1]}x{size[0]}")
def test_the_same_pictures(size, photograph, ours, theirs):
    x = photograph(*size)
    assert x.shape == (1, 3, *size)
    wanted = theirs(pad_to_multiple(x, 4))[:, :, : size[0], : size[1]]
    found = ours(x)
    assert wanted.std() > 0.1
    assert (wanted - x).abs().mean() > 0.01
    difference = (found - wanted).abs().max().item()
    print(f"{size[1]}x{size[0]}: largest difference {difference:.1e}")
    assert difference <= DIFFERENCE


@torch.no_grad()
def test_the_same_in_tiles(photograph, ours, theirs):
    x = photograph(192, 260)
    assert (translate_exact(ours.generator, x, 64, "cpu") - theirs(x)).abs().max() <= DIFFERENCE


@torch.no_grad()
def test_the_same_file_by_the_command(file, photograph, theirs, tmp_path):
    picture, out = tmp_path / "picture.png", tmp_path / "x.png"
    x = photograph(133, 201)
    Image.fromarray(((x[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).save(picture)
    assert main(["translate", str(file), str(picture), "--out", str(out), "--device", "cpu"]) == 0
    wanted = (theirs(pad_to_multiple(load_image(picture)[None], 4))[0, :, :133, :201] + 1) * 127.5
    found = np.asarray(Image.open(out)).astype(np.float32)
    assert np.abs(found - wanted.permute(1, 2, 0).numpy()).max() <= 0.5 + 127.5 * DIFFERENCE  # of a level: rounding


def test_gradients_are_the_same(photograph, ours, theirs):
    """To train on: the gradient of every weight that has one in both networks."""
    x = photograph(64, 64).double()
    results = []
    for network in (ours.generator.double(), theirs.double()):
        loss = network(x).square().mean()
        named = dict(network.named_parameters())
        slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        results.append({k.replace(".conv_block.", ".block."): t for k, t in zip(named, slopes, strict=True)})
    ours.generator.float(), theirs.float()
    found, wanted = results
    assert found.keys() == wanted.keys()
    cancelled = [key for key, slope in found.items() if slope is None]
    assert all(key.endswith(".bias") and wanted[key].abs().max() < 1e-12 for key in cancelled)
    for key in found.keys() - set(cancelled):
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-8, atol=1e-12, msg=key)


def test_the_file_written_again(file, ours, tmp_path):
    """Every tensor, under the published names."""
    assert isinstance(ours.generator, ResnetGenerator)
    (path,) = save_published({"G": ours.generator}, tmp_path)
    state, again = read_weights(file), read_weights(path)
    assert {key.replace(".block.", ".conv_block.") for key in state} == again.keys()
    assert all(torch.equal(again[key.replace(".block.", ".conv_block.")], tensor) for key, tensor in state.items())
