"""Show what a run has learned: pictures over time, an unpicked grid, curves, tables and facts.

    python -m experiments.showcase runs/fastcut --data horse2zebra --out docs/results/fastcut-horse2zebra
    python -m experiments.showcase runs/fastcut --data horse2zebra --out OUT --page docs/results.md

Reads a run that trains, stopped or finished, and writes to OUT:

strip.jpg        the first test pictures, and their translations at up to seven steps (the run's sample grids)
grid.jpg         input and output of the first 16 test pictures in sorted order, with the newest checkpoint
losses.svg       each loss over the steps as logged (pale) and smoothed; the measures of checkpoints.csv
metrics.csv      every line of metrics.jsonl
checkpoints.csv  the newest checkpoint and those that the run keeps: step, and measures that compare the translations
                 of all test pictures with the target domain
facts.json       machine, versions, seed, command, steps, images, speed, hours, parameters

Of a run of single pictures (SinCUT), strip.jpg and grid.jpg show the whole picture, its translations and the target.
With `--page`, a section of a Markdown page shows them. It is made once, and replaced from then on.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a script

from benchmarks.machine import facts as machine_facts
from experiments.curves import Series, draw_curves
from experiments.run_facts import GRID, check_page, facts_of, table_of, write_section
from experiments.set_measures import set_measures
from experiments.sheets import Cell, draw_sheet, jpeg, to_image
from fastnce.api import Run
from fastnce.common.writing import check_folder, write_whole
from fastnce.data.folder import Folder, domain_folders, load_image
from fastnce.data.target import SINGLE
from fastnce.engine.stored import follow, kept_epochs, step_of
from fastnce.translate.load import load_translator
from fastnce.translate.translator import Translator
from fastnce.watch.charts import groups, title_of
from fastnce.watch.reading import check_is_run, stored_config
from fastnce.watch.series import Metrics
from fastnce.watch.strips import layout

MOMENTS, STRIP_ROWS, PAIRS_PER_ROW = 7, 4, 4
WHOLE_SIDE, WHOLE_PER_ROW = 400, 3
"""Of a run of single pictures: the longest side in a sheet in pixels, and the cells of a row."""
FILES = ("strip.jpg", "grid.jpg", "losses.svg", "metrics.csv", "checkpoints.csv", "facts.json")


@dataclass(frozen=True)
class Pictures:
    """The pictures to translate, and those of the target domain.

    side: (height, width) that they are resized to, or an int; None keeps their size.
    """

    inputs: Folder
    targets: Folder
    channels: int
    side: int | tuple[int, int] | None

    @property
    def single(self) -> bool:
        return self.side is None

    def input(self, place: int) -> torch.Tensor:
        """(channels, height, width) in [-1, 1]."""
        return load_image(self.inputs.file(place), self.channels, self.side)

    def target(self, place: int) -> torch.Tensor:
        return load_image(self.targets.file(place), self.channels, self.side)


def find_pictures(data: Path, config: dict[str, Any], channels: int) -> Pictures:
    """The test pictures of a data set, or the two pictures of a single-picture run.

    Test pictures are resized to the side of the run's crops, as the run's own samples are.

    Raises:
        ValueError: there are none.
    """
    stored = config.get("data", {})
    single = stored.get("preprocess") == SINGLE
    a, b = domain_folders(data, "train" if single else "test", stored.get("direction", "AtoB"))
    crop = stored.get("crop_size", 256)
    side = None if single else crop if isinstance(crop, int) else (crop[0], crop[1])
    return Pictures(a, b, channels, side)


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints that a run keeps of its epochs, and its newest one, by step in ascending order.

    Raises:
        ValueError: there is none yet.
    """
    folder = run / "checkpoints"
    pointers = [*(folder / f"epoch-{epoch}" for epoch in kept_epochs(run)), folder / "latest"]
    found = {step: path for path in map(follow, pointers) if (step := step_of(path)) is not None}
    if not found:
        raise ValueError(f"{run} has no checkpoint yet: wait for its first one (run.save_every), then show it again")
    return dict(sorted(found.items()))


def spread_evenly(steps: Sequence[int], most: int) -> list[int]:
    """Choose `most` of the steps at even distances, with the first and the last; all if there are fewer."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def sampled(run: Run, pictures: Pictures, rows: int) -> dict[int, list[tuple[Image.Image, Image.Image]]]:
    """Inputs and outputs of up to `rows` rows of some sample grids by step, at even distances.

    They lose the margin that a grid adds to the smaller one of its two domains. Grids that have no columns A and fake_B
    are left out.
    """
    height, width = pictures.input(0).shape[1:]
    grids = {int(match[1]): path for path in run.samples if (match := re.fullmatch(r"step-(\d+)", path.stem))}
    found = {}
    for step in spread_evenly(sorted(grids), MOMENTS):
        with Image.open(grids[step]) as grid:
            grid.load()  # the layout may stand behind the pixels
            boxes = {(box.column, box.row): box.area for box in layout(grid.info.get("fastnce"), grid.size)}
            cut = {
                (column, row): grid.crop((left, top, min(right, left + width), min(low, top + height))).convert("RGB")
                for (column, row), (left, top, right, low) in boxes.items()
                if row < rows
            }
        pairs = [(cut["A", i], cut["fake_B", i]) for i in range(rows) if {("A", i), ("fake_B", i)} <= cut.keys()]
        if pairs:
            found[step] = pairs
    return found


def translated(model: Translator, pictures: Pictures, count: int) -> list[tuple[Image.Image, Image.Image]]:
    """The first `count` pictures, each with its translation."""
    inputs = [pictures.input(place) for place in range(min(count, len(pictures.inputs)))]
    return [(to_image(picture), to_image(model(picture[None])[0])) for picture in inputs]


def over_time(run: Run, kept: dict[int, Path], pictures: Pictures, newest: Translator) -> dict[int, list[Any]]:
    """Inputs and outputs by step: of the sample grids if there are two, else of the checkpoints."""
    rows = 1 if pictures.single else STRIP_ROWS
    if len(found := sampled(run, pictures, rows)) > 1:
        return found
    last = max(kept)
    return {
        step: translated(newest if step == last else load_translator(kept[step]), pictures, rows)
        for step in spread_evenly(list(kept), MOMENTS)
    }


def draw_strip(moments: dict[int, list[Any]], pictures: Pictures) -> Image.Image:
    """The inputs, then a column per step. Of single pictures: input, steps and target from left to right, in rows."""
    labels = [f"step {step:,}" for step in moments]
    outputs = [[pair[1] for pair in pairs] for pairs in moments.values()]
    inputs = [pair[0] for pair in next(iter(moments.values()))]
    if pictures.single:
        cells = [Cell("input", inputs[0]), *map(Cell, labels, (column[0] for column in outputs))]
        return whole_sheet([*cells, Cell("target", to_image(pictures.target(0)))])
    rows = range(min(len(inputs), *map(len, outputs)))
    heads = ["input", *labels]
    return draw_sheet(
        [
            [
                Cell(head if row == 0 else "", column[row])
                for head, column in zip(heads, [inputs, *outputs], strict=True)
            ]
            for row in rows
        ]
    )


def draw_grid(pairs: Sequence[tuple[Image.Image, Image.Image]], pictures: Pictures) -> Image.Image:
    """Four pairs of input and output per row, in the order of the pictures. Of single pictures, the target is third."""
    if pictures.single:
        cells = [Cell("input", pairs[0][0]), Cell("output", pairs[0][1])]
        return whole_sheet([*cells, Cell("target", to_image(pictures.target(0)))])
    rows = []
    for first in range(0, len(pairs), PAIRS_PER_ROW):
        heads = ("input", "output") if first == 0 else ("", "")
        chosen = pairs[first : first + PAIRS_PER_ROW]
        rows.append([Cell(head, picture) for pair in chosen for head, picture in zip(heads, pair, strict=True)])
    return draw_sheet(rows)


def whole_sheet(cells: Sequence[Cell]) -> Image.Image:
    """Pictures of any size, made small, three per row."""
    small = []
    for label, picture in cells:
        picture = picture.copy()
        picture.thumbnail((WHOLE_SIDE, WHOLE_SIDE), Image.Resampling.LANCZOS)
        small.append(Cell(label, picture))
    return draw_sheet([small[i : i + WHOLE_PER_ROW] for i in range(0, len(small), WHOLE_PER_ROW)])


def draw_losses(run: Path, rows: Sequence[dict[str, Any]], title: str) -> str:
    """The losses of metrics.jsonl, and each column of checkpoints.csv that is a measure."""
    metrics = Metrics(run / "metrics.jsonl")
    metrics.update()
    curves = {name: metrics.curves[name].thinned(400) for name in groups([metrics])["losses"]}
    series = [Series(title_of(name), curve.last.tolist(), curve.mean.tolist()) for name, curve in curves.items()]
    for name in [name for name in rows[0] if name != "step"]:
        series.append(Series(name, [row["step"] for row in rows], [row[name] for row in rows]))
    return draw_curves(series, title)


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV; a column for every key, in order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def show(folder: Path, data: Path, out: Path, *, measure: bool = True) -> dict[str, Any]:
    """Write the files of a run to `out`, and return its facts. Nothing is written unless everything could be made.

    Raises:
        ValueError: it is no run, has no checkpoint, or there are no test pictures.
    """
    check_is_run(folder)
    check_folder(out, ", ".join(FILES))
    kept = checkpoints(folder)
    run, config = Run(folder, max(kept)), stored_config(folder)
    model = load_translator(kept[run.steps])
    pictures = find_pictures(data, config, model.channels)
    strip = draw_strip(over_time(run, kept, pictures, model), pictures)
    grid = draw_grid(translated(model, pictures, GRID), pictures)
    facts = facts_of(run, config, model)
    facts["pictures"] = {"inputs": len(pictures.inputs), "targets": len(pictures.targets), "side": pictures.side}
    rows: list[dict[str, Any]] = [{"step": step} for step in kept]
    if measure and pictures.side is not None:
        domains = (pictures.inputs, pictures.targets)
        measures, untranslated = set_measures(kept.values(), *domains, model.channels, pictures.side)
        rows = [row | measure for row, measure in zip(rows, measures, strict=True)]
        facts["measures_of_the_inputs"] = untranslated
    drawn = machine_facts(torch.device("cpu"))
    facts["drawn"] = {key: drawn[key] for key in ("date", "commit", "fastnce", "torch", "python", "cpu")}
    title = f"{facts['method']}, {data.resolve().name}, {facts['steps']:,} steps"
    texts = {
        "losses.svg": draw_losses(folder, rows, title),
        "metrics.csv": csv_text(run.metrics),
        "checkpoints.csv": csv_text(rows),
        "facts.json": json.dumps(facts, indent=1, ensure_ascii=False) + "\n",
    }
    files = {"strip.jpg": jpeg(strip), "grid.jpg": jpeg(grid)} | {name: text.encode() for name, text in texts.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(out / name, content)
    return facts


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, write the files and print the facts; return 2 after a user's mistake."""
    description = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(prog="python -m experiments.showcase", description=description)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with testA and testB; of SinCUT: trainA, trainB"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="show the run in a section of this page")
    parser.add_argument("--title", default="", help="of a new section; default: METHOD on DATA")
    parser.add_argument("--no-measures", action="store_true", help="do not compare the sets, which takes minutes")
    args = parser.parse_args(arguments)
    try:
        if args.page is not None:
            check_page(args.page, args.out)
        facts = show(args.run, args.data, args.out, measure=not args.no_measures)
        if args.page is not None:
            title = args.title or f"{facts['method']} on {args.data.resolve().name}"
            write_section(args.page, args.out, title, facts)
    except (ValueError, OSError) as error:
        print(f"showcase: {error}", file=sys.stderr)
        return 2
    print(table_of(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
