"""Pictures with false headers, decompression bombs and unusual pictures: makers by file name."""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
from PIL import Image

SIDE = 24
ALLOWED = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
EXECUTED = "executed"
"""Environment variable with the path of the file to which executed code writes."""

Verdict = tuple[Literal["right", "same", "refused", "any"], np.ndarray | None]
"""Expected result of reading with three channels: "right" these pixels; "same" these pixels or a refusal; "refused";
"any" pixels or a refusal."""
Maker = Callable[[Path, Random], Verdict]
REFUSED: Verdict = ("refused", None)
ANY: Verdict = ("any", None)


def noise(rng: Random, *shape: int, kind: type = np.uint8) -> np.ndarray:
    numbers = np.random.default_rng(rng.getrandbits(63))
    return numbers.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)


def colours(rng: Random) -> np.ndarray:
    return noise(rng, SIDE, SIDE, 3)


def encoded(image: Image.Image, name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def holds(data: bytes | Callable[[], bytes], verdict: Verdict = REFUSED) -> Maker:
    def make(path: Path, rng: Random) -> Verdict:
        path.write_bytes(data if isinstance(data, bytes) else data())
        return verdict

    return make


# ---- PNG ----


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, bits: int = 8, colour: int = 2, data: bytes | None = None, extra: bytes = b""
) -> bytes:
    """Return a PNG file, black unless `data` are given."""
    if data is None:
        data = zlib.compress((b"\0" + bytes((width * {0: 1, 2: 3}[colour] * bits + 7) // 8)) * height)
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_chunk(kind: bytes, data: Callable[[], bytes]) -> Callable[[], bytes]:
    return lambda: png(SIDE, SIDE, extra=chunk(kind, data()))


def deflated(length: int, head: bytes = b"") -> Callable[[], bytes]:
    """Return a maker of `length` compressed zeros, about a thousandth of their size."""

    @functools.cache
    def make() -> bytes:
        packer = zlib.compressobj(9)
        return head + b"".join(packer.compress(bytes(2**20)) for _ in range(length >> 20)) + packer.flush()

    return make


def turned(path: Path, rng: Random) -> Verdict:
    """A picture with an EXIF orientation, as from a camera turned to the right."""
    pixels = noise(rng, SIDE, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    return "right", np.stack([pixels[::-1, column] for column in range(30)])


BLACK = np.zeros((SIDE, SIDE, 3), np.uint8)
BENIGN: Verdict = ("same", BLACK)
EXIF = struct.pack("<2sHIHHHIIH", b"II", 42, 8, 1, 0x0112, 3, 1, 99, 0)
PNGS: dict[str, Maker] = {
    "bomb-of-rows.png": holds(lambda: png(60_000, 60_000, 1, 0, deflated(60_000 * 7_501)())),
    "claims-all.png": holds(png(2**31 - 1, 2**31 - 1, 1, 0, b"x")),
    "thin.png": holds(png(1, 178_000_000, 1, 0, b"x")),
    "wide.png": holds(png(178_000_000, 1, 1, 0, b"x")),
    "no-side.png": holds(png(0, 0, 8, 2, b"")),
    "few-rows.png": holds(png(SIDE, SIDE, data=zlib.compress(bytes(50)))),
    "too-many-rows.png": holds(lambda: png(SIDE, SIDE, data=deflated(300 << 20)()), BENIGN),
    "garbage-rows.png": holds(png(SIDE, SIDE, data=b"garbage")),
    "text-bomb.png": holds(with_chunk(b"zTXt", deflated(300 << 20, b"a\0\0")), BENIGN),
    "international-bomb.png": holds(with_chunk(b"iTXt", deflated(300 << 20, b"a\0\1\0\0\0")), BENIGN),
    "profile-bomb.png": holds(with_chunk(b"iCCP", deflated(300 << 20, b"a\0\0")), BENIGN),
    "many-texts.png": holds(png(SIDE, SIDE, extra=chunk(b"tEXt", b"a\0b") * 100_000), BENIGN),
    "long-chunk.png": holds(png(SIDE, SIDE)[:8] + b"\xff\xff\xff\xff" + png(SIDE, SIDE)[12:]),
    "exif-outside.png": holds(with_chunk(b"eXIf", lambda: b"II*\0\xff\xff\xff\xff"), BENIGN),
    "exif-loop.png": holds(with_chunk(b"eXIf", lambda: EXIF[:-6] + struct.pack("<II", 6, 8)), BENIGN),
    "exif-99.png": holds(with_chunk(b"eXIf", lambda: EXIF + bytes(2)), BENIGN),
    "exif-text.png": holds(with_chunk(b"eXIf", lambda: EXIF.replace(b"\3\0\1", b"\2\0\4", 1) + bytes(2)), BENIGN),
    "one-pixel.png": holds(png(1, 1), ("right", np.zeros((1, 1, 3), np.uint8))),
    "strip.png": holds(png(3000, 2), ("right", np.zeros((2, 3000, 3), np.uint8))),
    "turned.jpg": lambda path, rng: (turned(path, rng), ANY)[1],  # lossy, so only its size is known
    "turned.png": turned,
}


# ---- our other formats ----


def tiff(width: int, height: int, bits: int, data: bytes, kind: int = 1, **other: int) -> bytes:
    """Return a grey TIFF file with one strip. `other` sets tags: t273=0 sets tag 273."""
    where = 8 + 2 + 12 * 10 + 4
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: where, 277: 1, 278: height, 279: len(data)}
    tags |= {339: kind} | {int(name[1:]): value for name, value in other.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def bmp(width: int, height: int, data: bytes = b"") -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head + data


def from_the_top(path: Path, rng: Random) -> Verdict:
    pixels = colours(rng)
    path.write_bytes(bmp(SIDE, -SIDE, pixels[:, :, ::-1].tobytes()))
    return "right", pixels


def first_of_several(name: str, **options) -> Maker:
    def make(path: Path, rng: Random) -> Verdict:
        frames = [colours(rng) for _ in range(4)]
        first, *rest = map(Image.fromarray, frames)
        first.save(path, name, save_all=True, append_images=rest, **options)
        return "right", frames[0]

    return make


def grey_16(name: str) -> Maker:
    def make(path: Path, rng: Random) -> Verdict:
        pixels = noise(rng, SIDE, SIDE, kind=np.uint16)
        Image.fromarray(pixels).save(path, name)
        return "right", np.stack([pixels] * 3, axis=2)

    return make


def grey(value: int, kind: type = np.uint8) -> Verdict:
    return "right", np.full((SIDE, SIDE, 3), value, kind)


AREA = SIDE * SIDE
JPEG = encoded(Image.fromarray(colours(Random(0))), "JPEG")
OTHERS: dict[str, Maker] = {
    "first-page.tif": first_of_several("TIFF"),
    "first-frame.webp": first_of_several("WEBP", lossless=True),
    "first-frame.png": first_of_several("PNG"),
    "grey16.tif": grey_16("TIFF"),
    "grey16.png": grey_16("PNG"),
    "claims-all.tif": holds(tiff(2**31 - 1, 2**31 - 1, 8, b"x")),
    "strip-outside.tif": holds(tiff(SIDE, SIDE, 8, b"x" * 10, t273=2**31 - 1, t279=2**31 - 1)),
    "nan.tif": holds(tiff(SIDE, SIDE, 32, np.full((SIDE, SIDE), np.nan, np.float32).tobytes(), 3)),
    "half.tif": holds(tiff(SIDE, SIDE, 16, bytes(2 * AREA), 3)),
    "double.tif": holds(tiff(SIDE, SIDE, 64, bytes(8 * AREA), 3)),
    "uint64.tif": holds(tiff(SIDE, SIDE, 64, bytes(8 * AREA))),
    "int16.tif": holds(tiff(SIDE, SIDE, 16, bytes(2 * AREA), 2)),
    "int32.tif": holds(tiff(SIDE, SIDE, 32, bytes(4 * AREA), 2)),
    "bogus.tif": holds(b"II*\0\xff\xff\xff\xff"),
    "own-tail.tif": holds(tiff(SIDE, SIDE, 8, bytes(AREA))[:-AREA][:-4] + struct.pack("<I", 8) + bytes(AREA), ANY),
    "claims-all.jpg": holds(JPEG.replace(struct.pack(">HH", SIDE, SIDE), struct.pack(">HH", 65500, 65500), 1)),
    "no-side.jpg": holds(JPEG.replace(struct.pack(">HH", SIDE, SIDE), struct.pack(">HH", 0, SIDE), 1)),
    "inks.jpg": holds(encoded(Image.new("CMYK", (SIDE, SIDE)), "JPEG"), ANY),
    "lab.tif": holds(encoded(Image.new("LAB", (SIDE, SIDE)), "TIFF")),
    "claims-all.bmp": holds(bmp(2**31 - 1, 2**31 - 1)),
    "less-than-none.bmp": holds(bmp(-SIDE, SIDE, bytes(3 * AREA))),
    "from-the-top.bmp": from_the_top,
    "claims-all.webp": holds(b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f\0" + bytes(12)),
    "claims-all.ppm": holds(b"P6\n1000000000 1000000000\n255\n"),
    "less-than-none.ppm": holds(b"P6\n-1 -1\n255\n"),
    "two-levels.pgm": holds(b"P5 24 24 1\n" + b"\1" * AREA, grey(255)),
    "sixteen.pgm": holds(b"P5 24 24 65535\n" + b"\1\2" * AREA, grey(258, np.uint16)),
    "in-words.pgm": holds(b"P2 24 24 255\n" + b"7 " * AREA, grey(7)),
    "no-level.pgm": holds(b"P5 24 24 0\n" + b"\1" * AREA),
    "long-remark.pgm": holds(b"P5\n#" + b"x" * 5_000_000 + b"\n24 24\n255\n" + b"\1" * AREA, ("same", grey(1)[1])),
    "long-number.pgm": holds(b"P5\n" + b"9" * 5_000_000 + b" 24\n255\n" + b"\1" * AREA),
}


# ---- arrays ----


class _Touch:
    """An object whose unpickling runs a program."""

    def __reduce__(self):
        return os.system, (f"echo pickle >> ${EXECUTED}",)


def npy(array: np.ndarray, verdict: Verdict = REFUSED, version: tuple[int, int] = (1, 0)) -> Maker:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return holds(buffer.getvalue(), verdict)


def headed(head: str, body: bytes = b"") -> Maker:
    text = head.encode() + b" " * (63 - (10 + len(head)) % 64) + b"\n"
    return holds(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body)


def shaped(shape: str, body: bytes = b"") -> Maker:
    return headed(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}", body)


def _zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3, np.uint8))
    return buffer.getvalue()


PIXELS = noise(Random(1), SIDE, SIDE + 2, 3)
DEEP = noise(Random(2), SIDE, SIDE, 3, kind=np.uint16)
ARRAYS: dict[str, Maker] = {
    "columns-first.npy": npy(np.asfortranarray(PIXELS), ("right", PIXELS)),
    "big-end-first.npy": npy(DEEP.astype(">u2"), ("right", DEEP)),
    "version-2.npy": npy(PIXELS, ("right", PIXELS), (2, 0)),
    "version-3.npy": npy(PIXELS, ("right", PIXELS), (3, 0)),
    "pickle.npy": holds(lambda: b"\x93NUMPY\x01\x00v\0" + _objects() + pickle.dumps(_Touch())),
    "bare-pickle.npy": holds(pickle.dumps(_Touch())),
    "floats.npy": npy(np.full((SIDE, SIDE), np.nan, np.float32)),
    "truths.npy": npy(np.ones((SIDE, SIDE), bool)),
    "number.npy": npy(np.array(3, np.uint8)),
    "four.npy": npy(np.zeros((2, 2, 2, 2), np.uint8)),
    "none.npy": npy(np.zeros((0, SIDE), np.uint8)),
    "fields.npy": npy(np.zeros((SIDE, SIDE), [("a", "u1")])),
    "thousand-channels.npy": npy(np.zeros((8, 8, 1000), np.uint8)),
    "claims-all.npy": shaped("(1000000000, 1000000000)"),
    "less-than-none.npy": shaped("(-24, -24)", bytes(AREA)),
    "overflow.npy": shaped("(9223372036854775807, 9223372036854775807, 9223372036854775807)"),
    "calls.npy": shaped(f"(__import__('os').system('echo head >> ${EXECUTED}'),)"),
    "deep-head.npy": headed("(" * 9000),
    "short.npy": shaped("(24, 24, 3)", bytes(100)),
    "text-head.npy": headed("shape"),
    "long-head.npy": holds(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 100),
    "zip.npy": holds(_zipped),
    "text.npy": holds(b"hello"),
}


def _objects() -> bytes:
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    return head.ljust(117) + b"\n"
