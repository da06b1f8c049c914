"""The commands with a model that comes with the package, by its name."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastnce.commands import demo
from fastnce.commands.main import main
from fastnce.evaluate import psnr
from fastnce.hub import HubModel
from fastnce.models import folder
from fastnce.translate.exported import about, read_details
from tests.ends import one_sentence

SIZE = (16, 20)
"""Height and width."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """The empty folder in which the commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def colours(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8))


def levels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, (*SIZE, *shape)).astype(np.uint16)


def png_of_16_bits(path: str) -> None:
    """PIL writes no colour of 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels(3))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    packed = (
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in (*chunks, (b"IEND", b""))
    )
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


TAKEN = {
    "colour.png": (lambda path: colours().save(path), "RGB"),
    "grey.png": (lambda path: colours().convert("L").save(path), "RGB"),
    "bits.png": (lambda path: colours().convert("1").save(path), "RGB"),
    "alpha.png": (lambda path: colours().convert("RGBA").save(path), "RGBA"),
    "grey_alpha.png": (lambda path: colours().convert("LA").save(path), "RGBA"),
    "palette.png": (lambda path: colours().convert("P").save(path), "RGB"),
    "cmyk.jpg": (lambda path: colours().convert("CMYK").save(path), "RGB"),
    "grey_16.png": (lambda path: Image.fromarray(levels()).save(path), "RGB"),
    "colour_16.png": (png_of_16_bits, "RGB"),
    "colour_16_array.npy": (lambda path: np.save(path, levels(3)), "RGB"),
    "grey_16_array.npy": (lambda path: np.save(path, levels()), "RGB"),
}
"""By name: what writes the file, and the mode of the translation."""


def test_pictures_of_these_kinds_are_translated():
    Path("IN").mkdir()
    for name, (write, _) in TAKEN.items():
        write(f"IN/{name}")
    with pytest.warns(UserWarning, match="^16") as warned:
        assert main(["translate", "derain", "IN", "--out", "OUT", "--device", "cpu"]) == 0
    for name, (_, mode) in TAKEN.items():
        with Image.open((Path("OUT") / name).with_suffix(".png")) as made:
            assert (made.mode, made.size) == (mode, SIZE[::-1]), name
    assert sorted(str(one.message).partition(" (")[0] for one in warned) == [
        "16 bits are written as 8",
        "16-bit colour is read at 8 bits",
    ]
    assert str(warned[-1].message).endswith(" and 2 more")


@pytest.mark.filterwarnings("error")
def test_sixteen_bits_are_kept_as_npy():
    np.save("a.npy", levels(3))
    assert main(["translate", "derain", "a.npy", "--out", "OUT", "--format", "npy", "--device", "cpu"]) == 0
    assert (np.load("OUT/a.npy").dtype, np.load("OUT/a.npy").shape) == (np.uint16, (*SIZE, 3))


REFUSED = {
    "four.npy": (
        lambda path: np.save(path, levels(4)),
        "has 4 channels, which cannot be made to match the 3 that the network takes (network.in_channels); grey and "
        "colour of 8 or 16 bits can",
    ),
    "floats.npy": (lambda path: np.save(path, levels(3) / 65535), "it should hold uint8 or uint16 of shape"),
    "floats.tiff": (
        lambda path: Image.fromarray(levels().astype(np.float32)).save(path),
        "holds 32-bit floats; unsigned integers of 8 or 16 bits are read",
    ),
    "lab.tiff": (lambda path: colours().convert("LAB").save(path), "holds Lab colours; grey, palette, RGB, CMYK and"),
    "a.gif": (lambda path: colours().save(path), "it holds no PNG, JPEG, WebP, BMP, TIFF, PPM or PGM"),
}
"""By name: what writes the file, and what the sentence says."""


def test_other_pictures_are_refused_in_one_sentence(capsys):
    for name, (write, said) in REFUSED.items():
        write(name)
        assert main(["translate", "derain", name, "--out", "OUT", "--device", "cpu"]) == 2, name
        assert said in one_sentence(capsys), name
        assert not Path("OUT").exists(), name


def test_an_unknown_name_and_an_option_of_runs(capsys):
    colours().save("a.png")
    for command in (["translate", "derian", "a.png", "--out", "OUT"], ["export", "derian", "--out", "OUT"]):
        assert main(command) == 2
        sentence = (
            "derian: no such run or file, and the models that come with fastnce are: derain; did you mean 'derain'?"
        )
        assert one_sentence(capsys) == f"fastnce: {sentence}\n"
    assert main(["translate", "derain", "a.png", "--out", "OUT", "--epoch", "best"]) == 2
    assert "--epoch best chooses a checkpoint of a run, and derain is none" in one_sentence(capsys)
    assert not Path("OUT").exists()


def test_evaluate(capsys):
    for side, seed in (("rain", 0), ("norain", 1)):
        Path("TEST", side).mkdir(parents=True)
        colours(seed).save(f"TEST/{side}/0.png")
    assert main(["evaluate", "derain", "--data", "TEST", "--json", "x.json", "--device", "cpu"]) == 0
    assert json.loads(Path("x.json").read_text())
    assert "1 picture" in capsys.readouterr().out


def test_the_list_of_models(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = about(read_details(folder("derain")))
    (row,) = (line for line in lines if line.startswith("derain "))
    assert all(text in row for text in said.values())
    assert lines[-1] == f"measured figures of derain: {folder('derain') / 'README.md'}"


def test_an_export_takes_weights_licence_and_card_along(capsys):
    assert main(["export", "derain", "--out", "copy"]) == 0
    assert "Read again: the weights are equal." in capsys.readouterr().out
    assert read_details(Path("copy"))["about"] == read_details(folder("derain"))["about"]
    assert Path("copy/README.md").read_bytes() == (folder("derain") / "README.md").read_bytes()
    stored, written = (load_file(place / "model.safetensors") for place in (folder("derain"), Path("copy")))
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[key], written[key]) and stored[key].dtype == written[key].dtype for key in stored)
    assert main(["export", "derain", "--out", "copy", "--dtype", "float32"]) == 0  # its card may be there
    assert {tensor.dtype for tensor in load_file("copy/model.safetensors").values()} == {torch.float32}
    assert HubModel.open("derain").card == Path("copy/README.md").read_text(encoding="utf-8")


def test_a_model_of_this_name_here_is_warned_of_once():
    assert main(["export", "derain", "--out", "derain"]) == 0
    with pytest.warns(UserWarning, match="derain is taken as the folder of this name") as said:
        assert main(["export", "derain", "--out", "copy"]) == 0
    assert len(said) == 1


def test_published_files_need_a_run(capsys):
    assert main(["export", "derain", "--out", "OUT", "--format", "published"]) == 2
    assert "--format published needs a run, which has all networks" in one_sentence(capsys)
    assert not Path("OUT").exists()


class Training(Exception):
    """The demo begins to train."""


def test_the_demo_shows_the_model_before_it_trains(monkeypatch, capsys):
    def train(*_, **__):
        raise Training

    monkeypatch.setattr(demo, "LONGEST", 96)
    monkeypatch.setattr(demo, "write_folders", lambda folder: None)  # of the training
    monkeypatch.setattr(demo, "train_run", train)
    with pytest.raises(Training):
        demo.main(["--out", "run"])
    said = capsys.readouterr().out
    with Image.open("run/derain.png") as grid:
        pixels, places = np.asarray(grid), json.loads(grid.text["fastnce"])
    assert [column["name"] for column in places["columns"]] == ["rendered rain", "by the model derain", "original"]
    top, height = places["rows"][0]["top"], places["rows"][0]["height"]
    rainy, restored, clean = (
        torch.from_numpy(pixels[top : top + height, column["left"] : column["left"] + column["width"]].copy())
        for column in places["columns"]
    )
    assert rainy.shape == clean.shape == (64, 96, 3)
    assert not torch.equal(rainy, clean)
    before, after = (demo.DerainingMetrics().update(*(_batch(x), _batch(clean)))[0] for x in (rainy, restored))
    assert f"PSNR from {before['psnr_y']:.2f} to {after['psnr_y']:.2f} dB, SSIM from {before['ssim_y']:.3f}" in said
    assert "run/derain.png shows rain, result and original" in said
    assert psnr(_batch(rainy), _batch(clean)).item() < 30


def _batch(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(2, 0, 1)[None]
