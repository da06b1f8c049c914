"""Every kind of TIFF is read as its tags define it (checked with tifffile), or refused with an error that names it."""

from __future__ import annotations

import functools
import itertools
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastnce.data import DataError, tiff
from fastnce.data.folder import probe_picture, read_picture
from fastnce.translate.photographs import read_photograph

HEIGHT, WIDTH = 19, 34
ORIENTATION, FILL_ORDER = 274, 266


@functools.cache
def places(h: int, w: int, orientation: int) -> tuple[np.ndarray, np.ndarray]:
    """The file's row and column for each displayed pixel, as TIFF 6.0 defines tag 274."""
    tall, wide = (w, h) if orientation >= 5 else (h, w)
    rows, columns = np.empty((2, tall, wide), int)
    for r, c in itertools.product(range(tall), range(wide)):
        rows[r, c], columns[r, c] = {
            1: (r, c),
            2: (r, w - 1 - c),
            3: (h - 1 - r, w - 1 - c),
            4: (h - 1 - r, c),
            5: (c, r),
            6: (h - 1 - c, r),
            7: (h - 1 - c, w - 1 - r),
            8: (c, w - 1 - r),
        }[orientation]
    return rows, columns


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    return stored[places(*stored.shape[:2], orientation)]


def meaning(path: Path) -> tuple[np.ndarray, bool]:
    """Return (H, W, 1 or 3) from a file's samples and tags, 16-bit colour at 8 bits; and whether it has 16 bits."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        stored = page.asarray()
        if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            stored = np.moveaxis(stored, 0, 2)
        stored = stored.reshape(page.imagelength, page.imagewidth, -1)
        orientation = page.tags[ORIENTATION].value if ORIENTATION in page.tags else 1
        kind, bits = page.photometric.name, page.bitspersample
    grey = kind in ("MINISBLACK", "MINISWHITE")
    colours = stored[:, :, : 1 if grey else 4 if kind == "SEPARATED" else 3].astype(np.int64)
    if kind == "MINISWHITE":
        colours = 2**bits - 1 - colours
    if bits == 16 and not grey:
        colours >>= 8
    if kind == "SEPARATED":  # the light that passes the inks and black
        colours = np.rint((255 - colours[:, :, :3]) * (255 - colours[:, :, 3:]) / 255).astype(np.int64)
    return upright(colours, orientation), bits == 16


def check(path: Path) -> np.ndarray | None:
    """Read a file, check the values, and that header and content agree; None if the file is refused."""
    want, deep = meaning(path)
    try:
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            got = read_picture(path, want.shape[2])
    except DataError as refused_for:
        sentence = str(refused_for)
    else:
        sentence = ""
    if sentence:
        assert re.fullmatch(rf"{re.escape(str(path))} (holds|has|is|does|leaves) [^\n]+", sentence), sentence
        with pytest.raises(DataError, match=re.escape(sentence)):
            probe_picture(path)
        return None
    assert got.shape == want.shape
    assert np.array_equal(got, want)
    assert probe_picture(path) == (*want.shape[:2], 8 * got.itemsize)
    assert [str(w.message)[:14] for w in messages] == ["16-bit colour "] * (deep and want.shape[2] == 3)
    return got


KINDS = [(bits, photo) for bits in (8, 16) for photo in ("minisblack", "miniswhite", "rgb", "separated")]
ORDERS = [(order, big) for order in "<>" for big in (False, True)]
LAYOUTS = [{"rowsperstrip": HEIGHT}, {"rowsperstrip": 5}, {"tile": (16, 16)}]
PACKINGS = [(None, False), ("zlib", False), ("zlib", True)]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL's, for a byte order that it does not know
@pytest.mark.parametrize(("bits", "photo"), KINDS)
def test_product(tmp_path, bits, photo):
    """All combinations of byte order, BigTIFF, packing, tiles, planes, extra samples; orientations in turn."""
    path = tmp_path / "x.tif"
    rng = np.random.default_rng(0)
    base = {"rgb": 3, "separated": 4}.get(photo, 1)
    orientations = itertools.cycle(range(1, 9))
    for (order, big), (packing, predictor), layout, planar, extra in itertools.product(
        ORDERS, PACKINGS, LAYOUTS, ("contig", "separate"), ((), (0,), (1,), (2,))
    ):
        samples = base + len(extra)
        if (planar == "separate" and samples == 1) or (big and extra):
            continue
        stored = rng.integers(0, 2**bits, (HEIGHT, WIDTH, samples)).astype(np.uint8 if bits == 8 else np.uint16)
        if extra == (1,):
            stored[:, :, -1] = 2**bits - 1  # opaque: multiplying colours by it changes nothing
        planes = np.moveaxis(stored, 2, 0).copy() if planar == "separate" else stored.squeeze()
        tifffile.imwrite(
            path,
            planes,
            photometric=photo,
            planarconfig=planar if samples > 1 else None,
            byteorder=order,
            bigtiff=big,
            compression=packing,
            predictor=predictor or None,
            extrasamples=extra or None,
            extratags=[(ORIENTATION, "H", 1, next(orientations), True)],
            metadata=None,
            **layout,
        )
        got = check(path)
        noise = bits == 16 and planar == "separate" and packing is None  # PIL reads these as noise
        unknown_to_some = order == ">" and bits == 16 and photo in ("miniswhite", "separated")
        if not extra and not (big and order == ">") and not noise and not unknown_to_some:
            assert got is not None, (order, big, packing, layout, planar)
        if noise or (big and order == ">"):
            assert got is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_of_one_strip(tmp_path, orientation, dtype):
    """PIL memory-maps only this layout: uncompressed, one strip. Also checks its transparency."""
    path = tmp_path / "x.tif"
    stored = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 4)).astype(dtype)
    tags = [(ORIENTATION, "H", 1, orientation, True)]
    tifffile.imwrite(path, stored[:, :, 0], photometric="minisblack", extratags=tags)
    assert np.array_equal(read_picture(path, 1)[:, :, 0], upright(stored[:, :, 0], orientation))
    assert probe_picture(path)[:2] == ((WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH))
    if dtype == np.uint8:
        tifffile.imwrite(path, stored, photometric="rgb", extrasamples=[2], extratags=tags)
        photograph = read_photograph(path, 3)
        assert np.array_equal(photograph.alpha, upright(stored[:, :, 3], orientation))
        levels = ((photograph.pixels + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert np.array_equal(levels, upright(stored[:, :, :3], orientation))


def test_colours_multiplied_by_alpha_are_divided_by_it(tmp_path):
    path = tmp_path / "x.tif"
    rng = np.random.default_rng(2)
    alpha = rng.integers(1, 256, (HEIGHT, WIDTH, 1))
    plain = rng.integers(0, 256, (HEIGHT, WIDTH, 3))
    stored = np.concatenate([np.rint(plain * alpha / 255), alpha], axis=2).astype(np.uint8)
    tifffile.imwrite(path, stored, photometric="rgb", extrasamples=[1])
    divided = np.minimum(255, stored[:, :, :3] * 255.0 / alpha)
    assert np.abs(read_picture(path, 3) - divided).max() <= 1
    assert np.array_equal(read_photograph(path, 3).alpha, alpha[:, :, 0])


# --- files that tifffile cannot write ---------------------------------------------------------------------------------


def by_hand(path: Path, values: np.ndarray, bits: int, tags: dict[int, tuple[str, list[int]]], order: str) -> None:
    """Write one uncompressed strip; values (H, W) are packed from the highest bit, each row starts at a byte."""
    rows = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
    data = b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)
    if tags.get(FILL_ORDER) == ("H", [2]):
        data = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
    h, w = values.shape
    every = {256: ("H", [w]), 257: ("H", [h]), 258: ("H", [bits]), 259: ("H", [1]), 277: ("H", [1]), 278: ("H", [h])}
    every |= {273: ("I", [0]), 279: ("I", [len(data)]), **tags}
    begin = 10 + 12 * len(every) + 4
    entries, beyond = b"", b""
    sizes = {"B": (1, 1), "H": (3, 2), "I": (4, 4)}
    strip = begin + sum(len(v) * sizes[t][1] for t, v in every.values() if len(v) * sizes[t][1] > 4)
    for tag, (kind, numbers) in sorted(every.items()):
        numbers = [strip] if tag == 273 and numbers == [0] else numbers
        packed = b"".join(struct.pack(order + kind, number) for number in numbers)
        entries += struct.pack(order + "HHI", tag, sizes[kind][0], len(numbers))
        entries += struct.pack(order + "I", begin + len(beyond)) if len(packed) > 4 else packed.ljust(4, b"\0")
        beyond += packed if len(packed) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(every))
    path.write_bytes(head + entries + struct.pack(order + "I", 0) + beyond + data)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_few_bits(tmp_path, bits):
    path = tmp_path / "x.tif"
    rng = np.random.default_rng(bits)
    palette = rng.integers(0, 2**16, (3, 2**bits))
    for photometric, fill, order in itertools.product((0, 1, 3), (1, 2), "<>"):
        values = rng.integers(0, 2**bits, (HEIGHT, 13))
        tags = {262: ("H", [photometric]), FILL_ORDER: ("H", [fill])}
        if photometric == 3:
            tags[320] = ("H", palette.ravel().tolist())
            want = (palette.T >> 8)[values]
        else:
            want = ((values if photometric else 2**bits - 1 - values) * (255 // (2**bits - 1)))[:, :, None]
        by_hand(path, values, bits, tags, order)
        if fill == 2 and (photometric == 3 or (photometric == 0 and bits == 8)):
            refused(path, "bits of its bytes in reverse")
            continue
        got = read_picture(path, want.shape[2])
        assert np.array_equal(got, want)
        assert probe_picture(path) == (HEIGHT, 13, 8)


def refused(path: Path, words: str) -> None:
    for function in (read_picture, probe_picture, lambda file: read_photograph(file, 3)):
        with pytest.raises(DataError, match=words) as caught:
            function(path)
        assert str(caught.value).startswith(f"{path} ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packing", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        *(("i1", "8-bit signed"), ("i2", "16-bit signed"), ("i4", "32-bit signed"), ("u4", "samples of 32 bits")),
        *(("f2", "16-bit floats"), ("f4", "32-bit floats"), ("f8", "64-bit floats")),
    ],
)
def test_other_numbers_are_refused(tmp_path, dtype, words, order, packing):
    path = tmp_path / "x.tif"
    for shape, photo in (((HEIGHT, WIDTH), "minisblack"), ((HEIGHT, WIDTH, 3), "rgb")):
        values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
        tifffile.imwrite(path, values, photometric=photo, byteorder=order, compression=packing)
        refused(path, words)


@pytest.mark.parametrize(
    ("bits", "tags", "words"),
    [
        (8, {262: ("H", [8])}, "holds Lab colours"),
        (8, {262: ("H", [32803])}, "raw values of a sensor"),
        (8, {}, "does not say what its values mean"),
        (12, {262: ("H", [1])}, "samples of 12 bits"),
        (8, {262: ("H", [1]), 259: ("H", [50001])}, "TIFF's scheme 50001"),
        (8, {262: ("H", [1]), 259: ("H", [6])}, "TIFF's scheme 6"),
        (8, {262: ("H", [2])}, "1 samples per pixel, but its tags name 3 colours"),
        (8, {262: ("H", [1]), 273: ("I", [0, 0])}, "sparse TIFF"),
        (4, {262: ("H", [3]), 320: ("H", [9] * 48)}, "palette of 8-bit values"),
    ],
)
def test_other_tags_are_refused(tmp_path, bits, tags, words):
    by_hand(tmp_path / "x.tif", np.full((HEIGHT, 14), 1), bits, tags, "<")
    refused(tmp_path / "x.tif", words)


def test_other_layouts_are_refused_by_their_tags():
    """Layouts that neither PIL nor tifffile writes."""
    ycbcr = {tiff.PHOTOMETRIC: 6, tiff.SAMPLES: 3, tiff.BITS: (8, 8, 8)}
    assert not tiff.refusal({**ycbcr, tiff.COMPRESSION: 7})
    assert not tiff.refusal({**ycbcr, tiff.COMPRESSION: 5, tiff.SUBSAMPLING: (1, 1)})
    for more in ({}, {tiff.COMPRESSION: 5}, {tiff.COMPRESSION: 5, tiff.SUBSAMPLING: (2, 2)}):
        assert "YCbCr that is not JPEG's" in tiff.refusal({**ycbcr, **more})
    narrow = {tiff.SUBSAMPLING: (1, 1), tiff.REFERENCE: (15, 235, 128, 240, 128, 240)}
    assert "YCbCr that is not JPEG's" in tiff.refusal({**ycbcr, tiff.COMPRESSION: 5, **narrow})
    assert "JPEG or YCbCr planes" in tiff.refusal({**ycbcr, tiff.COMPRESSION: 7, tiff.PLANAR: 2})
    inks = {tiff.PHOTOMETRIC: 5, tiff.SAMPLES: 4, tiff.BITS: (8,) * 4}
    assert not tiff.refusal(inks)
    assert "other than CMYK" in tiff.refusal({**inks, tiff.INK_SET: 2})
    assert "8, 16 bits" in tiff.refusal({tiff.PHOTOMETRIC: 2, tiff.SAMPLES: 3, tiff.BITS: (8, 16, 8)})


@pytest.mark.parametrize("packing", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate", "lzma", "jpeg"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_packings_of_pil(tmp_path, mode, packing):
    ramp = np.add.outer(np.arange(32) * 3, np.arange(48) * 2)
    colour = Image.fromarray((ramp[:, :, None] + [0, 40, 80]).clip(0, 255).astype(np.uint8))
    image = Image.fromarray((ramp * 257).astype(np.uint16)) if mode == "I;16" else colour.convert(mode)
    if packing == "jpeg" and mode in ("1", "P", "I;16"):
        return  # JPEG has no 1-bit, palette or 16-bit pixels
    image.save(tmp_path / "x.tif", compression=packing)
    channels = 1 if mode in ("1", "L", "LA", "I;16") else 3
    got = read_picture(tmp_path / "x.tif", channels).squeeze().astype(int)
    want = np.asarray(image if mode == "I;16" else image.convert("L" if channels == 1 else "RGB"))
    assert np.abs(got - want).max() <= (6 if packing == "jpeg" else 1 if mode == "YCbCr" else 0)
    assert probe_picture(tmp_path / "x.tif") == (32, 48, 16 if mode == "I;16" else 8)


@pytest.mark.parametrize("packing", ["group3", "group4", "tiff_ccitt"])
def test_fax(tmp_path, packing):
    picture = np.random.default_rng(0).integers(0, 2, (HEIGHT, WIDTH)).astype(bool)
    Image.fromarray(picture).save(tmp_path / "x.tif", compression=packing)
    assert np.array_equal(read_picture(tmp_path / "x.tif", 1)[:, :, 0], picture * 255)


def test_the_first_of_several_pages(tmp_path):
    pages = np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", pages, photometric="minisblack")
    assert np.array_equal(read_picture(tmp_path / "x.tif", 1)[:, :, 0], pages[0])


@pytest.mark.parametrize("packing", [None, "zlib"])
def test_cut_off(tmp_path, packing):
    path = tmp_path / "x.tif"
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    tifffile.imwrite(path, picture, compression=packing, rowsperstrip=5)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot be decoded"):
        read_picture(path, 1)
