"""Write pictures: what each format holds, and files that appear whole or not at all."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..common.writing import write_whole
from .folder import SUFFIXES
from .opening import DataError


def save_image(image: torch.Tensor, path: str | os.PathLike[str]) -> None:
    """Write (channels, height, width) in [-1, 1] as 8 bits, rounded to nearest; the suffix says the format.

    Values outside are clipped and NaN becomes the darkest value. 1, 3 and 4 channels go to any format that has them,
    any number to ``.npy``. JPEG is written at quality 95, WebP without loss. The file appears whole or not at all.

    Raises:
        DataError: the shape or the suffix does not fit.
        OSError: the disk is full or may not be written; it names the file, and nothing is left behind.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if image.ndim != 3:
        raise DataError(f"save_image takes (channels, height, width), not a tensor of shape {tuple(image.shape)}")
    if not image.numel():
        raise DataError(f"{path}: a picture of shape {tuple(image.shape)} has no pixels to write")
    if suffix not in SUFFIXES:
        raise DataError(f"{path} ends with {suffix or 'no suffix'}; a picture can be written as {', '.join(SUFFIXES)}")
    if suffix != ".npy" and image.shape[0] not in (1, 3, 4):
        raise DataError(f"{image.shape[0]} channels cannot be written as {suffix}; .npy takes any number")
    scaled = torch.nan_to_num(image.detach().float().add(1).mul(127.5), nan=0.0).round().clamp(0, 255)
    pixels = scaled.to(torch.uint8).permute(1, 2, 0).cpu().contiguous().numpy()  # (H, W, C)
    content = encoded(pixels, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def encoded(pixels: np.ndarray | Image.Image, path: Path, **options: Any) -> bytes:
    """A picture file's content, in the format that the suffix of `path` names.

    In memory: PIL does not notice when a disk takes only a part of what it writes, and NumPy does not say why.

    Args:
        pixels: (height, width, channels) of any dtype that the format holds, or a picture; ``.npy`` takes arrays.
        options: as the format's writer takes them, besides JPEG's quality 95 and WebP without loss.

    Raises:
        DataError: the format cannot hold it.
    """
    suffix = path.suffix.lower()
    packed = io.BytesIO()
    if suffix == ".npy":
        np.save(packed, np.asarray(pixels))
        return packed.getvalue()
    if suffix in (".jpg", ".jpeg"):
        options = {"quality": 95, **options}
    elif suffix == ".webp":
        options = {"lossless": True, **options}
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    try:
        pixels.save(packed, Image.registered_extensions()[suffix], **options)
    except (KeyError, ValueError, OSError, OverflowError) as error:
        raise DataError(f"{path}: {error}") from error
    return packed.getvalue()
