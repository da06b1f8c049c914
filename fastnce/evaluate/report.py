"""Measure a paired or unpaired test set and write the results as JSON, CSV and a contact sheet.

fastnce evaluate RUN --data TEST --json scores.json --sheet sheet.png
fastnce evaluate --inputs-only --data TEST --json inputs.json
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..common.gathered import gathering
from ..common.writing import check_not_replaced, sweep, write_whole
from ..data import DataError, find_images, load_image
from .distribution import fid_kid, require_fidelity
from .pairs import Pair, find_pairs
from .quality import KEYS, DerainingMetrics, to_levels

Translate = Callable[[Tensor], Tensor]
"""(1, channels, height, width) in [-1, 1] to the same size."""
SHEET_ROWS, SHEET_SIDE, DIFFERENCE_GAIN = 12, 320, 4


@dataclass
class Report:
    """The results of `evaluate`.

    Args:
        data: the test set.
        mean: of psnr_y, ssim_y, psnr_rgb, ssim_rgb over the pictures; fid, kid, kid_std if requested.
        inputs: the same means for the untranslated pictures; empty for an unpaired set.
        pictures: "name" and the four measures of each picture; empty for an unpaired set.
    """

    data: str
    mean: dict[str, float]
    inputs: dict[str, float]
    pictures: list[dict[str, Any]]

    def as_json(self) -> str:
        """Format `data`, `mean`, `inputs` and `pictures` as JSON. Infinity (equal pictures) becomes the text "inf"."""
        found = {"data": self.data, "mean": self.mean, "inputs": self.inputs, "pictures": self.pictures}
        return json.dumps(_finite(found), indent=1, ensure_ascii=False) + "\n"

    def as_csv(self) -> str:
        """Format one line per picture, then the means."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", *KEYS])
        for row in [*self.pictures, {"name": "mean", **self.mean}]:
            writer.writerow([row["name"], *(f"{row[key]:.6f}" for key in KEYS)])
        return text.getvalue()

    def summary(self) -> str:
        """Format the results as one line for the terminal."""
        parts = []
        if self.pictures:
            m = self.mean
            parts.append(f"{len(self.pictures)} pictures: {_line(m)}")
            if self.inputs and self.inputs != {key: m[key] for key in KEYS}:
                parts.append(f"(inputs: {_line(self.inputs)})")
        if "fid" in self.mean:
            parts.append(f"FID {self.mean['fid']:.2f}, KID {self.mean['kid']:.5f} +- {self.mean['kid_std']:.5f}")
        return "  ".join(parts)


def _line(m: dict[str, float]) -> str:
    return f"Y {m['psnr_y']:.2f} dB / {m['ssim_y']:.4f}, RGB {m['psnr_rgb']:.2f} dB / {m['ssim_rgb']:.4f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@gathering()
def evaluate(
    data: str | os.PathLike[str],
    translate: Translate | None = None,
    *,
    rain_side: str = "right",
    channels: int = 3,
    device: torch.device | str = "cpu",
    fid: bool = False,
    json_file: str | os.PathLike[str] | None = None,
    csv_file: str | os.PathLike[str] | None = None,
    sheet: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure a test set. Files are written only after everything has been measured.

    Args:
        data: a paired set (see `find_pairs`), or a folder with testA and testB for FID alone.
        translate: the model; None measures the inputs themselves.
        rain_side: the half of strips that is rainy, "right" or "left".
        channels: of the model's input.
        device: where the measures are computed.
        fid: also compute FID and KID between outputs and truths (or testB); needs torch-fidelity.
        json_file, csv_file, sheet: files to write: all results, one line per picture, and a contact sheet (PNG).
        progress: called with a sentence after each picture.

    Raises:
        ValueError: the set or a picture cannot be used (`DataError`), a file cannot be written, or torch-fidelity is
            missing.
    """
    data = Path(data)
    json_file, csv_file, sheet = (None if file is None else Path(file) for file in (json_file, csv_file, sheet))
    files = [file for file in (json_file, csv_file, sheet) if file is not None]
    _check_writable(files)
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet {sheet}: the contact sheet is a PNG, name it {sheet.stem}.png")
    if fid:
        require_fidelity()
    drawn = b""
    if (data / "testA").is_dir() and (data / "testB").is_dir():
        if not fid or csv_file or sheet:
            raise DataError(
                f"{data} holds testA and testB, which are not paired: measure them with --fid and --json only (PSNR, "
                f"SSIM, --csv and --sheet need pairs, such as rain/ and norain/)"
            )
        _check_kept(files, [*find_images(data / "testA"), *find_images(data / "testB")], translate)
        report = _unpaired(data, translate, channels, device, progress)
    else:
        pairs = find_pairs(data, rain_side)
        _check_kept(files, [file for pair in pairs for file in (pair.rainy, pair.clean)], translate)
        report = _paired(data, pairs, translate, channels, device, fid, progress)
        if sheet is not None:
            drawn = _sheet(pairs, report.pictures, translate, channels)
    try:
        for file, text in ((json_file, report.as_json), (csv_file, report.as_csv)):
            if file is not None:  # bytes of a file name that are not Unicode become \\udcXX, which JSON can read back
                write_whole(file, text().encode("utf-8", "backslashreplace"))
        if sheet is not None:
            write_whole(sheet, drawn)
    except OSError as error:  # the message includes the results, so that a full disk does not lose an hour's work
        raise OSError(error.errno, f"{error.strerror}; measured: {report.summary()}", error.filename) from error
    return report


def _check_writable(files: list[Path]) -> None:
    """Raise ValueError, before anything is measured, for files that cannot be written."""
    for file in files:
        folder = file.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"{file}: there is no folder {folder} to write it into")
        if file.is_dir():
            raise ValueError(f"{file} is a folder; name a file in it")
        if not os.access(file if file.exists() and not file.is_file() else folder, os.W_OK):
            raise ValueError(f"{file} cannot be written: {folder} allows no new files")
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise ValueError(f"the reports need different files, not {', '.join(map(str, files))}")


def _check_kept(files: list[Path], pictures: list[Path], translate: Translate | None) -> None:
    """Raise ValueError if a report would replace a picture or the model; remove leftovers of killed processes."""
    check_not_replaced(files, [*pictures, *getattr(translate, "sources", ())])
    for folder in {file.absolute().parent for file in files}:
        sweep(folder)


def _paired(
    data: Path,
    pairs: list[Pair],
    translate: Translate | None,
    channels: int,
    device: torch.device | str,
    fid: bool,
    progress: Callable[[str], None] | None,
) -> Report:
    metrics, inputs = DerainingMetrics(), DerainingMetrics()
    pictures: list[dict[str, Any]] = []
    made: list[Tensor] = []
    real: list[Tensor] = []
    for pair in pairs:
        rainy, clean = (picture[None] for picture in pair.load(channels))
        output = rainy if translate is None else translate(rainy)
        (row,) = metrics.update(output.to(device), clean.to(device))
        if translate is not None:
            inputs.update(rainy.to(device), clean.to(device))
        pictures.append({"name": pair.name, **row})
        if fid:
            made.append(_for_inception(output))
            real.append(_for_inception(clean))
        if progress is not None:
            progress(f"{len(pictures)}/{len(pairs)} {pair.name}: {_line(row)}")
    mean = metrics.compute()
    before = mean if translate is None else inputs.compute()
    if fid:
        mean = {**mean, **fid_kid(made, real, device)}
    return Report(str(data), mean, before, pictures)


def _unpaired(
    data: Path,
    translate: Translate | None,
    channels: int,
    device: torch.device | str,
    progress: Callable[[str], None] | None,
) -> Report:
    made: list[Tensor] = []
    sources = find_images(data / "testA")
    for count, file in enumerate(sources, 1):
        picture = load_image(file, channels)[None]
        made.append(_for_inception(picture if translate is None else translate(picture)))
        if progress is not None:
            progress(f"{count}/{len(sources)} {file.name}")
    real = [_for_inception(load_image(file, channels)[None]) for file in find_images(data / "testB")]
    return Report(str(data), fid_kid(made, real, device), {}, [])


def _for_inception(picture: Tensor) -> Tensor:
    if not torch.isfinite(picture).all():
        raise ValueError("the generator's output is not finite, so it has no FID")
    return to_levels(picture[0]).to(torch.uint8).expand(3, -1, -1).cpu()


def _sheet(pairs: list[Pair], pictures: list[dict[str, Any]], translate: Translate | None, channels: int) -> bytes:
    """Draw a PNG of input, output, truth and difference of up to 12 pictures, from the lowest PSNR on Y up."""
    order = sorted(range(len(pairs)), key=lambda i: pictures[i]["psnr_y"])
    count = min(SHEET_ROWS, len(order))
    chosen = [order[round(i * (len(order) - 1) / max(count - 1, 1))] for i in range(count)]
    rows: list[tuple[str, list[Image.Image]]] = []
    for index in chosen:
        rainy, clean = (picture[None] for picture in pairs[index].load(channels))
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
