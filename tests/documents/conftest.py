"""What the blocks of the documents find before they run: the fixtures that their markers name.

A fixture prepares the current folder. What it returns are variables of the block.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastnce
from fastnce.methods import PRESETS
from fastnce.networks import ResnetGenerator
from tests.ends import TINY

SIDE = 24


def _value(text: str) -> Any:
    parts = [int(part) if part.isdigit() else part for part in text.split(",")]
    if len(parts) > 1:
        return parts
    return {"true": True, "false": False}.get(text, parts[0])


@pytest.fixture
def page_folder(tmp_path, monkeypatch) -> Path:
    """The empty folder in which the blocks of a page run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(monkeypatch) -> None:
    """Presets train two steps with tiny networks on the CPU, unless a call says otherwise."""
    chosen: dict[str, dict[str, Any]] = {}
    for text in (*TINY, "run.steps=2"):
        name, _, value = text.partition("=")
        section, key = name.split(".")
        chosen.setdefault(section, {})[key] = _value(value)
    loss = chosen.pop("loss")

    def options(make):
        made = make()
        for key in set(loss) & set(vars(made)):
            setattr(made, key, loss[key])
        return made

    for name, preset in PRESETS.items():
        sections = {**preset.sections}
        for section, values in chosen.items():
            sections[section] = {**sections.get(section, {}), **values}
        monkeypatch.setitem(
            PRESETS, name, replace(preset, options=lambda make=preset.options: options(make), sections=sections)
        )


@pytest.fixture
def photographs(page_folder, small) -> dict[str, Any]:
    """`data` and `DIR` with trainA, trainB, testA and testB, and `TEST` with pairs; `picture` and `day` are images."""
    rng = np.random.default_rng(0)

    def write(*names: str) -> None:
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE + 4, 3), np.uint8)).save(name)

    for folder in ("data", "DIR"):
        write(*(f"{folder}/{part}/{i}.png" for part in ("trainA", "trainB", "testA", "testB") for i in range(2)))
    write(*(f"TEST/{part}/{i}.png" for part in ("rain", "norain") for i in range(2)))
    picture = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE + 4, 3), np.uint8))
    picture.save("picture.png")
    return {"picture": picture, "day": picture, "show": lambda picture: None}


@pytest.fixture
def run(photographs) -> dict[str, Any]:
    """The pictures of `photographs`, and three runs of two steps: runs/mine, runs/a and runs/b."""
    trained = fastnce.train("fastcut", data="data", out="runs/mine", quiet=True)
    for name in ("a", "b"):
        shutil.copytree("runs/mine", f"runs/{name}", symlinks=True)
    return {**photographs, "run": trained}


@pytest.fixture
def features() -> dict[str, Any]:
    """Rows (64, 16) as `feat_q` and `feat_k`; maps as `query_maps` and `key_maps`; images as `output` and `truth`."""
    shapes = [(1, channels, 8, 8) for channels in (3, 128, 256, 256, 256)]
    rows = {name: torch.nn.functional.normalize(torch.randn(64, 16), dim=1) for name in ("feat_q", "feat_k")}
    maps = {name: [torch.randn(shape) for shape in shapes] for name in ("query_maps", "key_maps")}
    images = {name: torch.rand(2, 3, 16, 16) * 2 - 1 for name in ("output", "truth")}
    return {"fastnce": fastnce, **rows, **maps, **images}


@pytest.fixture
def network() -> dict[str, Any]:
    """A small `generator`, its `LAYERS`, and an image `real_a`."""
    return {
        "generator": ResnetGenerator(width=4, blocks=1),
        "LAYERS": [0, 4],
        "real_a": torch.rand(1, 3, 16, 16) * 2 - 1,
        "nn": torch.nn,
    }
