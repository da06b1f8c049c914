"""Picture files appear complete or not at all, at whatever byte the disk becomes full."""

from __future__ import annotations

import errno
import io
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.data import save_image
from fastnce.engine.grid import save_grid
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published
from fastnce.translate.photographs import Photograph, write_photograph
from tests.ends import commands, largest_file, left, one_sentence, write

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
SIDE = 40
PICTURE = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (3, SIDE, SIDE)).astype(np.float32))
ALPHA = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE), np.uint8)
PROFILE = bytes(16) + b"RGB " + bytes(range(256)) * 8


def shown(file: Path) -> bytes:
    """Read the pixels with PIL or NumPy; a truncated file is an error."""
    if file.suffix == ".npy":
        return np.load(file).tobytes()
    if file.suffix == ".pth":
        weights = torch.load(file, weights_only=True)
        return b"".join(weights[key].numpy().tobytes() for key in sorted(weights))
    with Image.open(file) as image:
        return np.asarray(image).tobytes()


WRITERS: dict[str, Callable[[Path], object]] = {
    **{f"x{suffix}": lambda file: save_image(PICTURE, file) for suffix in (".png", ".jpg", ".webp", ".bmp", ".tiff")},
    **{f"y{suffix}": lambda file: save_image(PICTURE, file) for suffix in (".ppm", ".npy")},
    "grey.pgm": lambda file: save_image(PICTURE[:1], file),
    **{
        f"deep{suffix}": lambda file: write_photograph(PICTURE[:1], file, Photograph(PICTURE[:1], 16))
        for suffix in (".png", ".tif")
    },
    "deep.npy": lambda file: write_photograph(PICTURE, file, Photograph(PICTURE, 16)),
    **{
        f"alpha{suffix}": lambda file: write_photograph(PICTURE, file, Photograph(PICTURE, alpha=ALPHA))
        for suffix in (".png", ".webp", ".tiff")
    },
    "profile.jpg": lambda file: write_photograph(PICTURE, file, Photograph(PICTURE, profile=PROFILE)),
    "grid.png": lambda file: save_grid({"a": PICTURE[None], "b": PICTURE[None]}, file),
    "latest_net_G.pth": lambda file: save_published({"G": ResnetGenerator(width=1, blocks=1)}, file.parent),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_whole_or_as_it_was(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # saves time
    file, write = tmp_path / name, WRITERS[name]
    torch.manual_seed(0)
    write(file)
    size, wanted = file.stat().st_size, shown(file)
    old = b"what was there before"
    for limit in sorted({0, 1, 100, *range(7, size, max(1, size // 25)), size - 4096, size - 1} - {-1}):
        if not 0 <= limit < size:
            continue
        for before in (None, old):
            file.unlink(missing_ok=True) if before is None else file.write_bytes(before)
            torch.manual_seed(0)
            with largest_file(limit), pytest.raises(OSError, match="File too large") as caught:
                write(file)
            assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
            assert os.listdir(tmp_path) == [name] * (before is not None)
            assert before is None or file.read_bytes() == old
    torch.manual_seed(0)
    with largest_file(size):
        write(file)
    assert shown(file) == wanted
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "suffix"), [*(("translate", s) for s in ("png", "jpg", "bmp", "tiff")), ("rain", "png"), ("unpair", "png")]
)
def test_commands_keep_complete_pictures(name, suffix, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    photos, pairs = tmp_path / "photos", tmp_path / "pairs"
    for number, (folder, side) in enumerate(itertools.product((photos, pairs / "rain", pairs / "norain"), (24, 64))):
        save_image(PICTURE.repeat(1, 2, 2)[:, :side, :side] * (1 - 0.1 * number), folder / f"{side}.png")
    (model,) = save_published({"G": ResnetGenerator(width=1, blocks=1)}, tmp_path / "model")
    more = ["--format", suffix] if name == "translate" else []
    whole = tmp_path / "whole"
    assert main([*commands(model, photos, pairs, whole)[name], *more]) == 0
    sizes = sorted((whole / file).stat().st_size for file in left(whole))
    capsys.readouterr()
    for limit in (sizes[0] // 2, sizes[0], sizes[-1] // 2, sizes[-1] - 1):
        out = tmp_path / f"out{limit}"
        with largest_file(limit):
            assert main([*commands(model, photos, pairs, out)[name], *more]) == 2
        assert "File too large" in one_sentence(capsys)
        for file in left(out):
            assert shown(out / file) == shown(whole / file)


@pytest.mark.parametrize("option", ["--sheet", "--json", "--csv"])
def test_reports_are_complete_or_absent(option, tmp_path, capsys):
    pairs = write(tmp_path / "pairs", *(f"{side}/{n}.png" for n in (1, 2) for side in ("rain", "norain")))
    target = tmp_path / "m.png"
    measure = ["evaluate", "--inputs-only", "--data", str(pairs), "--device", "cpu", option, str(target)]
    for limit in (0, 50, 100):
        with largest_file(limit):
            assert main(measure) == 2
        assert f"{target}: File too large" in one_sentence(capsys)
        assert [file.name for file in tmp_path.iterdir()] == ["pairs"]


def test_encoding_in_memory_equals_pils_files(tmp_path):
    """For every format, encoding in memory gives the bytes that PIL writes to a file."""
    for suffix in (".png", ".jpg", ".webp", ".bmp", ".tiff", ".ppm"):
        save_image(PICTURE, tmp_path / f"x{suffix}")
        pixels = np.rint((PICTURE.numpy() + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
        options = {".jpg": {"quality": 95}, ".webp": {"lossless": True}}.get(suffix, {})
        Image.fromarray(pixels).save(tmp_path / f"y{suffix}", **options)
        assert (tmp_path / f"x{suffix}").read_bytes() == (tmp_path / f"y{suffix}").read_bytes()
    packed = io.BytesIO()
    np.save(packed, pixels)
    save_image(PICTURE, tmp_path / "x.npy")
    assert (tmp_path / "x.npy").read_bytes() == packed.getvalue()
