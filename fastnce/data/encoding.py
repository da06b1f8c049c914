"""Encode images and write them to files atomically."""

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
    """Write an image (channels, height, width) in [-1, 1] with 8 bits, in the format that the suffix names.

    Values are rounded to nearest; values outside [-1, 1] are clipped and NaN becomes -1. Images of 1, 3 or 4 channels
    can be written in every format that supports them, others only as ``.npy``. JPEG is written at quality 95, WebP
    without loss. The file appears complete or not at all.

    Raises:
        DataError: the shape or the suffix does not fit.
        OSError: the disk is full or cannot be written. The error names the file, and no partial file is left.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if image.ndim != 3:
        raise DataError(f"save_image takes (channels, height, width), not a tensor of shape {tuple(image.shape)}")
    if not image.numel():
        raise DataError(f"{path}: an image of shape {tuple(image.shape)} has no pixels to write")
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
    """Encode an image as the content of a file, in the format that the suffix of `path` names.

    The content is encoded in memory, because PIL does not notice a disk that takes only a part of it, and NumPy does
    not report the reason.

    Args:
        pixels: (height, width, channels) of any dtype that the format supports, or a PIL image; ``.npy`` takes arrays.
        options: of the format's writer. They override quality 95 for JPEG and lossless WebP.

    Raises:
        DataError: the format cannot hold the image.
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
