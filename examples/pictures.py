"""Small images for the examples: coloured discs on a gradient, cool in domain A and warm in domain B."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastnce.config import resolve
from fastnce.training import train_run


def picture(seed: int, warm: bool, side: int = 48) -> np.ndarray:
    """Return an image as uint8 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    pixels = np.stack([y, x, 1 - y], axis=2) * 120
    for _ in range(4):
        row, column, radius = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.25)
        pixels[(y - row) ** 2 + (x - column) ** 2 < radius**2] = rng.uniform(60, 200, 3)
    pixels *= (1.2, 0.9, 0.6) if warm else (0.7, 0.9, 1.2)
    return pixels.clip(0, 255).astype(np.uint8)


def write_folders(folder: Path, count: int = 4) -> Path:
    """Write trainA and trainB with `count` images each, and return the folder."""
    for domain, warm in (("trainA", False), ("trainB", True)):
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(picture(i + 100 * warm, warm)).save(folder / domain / f"{i}.png")
    return folder


SMALL = [
    "data.load_size=36",
    "data.crop_size=32",
    "network.generator=resnet_4blocks",
    "network.width=4",
    "network.discriminator_width=4",
    "run.steps=3",
    "run.sample_every=0",
    "run.monitor_every=0",
    "run.compile=false",
]
"""Settings for three steps, which take a second on a CPU."""


def train_small(method: str, *settings: str) -> int:
    """Train for three steps on these images in a temporary folder, and return the number of steps done."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_folders(Path(folder) / "pictures")
        return train_run(resolve(method, None, [*SMALL, f"data.dir={data}", *settings]), Path(folder) / "run")
