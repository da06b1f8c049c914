"""Deraining from start to end: render rain, train without pairs, translate a folder.

python examples/derain_folder.py                       # small, takes seconds; see docs/deraining.md for a real run
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from pictures import SMALL, write_folders

from fastnce.config import resolve
from fastnce.data.rain import RainOptions, write_rain
from fastnce.training import train_run
from fastnce.translate import load_translator, translate_files

SETTINGS = [
    *(setting for setting in SMALL if not setting.startswith(("network.generator", "data.load_size"))),
    "data.preprocess=crop",  # dcdgan-plus trains on crops at the original size
    "data.batch=2",
    "loss.nce_layers=1,4",
    "run.validate_every=0",
]


def main() -> list[Path]:
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        photographs = write_folders(top / "photographs")
        # trainA gets rainy and trainB clean images, of different scenes
        write_rain(photographs / "trainB", top / "data", RainOptions(), seed=0, unpaired=True)
        train_run(resolve("dcdgan-plus", None, [*SETTINGS, f"data.dir={top / 'data'}"]), top / "run")
        written = translate_files(load_translator(top / "run"), top / "data" / "trainA", top / "derained")
        print(f"{len(written)} images derained")
        return [path.relative_to(top) for path in written]


if __name__ == "__main__":
    main()
