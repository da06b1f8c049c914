"""The contact sheet of a test set: input, output, truth and their difference."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .pairs import Pair
from .quality import to_levels

Translate = Callable[[Tensor], Tensor]
"""(1, channels, height, width) in [-1, 1] to the same size."""
SHEET_ROWS, SHEET_SIDE, DIFFERENCE_GAIN = 12, 320, 4


def draw_sheet(pairs: list[Pair], pictures: list[dict[str, Any]], translate: Translate | None, channels: int) -> bytes:
    """Draw a PNG of input, output, truth and difference of up to 12 pictures, from the lowest PSNR on Y up.

    Args:
        pairs: of the test set.
        pictures: "name" and the measures of each, in the same order.
        translate: the model; None draws the inputs themselves.
        channels: of the model's input.
    """
    order = sorted(range(len(pairs)), key=lambda i: pictures[i]["psnr_y"])
    count = min(SHEET_ROWS, len(order))
    chosen = [order[round(i * (len(order) - 1) / max(count - 1, 1))] for i in range(count)]
    rows: list[tuple[str, list[Image.Image]]] = []
    made_channels = getattr(translate, "out_channels", channels)
    for index in chosen:
        rainy, clean = (picture[None] for picture in pairs[index].load(channels, made_channels))
        output = rainy if translate is None else translate(rainy)
        apart = (to_levels(output) - to_levels(clean)).abs() * DIFFERENCE_GAIN
        levels = [to_levels(rainy), to_levels(output), to_levels(clean), apart.clamp(max=255)]
        row = pictures[index]
        name = row["name"].encode("utf-8", "backslashreplace").decode()
        title = f"{name}: {row['psnr_y']:.2f} dB / {row['ssim_y']:.4f} on Y"
        rows.append((title, [_thumbnail(picture) for picture in levels]))
    margin, line = 6, 14
    names = ("input", "output", "truth", f"|output - truth| x {DIFFERENCE_GAIN}")
    widths = [max(row[1][column].width for row in rows) for column in range(4)]
    height = line + sum(line + row[1][0].height + margin for row in rows)
    canvas = Image.new("RGB", (sum(widths) + 5 * margin, height + margin), "white")
    draw = ImageDraw.Draw(canvas)
    lefts = [margin + sum(widths[:column]) + column * margin for column in range(4)]
    for left, name in zip(lefts, names, strict=True):
        draw.text((left, 1), name, fill="black")
    top = line
    for title, thumbnails in rows:
        draw.text((margin, top), title, fill="black")
        for left, thumbnail in zip(lefts, thumbnails, strict=True):
            canvas.paste(thumbnail, (left, top + line))
        top += line + thumbnails[0].height + margin
    packed = io.BytesIO()
    canvas.save(packed, format="PNG")
    return packed.getvalue()


def _thumbnail(levels: Tensor) -> Image.Image:
    pixels = levels[0].expand(3, -1, -1).to(torch.uint8).permute(1, 2, 0).cpu().contiguous().numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
    return image
