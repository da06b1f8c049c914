"""Measure a paired or unpaired test set and write the results as JSON, CSV and a contact sheet.

fastnce evaluate RUN --data TEST --json scores.json --sheet sheet.png
fastnce evaluate --inputs-only --data TEST --json inputs.json

Of a run, the last and the best checkpoint are measured if they differ: `fastnce translate RUN` uses the last, papers
report the best.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.gathered import gathering
from ..common.messages import counted
from ..common.writing import check_not_replaced, sweep, write_whole
from ..data import DataError, find_images, load_image
from ..data.folder import check_phase, order_of
from .features import FRECHET, KERNEL
from .gallery import Gallery
from .networks import INCEPTION, LITE0, Comparison, load_networks
from .pairs import Pair, find_pairs
from .quality import KEYS, DerainingMetrics
from .sheet import Translate, draw_sheet


@dataclass(repr=False)
class Report:
    """The results of `evaluate`.

    Args:
        data: the test set.
        mean: of psnr_y, ssim_y, psnr_rgb, ssim_rgb over the pictures; if requested, also fid, kid, kid_std,
            frechet_lite0 and kernel_lite0.
        inputs: the same means for the untranslated pictures; empty for an unpaired set.
        pictures: "name" and the four measures of each picture; empty for an unpaired set.
        checkpoint: which one of a run was measured, "last", "best" or "best and last"; empty if nothing else is known.
        step: of that checkpoint.
        best: the results of the run's best checkpoint, if it was measured too and is not this one.
    """

    data: str
    mean: dict[str, float]
    inputs: dict[str, float]
    pictures: list[dict[str, Any]]
    checkpoint: str = ""
    step: int | None = None
    best: Report | None = None

    def __repr__(self) -> str:
        """The data and the summary: all numbers of many pictures are too long for a screen."""
        return f"Report({self.data}: {self.summary()})".replace("\n", "; ")

    def as_json(self) -> str:
        """Format all results as JSON. Infinity (equal pictures) becomes the text "inf".

        The keys are `data`, `mean`, `inputs` and `pictures`; for a checkpoint of a run also `checkpoint` and `step`;
        and `best`, with `step`, `mean` and `pictures`, if there is one.
        """
        found: dict[str, Any] = {"data": self.data}
        if self.checkpoint:
            found |= {"checkpoint": self.checkpoint, "step": self.step}
        found |= {"mean": self.mean, "inputs": self.inputs, "pictures": self.pictures}
        if self.best is not None:
            found["best"] = {"step": self.best.step, "mean": self.best.mean, "pictures": self.best.pictures}
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
        """Format the results as one line for the terminal, or two with a best checkpoint."""
        if self.best is not None:
            return f"{replace(self, best=None).summary()}\n{self.best.summary()}"
        parts = [] if self.step is None else [f"{self.checkpoint} (step {self.step:,}):"]
        if self.pictures:
            m = self.mean
            parts.append(f"{counted(len(self.pictures), 'picture')}: {_line(m)}")
            if self.inputs and self.inputs != {key: m[key] for key in KEYS}:
                parts.append(f"(inputs: {_line(self.inputs)})")
        if "fid" in self.mean:
            parts.append(f"FID {self.mean['fid']:.2f}, KID {self.mean['kid']:.5f} +- {self.mean['kid_std']:.5f}")
        if FRECHET in self.mean:
            parts.append(f"{FRECHET} {self.mean[FRECHET]:.2f}, {KERNEL} {self.mean[KERNEL]:.5f}")
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
    best: Translate | None = None,
    rain_side: str = "right",
    direction: str = "",
    channels: int = 3,
    device: torch.device | str = "cpu",
    fid: bool = False,
    features: bool = False,
    feature_weights: str | os.PathLike[str] = "",
    checkpoint: str = "",
    steps: tuple[int | None, int | None] = (None, None),
    json_file: str | os.PathLike[str] | None = None,
    csv_file: str | os.PathLike[str] | None = None,
    sheet: str | os.PathLike[str] | None = None,
    gallery: Gallery | None = None,
    num: int = 0,
    phase: str = "test",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure a test set. Files are written only after everything has been measured.

    Args:
        data: a paired set (see `find_pairs`), or a folder with testA and testB for `fid` and `features` alone.
        translate: the model; None measures the inputs themselves.
        best: the best checkpoint of the same run, to be measured too. `Report.best` has its results.
        rain_side: the half of strips that is rainy, "right" or "left".
        direction: "AtoB"; or "BtoA" to translate testB, or the truths of pairs, and to compare with the others. Empty:
            that of the model's run.
        channels: of the model's input.
        device: where the measures are computed.
        fid: also compute FID and KID between outputs and truths (or testB); needs torch-fidelity.
        features: also compute frechet_lite0 and kernel_lite0 between these; see `FeatureDistance`.
        feature_weights: the file of Inception weights for `fid`; empty: torch-fidelity's own place.
        checkpoint: `Report.checkpoint` of `translate`.
        steps: of the checkpoints `translate` and `best`.
        json_file, csv_file, sheet: files to write: all results, one line per picture, and a contact sheet (PNG); the
            last two of `translate` only.
        gallery: also write the inputs, outputs of `translate`, and truths, with a page.
        num: measure so many pictures at most, the first in the order of their names; 0 takes all. Of testB all count.
        phase: the folders of an unpaired set are `phase`A and `phase`B.
        progress: called with a sentence after each picture.

    Raises:
        ValueError: the set or a picture cannot be used (`DataError`), a file cannot be written, or a package
            or its weights are missing.
    """
    data = Path(data)
    json_file, csv_file, sheet = (None if file is None else Path(file) for file in (json_file, csv_file, sheet))
    files = [file for file in (json_file, csv_file, sheet) if file is not None]
    _check_writable(files)
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet {sheet}: the contact sheet is a PNG, name it {sheet.stem}.png")
    exchanged = [
        order_of(direction or getattr(translate, kind, "AtoB")) == "BA" for kind in ("direction", "paired_direction")
    ]
    check_phase(phase, f"--phase {phase}")
    side_a, side_b = (data / f"{phase}{domain}" for domain in ("BA" if exchanged[0] else "AB"))
    unpaired = side_a.is_dir() and side_b.is_dir()
    if phase != "test" and not unpaired:
        raise DataError(f"{data} has no {phase}A and {phase}B, which --phase {phase} names")
    if unpaired and (not (fid or features) or csv_file or sheet):
        raise DataError(
            f"{data} holds {phase}A and {phase}B, which are not paired: add --fid or --features, without --csv and "
            f"--sheet (these, PSNR and SSIM need pairs, such as rain/ and norain/)"
        )
    measures = (*(INCEPTION if fid else ()), *(LITE0 if features else ()))
    sets = Comparison(load_networks(measures, device, feature_weights)) if measures else None
    drawn = b""
    pairs: list[Pair] = []
    names: list[str] = []
    lone: tuple[list[Path], list[Path]] = ([], [])
    if sets is not None and unpaired:
        lone = find_images(side_a)[: num or None], find_images(side_b)
        names = [file.relative_to(side_a).with_suffix("").as_posix() for file in lone[0]]
        taken = [*lone[0], *lone[1]]
    else:
        pairs = find_pairs(data, rain_side)[: num or None]
        pairs = [pair.exchanged() for pair in pairs] if exchanged[1] else pairs
        names = [pair.name for pair in pairs]
        taken = [file for pair in pairs for file in (pair.rainy, pair.clean)]
    if gallery is not None:
        _check_apart(gallery.out, data, taken)
        files = [*files, gallery.page, *(file for name in names for file in gallery.files(name))]
    for model in (translate, best):
        _check_kept(files, taken, model)

    def measure(model: Translate | None, name: str) -> Report:
        def told(sentence: str) -> None:
            if progress is not None:
                progress(f"{name}: {sentence}" if best is not None else sentence)

        shown = gallery if model is translate else None
        if sets is not None and unpaired:
            return _unpaired(data, lone, names, model, channels, sets, told, shown)
        return _paired(data, pairs, model, channels, device, sets, told, shown)

    report = replace(measure(translate, checkpoint), checkpoint=checkpoint, step=steps[0])
    if best is not None:
        report.best = replace(measure(best, "best"), checkpoint="best", step=steps[1])
    if sheet is not None:
        drawn = draw_sheet(pairs, report.pictures, translate, channels)
    try:
        for file, text in ((json_file, report.as_json), (csv_file, report.as_csv)):
            if file is not None:  # bytes of a file name that are not Unicode become \\udcXX, which JSON can read back
                write_whole(file, text().encode("utf-8", "backslashreplace"))
        if sheet is not None:
            write_whole(sheet, drawn)
        if gallery is not None:
            gallery.write(names)
    except OSError as error:  # the message includes the results, so that a full disk does not lose an hour's work
        measured = report.summary().replace("\n", "; ")
        raise OSError(error.errno, f"{error.strerror}; measured: {measured}", error.filename) from error
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


def _check_apart(out: Path, data: Path, pictures: list[Path]) -> None:
    """Raise ValueError if pictures written below `out` would be measured by the next evaluation of `data`."""
    own = f"{os.path.realpath(out)}{os.sep}"
    for picture in pictures:
        parts = picture.relative_to(data).parts if picture.is_relative_to(data) else ()
        folder = data / parts[0] if len(parts) > 1 else picture.parent
        if own.startswith(f"{os.path.realpath(folder)}{os.sep}"):
            raise ValueError(f"{out} is in {folder}, whose pictures are measured: write to another place")


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
    sets: Comparison | None,
    progress: Callable[[str], None],
    gallery: Gallery | None,
) -> Report:
    metrics, inputs = DerainingMetrics(), DerainingMetrics()
    made_channels = getattr(translate, "out_channels", channels)
    pictures: list[dict[str, Any]] = []
    made: list[Tensor] = []
    for pair in pairs:
        rainy, clean = (picture[None] for picture in pair.load(channels, made_channels))
        output = rainy if translate is None else translate(rainy)
        if gallery is not None:
            _show(gallery, pair.name, rainy, output, clean)
        (row,) = metrics.update(output.to(device), clean.to(device))
        if translate is not None:
            if made_channels != channels:  # the inputs are measured as pictures of the truth's kind
                rainy = pair.load(made_channels)[0][None]
            inputs.update(rainy.to(device), clean.to(device))
        if sets is not None:
            made.append(sets.features(output))
            if len(sets.reference) < len(pairs):
                sets.reference.append(sets.features(clean))
        pictures.append({"name": pair.name, **row})
        progress(f"{len(pictures)}/{len(pairs)} {pair.name}: {_line(row)}")
    mean = metrics.compute()
    before = mean if translate is None else inputs.compute()
    if sets is not None:
        mean = {**mean, **sets.measure(made)}
    return Report(str(data), mean, before, pictures)


def _unpaired(
    data: Path,
    files: tuple[list[Path], list[Path]],
    names: list[str],
    translate: Translate | None,
    channels: int,
    sets: Comparison,
    progress: Callable[[str], None],
    gallery: Gallery | None,
) -> Report:
    made: list[Tensor] = []
    sources, others = files
    for count, file in enumerate(sources, 1):
        picture = load_image(file, channels)[None]
        output = picture if translate is None else translate(picture)
        if gallery is not None:
            other = load_image(others[(count - 1) % len(others)], output.shape[1])[None]
            _show(gallery, names[count - 1], picture, output, other)
        made.append(sets.features(output))
        progress(f"{count}/{len(sources)} {file.name}")
    if not sets.reference:
        made_channels = getattr(translate, "out_channels", channels)
        sets.reference = [sets.features(load_image(file, made_channels)[None]) for file in others]
    return Report(str(data), sets.measure(made), {}, [])


def _show(gallery: Gallery, name: str, *pictures: Tensor) -> None:
    """Write the input, the output and the truth of one picture."""
    for which, picture in enumerate(pictures):
        gallery.save(name, which, picture[0])
