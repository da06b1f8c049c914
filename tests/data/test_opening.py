"""Opening pictures: formats, size limit, transparency, orientation, depth, names and paths."""

from __future__ import annotations

import itertools
import os
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.data import DataError, cache, find_images, load_image, save_image
from fastnce.data.folder import Folder, probe_picture, read_picture
from fastnce.data.limit import accepting, too_large
from fastnce.data.unpaired import UnpairedData
from fastnce.evaluate.report import evaluate
from fastnce.translate.photographs import Photograph, read_photograph, write_photograph

RNG = np.random.default_rng(0)


def png(path: Path, pixels: np.ndarray, depth: int, kind: int, key: tuple[int, ...] = ()) -> None:
    """Write a PNG by its specification: kind 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA; `key`: transparent colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b""
    for row in pixels.reshape(len(pixels), -1):
        bits = "".join(f"{value:0{depth}b}" for value in row)
        rows += b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, kind, 0, 0, 0)
    transparent = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    body = chunk(b"IHDR", head) + transparent + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


# --- transparency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "kind"), [*((d, 0) for d in (1, 2, 4, 8, 16)), (8, 2), (16, 2)])
def test_one_transparent_colour(tmp_path, depth, kind):
    """Exactly the pixels of that colour are transparent. A 16-bit colour cannot be matched at 8 bits: a warning."""
    path = tmp_path / "x.png"
    pixels = RNG.integers(0, 2**depth, (9, 11, 3 if kind == 2 else 1))
    pixels[4, 5] = pixels[0, 0] = 2**depth - 1 if depth < 8 else pixels[0, 0]
    png(path, pixels, depth, kind, tuple(pixels[4, 5]))
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        photograph = read_photograph(path, 3)
        read = read_picture(path, 3)
    if (depth, kind) == (16, 2):
        assert photograph.alpha is None
        assert any("transparent colour has 16 bits" in str(w.message) for w in messages)
    else:
        assert np.array_equal(photograph.alpha, np.where((pixels == pixels[4, 5]).all(2), 0, 255))
        assert not messages
    deep = (depth, kind) == (16, 0)
    want = pixels if deep else pixels >> 8 if depth == 16 else pixels * (255 // (2**depth - 1))
    assert np.array_equal(read, np.broadcast_to(want, (9, 11, 3)))
    assert probe_picture(path) == (9, 11, photograph.bits) == (9, 11, 16 if deep else 8)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind", [4, 6])
def test_alpha_of_png(tmp_path, depth, kind):
    path = tmp_path / "x.png"
    pixels = RNG.integers(0, 2**depth, (9, 11, 4 if kind == 6 else 2))
    png(path, pixels, depth, kind)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        photograph = read_photograph(path, 3)
    assert ["read at 8 bits" in str(w.message) for w in messages] == [True] * (depth == 16)
    assert np.array_equal(photograph.alpha, pixels[:, :, -1] >> (depth - 8))
    want = np.broadcast_to(pixels[:, :, :-1] >> (depth - 8), (9, 11, 3))
    assert np.array_equal(read_picture(path, 3) if depth == 8 else quiet(read_picture, path, 3), want)
    assert probe_picture(path) == (9, 11, 8)


def quiet(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def test_alpha_of_a_palette(tmp_path):
    index, alpha = RNG.integers(0, 4, (9, 11)).astype(np.uint8), np.array([0, 100, 255, 7])
    colours = RNG.integers(0, 256, (4, 3)).astype(np.uint8)
    image = Image.frombytes("P", (11, 9), index.tobytes())
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "x.png", transparency=bytes(alpha.tolist()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        photograph = read_photograph(tmp_path / "x.png", 3)
    assert np.array_equal(photograph.alpha, alpha[index])
    assert np.array_equal(read_picture(tmp_path / "x.png", 3), colours[index])


def test_a_warning_says_that_sixteen_bits_lose_alpha(tmp_path):
    source = Photograph(torch.zeros(1, 9, 11), 16, np.full((9, 11), 7, np.uint8))
    with pytest.warns(UserWarning, match="16 bits are written without alpha"):
        write_photograph(torch.zeros(1, 9, 11), tmp_path / "x.png", source)
    assert read_photograph(tmp_path / "x.png", 1).alpha is None
    write_photograph(torch.zeros(1, 9, 11), tmp_path / "y.png", source, 8)
    assert np.array_equal(read_photograph(tmp_path / "y.png", 1).alpha, source.alpha)


# --- orientation and depth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_head_and_content_agree_on_every_orientation(tmp_path, name):
    stored = np.zeros((8, 24, 4), np.uint8)
    stored[:4, :8], stored[..., 3] = 255, 255
    stored[4:, 16:, 3] = 0
    mode = "RGB" if name == "x.jpg" else "RGBA"
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    for orientation, (down, right) in corner.items():  # where the white corner at the top left is displayed
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).convert(mode).save(tmp_path / name, exif=exif)
        got = read_picture(tmp_path / name)
        tall = orientation >= 5
        assert got.shape[:2] == ((24, 8) if tall else (8, 24)) == probe_picture(tmp_path / name)[:2]
        assert got[-2 * down + 1 if down else 0, -2 * right + 1 if right else 0, 0] > 200
        photograph = read_photograph(tmp_path / name, 3)
        assert photograph.pixels.shape[1:] == got.shape[:2]
        if mode == "RGBA":
            assert photograph.alpha.shape == got.shape[:2]
            assert photograph.alpha[0 if down else -1, 0 if right else -1] == 0


@pytest.mark.parametrize("largest", [1, 100, 255, 1023, 65535])
def test_netpbm(tmp_path, largest):
    """Values are fractions of the largest. Grey of more than 8 bits is read at 16, colour at 8 with a warning."""
    for kind, channels in ((b"P5", 1), (b"P6", 3)):
        values = RNG.integers(0, largest + 1, (9, 11, channels))
        path = tmp_path / ("x.pgm" if channels == 1 else "x.ppm")
        path.write_bytes(kind + b" 11 9 %d\n" % largest + values.astype(">u2" if largest > 255 else "u1").tobytes())
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            got = read_picture(path, channels)
        deep = largest > 255 and channels == 1
        assert np.abs(got - values / largest * (65535 if deep else 255)).max() <= 0.5
        assert probe_picture(path) == (9, 11, 8 * got.itemsize) == (9, 11, 16 if deep else 8)
        assert len(messages) == (largest > 255 and channels == 3)


# --- which formats, and how large -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["EPS", "GIF", "PDF", "TGA", "ICO", "PCX"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_other_formats_are_not_opened(tmp_path, kind, suffix, monkeypatch):
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(tmp_path / "x", kind)
    path = (tmp_path / "x").rename(tmp_path / f"x{suffix}")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    for function in (read_picture, probe_picture, load_image, lambda file: read_photograph(file, 3)):
        with pytest.raises(DataError, match="is not a picture that can be read: it holds no PNG, JPEG, WebP") as caught:
            function(path)
        assert str(path) in str(caught.value)


def test_file_names_do_not_decide_the_format(tmp_path):
    """This includes pictures of phones, which hold several frames."""
    image = Image.fromarray(RNG.integers(0, 256, (8, 16, 3)).astype(np.uint8))
    image.save(tmp_path / "x.jpg", "PNG")
    assert np.array_equal(read_picture(tmp_path / "x.jpg"), np.asarray(image))
    image.save(tmp_path / "y.jpg", "MPO", save_all=True, append_images=[image.rotate(180)])
    assert np.abs(read_picture(tmp_path / "y.jpg").mean((0, 1)) - np.asarray(image).mean((0, 1))).max() < 3


def test_the_limit_of_pixels(tmp_path, monkeypatch):
    save_image(torch.zeros(3, 20, 50), tmp_path / "x.png")
    save_image(torch.zeros(3, 20, 50), tmp_path / "x.npy")
    for file in (tmp_path / "x.png", tmp_path / "x.npy"):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
        monkeypatch.delenv("FASTNCE_MAX_PIXELS", raising=False)
        for function in (read_picture, probe_picture, lambda path: read_photograph(path, 3)):
            with pytest.raises(DataError, match=r"1,000 pixels exceed the limit of 800;.*FASTNCE_MAX_PIXELS=1000 "):
                function(file)
        monkeypatch.setenv("FASTNCE_MAX_PIXELS", "1000")
        assert read_picture(file).shape == (20, 50, 3)
        monkeypatch.setenv("FASTNCE_MAX_PIXELS", "900")
        with pytest.raises(DataError, match="exceed the limit of 900"):
            probe_picture(file)
        for text in ("many", "0", "-5", "1e9"):
            monkeypatch.setenv("FASTNCE_MAX_PIXELS", text)
            with pytest.raises(DataError, match="FASTNCE_MAX_PIXELS=.* should be a whole number of pixels above 0"):
                read_picture(file)


def test_large_pictures_are_read_without_a_warning(tmp_path, monkeypatch):
    save_image(torch.zeros(3, 20, 50), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    with warnings.catch_warnings(record=True) as messages:
        warnings.resetwarnings()
        read_picture(tmp_path / "x.png")
        assert not messages
        warnings.simplefilter("error")  # users may still turn it into an error
        with pytest.raises(DataError, match="could be decompression bomb"):
            read_picture(tmp_path / "x.png")


# --- names and paths --------------------------------------------------------------------------------------------------

LONGEST = {"plain": "n" * 251, "two bytes": "é" * 125, "three bytes": "雨" * 83, "four bytes": "🌧" * 62}


@pytest.mark.skipif(sys.platform == "win32", reason="names are limited in another way")
@pytest.mark.parametrize("stem", LONGEST.values(), ids=LONGEST.keys())
def test_the_longest_names_can_be_written(tmp_path, stem):
    path = tmp_path / f"{stem}.png"
    assert len(os.fsencode(path.name)) > 250
    save_image(torch.zeros(3, 8, 8), path)
    source = read_photograph(path, 3)
    for alpha, bits, channels in ((np.full((8, 8), 9, np.uint8), 8, 3), (None, 16, 1)):
        write_photograph(torch.zeros(channels, 8, 8), path, Photograph(source.pixels, bits, alpha))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    for name in ("rain", "norain"):
        save_image(torch.full((3, 16, 16), 0.1 * len(name)), tmp_path / name / "1.png")
    path.unlink()
    outputs = {"json_file": f"{stem[:-2]}.json"[-255:], "csv_file": f"{stem}.csv", "sheet": f"{stem}.png"}
    evaluate(tmp_path, **{key: tmp_path / name for key, name in outputs.items()})
    assert sorted(os.listdir(tmp_path)) == sorted(["rain", "norain", *outputs.values()])


class AsPath:
    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, AsPath])
def test_paths_of_every_kind(tmp_path, kind):
    for name in ("a.png", "a.npy"):
        save_image(torch.zeros(3, 8, 8), kind(tmp_path / name))
        assert read_picture(kind(tmp_path / name)).shape == (8, 8, 3)
        assert probe_picture(kind(tmp_path / name)) == (8, 8, 8)
        assert load_image(kind(tmp_path / name)).shape == (3, 8, 8)
        photograph = read_photograph(kind(tmp_path / name), 3)
        write_photograph(photograph.pixels, kind(tmp_path / name), photograph)
    assert find_images(kind(tmp_path)) == [tmp_path / "a.npy", tmp_path / "a.png"]
    assert Folder.listed(kind(tmp_path)).names == ["a.npy", "a.png"]


def test_caches_of_older_formats_are_rebuilt(tmp_path, monkeypatch):
    """Pictures that an older version decoded differently are decoded again."""
    for domain, i in itertools.product(("trainA", "trainB"), range(2)):
        save_image(torch.full((3, 8, 8), 0.1 * i), tmp_path / domain / f"{i}.png")

    def kept() -> set[str]:
        return {file.name for file in (tmp_path / ".fastnce-cache").glob("*.bin")}

    with monkeypatch.context() as old:
        old.setattr(cache, "FORMAT", 1)
        UnpairedData(tmp_path, load_size=8, crop_size=8)
    before = kept()
    UnpairedData(tmp_path, load_size=8, crop_size=8)
    assert (len(before), len(kept() - before)) == (2, 2)


def test_arrays_of_either_byte_order(tmp_path):
    picture = np.arange(6 * 5, dtype=np.uint16).reshape(6, 5) * 2000
    for name, order in (("big", ">u2"), ("little", "<u2")):
        np.save(tmp_path / f"{name}.npy", picture.astype(order))
        found = read_picture(tmp_path / f"{name}.npy", 1)
        assert found.dtype == np.dtype("=u2")
        assert np.array_equal(found[..., 0], picture)
        assert probe_picture(tmp_path / f"{name}.npy") == (6, 5, 16)


def test_a_limit_that_holds_for_a_while(tmp_path, monkeypatch):
    """It replaces the environment variable and PIL's limit, for all threads, and PIL's is put back."""
    save_image(torch.zeros(3, 20, 50), tmp_path / "x.png")
    save_image(torch.zeros(3, 20, 50), tmp_path / "x.npy")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    monkeypatch.setenv("FASTNCE_MAX_PIXELS", "500")
    for file in (tmp_path / "x.png", tmp_path / "x.npy"):
        with accepting(998, "--max-pixels {}"):
            with pytest.raises(DataError, match=r"limit of 998;.* accept it with --max-pixels 1000 \(as RGB it takes"):
                read_picture(file)
            with accepting(0, "data.max_pixels={}"), pytest.raises(DataError, match=r"of 998;.*data\.max_pixels=1000 "):
                probe_picture(file)
            with accepting(1000, "data.max_pixels={}"), ThreadPoolExecutor(1) as pool:
                assert pool.submit(read_picture, file).result().shape == (20, 50, 3)
            with pytest.raises(DataError, match="limit of 998"):
                read_picture(file)
        assert Image.MAX_IMAGE_PIXELS == 400
        with accepting(0, "--max-pixels {}"), pytest.raises(DataError, match=r"limit of 500;.* --max-pixels 1000 "):
            read_picture(file)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)


def test_the_memory_of_a_large_picture_is_said():
    assert "(as RGB it takes 2.8 GiB, and decoding it about 14.0 GiB of memory)" in too_large(Path("x.png"), 10**9)
