"""The inference scripts of examples/ read and write pictures as `fastnce translate` does."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.networks import ResnetGenerator
from fastnce.translate import Translator
from tests.programs import ROOT

TURNED = Image.Exif()
TURNED[0x0112] = 6


def colour(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


PICTURES = {
    "2 x 9": colour(2, 9),
    "3 x 90": colour(3, 90),
    "31 x 22": colour(31, 22),
    "grey": colour(9, 21).convert("L"),
    "palette": colour(9, 21).convert("P"),
    "16 bits": Image.fromarray(np.random.default_rng(4).integers(0, 65536, (9, 21)).astype(np.uint16)),
}


@pytest.fixture(params=["infer_torch.py", "infer_onnx.py"])
def script(request, monkeypatch, tmp_path):
    """Run a script with a network in place of the file; (network, picture's path) to the result's path."""

    def run(network: ResnetGenerator, picture: Path, channels: int, out_channels: int) -> Path:
        sizes = {"channels": channels, "multiple": network.factor, "smallest": network.smallest}
        config = {"format": "torch", "file": "model", "input": sizes, "output": {"channels": out_channels}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if request.param == "infer_torch.py":
            monkeypatch.setattr("torch.export.load", lambda _: SimpleNamespace(module=lambda: network))
        else:
            pytest.importorskip("onnxruntime", reason="onnxruntime (extra export) is not installed")

            def compute(_, given):
                with torch.no_grad():
                    return [network(torch.from_numpy(given["images"])).numpy()]

            monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: SimpleNamespace(run=compute))
        runpy.run_path(str(ROOT / "examples" / request.param))["main"](tmp_path, picture, tmp_path / "out.png")
        return tmp_path / "out.png"

    return run


@pytest.mark.parametrize("channels", [(3, 3), (1, 1), (3, 1), (1, 3)], ids=str)
def test_pictures(channels, script, tmp_path):
    torch.manual_seed(0)
    network = ResnetGenerator(*channels, width=2, blocks=1).eval()
    for name, picture in PICTURES.items():
        picture.save(tmp_path / "in.png")
        made = np.asarray(Image.open(script(network, tmp_path / "in.png", *channels))).astype(float)
        wanted = np.asarray(Translator(network).translate(Image.open(tmp_path / "in.png"))).astype(float)
        if wanted.max() > 255:  # the script writes 8 bits
            wanted = wanted / 257
        assert made.shape == wanted.shape, name
        assert abs(made - wanted).max() <= 1, name
        assert made.std() > 1, name


def test_one_pixel_and_a_turned_photograph(script, tmp_path):
    network = ResnetGenerator(width=2, blocks=1, norm="none").eval()
    colour(1, 1).save(tmp_path / "in.png")
    assert Image.open(script(network, tmp_path / "in.png", 3, 3)).size == (1, 1)
    colour(10, 20).save(tmp_path / "in.jpg", exif=TURNED)
    assert Image.open(script(network, tmp_path / "in.jpg", 3, 3)).size == (10, 20)


def test_other_channels_are_one_sentence(script, tmp_path):
    with pytest.raises(SystemExit, match="is not for pictures of 1 or 3 channels"):
        script(ResnetGenerator(4, 3, width=2, blocks=1), tmp_path / "in.png", 4, 3)
