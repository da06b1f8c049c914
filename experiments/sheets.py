"""Sheets of labelled pictures, as JPEG files of a limited size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastnce.evaluate.quality import to_levels

LARGEST = 300_000
"""Bytes of a sheet."""
MARGIN, LINE = 4, 16
QUALITIES = (92, 88, 84, 80, 75, 70, 60)
SMALLEST = 64
"""A sheet is not made narrower than so many pixels."""


class Cell(NamedTuple):
    """A picture, and the words above it."""

    label: str
    picture: Image.Image


def to_image(picture: Tensor) -> Image.Image:
    """Convert (channels, height, width) in [-1, 1] to RGB; of other channels than three, the first is shown in grey."""
    levels = to_levels(picture[None])[0]
    levels = levels if levels.shape[0] == 3 else levels[:1].expand(3, -1, -1)
    return Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).cpu().contiguous().numpy())


def draw_sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Draw rows of cells in columns. A row is as high as its highest picture, with a line for labels if it has any."""
    columns = max(len(row) for row in rows)
    widths = [max(row[i].picture.width for row in rows if i < len(row)) for i in range(columns)]
    heads = [LINE if any(cell.label for cell in row) else 0 for row in rows]
    heights = [max(cell.picture.height for cell in row) for row in rows]
    size = (sum(widths) + MARGIN * (columns + 1), sum(heads) + sum(heights) + MARGIN * (len(rows) + 1))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    top = MARGIN
    for row, head, height in zip(rows, heads, heights, strict=True):
        left = MARGIN
        for cell, width in zip(row, widths, strict=False):
            draw.text((left, top), cell.label, fill="black", font=font)
            sheet.paste(cell.picture, (left, top + head))
            left += width + MARGIN
        top += head + height + MARGIN
    return sheet


def jpeg(sheet: Image.Image, most: int = LARGEST) -> bytes:
    """Encode as JPEG of at most `most` bytes: with the highest quality that fits, else smaller.

    Raises:
        ValueError: it does not fit even with a width of 64 pixels.
    """
    while True:
        for quality in QUALITIES:
            packed = io.BytesIO()
            sheet.save(packed, "JPEG", quality=quality, optimize=True)
            if packed.tell() <= most:
                return packed.getvalue()
        width, height = (round(side * 0.85) for side in sheet.size)
        if width < SMALLEST or height < 1:
            raise ValueError(f"a sheet of {sheet.width}x{sheet.height} pixels does not fit into {most} bytes")
        sheet = sheet.resize((width, height), Image.Resampling.LANCZOS)
