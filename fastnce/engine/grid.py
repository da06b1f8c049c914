"""Sample grids: one PNG with a column per name and a row per image."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

from ..common.writing import write_whole

KEYWORD = "fastnce"
"""Of the PNG's text chunk that says where its columns and rows are."""


def save_grid(pictures: dict[str, Tensor], path: Path, margin: int = 4) -> None:
    """Write a PNG with one column per name and one row per image.

    A text chunk `fastnce` holds {"columns": [{"name", "left", "width"}, ...], "rows": [{"top", "height"}, ...]} in
    pixels, so that programs can take the grid apart.

    Args:
        pictures: by name, (images, channels, height, width) in [-1, 1]. With 3 or more channels, the first three are
            shown as RGB; else the first one.
    """
    header = 14
    rows = max(column.shape[0] for column in pictures.values())
    height = max(column.shape[2] for column in pictures.values())
    lefts, left = [], margin
    for column in pictures.values():
        lefts.append(left)
        left += column.shape[3] + margin
    tops = [header + row * (height + margin) for row in range(rows)]
    canvas = Image.new("RGB", (left, header + rows * (height + margin) + margin), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for (name, column), left in zip(pictures.items(), lefts, strict=True):
        draw.text((left, 1), name, fill=(0, 0, 0))
        for picture, top in zip(column, tops, strict=False):
            canvas.paste(_to_image(picture), (left, top))
    columns = [
        {"name": name, "left": left, "width": column.shape[3]}
        for (name, column), left in zip(pictures.items(), lefts, strict=True)
    ]
    text = PngImagePlugin.PngInfo()
    text.add_text(KEYWORD, json.dumps({"columns": columns, "rows": [{"top": t, "height": height} for t in tops]}))
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    canvas.save(packed, format="PNG", pnginfo=text)
    write_whole(path, packed.getvalue())


def _to_image(picture: Tensor) -> Image.Image:
    channels = picture[:3] if picture.shape[0] >= 3 else picture[:1].expand(3, -1, -1)
    values = channels.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round()
    return Image.fromarray(values.permute(1, 2, 0).numpy().astype(np.uint8))
