"""Ablation of DCD-GAN: PSNR and SSIM on held-out pairs, with the same number of steps for each variant.

python experiments/derain.py --train DIR --test TEST [TEST ...] --out RESULTS    # DIR as `fastnce unpair` writes it
python experiments/derain.py ... --pairs PAIRS                                   # also train with pairs, as a bound
python experiments/derain.py ... --only plus paper --seeds 0 1 --steps 2000
python experiments/derain.py ... --seeds 0 1 --collect                           # only collect finished runs
python experiments/derain.py ... --options "loss.rendered_rain=density=0.1:0.3"  # other options, for all variants

Every run is `fastnce train` with other options. Finished runs are not repeated. The results are those of the averaged
weights after the last step: choosing the best step on the test set would bias them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a script

from benchmarks import machine
from fastnce.config import Config, resolve
from fastnce.engine.held_out import find_validation
from fastnce.engine.loop import train
from fastnce.engine.validate import Validation
from fastnce.evaluate.pairs import Pair, find_pairs
from fastnce.evaluate.quality import KEYS, DerainingMetrics
from fastnce.methods import Batch, Draws, Group, Method, NetworkOptions, Phase
from fastnce.training import train_run
from fastnce.translate.load import load_translator
from fastnce.translate.translator import Translator

SMALL = [
    "network.width=8",
    "network.discriminator_width=16",
    "data.load_size=32",
    "data.crop_size=32",
    "data.batch=4",
    "loss.patches=64",
    "loss.projection=64",
    "optim.lr=2e-3",
    "optim.ema=0.98",
    "run.sample_every=0",
    "run.monitor_every=100",
]
"""Options that make `dcdgan-plus` small enough for minutes on a CPU core."""

PAPER = ["loss.lambda_rendered=0"]
"""Only the paper's terms, with the weights and networks of `dcdgan-plus`."""

VARIANTS: dict[str, list[str]] = {
    "plus": [],
    "rendered pairs x 0.1": ["loss.lambda_rendered=5"],
    "paper": PAPER,
    "no contrast": [*PAPER, "loss.lambda_nce=0"],
    "no adversary": [*PAPER, "loss.lambda_gan=0"],
    "no colour cycle": [*PAPER, "loss.lambda_color=0"],
    "no frequency cycle": [*PAPER, "loss.lambda_frequency=0"],
    "no identity": [*PAPER, "loss.lambda_idt=0"],
    "no external negatives": [*PAPER, "loss.external=none"],
    "default weights": [*PAPER, "loss.lambda_nce=2", "loss.lambda_gan=1", "loss.lambda_idt=1"],
    "resnet": [
        *PAPER,
        "network.generator=resnet_6blocks",
        "network.norm=instance",
        "network.init_type=xavier",
        "network.antialias=true",
    ],
    "rendered pairs alone": [
        "loss.lambda_nce=0",
        "loss.lambda_gan=0",
        "loss.lambda_color=0",
        "loss.lambda_frequency=0",
        "loss.lambda_idt=0",
    ],
    "plus, no external negatives": ["loss.external=none"],
}
PAIRED = "with pairs"


class Paired(Method):
    """The same generator trained with L1 on pairs: an upper bound for unpaired training."""

    def __init__(self, network: NetworkOptions):
        super().__init__()
        self.options = None
        self.generator = network.build_generator()

    def generators(self):
        return {"G": self.generator}

    def groups(self):
        return {"G": Group((self.generator,))}

    def phases(self):
        return (Phase(self.loss, ("G",)),)

    def generate(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        return {"fake_B": self.generator(batch.a)}

    def loss(self, batch: Batch, outputs: dict[str, Any], draws: Draws):
        loss = F.l1_loss(outputs["fake_B"], batch.b)
        return loss, {"L1": loss}

    def translate(self, a: Tensor) -> Tensor:
        return self.generator(a)


class PairedCrops:
    """Random crops of pairs at the same position in both images."""

    def __init__(self, pairs: list[Pair], crop: int, batch: int, seed: int):
        self.pairs = [pair.load() for pair in pairs]
        self.crop, self.size, self.seed = crop, batch, seed
        self.steps_per_epoch = max(1, len(pairs) // batch)

    def batch(self, step: int, *, decaying: bool = False) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        rainy, clean = [], []
        for _ in range(self.size):
            place, top, left, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
            a, b = self.pairs[int(place * len(self.pairs))]
            y, x = (int(u * (side - self.crop + 1)) for u, side in zip((top, left), a.shape[1:], strict=True))
            for column, image in ((rainy, a), (clean, b)):
                window = image[:, y : y + self.crop, x : x + self.crop]
                column.append(window.flip(2) if mirror < 0.5 else window)
        return torch.stack(rainy), torch.stack(clean)

    def samples(self, count: int) -> tuple[Tensor, Tensor]:
        return self.batch(0)

    def digest(self) -> str:
        return f"{len(self.pairs)} pairs"


def configuration(args: argparse.Namespace, name: str, seed: int) -> Config:
    """Return the configuration of a variant. The learning rate decays over the last third."""
    size = ["network.width=4", "data.batch=1", "loss.patches=8", "loss.projection=8"] if args.quick else []
    variant = VARIANTS.get(name, [])
    options = [*SMALL, *variant, *size, *args.options, f"run.seed={seed}", "run.device=cpu"]
    config = resolve("dcdgan-plus", None, options)
    config.data.dir = str(args.train)
    steps_per_epoch = max(len(list((args.train / f"train{d}").iterdir())) for d in "AB") // config.data.batch
    epochs = max(2, math.ceil(args.steps / steps_per_epoch))
    config.optim.n_epochs_decay = epochs // 3
    config.optim.n_epochs = epochs - epochs // 3
    config.run.steps = args.steps
    config.run.threads = 1
    config.run.log_every = config.run.validate_every = max(1, args.steps // 4)
    config.run.save_every = args.steps
    config.run.validate_pictures = args.held_out
    config.data.validate = str(args.test[0])
    return config


def settings_of(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Return what a row says of how it was made."""
    settings = {"variant": name, "seed": seed, "steps": args.steps, "pictures": args.pictures}
    return settings | ({"options": " ".join(args.options)} if args.options else {})


def finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of a finished run; None if there is none, or if it was made with other settings."""
    if not (folder / "row.json").exists():
        return None
    row: dict[str, Any] = json.loads((folder / "row.json").read_text())
    same = row.items() >= settings.items() and row.get("options") == settings.get("options")
    return row if same else None


def run_one(args: argparse.Namespace, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and measure a variant, and return its row of the table."""
    settings = settings_of(args, name, seed)
    if (row := finished(folder, settings)) is not None:
        return row
    config = configuration(args, name, seed)
    began, cpu = time.monotonic(), time.process_time()
    if name == PAIRED:
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        method = Paired(config.network)
        pairs = find_validation("", str(args.pairs), len(list((args.train / "trainA").iterdir())))
        data = PairedCrops(pairs, int(str(config.data.crop_size)), config.data.batch, seed)
        held_out = find_validation("", config.data.validate, args.held_out)
        validation = Validation(held_out, 3, torch.device("cpu"), Translator)
        more = {"config": config.as_dict(), "quiet": True, "validation": validation}
        train(method, data, config.optim, config.run, folder, **more)
    else:
        train_run(config, folder, quiet=True)
    row = {**settings, "seconds": round(time.monotonic() - began), "cpu_seconds": round(time.process_time() - cpu)}
    translator = load_translator(folder)
    for test in args.test:
        inputs, outputs = DerainingMetrics(), DerainingMetrics()
        for pair in find_validation("", str(test), args.pictures):
            rainy, clean = (image[None] for image in pair.load())
            inputs.update(rainy, clean)
            outputs.update(translator(rainy), clean)
        before, after = inputs.compute(), outputs.compute()
        title = set_name(test)
        row |= {f"{title} {key}": round(after[key], 4) for key in KEYS[:2]}
        row |= {f"{title} gain {key}": round(after[key] - before[key], 4) for key in KEYS[:2]}
    (folder / "row.json").write_text(json.dumps(row))
    return row


def set_name(test: Path) -> str:
    """Return the name of a test set: "Rain800" for .../Rain800/test."""
    return test.parent.name if test.name in ("test", "test_strips") else test.name


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Return (step, PSNR, SSIM) of a run on the held-out pairs."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: (r["held_out_psnr_y"], r["held_out_ssim_y"]) for r in rows if "held_out_psnr_y" in r}
    return [(step, *values) for step, values in sorted(found.items())]


def write(out: Path, rows: list[dict[str, Any]], curves: dict[str, list], facts: dict[str, Any]) -> None:
    """Write results.json, results.csv (the table), curves.csv and, with matplotlib, curves.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    with (out / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    with (out / "curves.csv").open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["variant", "seed", "step", "psnr_y", "ssim_y"])
        for name, points in curves.items():
            variant, seed = name.rsplit(" ", 1)
            lines.writerows([variant, seed, step, f"{p:.4f}", f"{s:.5f}"] for step, p, s in points)
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    variants = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in curves))
    for name, points in curves.items():
        variant, seed = name.rsplit(" ", 1)
        if max(p[1] for p in points[1:]) < points[0][1] - 3:
            continue  # far below its inputs, which would compress the scale of the others
        strong = variant in ("plus", "paper", PAIRED)
        for axis, column in zip(axes, (1, 2), strict=True):
            x, y = [p[0] for p in points], [p[column] for p in points]
            colour = pyplot.get_cmap("tab20")(variants.index(variant) % 20)
            style = {"linestyle": "-" if seed == "0" else "--", "linewidth": 2 if strong else 0.9, "color": colour}
            axis.plot(x, y, label=name, **style)
    for axis, label in zip(axes, ("PSNR on Y (dB)", "SSIM on Y"), strict=True):
        axis.set_xlabel("steps")
        axis.set_ylabel(f"held-out {label}")
        axis.grid(alpha=0.2)
    axes[1].legend(fontsize=6)
    figure.savefig(out / "curves.png", dpi=80)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, metavar="DIR", help="trainA and trainB")
    parser.add_argument("--test", type=Path, required=True, nargs="+", metavar="TEST", help="paired sets")
    parser.add_argument("--pairs", type=Path, metavar="PAIRS", help="training pairs, for the upper bound")
    parser.add_argument("--out", type=Path, required=True, metavar="RESULTS")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder of the runs; default RESULTS/runs")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=25, help="per test set; 0 for all")
    parser.add_argument("--held-out", type=int, default=8, help="pictures of the first set for validation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"one or more of {', '.join([*VARIANTS, PAIRED])}")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="for all variants")
    parser.add_argument("--collect", action="store_true", help="write the results of finished runs, train nothing")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to test that everything runs")
    args = parser.parse_args(arguments)
    names = args.only or [*VARIANTS, *([PAIRED] if args.pairs else [])]
    unknown = [name for name in names if name not in (*VARIANTS, PAIRED)]
    if unknown or (PAIRED in names and not args.pairs):
        parser.error(f"no variant {unknown[0]!r}" if unknown else f"{PAIRED!r} needs --pairs")
    try:
        resolve("dcdgan-plus", None, args.options)
    except ValueError as error:
        parser.error(f"--options: {error}")
    for test in args.test:
        find_pairs(test)
    rows, curves = [], {}
    facts = machine.facts(torch.device("cpu"))
    facts["command"] = " ".join(["python", "experiments/derain.py", *sys.argv[1:]])
    for name in names:
        for seed in args.seeds:
            folder = (args.runs or args.out / "runs") / f"{name.replace(' ', '-')}-{seed}"
            if args.collect and finished(folder, settings_of(args, name, seed)) is None:
                print(f"left out, not finished with these settings: {folder}", file=sys.stderr)
                continue
            rows.append(run_one(args, name, seed, folder))
            curves[f"{name} {seed}"] = curve(folder)
            print(json.dumps(rows[-1]), flush=True)
            write(args.out, rows, curves, facts)
    if not rows:
        parser.error(f"--collect: no run in {args.runs or args.out / 'runs'} has finished with these settings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
