"""Predict the cost of training steps on a GPU without having it: counted work divided by its rates.

python benchmarks/predict.py            # some minutes on a CPU; prints the tables of docs/performance.md
python benchmarks/predict.py --only steps --names cut --images 1

Steps run on fake tensors, which compute nothing (`benchmarks/count.py`). FLOP, bytes and launches are those of our
code; times follow from the rates below. A prediction is not a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    # allows the kernels on fake tensors without a GPU; not on import, where it would affect real tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import baselines
from benchmarks.count import Count, Work
from benchmarks.step import with_all_biases
from benchmarks.step_costs import Counted, count_step
from fastnce.engine.recompute import recompute_blocks
from fastnce.methods import dclgan
from fastnce.nce import PatchNCEHead
from fastnce.networks import set_implementation


@dataclass(frozen=True)
class Device:
    """A GPU. Bandwidth, product rates and launch costs were measured on an H100
    (`benchmarks/results/h100-2026-11-26/`). The efficiency of convolutions and the effect of the cache are assumed.

    Args:
        bandwidth: bytes per second of a large copy.
        cached: bytes per second if all data of an operator, at most `cache` bytes, stay in the cache.
        cache: bytes of the cache.
        bfloat16, tf32: FLOP per second of large products.
        products: fraction of these rates that a convolution reaches when all multiprocessors are busy.
        few: the least fraction of busy multiprocessors for few outputs, reached by splitting sums.
        eager: seconds per launch on the host.
        node: seconds per node of a CUDA graph.
    """

    bandwidth: float = 3.0e12
    cached: float = 3.0e12
    cache: float = 40e6
    bfloat16: float = 779e12
    tf32: float = 406e12
    products: float = 0.7
    few: float = 0.5
    multiprocessors: int = 132
    eager: float = 8.2e-6
    node: float = 1.2e-6

    def seconds(self, work: Work) -> float:
        """Return the time of one operator on the device: the longest of arithmetic, traffic and launches."""
        rate = self.bfloat16 if work.dtype == torch.bfloat16 else self.tf32
        waves = max(1, math.ceil(work.tiles / self.multiprocessors))
        busy = max(self.few, work.tiles / (waves * self.multiprocessors)) if work.tiles else 1.0
        bandwidth = self.bandwidth if work.bytes > self.cache else self.cached
        return max(work.flop / (rate * self.products * busy), work.bytes / bandwidth, work.launches * self.node)

    def eager_seconds(self, count: Count) -> float:
        """Return the time of an uncaptured step: the larger of the host's and the device's time."""
        return max(count.launches * self.eager, self.device_seconds(count))

    def device_seconds(self, count: Count) -> float:
        """Return the time of a captured step, whose operators run one after another."""
        return sum(self.seconds(work) for work in count.works)

    def floor_seconds(self, counted: Counted) -> float:
        """Return the lower bound at this precision: all FLOP at the full rate, or the least traffic."""
        rate = self.bfloat16 if any(work.dtype == torch.bfloat16 for work in counted.count.works) else self.tf32
        return max(counted.count.flop / rate, counted.least_bytes / self.bandwidth)


OPTIMISTIC = Device(cached=12e12, products=0.85, few=1.0, node=0.8e-6)
"""Optimistic: maps stay in the L2 cache, convolutions are almost as fast as products, nodes are cheap."""


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Context manager in which DCLGAN's loss uses the kernels, as it does on a GPU."""
    with contextlib.ExitStack() as stack:
        for name in ("patch_nce_layers", "project_patches"):
            chosen = partial(getattr(dclgan, name), implementation="triton")
            stack.enter_context(mock.patch.object(dclgan, name, chosen))
        yield


def fused_loss(step: Any) -> None:
    """Use the kernels for the contrastive loss."""
    for module in step.method.modules():
        if isinstance(module, PatchNCEHead):
            module.implementation = "triton"


def fused(step: Any) -> None:
    """Use the kernels for loss, norms, pads, blurs and last convolutions, as on a GPU."""
    fused_loss(step)
    set_implementation(step.method, "triton")


def published_loss(name: str, images: int, patches: int = 256, dim: int = 256) -> Count:
    """Count the extra work of the published loss: DCLGAN's broadcast cosines; none for CUT."""
    rows = [torch.randn(images * patches, dim, device="meta", requires_grad=True) for _ in range(2)]
    with Count() as count:
        if name.startswith(("dclgan", "dcdgan")):
            for _ in range(2 * 4):  # two directions of four layers
                baselines.dclgan_loss(rows[0], rows[1]).mean().backward()
    return count


@dataclass
class Prediction:
    """One line of the table: milliseconds per step on the assumed device."""

    name: str
    images: int
    form: str
    gflop: float
    gbytes: float
    launches: int
    floor: float
    optimistic: float
    usual: float
    eager: float


def predict(name: str, images: int, side: int, device: Device, **more: Any) -> Iterator[Prediction]:
    """Yield the published step, ours in float32 and bfloat16 with library layers, and ours with fused layers."""

    def line(form: str, counted: Counted) -> Prediction:
        count = counted.count
        seconds = (
            device.floor_seconds(counted),
            OPTIMISTIC.device_seconds(count),
            device.device_seconds(count),
            device.eager_seconds(count),
        )
        times = (1e3 * t for t in seconds)
        return Prediction(name, images, form, count.flop / 1e9, count.bytes / 1e9, count.launches, *times)

    published = count_step(name, images, side, "fp32", reuse_key_features=False, prepare=with_all_biases, **more)
    if name != "dcdgan":  # the code of the paper's DCD-GAN is not published
        published.count.works += published_loss(name, images).works
        yield line("as published, float32", published)
    with as_on_a_gpu():
        yield line("ours, float32", count_step(name, images, side, "fp32", prepare=fused_loss, **more))
        yield line("ours, bfloat16", count_step(name, images, side, "bf16", prepare=fused_loss, **more))
        yield line("ours, bfloat16, fused layers", count_step(name, images, side, "bf16", prepare=fused, **more))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * 1 + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def steps_table(names: Sequence[str], batches: Sequence[int], side: int, device: Device) -> Iterator[str]:
    rows = []
    for name in names:
        for images in batches:
            if images > 1 and name != "cut":
                continue
            for p in predict(name, images, side, device):
                print(f"{name} B={images}: {p.form}", file=sys.stderr, flush=True)
                cells = [f"{name}, B={images}", p.form, f"{p.gflop:,.0f}", f"{p.gbytes:.1f}", f"{p.launches:,}"]
                rows.append([*cells, f"{p.floor:.2f}", f"{p.optimistic:.2f}", f"{p.usual:.2f}", f"{p.eager:.2f}"])
    header = ["step", "form", "GFLOP", "GB moved", "launches", "floor ms", "optimistic", "usual", "uncaptured"]
    yield table(header, rows)


def memory_table(names: Sequence[str], batches: Sequence[int], sides: Sequence[int]) -> Iterator[str]:
    """Yield the peak memory in GiB by crop size and batch: weights, moments and the live tensors of a step."""

    def recomputed(step: Any) -> None:
        fused(step)
        recompute_blocks(step.method)

    forms: dict[str, tuple[str, Callable[[Any], None]]] = {
        "float32": ("fp32", lambda _: None),
        "bfloat16": ("bf16", lambda _: None),
        "bfloat16, kernels": ("bf16", fused),
        "and recomputed blocks": ("bf16", recomputed),
    }
    rows = []
    for name in names:
        for side in sides:
            for images in batches:
                print(f"memory {name} {side} B={images}", file=sys.stderr, flush=True)
                with as_on_a_gpu():
                    peaks = [count_step(name, images, side, p, prepare=f).peak / 2**30 for p, f in forms.values()]
                rows.append([name, f"{side} x {side}", str(images), *(f"{peak:.1f}" for peak in peaks)])
    columns = list(forms)
    yield table(["step", "crop", "B", *columns], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables in Markdown and return 0."""
    parser = argparse.ArgumentParser(prog="benchmarks/predict.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("steps", "memory"), help="print only one table")
    parser.add_argument("--names", nargs="+", default=["cut", "fastcut", "dclgan", "dcdgan"], metavar="METHOD")
    parser.add_argument("--images", nargs="+", type=int, default=[1, 8], metavar="B")
    parser.add_argument("--side", type=int, default=256)
    args = parser.parse_args(argv)
    device = Device()
    if args.only != "memory":
        print(f"Usual: {device}\n\nOptimistic: {OPTIMISTIC}\n")
        for text in steps_table(args.names, args.images, args.side, device):
            print(text)
    if args.only != "steps":
        print("\nPeak memory, GiB, computed\n")
        names = [name for name in args.names if name in ("cut", "dcdgan")]
        for text in memory_table(names, (1, 4, 8), (256, 512, 1024)):
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
