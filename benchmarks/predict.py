"""What training steps should cost on a GPU that need not be here: counted work over its rates.

python benchmarks/predict.py            # some minutes on a CPU; prints the tables of docs/performance.md
python benchmarks/predict.py --only steps --names cut --images 1

Nothing is computed: steps run on fake tensors (`benchmarks/count.py`). FLOP, bytes and launches are those of our own
code, and the times are those over the rates below. A prediction is no measurement.
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
    # so that the kernels can be chosen, on fake tensors without a GPU; not where this is imported, beside real ones
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import baselines
from benchmarks.count import Count, Counted, Work, count_step
from benchmarks.step import with_all_biases
from fastnce.engine.recompute import recompute_blocks
from fastnce.methods import dclgan
from fastnce.nce import PatchNCEHead
from fastnce.networks import set_implementation


@dataclass(frozen=True)
class Device:
    """A GPU. Bandwidth, rates of products and the cost of launches are an H100's, measured
    (`benchmarks/results/h100-2026-11-26/`); what its convolutions reach of them, and what its cache brings, is assumed.

    Args:
        bandwidth: bytes a second that a large copy reaches; cached: the same where all of an operator's data, at most
            `cache` bytes, stay in the cache between operators.
        bfloat16, tf32: FLOP a second of large products.
        products: what a convolution reaches of that when all multiprocessors are busy.
        few: the part of them that it keeps busy at least, by dividing sums, when it has few outputs.
        eager, node: seconds that a launch costs the host, and a node in a CUDA graph.
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
        """Of one operator on the device: the longest of arithmetic, traffic and its launches."""
        rate = self.bfloat16 if work.dtype == torch.bfloat16 else self.tf32
        waves = max(1, math.ceil(work.tiles / self.multiprocessors))
        busy = max(self.few, work.tiles / (waves * self.multiprocessors)) if work.tiles else 1.0
        bandwidth = self.bandwidth if work.bytes > self.cache else self.cached
        return max(work.flop / (rate * self.products * busy), work.bytes / bandwidth, work.launches * self.node)

    def eager_seconds(self, count: Count) -> float:
        """A step launched one by one: the host sets the pace where the device does not."""
        return max(count.launches * self.eager, self.device_seconds(count))

    def device_seconds(self, count: Count) -> float:
        """A captured step: each operator after the one before."""
        return sum(self.seconds(work) for work in count.works)

    def floor_seconds(self, counted: Counted) -> float:
        """No implementation is faster at this precision: all FLOP at the full rate, or the least traffic."""
        rate = self.bfloat16 if any(work.dtype == torch.bfloat16 for work in counted.count.works) else self.tf32
        return max(counted.count.flop / rate, counted.least_bytes / self.bandwidth)


HOPEFUL = Device(cached=12e12, products=0.85, few=1.0, node=0.8e-6)
"""If all goes well: maps stay in the L2 cache, convolutions come near products, nodes cost little."""


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within: DCLGAN's loss takes the kernels, as it does by itself on a GPU."""
    with contextlib.ExitStack() as stack:
        for name in ("patch_nce_layers", "project_patches"):
            chosen = partial(getattr(dclgan, name), implementation="triton")
            stack.enter_context(mock.patch.object(dclgan, name, chosen))
        yield


def fused_loss(step: Any) -> None:
    """The contrastive loss by its kernels."""
    for module in step.method.modules():
        if isinstance(module, PatchNCEHead):
            module.implementation = "triton"


def fused(step: Any) -> None:
    """Loss, norms, pads, blurs and last convolutions by kernels, as a GPU's step has them."""
    fused_loss(step)
    set_implementation(step.method, "triton")


def published_loss(name: str, images: int, patches: int = 256, dim: int = 256) -> Count:
    """What the published loss moves and launches more than ours does: DCLGAN's broadcast cosines; nothing for CUT."""
    rows = [torch.randn(images * patches, dim, device="meta", requires_grad=True) for _ in range(2)]
    with Count() as count:
        if name.startswith(("dclgan", "dcdgan")):
            for _ in range(2 * 4):  # two directions of four layers
                baselines.dclgan_loss(rows[0], rows[1]).mean().backward()
    return count


@dataclass
class Prediction:
    """One line: milliseconds a step on the assumed device."""

    name: str
    images: int
    form: str
    gflop: float
    gbytes: float
    launches: int
    floor: float
    hopeful: float
    usual: float
    eager: float


def predict(name: str, images: int, side: int, device: Device, **more: Any) -> Iterator[Prediction]:
    """The published way, ours in float32 and bfloat16 with library layers, and ours with fused ones."""

    def line(form: str, counted: Counted) -> Prediction:
        count = counted.count
        seconds = (
            device.floor_seconds(counted),
            HOPEFUL.device_seconds(count),
            device.device_seconds(count),
            device.eager_seconds(count),
        )
        times = (1e3 * t for t in seconds)
        return Prediction(name, images, form, count.flop / 1e9, count.bytes / 1e9, count.launches, *times)

    twice = count_step(name, images, side, "fp32", reuse_key_features=False, prepare=with_all_biases, **more)
    if name != "dcdgan":  # of which nothing was released
        twice.count.works += published_loss(name, images).works
        yield line("as published, float32", twice)
    with as_on_a_gpu():
        yield line("ours, float32", count_step(name, images, side, "fp32", prepare=fused_loss, **more))
        yield line("ours, bfloat16", count_step(name, images, side, "bf16", prepare=fused_loss, **more))
        yield line("ours, bfloat16, fused layers", count_step(name, images, side, "bf16", prepare=fused, **more))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
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
                rows.append([*cells, f"{p.floor:.2f}", f"{p.hopeful:.2f}", f"{p.usual:.2f}", f"{p.eager:.2f}"])
    header = ["step", "form", "GFLOP", "GB moved", "launches", "floor ms", "hopeful", "usual", "one by one"]
    yield table(header, rows)


def memory_table(names: Sequence[str], batches: Sequence[int], sides: Sequence[int]) -> Iterator[str]:
    """Peak memory by crop size and batch, in GiB: weights and moments, and what lives during a step."""

    def recomputed(step: Any) -> None:
        fused(step)
        recompute_blocks(step.method)

    forms: dict[str, tuple[str, Callable[[Any], None]]] = {
        "float32": ("fp32", lambda _: None),
        "bfloat16": ("bf16", lambda _: None),
        "bfloat16, kernels": ("bf16", fused),
        "and blocks computed again": ("bf16", recomputed),
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
    """Print the tables in Markdown; 0."""
    parser = argparse.ArgumentParser(prog="benchmarks/predict.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("steps", "memory"), help="one of the two tables")
    parser.add_argument("--names", nargs="+", default=["cut", "fastcut", "dclgan", "dcdgan"], metavar="METHOD")
    parser.add_argument("--images", nargs="+", type=int, default=[1, 8], metavar="B")
    parser.add_argument("--side", type=int, default=256)
    args = parser.parse_args(argv)
    device = Device()
    if args.only != "memory":
        print(f"Usual: {device}\n\nHopeful: {HOPEFUL}\n")
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
