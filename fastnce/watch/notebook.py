"""The display of a run in a notebook: progress and the newest samples, in one output that changes."""

from __future__ import annotations

import base64
import html
import io
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from torch import Tensor

from ..engine.callbacks import Callback, RunInfo
from ..engine.log import clock
from .report import NAME
from .tracking import strip

EVERY = 0.25
"""Seconds between changes of the display, at least. Samples and the end are shown at once."""

HIDDEN = {"epoch", "lr", "pictures", "images_per_second", "data_share", "skipped_steps", "warnings", "response"}
"""Values of a log line that are not shown among the losses."""

NARROWEST = 96
"""Pixels of a column of samples, at least, so that its caption fits. Smaller images are enlarged."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython is not imported for it."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None  # IPython on a terminal has none


def report_link(folder: Path) -> str:
    """A link to a run's report, as HTML; empty if there is none.

    The address is relative where the run lies below the working folder: a notebook's page may open files there only.
    """
    file = (folder / NAME).resolve()
    if not file.is_file():
        return ""
    here = Path.cwd().resolve()
    address = quote(file.relative_to(here).as_posix()) if file.is_relative_to(here) else file.as_uri()
    return f'<a href="{html.escape(address)}" target="_blank">{html.escape(str(folder / NAME))}</a>'


class NotebookCallback(Callback):
    """Shows a run below the cell that trains it. Needs IPython, which every notebook has."""

    optional = True

    def __init__(self) -> None:
        self._run: RunInfo | None = None
        self._handle: Any = None
        self._step, self._state, self._changed = 0, "", 0.0
        self._values: dict[str, float] = {}
        self._measured: dict[str, float] = {}
        self._warning = ""
        self._columns: dict[str, str] = {}
        self._width = NARROWEST
        self._since: tuple[float, int] | None = None

    def begin(self, run: RunInfo) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self._run, self._step = run, run.step
        self._handle = display(HTML(self._page()), display_id=True)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._step = step
        self._since = self._since or (time.monotonic(), step)  # the first steps are slower
        measured = {name: value for name, value in values.items() if name.startswith("held_out_")}
        if measured:
            self._measured = measured
        else:
            self._values = values
        self._change(time.monotonic() - self._changed >= EVERY)

    def samples(self, step: int, pictures: dict[str, Tensor]) -> None:
        self._step = step
        self._columns = {name: _jpeg(column) for name, column in pictures.items()}
        self._width = max([NARROWEST, *(column.shape[3] for column in pictures.values())])
        self._change(True)

    def warn(self, step: int, sentence: str) -> None:
        self._warning = f"step {step:,}: {sentence}"
        self._change(True)

    def end(self, step: int, state: str, reason: str) -> None:
        self._step, self._state = step, f"{state}: {reason}" if reason else state
        self._change(True)

    def _change(self, now: bool) -> None:
        if now and self._handle is not None:
            self._changed = time.monotonic()
            self._handle.update(self._html(self._page()))

    def _page(self) -> str:
        run = self._run
        assert run is not None
        head = [f"step {self._step:,} of {run.total:,}"]
        if "epoch" in self._values:
            head.insert(0, f"epoch {self._values['epoch']:g}")
        if "images_per_second" in self._values:
            head.append(f"{self._values['images_per_second']:.1f} images/s")
        if self._state:
            head.append(self._state)
        elif left := self._left():
            head.append(left)
        losses = {n: v for n, v in self._values.items() if n not in HIDDEN and not n.startswith("identity_")}
        held_out = {name.removeprefix("held_out_"): v for name, v in self._measured.items() if name[-7:] != "seconds"}
        lines = [
            f"<b>{html.escape(str(run.folder))}</b>: {html.escape(', '.join(head))}",
            f'<progress value="{self._step}" max="{max(run.total, 1)}" style="width:100%"></progress>',
            html.escape("  ".join(f"{name} {value:.3f}" for name, value in losses.items())),
            html.escape("held out: " + "  ".join(f"{n} {v:.3f}" for n, v in held_out.items()) if held_out else ""),
            html.escape(f"warning: {self._warning}" if self._warning else ""),
            report_link(run.folder),
        ]
        columns = [
            f'<figure style="margin:0"><figcaption>{html.escape(name)}</figcaption>'
            f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{content}" style="width:100%"></figure>'
            for name, content in self._columns.items()
        ]
        if columns:
            grid = f"display:grid;gap:8px;grid-template-columns:repeat(auto-fill,{self._width}px)"
            lines.append(f'<div style="{grid}">{"".join(columns)}</div>')
        return "".join(f"<div>{line}</div>" for line in lines if line)

    def _left(self) -> str:
        """The time left, at the pace since the first log line; empty as long as there is no pace."""
        assert self._run is not None
        begun, first = self._since or (0.0, self._step)
        if self._step <= first:
            return ""
        pace = (time.monotonic() - begun) / (self._step - first)
        return f"{clock(pace * max(self._run.total - self._step, 0))} left"


def _jpeg(pictures: Tensor) -> str:
    """The images of one name above each other, as base64 of a JPEG file."""
    packed = io.BytesIO()
    Image.fromarray(strip(pictures, axis=0)).save(packed, format="JPEG", quality=90)
    return base64.b64encode(packed.getvalue()).decode()
