"""Folders that look like runs, for the tests of the report."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from fastnce.config import resolve
from fastnce.engine import state_file

COLUMNS = ("A", "fake_B", "rec_A", "B", "fake_A")


def lines(file: Path, values: list[dict[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(value) + "\n" for value in values)


def training(steps: range, epoch_steps: int = 10, first_epoch: int = 1) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: two losses and the rest that a run logs."""
    return [
        {
            "step": step,
            "G_GAN": 1 / step,
            "NCE": 5 - step / 1000,
            "epoch": (step - 1) // epoch_steps + first_epoch,
            "pictures": 4 * step,
            "lr": 2e-4,
            "images_per_second": 30.0,
            "warnings": 0,
        }
        for step in steps
    ]


def grid(
    path: Path, seed: int, side: int = 16, rows: int = 2, names: tuple[str, ...] = COLUMNS, text: Any = True
) -> None:
    """A sample grid of noise whose inputs A and B are the same for every seed. text: of the PNG; True: the layout."""
    width, height = 4 + len(names) * (side + 4), 18 + rows * (side + 4)
    pixels = np.full((height, width, 3), 255, np.uint8)
    layout: dict[str, list[dict[str, Any]]] = {"columns": [], "rows": []}
    for row in range(rows):
        layout["rows"].append({"top": 14 + row * (side + 4), "height": side})
    for place, name in enumerate(names):
        layout["columns"].append({"name": name, "left": 4 + place * (side + 4), "width": side})
        random = np.random.default_rng([place, seed if len(name) > 1 else 0])
        for row in layout["rows"]:
            left = layout["columns"][-1]["left"]
            noise = random.integers(0, 256, (side, side, 3), np.uint8)
            pixels[row["top"] : row["top"] + side, left : left + side] = noise
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("fastnce", json.dumps(layout) if text is True else text)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, pnginfo=info)


def checkpoint(run: Path, step: int, psnr: float | None = None, *pointers: str) -> None:
    """A checkpoint's state.json, and what points to it."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state: dict[str, Any] = {"step": step, "generators": ["G"], "sha256": dict.fromkeys(state_file.FILES, "0" * 64)}
    if psnr is not None:
        state["validation"] = {"pairs": "x", "psnr_y": psnr, "ssim_y": 0.5}
    (folder / "state.json").write_text(state_file.sealed(state))
    for name in pointers:
        (run / "checkpoints" / name).write_text(folder.name)


def run(folder: Path, *overrides: str, method: str = "cyclegan", state: str = "finished", steps: int = 40) -> Path:
    """A finished run with everything that a report shows."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(resolve(method, None, list(overrides)).as_toml())
    lines(folder / "metrics.jsonl", [{"step": 0, "held_out_psnr_y": 20.0, "held_out_ssim_y": 0.4}])
    for step in range(1, steps + 1):
        lines(folder / "metrics.jsonl", training(range(step, step + 1)))
        if step % 10 == 0:
            psnr = 30 - abs(step - 20) / 10
            values = {"held_out_psnr_y": psnr, "held_out_ssim_y": 0.5, "held_out_seconds": 1.0}
            lines(folder / "metrics.jsonl", [{"step": step, "pictures": 4 * step, **values}])
            grid(folder / "samples" / f"step-{step:08d}.png", step)
    checkpoint(folder, 20, 30.0, "best")
    checkpoint(folder, steps, 28.0, "latest")
    start = {"command": ["fastnce", "train", method], "device": "cuda:7", "ranks": 1, "total": steps}
    start |= {"machine": {"GPU": "Imaginary 9000"}, "versions": {"torch": "9.9.9"}}
    events = [
        {"time": "2026-11-27T18:00:00+00:00", "event": "start", "step": 0, **start},
        {
            "time": "2026-11-27T18:00:30+00:00",
            "event": "warning",
            "step": 9,
            "text": "warning: the outputs hardly differ",
        },
        {
            "time": "2026-11-27T18:01:00+00:00",
            "event": "end",
            "step": 20,
            "state": "stopped",
            "reason": "1 minute is over",
        },
        {"time": "2026-11-27T19:00:00+00:00", "event": "start", "step": 20, **start},
        {
            "time": "2026-11-27T19:00:00+00:00",
            "event": "change",
            "step": 20,
            "changes": ["optim.lr: 0.0002, now 0.0001"],
        },
    ]
    end = {"time": "2026-11-27T19:02:00+00:00", "event": "end", "step": steps, "state": state, "reason": ""}
    lines(folder / "history.jsonl", events if state == "killed" else [*events, end])
    return folder


class Page(HTMLParser):
    """A page's texts by section, its attributes, and the data of its script."""

    def __init__(self, file: Path):
        super().__init__()
        self.html = file.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.scripts: list[str] = []
        self._section, self._in = "", ""
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag in ("header", "section", "footer", "main"):
            self._section = dict(attrs).get("id") or tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, text):
        if self._in == "script":
            self.scripts[-1] += text
        elif self._in != "style":
            self.texts[self._section] = " ".join(f"{self.texts.get(self._section, '')} {text}".split())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])
