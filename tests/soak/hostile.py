"""Hostile files in place of pictures, by file name: false headers, damage, other formats, devices, links."""

from __future__ import annotations

import io
import os
import socket
import stat
import struct
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from .lying import ALLOWED, ANY, ARRAYS, OTHERS, PNGS, REFUSED, SIDE, Maker, Verdict, colours, encoded, holds

# ---- other formats under our names ----

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n%%EndComments\n0 0 24 24 rectfill\nshowpage\n%%EOF\n"
FOREIGN: dict[str, Maker] = {
    **{f"eps{suffix}": holds(EPS) for suffix in (".png", ".jpg", ".tif", ".bmp", ".webp", ".ppm")},
    "bound-eps.png": holds(b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, len(EPS), 0, 0, 0, 0, 0xFFFF) + EPS),
    "pdf.png": holds(b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n"),
    "svg.png": holds(b'<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24"/>'),
    "page.jpg": holds(b"<html><body>404</body></html>"),
    "pointer.png": holds(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "zeros.png": holds(bytes(1000)),
    "empty.png": holds(b""),
    "fits.tif": holds(b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80)),
    "placed.png": holds(b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 100, 100, 72) + bytes(40)),
    "layers.png": holds(b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, SIDE, SIDE, 8, 3) + bytes(4814)),
}


def _foreign(name: str) -> Maker | None:
    """Return a picture in another of PIL's formats; None if PIL cannot write it."""
    for mode in ("RGB", "L", "P", "1", "F"):
        try:
            data = encoded(Image.new(mode, (32, 32)), name)
        except Exception:
            continue
        return holds(data) if data else None
    return None


def foreign() -> dict[str, Maker]:
    """Return a maker for every format that PIL writes, except ours."""
    Image.init()
    names = sorted(set(Image.SAVE) - {*ALLOWED, "MPO", "SPIDER"})
    made = {name: _foreign(name) for name in names}
    return {f"{name.lower()}.png": maker for name, maker in made.items() if maker is not None}


# ---- links, devices, sockets ----


def linked(target: str) -> Maker:
    def make(path: Path, rng: Random) -> Verdict:
        path.symlink_to(target.replace("SELF", path.name))
        return REFUSED

    return make


def _fifo(path: Path, rng: Random) -> Verdict:
    os.mkfifo(path)
    return REFUSED


def _socket(path: Path, rng: Random) -> Verdict:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)
    return REFUSED


def _device(kind: int, number: int) -> Maker:
    def make(path: Path, rng: Random) -> Verdict:
        os.mknod(path, kind | 0o666, os.makedev(1, number))
        return REFUSED

    return make


def _locked(path: Path, rng: Random) -> Verdict:
    pixels = colours(rng)
    Image.fromarray(pixels).save(path)
    path.chmod(0)
    return ("right", pixels) if os.access(path, os.R_OK) else REFUSED  # root may read it nevertheless


def _through(path: Path, rng: Random) -> Verdict:
    """A link to a picture, as users have them."""
    pixels = colours(rng)
    kept = path.with_name(f".{path.stem}-kept.png")
    Image.fromarray(pixels).save(kept)
    path.symlink_to(kept.name)
    return "right", pixels


PLACES: dict[str, Maker] = {
    "to-nothing.png": linked("nowhere"),
    "loop.png": linked("SELF"),
    "to-zeros.png": linked("/dev/zero"),
    "to-stdin.png": linked("/dev/stdin"),
    "to-memory.png": linked("/proc/self/mem"),
    "to-terminal.png": linked("/dev/tty"),
    "to-itself.npy": linked("/proc/self/fd/0"),
    "through.png": _through,
    "pipe.png": _fifo,
    "pipe.npy": _fifo,
    "socket.png": _socket,
    "zeros-device.png": _device(stat.S_IFCHR, 5),
    "disk-device.png": _device(stat.S_IFBLK, 0),
    "locked.png": _locked,
}


# ---- damage ----

ORIGINALS: dict[str, tuple[str, dict]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 90}),
    ".webp": ("WEBP", {"lossless": True}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {"compression": "tiff_lzw"}),
    ".ppm": ("PPM", {}),
    ".npy": ("", {}),
}
DAMAGES = ("cut", "flipped", "zeroed", "longer", "doubled", "scattered")
SUMMED = (".png",)
"""Formats with checksums, which detect any change of pixels."""


def damaged(suffix: str, how: str) -> Maker:
    def make(path: Path, rng: Random) -> Verdict:
        pixels = colours(rng)
        name, options = ORIGINALS[suffix]
        if name:
            data = bytearray(encoded(Image.fromarray(pixels), name, **options))
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # JPEG changes them
        else:
            buffer = io.BytesIO()
            np.save(buffer, pixels)
            data = bytearray(buffer.getvalue())
        path.write_bytes(damage(bytes(data), how, rng))
        return ("same", pixels) if suffix in SUMMED or how in ("cut", "longer") else ANY

    return make


def damage(data: bytes, how: str, rng: Random) -> bytes:
    """Return damaged bytes, at random positions."""
    changed = bytearray(data)
    first, last = sorted(rng.sample(range(len(data) + 1), 2))
    if how == "cut":
        return data[: rng.choice([first, len(data) - rng.randint(1, 8), rng.randint(1, 64)])]
    if how == "longer":
        return data + rng.randbytes(rng.randint(1, 100))
    if how == "doubled":
        return data[:last] + data[first:]
    if how == "zeroed":
        changed[first:last] = bytes(last - first)
    for _ in range({"flipped": 1, "scattered": rng.randint(2, 40)}.get(how, 0)):
        # prefer the header, where damage matters more than in pixels
        place = rng.randrange(rng.choice([len(data), min(len(data), 128)]))
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def kinds() -> dict[str, Maker]:
    """Return all kinds of hostile files."""
    broken = {f"{how}{suffix}": damaged(suffix, how) for suffix in ORIGINALS for how in DAMAGES}
    return {**PNGS, **OTHERS, **ARRAYS, **FOREIGN, **foreign(), **PLACES, **broken}
