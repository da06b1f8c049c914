"""Translate a picture of any kind: PIL, NumPy or a tensor in, the same kind out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..common.imports import first_line
from ..common.messages import shown
from ..data.opening import alpha_of

PEAKS = {torch.uint8: 255, torch.uint16: 65535}
"""The largest value of each whole-number dtype that a picture may have."""
Translate = Callable[[Tensor], Tensor]
"""(images, channels, height, width) in [-1, 1] to the same."""


def translate_picture(translate: Translate, picture: Any, channels: int, out_channels: int) -> Any:
    """Translate one picture, or a batch of them as a tensor, and return the same kind.

    Args:
        translate: the model.
        picture: see `Translator.translate`.
        channels, out_channels: of the model's input and output.

    Raises:
        ValueError: the kind, dtype, shape or range does not fit.
    """
    if isinstance(picture, Image.Image):
        try:
            picture.load()
            upright = ImageOps.exif_transpose(picture)
        except Exception as error:  # decoders raise almost any error on damaged content
            raise ValueError(f"the picture cannot be decoded: {first_line(error)}") from error
        return _pil(translate, upright, channels, out_channels)
    if isinstance(picture, np.ndarray):
        return _array(translate, picture, channels, out_channels)
    if isinstance(picture, Tensor):
        return _tensor(translate, picture, channels)
    raise ValueError(f"a picture must be a PIL image, a NumPy array or a tensor, not {shown(picture)}")


def _pil(translate: Translate, upright: Image.Image, channels: int, out_channels: int) -> Image.Image:
    if channels not in (1, 3) or out_channels not in (1, 3):
        raise ValueError(f"this model takes {channels} channels and makes {out_channels}: use an array or a tensor")
    if upright.mode == "La":  # no other function converts this mode
        upright = upright.convert("LA")
    alpha = alpha_of(upright)
    if upright.mode == "F":
        raise ValueError("a PIL image of floats has no known range: use a NumPy array of floats in [-1, 1]")
    if upright.mode.startswith("I"):  # 16 bits of grey
        values = np.asarray(upright)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"a PIL image of mode {upright.mode} must have values from 0 to 65535")
        grey = values.astype(np.uint16)
        made = _levels(translate, np.repeat(grey[:, :, None], channels, axis=2))
        if out_channels == 1:
            return Image.fromarray(made[:, :, 0])  # uint16 becomes I;16
        return Image.fromarray((made / 257).round().astype(np.uint8))  # PIL has no colour of 16 bits
    upright.info.pop("transparency", None)  # kept as alpha; PIL would search for this colour when converting
    colour = upright.convert("RGB" if channels == 3 else "L")
    made = _levels(translate, np.atleast_3d(np.asarray(colour)))
    image = Image.fromarray(made[:, :, 0] if out_channels == 1 else made)
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    if "icc_profile" in upright.info and colour.mode == upright.mode.removesuffix("A") == image.mode.removesuffix("A"):
        image.info["icc_profile"] = upright.info["icc_profile"]
    return image


def _levels(translate: Translate, levels: np.ndarray) -> np.ndarray:
    """Translate (height, width, channels) of uint8 or uint16."""
    tensor = torch.from_numpy(np.array(levels)).permute(2, 0, 1)  # a copy, because PIL's pixels are read-only
    return _whole(translate, tensor[None])[0].permute(1, 2, 0).contiguous().numpy()


def _array(translate: Translate, picture: np.ndarray, channels: int, out_channels: int) -> np.ndarray:
    flat = picture.ndim == 2
    if flat and not channels == out_channels == 1:
        raise ValueError(
            f"an array of shape {picture.shape} has one channel, and this model takes {channels} and makes "
            f"{out_channels}: give it (height, width, {channels})"
        )
    deep = picture[:, :, None] if flat else picture
    if deep.ndim not in (3, 4) or deep.shape[-1] != channels or 0 in deep.shape:
        raise ValueError(
            f"an array must be (height, width, {channels}) or (images, height, width, {channels}), not {picture.shape}"
        )
    try:
        tensor = torch.from_numpy(np.array(deep, dtype=deep.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise ValueError(f"an array must be uint8, uint16 or floats in [-1, 1], not {picture.dtype}") from None
    made = _tensor(translate, tensor.movedim(-1, -3), channels).movedim(-3, -1).contiguous().numpy()
    return made[:, :, 0] if flat else made


def _tensor(translate: Translate, picture: Tensor, channels: int) -> Tensor:
    if picture.dim() not in (3, 4) or picture.shape[-3] != channels or 0 in picture.shape:
        raise ValueError(
            f"a tensor must be ({channels}, height, width) or (images, {channels}, height, width), not "
            f"{tuple(picture.shape)}"
        )
    if picture.is_meta or picture.layout != torch.strided:
        raise ValueError("a tensor must be an ordinary one with values, not sparse or on the meta device")
    single = picture.dim() == 3
    pictures = picture.detach()[None] if single else picture.detach()
    if pictures.dtype in PEAKS:
        made = _whole(translate, pictures)
    elif pictures.is_floating_point():
        least, most = (float(limit) for limit in pictures.aminmax())  # NaN if any value is
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError("float pictures must lie in [-1, 1], and these hold NaN or infinity")
        if least >= 0 and most <= 1:  # hardly a photograph has no pixel darker than the middle
            warnings.warn(
                "these float pictures have values from 0 to 1 only, and floats are taken to lie in [-1, 1]: if 0 is "
                "black in them, give 2 * pictures - 1",
                stacklevel=2,
            )
        made = translate(pictures).to(pictures.dtype)
    else:
        raise ValueError(f"a tensor must be uint8, uint16 or floats in [-1, 1], not {pictures.dtype}")
    made = made.to(picture.device)
    return made[0] if single else made


def _whole(translate: Translate, pictures: Tensor) -> Tensor:
    """Translate (images, channels, height, width) of uint8 or uint16."""
    peak = PEAKS[pictures.dtype]
    made = translate(pictures.cpu().to(torch.float32).div_(peak / 2).sub_(1))
    if not torch.isfinite(made).all():
        raise ValueError("the generator's output is not finite")
    return ((made + 1) * (peak / 2)).round().clamp(0, peak).to(pictures.dtype)
