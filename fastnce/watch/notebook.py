"""The display of a run in a notebook: progress and the newest samples, in one output that changes."""

from __future__ import annotations

import base64
import html
import io
import sys
import time
from typing import Any

from PIL import Image
from torch import Tensor

from ..engine.callbacks import Callback, RunInfo
from .tracking import strip

EVERY = 0.25
"""Seconds between changes of the display, at least. Samples and the end are shown at once."""

HIDDEN = {"epoch", "lr", "pictures", "images_per_second", "data_share", "skipped_steps", "warnings", "response"}
"""Values of a log line that are not shown among the losses."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython is not imported for it."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None  # IPython on a terminal has none


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

    def begin(self, run: RunInfo) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self._run, self._step = run, run.step
        self._handle = display(HTML(self._page()), display_id=True)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._step = step
        measured = {name: value for name, value in values.items() if name.startswith("held_out_")}
        if measured:
            self._measured = measured
        else:
            self._values = values
        self._change(time.monotonic() - self._changed >= EVERY)

    def samples(self, step: int, pictures: dict[str, Tensor]) -> None:
        self._step = step
        self._columns = {name: _jpeg(column) for name, column in pictures.items()}
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
        losses = {n: v for n, v in self._values.items() if n not in HIDDEN and not n.startswith("identity_")}
        held_out = {name.removeprefix("held_out_"): v for name, v in self._measured.items() if name[-7:] != "seconds"}
        lines = [
            f"<b>{html.escape(str(run.folder))}</b>: {html.escape(', '.join(head))}",
            f'<progress value="{self._step}" max="{max(run.total, 1)}" style="width:100%"></progress>',
            html.escape("  ".join(f"{name} {value:.3f}" for name, value in losses.items())),
            html.escape("held out: " + "  ".join(f"{n} {v:.3f}" for n, v in held_out.items()) if held_out else ""),
            html.escape(f"warning: {self._warning}" if self._warning else ""),
        ]
        columns = [
            f'<figure style="display:inline-block;margin:4px"><figcaption>{html.escape(name)}</figcaption>'
            f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{content}"></figure>'
            for name, content in self._columns.items()
        ]
        return "".join(f"<div>{line}</div>" for line in lines if line) + "".join(columns)


def _jpeg(pictures: Tensor) -> str:
    """The images of one name above each other, as base64 of a JPEG file."""
    packed = io.BytesIO()
    Image.fromarray(strip(pictures, axis=0)).save(packed, format="JPEG", quality=90)
    return base64.b64encode(packed.getvalue()).decode()
