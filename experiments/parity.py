"""Compare training in 16 bits with float32: the same weights, images and seeds in each precision.

    python experiments/parity.py --steps 200 --width 8 --crop 64 --out benchmarks/results/parity-cpu-DATE
    python experiments/parity.py --steps 2000 --device cuda --data DIR --pairs DIR/test --out OUT --minutes 8

Writes losses.csv and summary.json after each run and losses.png at the end. A failed run does not affect the others.

Runs diverge, because Adam amplifies the smallest difference of a gradient to a full step. A second float32 run with
another seed for the step's draws therefore shows the difference between two equivalent runs. A precision is as good as
float32 if its losses, and the PSNR on held-out pairs, stay within this difference. On CUDA "fp32" may compute in TF32
(`--tf32`); the summary records it.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a script

from benchmarks.machine import facts
from fastnce.commands.demo import write_folders
from fastnce.data.unpaired import UnpairedData
from fastnce.engine.choices import pick_compile, pick_device, set_tf32
from fastnce.engine.cudagraph import pick_graph
from fastnce.engine.held_out import find_validation
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.engine.validate import Validation
from fastnce.methods import Batch, NetworkOptions
from fastnce.methods.presets import PRESETS
from fastnce.translate.translator import Translator

AGAIN = "fp32 again"
"""Float32 with other patch locations, which shows how far two runs of the same precision differ."""

Rows = list[dict[str, float]]


def train(name: str, args: argparse.Namespace, data: UnpairedData, device: torch.device, until: float) -> Rows:
    """Train once and return the losses of each step, with the PSNR on held-out pairs where it was measured.

    until: `time.monotonic()` after which no further step starts.
    """
    torch.manual_seed(args.seed)
    preset = PRESETS[args.method]
    sections = preset.sections.get("network", {})
    sizes = {"width": args.width, "discriminator_width": args.width}
    method = preset.method(preset.options(), NetworkOptions(**{**sections, **sizes})).to(device)
    precision = "fp32" if name == AGAIN else name
    graph, compiled = pick_graph(args.graph, device), pick_compile(args.compile, device)
    step = Step(method, OptimOptions(**preset.sections.get("optim", {})), precision, compiled, graph=graph)
    pairs = find_validation("", args.pairs) if args.pairs else []
    held_out = Validation(pairs, 3, device, Translator) if pairs else None
    rows: Rows = []
    for number in range(args.steps):
        rng = random.Random(f"{args.seed}/{number}")
        batch = Batch(*data.batch(number))
        draws = method.draw(rng)
        torch.manual_seed(rng.getrandbits(63) + (name == AGAIN))
        losses = step.run(batch, draws)
        values = torch.stack([loss.float() for loss in losses.values()]).tolist()
        rows.append({"step": number + 1} | dict(zip(losses, values, strict=True)))
        last = number + 1 == args.steps or time.monotonic() > until
        if held_out is not None and (last or (number + 1) % args.validate_every == 0):
            held_out.measure(method)
            method.train()
            rows[-1]["psnr_y"] = held_out.latest["psnr_y"]
        if last:
            break
    step.close()
    return rows


def compare(runs: dict[str, Rows], names: list[str]) -> dict[str, Any]:
    """Return, for every run, the mean of each loss over the last quarter and its relative difference from "fp32".

    A run that stopped early is compared with the same steps of "fp32".
    """
    found: dict[str, Any] = {}
    for run, rows in runs.items():
        steps = min(len(rows), len(runs["fp32"]))
        tail, exact = (part[:steps][-max(1, steps // 4) :] for part in (rows, runs["fp32"]))
        found[run] = {}
        for name in names:
            mean, other = (sum(row[name] for row in part) / len(part) for part in (tail, exact))
            found[run][name] = {"mean": mean, "relative": (mean - other) / max(abs(other), 1e-12)}
        if "psnr_y" in rows[-1]:
            found[run]["psnr_y"] = rows[-1]["psnr_y"]
    return found


def draw(runs: dict[str, Rows], names: list[str], title: str, file: Path) -> None:
    """Plot each loss over steps, smoothed over a fortieth of the steps, one line per run. Needs matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no plot, {file.name}: matplotlib is not installed")
        return

    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 2.6 * lines), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for run, rows in runs.items():
            values = [row[name] for row in rows]
            width = max(1, len(values) // 40)
            smooth = [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]
            axis.plot(range(1, len(values) + 1), smooth, label=run, linewidth=1, linestyle=":" if run == AGAIN else "-")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def losses_of(runs: dict[str, Rows]) -> list[str]:
    """Return the names of the losses in order; all runs have the same."""
    first = next(iter(runs.values()), [{}])[0]
    return [name for name in first if name not in ("step", "psnr_y")]


def write(runs: dict[str, Rows], summary: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the losses of the finished runs, and the summary with the comparison."""
    names = losses_of(runs)
    with (args.out / "losses.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "step", *names, "psnr_y"], restval="")
        writer.writeheader()
        for run, rows in runs.items():
            writer.writerows({"run": run} | row for row in rows)
    if "fp32" in runs:
        summary["last quarter"] = compare(runs, names)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and call `run_all`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--method", default="fastcut", choices=list(PRESETS))
    parser.add_argument("--precisions", default="bf16", help="in addition to fp32, separated by commas: bf16,fp16")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="folder with trainA and trainB; default: the demo's photographs")
    parser.add_argument("--pairs", default="", help="held-out pairs for PSNR on Y (see fastnce evaluate)")
    parser.add_argument("--validate-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", default="false")
    parser.add_argument("--graph", default="auto")
    parser.add_argument("--tf32", default="auto")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="total time of all runs, without decoding")
    parser.add_argument("--out", type=Path, default=Path("parity"), help="folder; default %(default)s")
    return run_all(parser.parse_args(arguments))


def run_all(args: argparse.Namespace) -> int:
    """Train in each precision and write the results; return 0 if all runs succeeded, else 1."""
    device = pick_device(args.device)
    tf32 = set_tf32(args.tf32, device)
    runs: dict[str, Rows] = {}
    states: dict[str, str] = {}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"data": "the demo's photographs"} if args.data is None else {}
    for name in ("out", "minutes"):
        settings.pop(name)
    summary = {"machine": facts(device), "settings": settings, "fp32": tf32 or "float32", "runs": states}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            write_folders(Path(folder), side=max(96, args.crop))
        root = args.data or Path(folder)
        sizes = {"load_size": args.crop * 286 // 256, "crop_size": args.crop, "batch": args.batch}
        data = UnpairedData(root, **sizes, seed=args.seed, device=device, preprocess="scale_shortside_and_crop")
        data.batch(0)  # decodes all images before the time of the first run starts
        end = time.monotonic() + 60 * args.minutes
        planned = list(dict.fromkeys(["fp32", AGAIN, *args.precisions.split(",")]))
        for index, name in enumerate(planned):
            began = time.monotonic()
            try:
                rows = train(name, args, data, device, began + (end - began) / (len(planned) - index))
            except Exception as error:  # such as out of memory in one precision: run the others
                traceback.print_exc()
                states[name] = f"failed: {type(error).__name__}: {error}"
            else:
                runs[name] = rows
                early = f", stopped at step {len(rows)} of {args.steps}" if len(rows) < args.steps else ""
                states[name] = f"{len(rows)} steps in {time.monotonic() - began:.0f} s{early}"
            print(f"{name}: {states[name]}", flush=True)
            write(runs, summary, args)
        data.close()
    names = losses_of(runs)
    title = f"{args.method}, width {args.width}, crops of {args.crop}, batch {args.batch}, {device.type}"
    if runs:
        draw(runs, names, title, args.out / "losses.png")
    print("\nmean over the last quarter of the steps, and relative difference from fp32")
    print(f"{'':<12}", *(f"{name:>18}" for name in names))
    for run, values in summary.get("last quarter", {}).items():
        print(f"{run:<12}", *(f"{values[n]['mean']:>9.4f} {values[n]['relative']:>+8.1%}" for n in names))
    return 0 if len(runs) == len(planned) else 1


if __name__ == "__main__":
    sys.exit(main())
