"""Picture files: find, decode and resize them.

PIL decodes PNG, JPEG, WebP, BMP, TIFF, PPM and PGM; other formats are refused, whatever the file name. A ``.npy`` file
holds an array (H, W) or (H, W, C) of uint8 or uint16, with any number of channels. Decoding a file:

- applies the EXIF orientation (the published loaders do not), and reads only the first of several frames;
- with ``channels=3``, repeats grey, looks up palettes and drops alpha;
- with ``channels=1``, converts colour to ITU-R 601 luma (PIL's mode L);
- with any other number of channels, requires that the file has this number.

16 bits are kept for grey PNG, TIFF and PGM and for ``.npy``. PIL reads 16-bit *colour* files, and grey files with
alpha, at 8 bits (the high byte of each sample; PPM is rounded). One warning says so; ``.npy`` keeps 16 bits of any
colour. TIFF is read as its tags define it: grey of either polarity with 1 to 16 bits, palettes, RGB and CMYK of 8 or 16
bits, YCbCr in JPEG. Files that PIL would misread are refused (see `tiff`).
"""

import os
import warnings
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .limit import DataError, pixel_limit, too_large
from .opening import Head, decoded, decoding, opened

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
DIRECTIONS = ("AtoB", "BtoA")
LONGEST_HEAD = 10_000  # bytes of a .npy header; NumPy refuses longer ones too, but allocates memory for them first


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Find every picture in a folder and its subfolders, sorted by path.

    Links are followed. Files and folders whose name begins with a dot are skipped. A warning names each folder that
    cannot be read for lack of permission.

    Raises:
        DataError: the folder is missing or cannot be listed.
    """
    top = Path(folder)
    return [top / name for name in sorted(name for name, _ in _scan(top))]


def _scan(top: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield (path below `top`, entry) of every picture, in the order of the disk."""
    if not top.is_dir():
        raise DataError(f"there is no folder {top}")
    visited: set[str] = set()
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        here = os.path.join(top, inside)
        real = os.path.realpath(here)
        if real in visited:  # a link to a parent folder would be followed forever
            continue
        visited.add(real)
        below = []
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        below.append(os.path.join(inside, entry.name))
                    elif entry.name.lower().endswith(SUFFIXES):
                        yield os.path.join(inside, entry.name), entry
        except PermissionError:  # such as lost+found, which belongs to root
            warnings.warn(f"no permission to read the folder {here}: its pictures are skipped", stacklevel=3)
        except OSError as error:
            raise DataError(f"the folder {here} cannot be listed: {error.strerror or error}") from error
        waiting += sorted(below, reverse=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


@dataclass(frozen=True, eq=False)
class Folder:
    """The pictures of one domain, sorted by path, in about 100 bytes per picture: there may be millions.

    Args:
        path: the folder.
        names: of the files, relative to the folder.
        sizes, times: (pictures,) int64 of bytes and of modification times in nanoseconds; -1 if unknown.
        first: these are the first so many of the folder's pictures; 0: all of them.
    """

    path: Path
    names: list[str]
    sizes: np.ndarray
    times: np.ndarray
    first: int = 0

    @classmethod
    def listed(cls, path: str | os.PathLike[str], limit: int = 0) -> "Folder":
        """List the pictures of a folder; raise DataError if it holds none.

        Args:
            limit: take the first so many; 0 takes all. As published, those of a folder come before those of its
                subfolders. Within one folder, the order is that of their names (published: the order of the disk).
        """
        path = Path(path)
        found: list[str] = []
        stats = array("q")
        for name, entry in _scan(path):
            found.append(name)
            try:
                stat = entry.stat()
                stats.extend((stat.st_size, stat.st_mtime_ns))
            except OSError:  # a broken link; decoding it will report the error
                stats.extend((-1, -1))
        if not found:
            raise DataError(f"there is no picture in {path} (looked for {', '.join(SUFFIXES)})")
        order = sorted(range(len(found)), key=found.__getitem__)
        if 0 < limit < len(found):
            order = sorted(sorted(order, key=lambda place: os.path.split(found[place]))[:limit], key=found.__getitem__)
        sizes, times = np.array(stats, np.int64).reshape(-1, 2)[order].T
        return cls(path, [found[place] for place in order], sizes, times, limit if limit < len(found) else 0)

    def __len__(self) -> int:
        return len(self.names)

    def file(self, place: int) -> Path:
        return self.path / self.names[place]

    def listing(self) -> list[tuple[str, int, int]]:
        """Return (name, bytes, time) of each picture. Names are relative, so that the folder may be moved."""
        names = [name.replace(os.sep, "/") for name in self.names]
        return list(zip(names, self.sizes.tolist(), self.times.tolist(), strict=True))

    def without(self, skipped: list[tuple[Path, str]]) -> "Folder":
        """Return this list without the skipped files."""
        gone = {file for file, _ in skipped}
        if not gone:
            return self
        kept = [place for place in range(len(self)) if self.file(place) not in gone]
        return Folder(self.path, [self.names[place] for place in kept], self.sizes[kept], self.times[kept], self.first)


def check_phase(phase: str, given: str) -> None:
    """Raise DataError if a phase leads out of the data set; `given` is what the user wrote, such as `--phase ..`."""
    if not is_phase(phase):
        raise DataError(f"{given} must begin the names of folders in the data set, such as train, not lead out of it")


def is_phase(phase: str) -> bool:
    """Whether `phase`A is a folder in the data set, such as trainA or night/A."""
    path = Path(phase)
    return not path.is_absolute() and ".." not in path.parts


def domain_folders(
    root: str | os.PathLike[str], phase: str, direction: str = "AtoB", limit: int = 0
) -> tuple[Folder, Folder]:
    """List `root`/{phase}A and {phase}B. For "test", list valA and valB if testA does not exist.

    Args:
        direction: "AtoB", or "BtoA" to return {phase}B as A and {phase}A as B.
        limit: take the first so many pictures of each; 0 takes all (see `Folder.listed`).

    Raises:
        DataError: the direction is neither; the phase leads out of `root`; or a folder is missing (the message names
            the content of `root`) or holds no picture.
    """
    check_phase(phase, f"phase={phase}")
    domains = order_of(direction)
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; it should hold {phase}A and {phase}B")
    if phase == "test" and not (root / "testA").exists() and (root / "valA").exists():
        phase = "val"
    for domain in "AB":
        if not (root / (phase + domain)).is_dir():
            names = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
            held = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise DataError(f"there is no folder {phase}{domain} in {root}, which holds {held or 'nothing'}")
    a, b = (Folder.listed(root / f"{phase}{domain}", limit) for domain in domains)
    return a, b


def order_of(direction: str) -> str:
    """Return which folders are A and B, as "AB" or "BA"; raise DataError for an unknown direction."""
    if direction not in DIRECTIONS:
        raise DataError(f"data.direction={direction} is none of {', '.join(DIRECTIONS)}")
    return "AB" if direction == "AtoB" else "BA"


def clean_folder(root: str | os.PathLike[str], phase: str, direction: str = "AtoB", limit: int = 0) -> Folder:
    """List the folder of B alone, as `domain_folders` does; raise DataError if it is missing or holds no picture."""
    check_phase(phase, f"phase={phase}")
    path = Path(root) / f"{phase}{order_of(direction)[1]}"
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; it should hold clean pictures to render rain on")
    return Folder.listed(path, limit)


def read_picture(path: str | os.PathLike[str], channels: int = 3) -> np.ndarray:
    """Decode one file.

    Returns:
        (height, width, channels) uint8, or uint16 if the file has 16 bits that can be kept.

    Raises:
        DataError: the file is missing, empty, truncated, too large or of an unsupported kind, or its channels do not
            match.
    """
    path = Path(path)
    with decoding(path):
        if path.suffix.lower() == ".npy":
            array = _map_array(path)
            return _match_array(np.array(array, array.dtype.newbyteorder("=")), channels, path)
        return match_channels(*decoded(path), channels, path)


def probe_picture(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Read (height, width, bits) of the array that `read_picture` would return, from a file's header; bits is 8 or 16.

    Raises:
        DataError: see `read_picture`, as far as the header shows the error.
    """
    path = Path(path)
    with decoding(path):
        if path.suffix.lower() == ".npy":
            array = _map_array(path)
            return array.shape[0], array.shape[1], 8 * array.dtype.itemsize
        with opened(path) as (_, head):
            return head.height, head.width, head.bits


def match_channels(image: Image.Image, head: Head, channels: int, path: Path) -> np.ndarray:
    """Convert a decoded picture to (height, width, channels) uint8 or uint16; raise DataError if that is impossible."""
    if head.bits == 16:
        array = np.asarray(image).astype(np.uint16)
        return _match_array(65535 - array if head.inverted else array, channels, path)
    if channels in (1, 3):
        image.info.pop("transparency", None)  # alpha is dropped; PIL would search for this colour when converting
        image = image.convert("L" if channels == 1 else "RGB")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    bands = len(image.getbands())
    if bands != channels:
        raise DataError(f"{path} has {bands} channels ({image.mode}), {_unlike(channels)}")
    return np.array(image).reshape(image.height, image.width, channels)


def _map_array(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        head = file.read(12)
    if head[:6] == b"\x93NUMPY" and head[6] > 1 and int.from_bytes(head[8:], "little") > LONGEST_HEAD:
        raise DataError(f"{path} cannot be decoded: its header claims {int.from_bytes(head[8:], 'little'):,} bytes")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    kinds = (np.uint8, np.uint16)  # of either byte order
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or array.dtype.newbyteorder("=") not in kinds:
        kind = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise DataError(f"{path} holds {kind}; it should hold uint8 or uint16 of shape (H, W) or (H, W, C)")
    if 0 in array.shape:
        raise DataError(f"{path} holds no pixels: its shape is {array.shape}")
    pixels, limit = array.shape[0] * array.shape[1], pixel_limit()
    if limit is not None and pixels > limit:
        raise DataError(too_large(path, pixels))
    return array


def _match_array(array: np.ndarray, channels: int, path: Path) -> np.ndarray:
    """Convert (H, W) or (H, W, C) to (H, W, channels) of the same dtype."""
    if array.ndim == 2:
        array = array[:, :, None]
    bands = array.shape[2]
    if bands == channels:
        return np.ascontiguousarray(array)
    if bands == 1 and channels == 3:
        return np.repeat(array, 3, axis=2)
    if bands == 3 and channels == 1:  # PIL's fixed-point luma, so that 8 bits agree with mode L
        luma = (array.astype(np.uint64) * np.array([19595, 38470, 7471], np.uint64)).sum(2, keepdims=True)
        return ((luma + 0x8000) >> 16).astype(array.dtype)
    raise DataError(f"{path} has {bands} channels, {_unlike(channels)}")


def _unlike(channels: int) -> str:
    fits = "; grey and colour of 8 or 16 bits can" if channels in (1, 3) else ""
    return f"which cannot be made to match the {channels} that the network takes (network.in_channels){fits}"


def resize_picture(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, C) with PIL's antialiased bicubic filter; uint8 is bit-equal to ``Image.resize``.

    Channels are resized separately (PIL would weight colours by alpha). 16-bit values are resized as floats, then
    rounded and clipped.
    """
    if picture.shape[:2] == (height, width):
        return picture
    if picture.dtype == np.uint8 and picture.shape[2] == 3:
        return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    planes = []
    for plane in np.moveaxis(picture, 2, 0):
        if picture.dtype == np.uint8:
            planes.append(
                Image.fromarray(np.ascontiguousarray(plane)).resize((width, height), Image.Resampling.BICUBIC)
            )
        else:
            real = Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
            planes.append(np.clip(np.rint(np.asarray(real)), 0, 65535))
    return np.stack([np.asarray(plane) for plane in planes], axis=2).astype(picture.dtype)


def load_image(
    path: str | os.PathLike[str], channels: int = 3, size: int | tuple[int, int] | None = None
) -> torch.Tensor:
    """Load a picture as float32 (channels, height, width) in [-1, 1].

    Args:
        path: a file of any format named at the top of this module.
        channels: 1, 3 or the file's own number.
        size: an int or (height, width) to resize to (bicubic); None keeps the picture's size.

    Raises:
        DataError: see `read_picture`.
    """
    picture = read_picture(path, channels)
    if size is not None:
        picture = resize_picture(picture, *pair("size", size))
    return as_tensor(picture)


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    """Convert (H, W, C) uint8 or uint16 to float32 (C, H, W) in [-1, 1]."""
    half = 127.5 if picture.dtype == np.uint8 else 32767.5
    return torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1).contiguous().div_(half).sub_(1)


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Convert an int or (height, width) to (height, width)."""
    sides = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise DataError(f"{name} should be a positive int or (height, width), not {value!r}")
    return sides[0], sides[1]
