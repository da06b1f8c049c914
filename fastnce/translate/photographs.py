"""Read and write photographs with the metadata that a translation keeps.

The EXIF orientation is applied when a file is read. Alpha is copied from the source, except with 16 bits, where PIL
cannot write it (a warning says so). A colour profile of less than 1 MiB is copied if it fits the written channels (RGB
or grey). Other metadata is dropped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..common.gathered import warn_of_file
from ..common.writing import write_whole
from ..data import load_image, save_image
from ..data.encoding import encoded
from ..data.folder import as_tensor, match_channels, probe_picture, resize_picture
from ..data.opening import alpha_of, decoded, decoding

ALPHA = (".png", ".webp", ".tif", ".tiff")
PROFILE = (".png", ".webp", ".tif", ".tiff", ".jpg", ".jpeg")
GREY_16 = (".png", ".tif", ".tiff")
LARGEST_PROFILE = 1 << 20  # bytes; PIL does not read a PNG with a larger one


@dataclass(frozen=True)
class Photograph:
    """A photograph read from a file.

    Args:
        pixels: (channels, height, width) float32 in [-1, 1].
        bits: of the file, 8 or 16.
        alpha: (height, width) uint8; None if the file has no transparency.
        profile: the ICC profile, if any.
    """

    pixels: Tensor
    bits: int = 8
    alpha: np.ndarray | None = None
    profile: bytes | None = None


def read_photograph(path: str | os.PathLike[str], channels: int, size: tuple[int, int] | None = None) -> Photograph:
    """Read a photograph; raise DataError as `load_image` does.

    Args:
        size: the (height, width) to resize to, with the bicubic filter of training; None keeps its size.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return Photograph(load_image(path, channels, size), probe_picture(path)[2])
    with decoding(path):
        image, head = decoded(path)
        alpha = alpha_of(image) if channels in (1, 3) else None
        profile = image.info.get("icc_profile")
        pixels = match_channels(image, head, channels, path)
        if size is not None:
            pixels = resize_picture(pixels, *size)
            alpha = None if alpha is None else resize_picture(alpha[:, :, None], *size)[:, :, 0]
        return Photograph(as_tensor(pixels), head.bits, alpha, profile)


def check_format(suffix: str, bits: int | None, channels: int) -> None:
    """Raise ValueError if this format cannot store `channels` channels with `bits` bits."""
    if bits not in (None, 8, 16):
        raise ValueError(f"bits must be 8 or 16, not {bits}")
    if bits == 16 and not _holds_16(suffix, channels):
        raise ValueError(
            f"16 bits cannot be written as {suffix.lstrip('.')} with {channels} channels (PIL writes them only for one "
            f"channel, as PNG or TIFF): take --format npy, which holds any number, or --bits 8"
        )


def _holds_16(suffix: str, channels: int) -> bool:
    return suffix == ".npy" or (suffix in GREY_16 and channels == 1)


def write_photograph(result: Tensor, path: str | os.PathLike[str], source: Photograph, bits: int | None = None) -> None:
    """Write an image (channels, height, width) in [-1, 1] with the alpha and the profile of its source.

    Args:
        result: the image.
        path: of the file; its suffix names the format.
        source: the photograph that was translated.
        bits: 8, 16, or None for the source's depth if the format supports it.

    Raises:
        DataError, OSError: see `save_image`. The file appears complete or not at all.
    """
    path = Path(path)
    suffix, channels = path.suffix.lower(), result.shape[0]
    deep = bits == 16 or (bits is None and source.bits == 16 and _holds_16(suffix, channels))
    alpha = source.alpha if suffix in ALPHA and channels in (1, 3) else None
    if bits is None and source.bits == 16 and not deep:
        warn_of_file("16 bits are written as 8 (PIL writes 16 only as grey PNG or TIFF; --format npy keeps them)", path)
    if deep and alpha is not None:
        alpha = None
        warn_of_file("16 bits are written without alpha, which PIL does not support (--bits 8 keeps it)", path)
    profile = source.profile if suffix in PROFILE and _fits(source.profile, channels) else None
    if profile is not None and len(profile) >= LARGEST_PROFILE:
        warn_of_file("a colour profile of 1 MiB or more is dropped", path)
        profile = None
    if not deep and alpha is None and profile is None:
        save_image(result, path)
        return
    peak, kind = (65535, np.uint16) if deep else (255, np.uint8)
    scaled = torch.nan_to_num(result.detach().float().add(1).mul(peak / 2), nan=0.0).round().clamp(0, peak)
    pixels = scaled.permute(1, 2, 0).cpu().numpy().astype(kind)  # (H, W, C)
    content = encoded(
        pixels if suffix == ".npy" else _compose(pixels, alpha, suffix), path, **_options(suffix, profile)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def _compose(pixels: np.ndarray, alpha: np.ndarray | None, suffix: str) -> Image.Image:
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if alpha is not None:
        if suffix == ".webp":  # WebP has no grey with alpha
            image = image.convert("RGB")
        image.putalpha(Image.fromarray(alpha))
    return image


def _options(suffix: str, profile: bytes | None) -> dict[str, Any]:
    options: dict[str, Any] = {"icc_profile": profile} if profile else {}
    if suffix == ".webp":
        options["exact"] = True
    return options


def _fits(profile: bytes | None, channels: int) -> bool:
    """Whether a profile fits this number of channels: bytes 16 to 19 of its header name the colour space."""
    return profile is not None and profile[16:20] == (b"GRAY" if channels == 1 else b"RGB ")
