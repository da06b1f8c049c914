"""Open picture files: accepted formats, the size limit, and the facts in a file's header."""

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..common.gathered import warn_of_file
from . import tiff
from .limit import DataError, pixel_limit, too_large

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")  # only these: for EPS, for example, PIL runs a program
EXIF_ORIENTATION = 0x0112
LOST = "16-bit colour is read at 8 bits (PIL keeps the high byte; .npy files keep 16)"
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True)
class Head:
    """Facts about a picture that are known before decoding.

    Args:
        height, width: after the orientation is applied.
        bits: of the decoded array, 8 or 16.
        raw: PIL's name for the stored samples, such as "RGB;16B".
        lost: 16-bit samples are read at 8 bits.
        inverted: 16-bit grey in which 0 is white. PIL does not invert it.
    """

    height: int
    width: int
    bits: int
    raw: str
    lost: bool
    inverted: bool


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Convert every error of a decoder into a DataError of one sentence that names the file."""
    try:
        status = path.stat()
        _check_regular(path, status.st_mode)
        if status.st_size == 0:
            raise DataError(f"{path} is empty (0 bytes)")
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except Image.DecompressionBombError as error:
        raise DataError(too_large(path, int(re.findall(r"\d+", str(error))[0]))) from error
    except Exception as error:  # decoders raise almost any error on damaged content: SyntaxError, struct.error, ...
        raise DataError(f"{path} cannot be decoded: {str(error) or type(error).__name__}") from error


def regular_file(path: Path) -> io.BufferedReader:
    """Open a regular file for reading. Opening a pipe or reading a device could wait forever, so these are refused.

    Raises:
        DataError: the path is not a regular file.
        OSError: the file cannot be opened.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(path, os.fstat(number).st_mode)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in KINDS if test(mode)), "something else")
        raise DataError(f"{path} is {kind}, not a file that holds a picture")


@contextmanager
def opened(path: Path) -> Iterator[tuple[Image.Image, Head]]:
    """Open a picture without decoding it; yield it with its `Head`.

    PIL gets a file object instead of a name, because it memory-maps files that it opens by name, and TIFF files with a
    wrong size.

    Raises:
        DataError: the format or kind is not supported.
    """
    limit = pixel_limit()
    with path.open("rb") as file:
        if limit is not None and (pixels := _webp_pixels(file.read(30))) > limit:
            raise DataError(too_large(path, pixels))
        if why := tiff.refusal_of_head(file):
            raise DataError(f"{path} {why}")
        file.seek(0)
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            why = tiff.refusal_of_file(file)
            if not why:
                why = "is not a picture that can be read: it holds no PNG, JPEG, WebP, BMP, TIFF, PPM or PGM"
            raise DataError(f"{path} {why}") from None
        with image:
            yield image, _head(image, path)


def decoded(path: Path) -> tuple[Image.Image, Head]:
    """Decode a picture and apply its orientation. A transparent colour is scaled like the pixels.

    Raises:
        DataError: see `opened`; or the content disagrees with the header.
    """
    with opened(path) as (image, head):
        if head.lost:
            warn_of_file(LOST, path)
        _mend_transparency(image, head, path)
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.size != (head.width, head.height):
        found = f"{upright.width}x{upright.height}"
        raise DataError(f"{path} was decoded to {found} pixels, but its header says {head.width}x{head.height}")
    if upright.mode == "La":  # no other function converts this mode
        upright = upright.convert("LA")
    return upright, head


def alpha_of(image: Image.Image) -> np.ndarray | None:
    """Return a decoded picture's alpha as (height, width) uint8; None if it has no transparency."""
    if not image.has_transparency_data:
        return None
    key = image.info.get("transparency")
    if isinstance(key, int) and (image.mode in ("1", "L") or image.mode.startswith("I")):
        # One transparent grey: PIL compares it with 8-bit values, and some versions compare bits wrongly.
        return np.where(np.asarray(image) == (bool(key) if image.mode == "1" else key), 0, 255).astype(np.uint8)
    return np.asarray(image.convert("RGBA").getchannel("A"))


def _webp_pixels(head: bytes) -> int:
    """Pixels of a WebP file's canvas, else 0. Some versions of PIL allocate the canvas before they check its size."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0
    if head[12:16] == b"VP8X":
        return (int.from_bytes(head[24:27], "little") + 1) * (int.from_bytes(head[27:30], "little") + 1)
    if head[12:16] == b"VP8L":
        sides = int.from_bytes(head[21:25], "little")
        return ((sides & 0x3FFF) + 1) * ((sides >> 14 & 0x3FFF) + 1)
    return (int.from_bytes(head[26:28], "little") & 0x3FFF) * (int.from_bytes(head[28:30], "little") & 0x3FFF)


def _head(image: Image.Image, path: Path) -> Head:
    tiles = getattr(image, "tile", [])
    raw = str(tiles[0][3]) if tiles else ""  # read before decoding, which empties the list
    width, height = image.size
    lost = not image.mode.startswith("I") and ";16" in raw
    inverted = False
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if why := tiff.refusal(tags):
            raise DataError(f"{path} {why}")
        width, height = tags[tiff.WIDTH], tags[tiff.HEIGHT]  # only some versions of PIL have already rotated the size
        deep, photometric = tiff.bits_of(tags) == 16, tags[tiff.PHOTOMETRIC]
        lost = deep and photometric not in (tiff.WHITE_IS_ZERO, tiff.GREY)
        inverted = deep and photometric == tiff.WHITE_IS_ZERO
    elif image.format == "PPM" and image.mode == "RGB":
        largest = re.findall(r"\d+", raw)  # the name contains the largest value
        lost = bool(largest) and int(largest[-1]) > 255
    if image.mode == "F":
        raise DataError(f"{path} holds 32-bit floats; 8 and 16 bit integers are read")
    if _exif(image).get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
        width, height = height, width
    return Head(height, width, 16 if image.mode.startswith("I") else 8, raw, lost, inverted)


def _exif(image: Image.Image) -> Image.Exif:
    """Return the EXIF data. PIL decodes any PNG first, as EXIF may follow the pixels; here only if a chunk follows."""
    file = getattr(image, "fp", None)
    if image.format != "PNG" or file is None or "exif" in image.info:
        return image.getexif()
    here = file.tell()
    file.seek(8)
    kinds: set[bytes] = set()
    while len(chunk := file.read(8)) == 8 and chunk[4:] != b"IEND":
        if chunk[4:] == b"IDAT" or kinds:
            kinds.add(chunk[4:])
        file.seek(int.from_bytes(chunk[:4]) + 4, os.SEEK_CUR)
    file.seek(here)
    return Image.Image.getexif(image) if kinds == {b"IDAT"} else image.getexif()


def _mend_transparency(image: Image.Image, head: Head, path: Path) -> None:
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None:
        return
    if head.raw in ("L;2", "L;4"):  # PIL scales the pixels to 8 bits, but not the transparent grey
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[head.raw]
    elif image.mode == "RGB" and head.lost:
        del image.info["transparency"]
        warn_of_file("a transparent colour has 16 bits and is ignored (PIL reads 8 of them)", path)
