"""The command line in Python: train, load and evaluate in three lines.

run = fastnce.train("fastcut", data="DIR", out="runs/mine", **{"data.batch": 4})
model = fastnce.load("runs/mine")
dusk = model.translate(PIL.Image.open("day.jpg"))
print(fastnce.evaluate(model, "TEST").summary())
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .common.messages import counted, shown
from .config.resolve import resolve
from .engine.callbacks import Callback, RunInfo, StopTraining
from .engine.choices import pick_device
from .engine.history import read_history, read_lines
from .engine.loop import TrainingFailed
from .evaluate.report import Report
from .evaluate.report import evaluate as measure
from .training.continuing import apply_changes, continue_config
from .training.run import train_run
from .translate.chosen import CHECKPOINTS, last_and_best, step_loaded
from .translate.load import load_translator
from .translate.named import locate
from .translate.translator import Tiles, Translator
from .watch.notebook import NotebookCallback, in_notebook, report_link

__all__ = ["Callback", "Run", "RunInfo", "StopTraining", "TrainingFailed", "evaluate", "load", "train"]


class Run:
    """A run's folder, after training or later.

    Args:
        folder: the run.
        steps: steps done.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: int):
        self.folder, self.steps = Path(folder), steps

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl as dicts: "step", each loss by its name, "lr", "held_out_psnr_y" and so on."""
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def history(self) -> list[dict[str, Any]]:
        """What happened, as `fastnce.engine.history` describes: starts, warnings, changes and ends."""
        return read_history(self.folder)

    @property
    def samples(self) -> list[Path]:
        """The sample grids, oldest first."""
        return sorted((self.folder / "samples").glob("step-*.png"))

    @property
    def report(self) -> Path:
        """The report that a browser shows; it is there unless `run.report` is off."""
        return self.folder / "report.html"

    def load(self, checkpoint: str = "latest", **options: Any) -> Translator:
        """The model of the newest checkpoint, or of the best one with `checkpoint="best"`; `options` as for `load`."""
        return load(self.folder / "checkpoints" / checkpoint, **options)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {counted(self.steps, 'step')})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the folder, the steps, and a link to the report, or else the newest sample grid."""
        link = report_link(self.folder)
        shown = f"<p>{html.escape(str(self.folder))}: {counted(self.steps, 'step')}{', ' if link else ''}{link}</p>"
        if self.samples and not link:
            content = base64.b64encode(self.samples[-1].read_bytes()).decode()
            shown += f'<img alt="samples" style="max-width:100%" src="data:image/png;base64,{content}">'
        return shown


def train(
    method: str = "",
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback | Callable[..., Any]] = (),
    change: Mapping[str, Any] | None = None,
    quiet: bool = False,
    trust_code: bool = False,
    **options: Any,
) -> Run:
    """Train a method, as `fastnce train` does; the same call continues the run.

    One training runs at a time in a process; it may run in a thread. Under `torchrun`, every process makes this call.
    In a notebook, the cell shows the progress and the newest samples.

    Args:
        method: "cut", "fastcut", "sincut", "cyclegan", "dclgan", "simdcl", "dcdgan", ... or "mypaper.py:MyMethod".
            Without it and `config`, the run in `out` continues with the configuration that is stored in it.
        data: the folder with trainA and trainB.
        out: the folder of the run.
        config: a TOML file, as for `fastnce train --config`.
        callbacks: watch the run: instances of `Callback`, or functions (step, values). One that raises `StopTraining`
            ends the run cleanly. A single one needs no list.
        change: values with which a run continues from now on, such as {"optim.lr": 1e-4}; its history records them.
        quiet: print nothing, and show nothing in a notebook.
        trust_code: without `method`, import the user's own code that the stored configuration names.
        options: values by key, such as **{"data.batch": 4, "run.steps": 10_000}. `fastnce train METHOD --dry-run`
            lists them all.

    Returns:
        the run.

    Raises:
        ValueError: an option, the images or the folder cannot be used; the message says what would be right.
        TrainingFailed: training cannot go on.
    """
    if not out:
        raise ValueError('fastnce.train needs out="RUN", the folder of the run')
    for name, place in (("data", data), ("out", out), ("config", config), ("data.dir", options.get("data.dir"))):
        if place is not None and not isinstance(place, str | os.PathLike):
            raise ValueError(f"{name} must be a path, not {shown(place)}")
    if isinstance(callbacks, Callback) or callable(callbacks):
        callbacks = [callbacks]
    if not isinstance(callbacks, Iterable):
        raise ValueError(f"callbacks must be a list of callbacks, not {shown(callbacks)}")
    if change is not None and not isinstance(change, Mapping):
        raise ValueError(f'change must be a dict such as {{"optim.lr": 1e-4}}, not {shown(change)}')
    if data is not None:
        if os.fspath(options.get("data.dir", data)) != os.fspath(data):
            raise ValueError(f"data={os.fspath(data)} and data.dir={options['data.dir']} differ: give one of them")
        options["data.dir"] = os.fspath(data)
    change = change or {}
    if method or config is not None:
        resolved = resolve(method, None if config is None else Path(config), values=options)
        changes = apply_changes(resolved, Path(out), change)
    else:
        resolved, changes = continue_config(Path(out), change, options, trust_code=trust_code)
    if not (resolved.data.dir or resolved.data.dataset):
        raise ValueError('fastnce.train needs data="DIR", the folder with trainA and trainB')
    display = [NotebookCallback()] if in_notebook() and not quiet else []
    watching = [*callbacks, *display]
    return Run(out, train_run(resolved, out, quiet=quiet or bool(display), callbacks=watching, changes=changes))


def load(
    source: str | os.PathLike[str] | Run,
    device: str | torch.device = "auto",
    *,
    generator: str = "",
    tiles: Tiles = "auto",
    tile_size: int = 1024,
    trust_code: bool = False,
) -> Translator:
    """Load a trained model; its method `translate` takes a PIL image, a NumPy array or a tensor.

    Args:
        source: a run (its folder, or what `train` returned), a checkpoint's folder, an exported folder, a published
            `.pth` file, or the name of a model that comes with the package: "derain".
        device: "auto" is the first accelerator, else the CPU.
        generator, tiles, tile_size, trust_code: see `fastnce.translate.load_translator`.

    Raises:
        ValueError: there is no such run or file, or it does not contain a usable generator.
    """
    return load_translator(
        source.folder if isinstance(source, Run) else source,
        pick_device(str(device)),
        generator,
        tiles=tiles,
        tile_size=tile_size,
        trust_code=trust_code,
    )


def evaluate(
    model: Translator | str | os.PathLike[str] | Run | None,
    data: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    **options: Any,
) -> Report:
    """Measure a model on a test set, as `fastnce evaluate` does.

    Args:
        model: what `load` returns, or what it takes; None measures the inputs themselves.
        data: a paired test set, or a folder with testA and testB (see `fastnce.evaluate.pairs.find_pairs`).
        checkpoint: of a run: "best", "last" or "both"; None: both where they differ.
        options: see `fastnce.evaluate.report.evaluate`, such as fid=True or sheet="sheet.png".

    Returns:
        the report: `mean`, `inputs`, `pictures`, `summary()`; `best` has the best checkpoint if it is measured too.

    Raises:
        ValueError: the model, the set or a picture cannot be used.
    """
    if model is None or isinstance(model, Translator):
        if checkpoint is not None:
            raise ValueError(f'checkpoint="{checkpoint}" chooses between the checkpoints of a run: give the run')
        if model is not None:
            options = {"channels": model.channels, "device": model.device, **options}
        return measure(data, model, **options)
    if checkpoint not in (None, *CHECKPOINTS):
        raise ValueError(f"checkpoint must be one of {', '.join(CHECKPOINTS)}, not {checkpoint!r}")
    place = model.folder if isinstance(model, Run) else locate(model)
    last, best, name = last_and_best(place, load, checkpoint)
    steps = (step_loaded(last) if name else None, step_loaded(best))
    known = {"channels": last.channels, "device": last.device, "best": best, "checkpoint": name, "steps": steps}
    return measure(data, last, **{**known, **options})
