"""Files with false headers do not cost memory; orientation and colour profiles that follow the pixels."""

from __future__ import annotations

import io
import os
import re
import resource
import struct
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

from fastnce.data import DataError
from fastnce.data.folder import probe_picture, read_picture
from fastnce.translate.photographs import Photograph, read_photograph, write_photograph

# ---- false sizes ----


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *, before: bytes = b"", pixels: bytes | None = None, after: bytes = b"") -> bytes:
    """Black, 8-bit grey."""
    data = zlib.compress(bytes((width + 1) * height)) if pixels is None else pixels
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", data) + after + chunk(b"IEND", b"")


def tiff(*entries: tuple[int, int, int, int], tail: int = 0) -> bytes:
    """40x40 grey; `entries` add or replace tags: (tag, type, count, value)."""
    tags = {256: (4, 1, 40), 257: (4, 1, 40), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 400)}
    tags |= {277: (3, 1, 1), 278: (4, 1, 40), 279: (4, 1, 1600)} | {tag: rest for tag, *rest in entries}
    block = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + block + bytes(4 + 3000) + b"\1" * tail


def jpeg(*segments: tuple[bytes, bytes]) -> bytes:
    packed = io.BytesIO()
    Image.new("L", (40, 40)).save(packed, "JPEG")
    more = b"".join(b"\xff" + mark + struct.pack(">H", len(data) + 2) + data for mark, data in segments)
    return packed.getvalue()[:2] + more + packed.getvalue()[2:]


def webp(side: int) -> bytes:
    """An animation with a canvas of this size."""
    packed = io.BytesIO()
    Image.new("RGB", (16, 16)).save(packed, "WEBP", lossless=True)
    sides = (side - 1).to_bytes(3, "little") * 2
    frame = bytes(6) + (15).to_bytes(3, "little") * 2 + bytes(4) + packed.getvalue()[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + sides + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def still_webp(lossless: bool) -> bytes:
    """A file of 16x16 pixels that claims 16383x16383."""
    packed = io.BytesIO()
    Image.new("RGB", (16, 16)).save(packed, "WEBP", lossless=lossless)
    whole = packed.getvalue()
    if lossless:
        sides = int.from_bytes(whole[21:25], "little") & ~0xFFFFFFF | 16382 << 14 | 16382
        return whole[:21] + sides.to_bytes(4, "little") + whole[25:]
    return whole[:26] + struct.pack("<HH", 16383, 16383) + whole[30:]


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6) + bytes(4800)


def npy(head: str, version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(head)) + head.encode()


SHAPE = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}\n"
ZEROS = zlib.compress(bytes(100 << 20), 1)
RIGHT = "right"
LARGE, BROKEN = "is too large: .* pixels exceed the limit", "cannot be decoded"
LYING = {
    "idat.png": (png(40, 40, pixels=ZEROS), RIGHT),
    "claims.png": (png(2**31 - 1, 2**31 - 1, pixels=b"x"), LARGE),
    "text.png": (png(40, 40, before=chunk(b"zTXt", b"a\0\0" + ZEROS)), BROKEN),
    "texts.png": (png(40, 40, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 80), BROKEN),
    "itxt.png": (png(40, 40, before=chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)), BROKEN),
    "iccp.png": (png(40, 40, before=chunk(b"iCCP", b"a\0\0" + ZEROS)), BROKEN),
    "length.png": (png(40, 40)[:33] + b"\xff\xff\xff\xffIDAT", BROKEN),
    "tags.tif": (b"II\x2b\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60), "holds 1,152,921,504,606,846,976 tags"),
    "sides.tif": (tiff((256, 4, 1, 2**31), (257, 4, 1, 2**31)), LARGE),
    "strips.tif": (
        tiff((273, 4, 10**6, 400), (279, 4, 10**6, 400), tail=4 * 10**6),
        "holds 1,000,000 values in its tag",
    ),
    "byte strips.tif": (tiff((273, 1, 10**6, 400), tail=10**6), "holds 1,000,000 values in its tag 273"),
    "bits.tif": (tiff((258, 3, 10**6, 400), tail=2 * 10**6), "holds 1,000,000 values in its tag 258"),
    "ratios.tif": (tiff((532, 5, 10**6, 400), tail=8 * 10**6), "holds 1,000,000 values in its tag 532"),
    "counts.tif": (tiff((279, 4, 2**32 - 1, 400)), "holds 4,294,967,295 values in its tag 279"),
    "strip.tif": (tiff((279, 4, 1, 2**32 - 1)), RIGHT),
    "lost strip.tif": (tiff((273, 4, 1, 2**32 - 1)), BROKEN),
    "profile.tif": (tiff((34675, 7, 10**7, 400), tail=10**7), RIGHT),
    "loop.tif": (tiff()[: 10 + 9 * 12] + struct.pack("<I", 8) + bytes(3000), RIGHT),
    "canvas.webp": (webp(16383), LARGE),
    "lossless.webp": (still_webp(lossless=True), LARGE),
    "lossy.webp": (still_webp(lossless=False), LARGE),
    "bmp.bmp": (bmp(2**31 - 1, 2**31 - 1), LARGE),
    "down.bmp": (bmp(40, -40), RIGHT),
    "left.bmp": (bmp(-40, 40), LARGE),
    "ppm.ppm": (b"P6\n1000000000 1000000000\n255\n", LARGE),
    "digits.pgm": (b"P5\n" + b"9" * 5000 + b" 40\n255\n", BROKEN),
    "exif.jpg": (jpeg(*[(b"\xe1", b"Exif\0\0" + bytes(65_000))] * 50), RIGHT),
    "thumbnail.jpg": (jpeg((b"\xe0", b"JFIF\0\1\2\0\0\1\0\1\xff\xff" + bytes(60_000))), RIGHT),
    "sides.jpg": (jpeg().replace(struct.pack(">HH", 40, 40), b"\xff\xf0\xff\xf0", 1), LARGE),
    "shape.npy": (npy(SHAPE.format("|u1", (10**9, 10**9))), BROKEN),
    "below.npy": (npy(SHAPE.format("|u1", (-40, -40))) + bytes(1600), BROKEN),
    "overflow.npy": (npy(SHAPE.format("|u1", (2**62, 2**62, 2**62))), BROKEN),
    "objects.npy": (npy(SHAPE.format("|O", (40, 40))) + b"cos\nsystem\n(S'exit'\ntR.", BROKEN),
    "pickle.npy": (b"cos\nsystem\n(S'exit'\ntR.", BROKEN),
    "call.npy": (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (exit(),), }\n"), BROKEN),
    "deep.npy": (npy("(" * 9000), BROKEN),
    "head.npy": (npy("", 2)[:8] + b"\xff\xff\xff\xff", BROKEN),
}
ROOM = 48 << 20  # bytes, for the content of the files and PIL's tables


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no such limit")
def test_false_headers_do_not_cost_memory(tmp_path):
    """A process limited to 48 MiB more memory reads each file. Without the limit, the errors are the same."""
    for name, (content, _) in LYING.items():
        (tmp_path / name).write_bytes(content)
    Image.init()  # load the plug-ins before memory is limited

    def outcome(name: str) -> str:
        try:
            return f"{RIGHT} {read_picture(tmp_path / name).shape}, {probe_picture(tmp_path / name)}"
        except DataError as error:
            return re.sub("0x[0-9a-f]+", "0x", str(error))

    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        try:
            with os.fdopen(writing, "w") as out, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out.write("\n".join(outcome(name) for name in LYING))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as found:
        got = found.read().split("\n")
    os.waitpid(pid, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free = [outcome(name) for name in LYING]
    for (name, (_, wanted)), limited, unlimited in zip(LYING.items(), got, free, strict=True):
        assert limited == unlimited, name
        assert re.search(wanted, limited), limited
        assert "Memory" not in limited or "MAX_TEXT_MEMORY" in limited
        assert limited.startswith(f"{RIGHT} (40, 40, 3), (40, 40, 8)") or name in limited


# ---- metadata ----


@pytest.mark.parametrize("place", ["before", "after", "text after"])
def test_the_orientation_of_a_png(place, tmp_path, monkeypatch):
    """It may precede or follow the pixels. Only in the second case must the probe decode the picture."""
    exif = b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
    file = tmp_path / "x.png"
    chunks = {"before": {"before": chunk(b"eXIf", exif)}, "after": {"after": chunk(b"eXIf", exif)}}
    text = b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n  %d\n" % (len(exif) + 6) + (b"Exif\0\0" + exif).hex().encode()
    )
    file.write_bytes(png(20, 10, **chunks.get(place, {"after": chunk(b"zTXt", text)})))
    assert probe_picture(file) == (20, 10, 8)
    assert read_picture(file).shape == (20, 10, 3)
    decoded = []
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_end", lambda self: decoded.append(self))
    file.write_bytes(png(20, 10, **chunks["before"]))
    assert probe_picture(file) == (20, 10, 8)
    file.write_bytes(png(20, 10))
    assert probe_picture(file) == (10, 20, 8)
    assert decoded == []


def test_a_colour_profile_that_could_not_be_read_back_is_dropped(tmp_path):
    """PIL refuses a PNG with a profile of more than 1 MiB, and truncates a profile too long for JPEG's segments."""
    pixels = torch.zeros(3, 8, 8)
    for size, kept in (((1 << 20) - 1, True), (1 << 20, False), (17 << 20, False)):
        profile = bytes(16) + b"RGB " + bytes(size - 20)
        for suffix in (".png", ".jpg", ".webp", ".tif"):
            file = tmp_path / f"x{suffix}"
            with warnings.catch_warnings(record=True) as messages:
                warnings.simplefilter("always")
                write_photograph(pixels, file, Photograph(pixels, profile=profile))
            assert ["1 MiB or more is dropped" in str(one.message) for one in messages] == [True] * (not kept)
            assert read_photograph(file, 3).profile == (profile if kept else None)
