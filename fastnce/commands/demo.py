"""Show the trained model derain on a photograph, then train a small model in about two minutes, without a download.

The model derain comes with the package. It removes rain that is rendered on a photograph. Then a small FastCUT learns
from one photograph taken at dusk to render daylight photographs as if taken at dusk. The photographs are included in
the package scikit-image (extra `demo`).
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..common.writing import write_whole
from ..config import resolve
from ..data import load_image
from ..data.encoding import encoded
from ..data.folder import as_tensor
from ..data.rain import RainOptions, render_rain
from ..engine.choices import pick_device
from ..engine.grid import save_grid
from ..engine.log import clock
from ..evaluate.quality import DerainingMetrics
from ..training import train_run
from ..translate.load import load_translator
from .parsing import command_parser

DAY = ("astronaut", "chelsea", "coffee", "motorcycle")
DUSK = "rocket"
RAIN = RainOptions(density=(0.2, 0.2), opacity=(0.6, 0.6), angle=(12, 12))
"""Of the picture that shows the model derain."""
LONGEST = 512
"""Pixels of its longer side: the model takes a second or two on a CPU."""
SETTINGS = [
    "data.preprocess=scale_shortside_and_crop",
    "data.load_size=160",
    "data.crop_size=96",
    "network.generator=resnet_4blocks",
    "network.width=16",
    "network.discriminator_width=16",
    "loss.patches=128",
    "loss.projection=64",
    "optim.ema=0.99",
    "run.log_every=50",
    "run.sample_every=0",
]


def photographs() -> dict[str, np.ndarray]:
    """Return the demo's photographs, uint8 (height, width, 3); raise ValueError if scikit-image is missing."""
    try:
        from skimage import data
    except ImportError:
        raise ValueError("the demo needs scikit-image's photographs: pip install scikit-image") from None
    found = {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    found["motorcycle"] = data.stereo_motorcycle()[0]
    return found


def write_folders(folder: Path, side: int = 320) -> None:
    """Write trainA and testA (day), trainB and testB (dusk), resized to a short side of `side` pixels."""
    for name, pixels in photographs().items():
        picture = Image.fromarray(pixels[..., :3])
        scale = side / min(picture.size)
        size = round(picture.width * scale), round(picture.height * scale)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        for split in ("train", "test"):
            target = folder / f"{split}{'B' if name == DUSK else 'A'}"
            target.mkdir(parents=True, exist_ok=True)
            write_whole(target / f"{name}.png", encoded(picture, target / f"{name}.png"))


def show_derain(file: Path) -> str:
    """Write a photograph with rendered rain, the same by the model derain, and the original, side by side.

    Returns:
        a sentence with PSNR and SSIM of the rainy picture and of the result, on Y.
    """
    picture = Image.fromarray(photographs()[DUSK][..., :3])
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.BICUBIC)
    clean = as_tensor(np.asarray(picture))[None]
    rainy = render_rain(clean, RAIN, torch.Generator().manual_seed(0))
    began = time.perf_counter()
    restored = load_translator("derain", pick_device("auto"))(rainy)
    seconds = time.perf_counter() - began
    save_grid({"rendered rain": rainy, "by the model derain": restored, "original": clean}, file)
    before, after = (DerainingMetrics().update(x, clean)[0] for x in (rainy, restored))
    return (
        f"derain, a trained model that comes with fastnce, in {seconds:.1f} s: PSNR from "
        f"{before['psnr_y']:.2f} to {after['psnr_y']:.2f} dB, SSIM from {before['ssim_y']:.3f} to "
        f"{after['ssim_y']:.3f}. {file} shows rain, result and original."
    )


def main(arguments: list[str]) -> int:
    """Show the model derain; train a small FastCUT on photographs for about two minutes and show its results."""
    parser = command_parser("demo", main)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="folder of the run (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=900, metavar="N", help="more steps give better pictures")
    parser.add_argument("--minutes", type=float, default=2.0, metavar="N", help="stop after N minutes at the latest")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {args.steps}")
    folder = args.out / "photographs"
    epochs = f"optim.n_epochs={max(1, args.steps // len(DAY))}"
    config = resolve("fastcut", None, [*SETTINGS, epochs, "optim.n_epochs_decay=0", f"run.minutes={args.minutes}"])
    config.data.dir = str(folder)
    write_folders(folder)
    print(f"{show_derain(args.out / 'derain.png')}\n", flush=True)
    began = time.perf_counter()
    steps = train_run(config, args.out)

    translator = load_translator(args.out, pick_device("auto"))
    rows = []
    for name in DAY:
        day = load_image(folder / "testA" / f"{name}.png", size=(240, 320))
        rows.append((day, translator(day[None])[0]))
    grid = args.out / "demo.png"
    day_pictures, dusk_pictures = (torch.stack(column) for column in zip(*rows, strict=True))
    save_grid({"day": day_pictures, "dusk (by the model)": dusk_pictures}, grid)
    if steps < args.steps:
        print(
            f"\nonly {steps:,} of {args.steps:,} steps were done in time, so the dusk is unfinished: the same command "
            f"goes on from here"
        )
    print(
        f"\n{steps:,} steps in {clock(time.perf_counter() - began)}. {grid} shows the photographs on the left and the "
        f"same ones at dusk on the right.\nNext: put your own pictures into DIR/trainA and DIR/trainB, then run\n"
        f"  fastnce train fastcut --data DIR --out runs/mine\n"
        f"  fastnce translate runs/mine FOLDER --out OUT"
    )
    return 0
