"""CPU time of uncaptured calls, beside plain PyTorch: what a drop-in costs where the host decides.

python -m benchmarks.host [--out DIR] [--published CUT] [--only NAME ...]

Needs a CUDA device, or libraries that stand in for CUDA's: CPU time does not depend on what the device computes. Both
sides of a ratio run in one process, alternating, and each figure is the median of its rounds. Launches are the kernels
and fills that the CUDA profiler would count; a stand-in does not report them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from fastnce.kernels import blur, instance_norm, instance_norm_backward, reflect_pad
from torch import Tensor

from benchmarks import baselines, machine
from benchmarks.cases import Context
from benchmarks.published import Checkout, find_checkouts
from benchmarks.step import OurStep, _theirs, pictures
from fastnce import PatchNCEHead, PatchNCELoss, PatchSampleF, accelerate

CHANNELS, SIDES = (3, 128, 256, 256, 256), (262, 256, 128, 64, 64)
"""The maps of CUT's five layers for an image of 256x256."""
DEVICE = torch.device("cuda")

Call = Callable[[], Any]


@dataclass
class Comparison:
    """One piece of work: our call, and the published way to do it (None for the cost of a launch)."""

    name: str
    ours: Call
    theirs: Call | None
    goal: str
    launches: int = 1
    """Kernels of ours, by which its time is divided if there is nothing to compare with."""


@dataclass
class Row:
    """The result: microseconds of CPU time per call."""

    name: str
    ours_us: float
    published_us: float | None
    ratio: float | None
    per_launch_us: float | None
    goal: str


def losses() -> Iterator[Comparison]:
    """Yield the drop-in loss, the drop-in classes over five layers, and the whole chain."""
    q, k = torch.randn(256, 256, device=DEVICE, requires_grad=True), torch.randn(256, 256, device=DEVICE)
    loss = PatchNCELoss(temperature=0.07)
    yield Comparison(
        "PatchNCELoss, 256 rows, forward + backward",
        lambda: torch.autograd.grad(loss(q, k).mean(), q),
        lambda: torch.autograd.grad(baselines.cut_loss(q, k).mean(), q),
        "0.30x",
    )
    ready = torch.empty(256, device=DEVICE), torch.empty(256, 256, device=DEVICE)
    yield Comparison(
        "  floor: an autograd function without work in its place",
        lambda: torch.autograd.grad(_Nothing.apply(q, *ready).mean(), q),
        lambda: torch.autograd.grad(baselines.cut_loss(q, k).mean(), q),
        "",
    )
    maps = [torch.randn(1, c, s, s, device=DEVICE).requires_grad_() for c, s in zip(CHANNELS, SIDES, strict=True)]
    keys = [m.detach() for m in maps]
    sampler = PatchSampleF(use_mlp=True, nc=256, in_channels=CHANNELS).to(DEVICE)
    leaves = [*maps, *sampler.parameters()]
    yield Comparison(
        "PatchSampleF + PatchNCELoss, five layers, forward + backward",
        lambda: torch.autograd.grad(_classes(sampler, loss, maps, keys), leaves),
        lambda: torch.autograd.grad(_plain_classes(sampler, maps, keys), leaves),
        "0.25x",
    )
    found = [torch.empty_like(leaf) for leaf in leaves]
    yield Comparison(
        "  floor: autograd functions without work in their place",
        lambda: torch.autograd.grad(_nothing_five_times(maps, leaves, found, *ready), leaves),
        lambda: torch.autograd.grad(_plain_classes(sampler, maps, keys), leaves),
        "",
    )
    head = PatchNCEHead(CHANNELS, dim=256, patches=256, temperature=0.07).to(DEVICE)
    both = [torch.randn(2, c, s, s, device=DEVICE).requires_grad_() for c, s in zip(CHANNELS, SIDES, strict=True)]
    both_keys, both_leaves, mlps = [m.detach() for m in both], [*both, *head.parameters()], head.mlps(5)
    yield Comparison(
        "PatchNCEHead, two directions, forward + backward",
        lambda: torch.autograd.grad(head(both, both_keys, directions=2).sum(), both_leaves),
        lambda: torch.autograd.grad(baselines.chain(both, both_keys, mlps).sum(), both_leaves),
        "0.15x",
    )


class _Nothing(torch.autograd.Function):
    """What a fused loss costs before it does anything: a result, a saved gradient, its product with the upstream."""

    @staticmethod
    def forward(ctx, rows, result, gradient):
        ctx.save_for_backward(gradient)
        return result.view_as(result)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream[:, None], None, None


class _NothingSampled(torch.autograd.Function):
    """The same for a sampler: `count` rows from all maps and weights, whose gradients are there already."""

    @staticmethod
    def forward(ctx, rows, count, gradients, *leaves):
        ctx.gradients = gradients
        return tuple(rows.view_as(rows) for _ in range(count))

    @staticmethod
    def backward(ctx, *_):
        return None, None, None, *ctx.gradients


def _nothing_five_times(maps, leaves, found, result: Tensor, gradient: Tensor) -> Tensor:
    rows = _NothingSampled.apply(gradient, len(maps), found, *leaves)
    total = torch.zeros((), device=DEVICE)
    for one in rows:
        total = total + _Nothing.apply(one, result, gradient).mean()
    return total / len(rows)


def _classes(sampler: PatchSampleF, loss: PatchNCELoss, maps: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """CUT's `calculate_NCE_loss` with the drop-in classes."""
    with torch.no_grad():
        key_rows, ids = sampler(keys, 256)
    query_rows, _ = sampler(maps, 256, ids)
    total = torch.zeros((), device=DEVICE)
    for q, k in zip(query_rows, key_rows, strict=True):
        total = total + loss(q, k).mean()
    return total / len(query_rows)


def _plain_classes(sampler: PatchSampleF, maps: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    mlps = sampler.mlps(len(maps))
    assert mlps is not None
    ids = [torch.randperm(m.shape[2] * m.shape[3], device=m.device)[:256] for m in keys]
    with torch.no_grad():
        key_rows = baselines.project(keys, ids, mlps)
    query_rows = baselines.project(maps, ids, mlps)
    total = torch.zeros((), device=DEVICE)
    for q, k in zip(query_rows, key_rows, strict=True):
        total = total + baselines.cut_loss(q, k).mean()
    return total / len(query_rows)


def layers() -> Iterator[Comparison]:
    """Yield single kernels of the layers: host code, allocation and launch."""
    half = torch.randn(2, 256, 64, 64, device=DEVICE, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    wide = torch.randn(2, 128, 256, 256, device=DEVICE, dtype=torch.bfloat16)
    wide = wide.contiguous(memory_format=torch.channels_last)
    _, statistics = instance_norm.instance_norm(half, None, 1e-5, 0.0, 1)
    padded = reflect_pad.reflect_pad(half, 66, 66)
    goal = "15 us"
    yield Comparison("torch add, one launch", lambda: half + 1, None, "")
    yield Comparison("blur_down", lambda: blur.blur_down(wide, 128, 128), None, goal)
    yield Comparison("blur_up", lambda: blur.blur_up(half, 128, 128), None, goal)
    yield Comparison("reflect_pad", lambda: reflect_pad.reflect_pad(half, 66, 66), None, goal)
    yield Comparison("reflect_pad_backward", lambda: reflect_pad.reflect_pad_backward(padded, 64, 64), None, goal)
    yield Comparison("instance_norm", lambda: instance_norm.instance_norm(half, None, 1e-5, 0.0, 1), None, goal)
    yield Comparison(
        "instance_norm_backward",
        lambda: instance_norm_backward.instance_norm_backward(padded, None, half, statistics, 0.0, 1),
        None,
        goal,
    )


def steps(published: Sequence[Checkout]) -> Iterator[Comparison]:
    """Yield CUT's whole step in float32 without a CUDA graph, beside the published step if there is a checkout."""
    context = Context(device=DEVICE, quick=False, published=list(published))
    a, b = pictures(1, 256, DEVICE)
    ours = partial(OurStep("cut", context, "fp32", {"compile": False, "graph": False}), a, b)
    theirs: dict[str, Call] = {}
    for checkout in published:
        name = "cut" if (checkout.folder / "models" / "cut_model.py").is_file() else "dclgan"
        theirs.setdefault(name, partial(_theirs(checkout, name, 1, context), a, b))
    yield Comparison("CUT step, 256x256, batch 1, uncaptured", ours, theirs.get("cut"), "0.60x", launches=0)
    for checkout in published:
        name = "cut" if (checkout.folder / "models" / "cut_model.py").is_file() else "dclgan"
        patched = partial(_theirs(accelerated(checkout.folder), name, 1, context), a, b)
        yield Comparison(
            f"{checkout.name}'s own step with fastnce.accelerate", patched, theirs[name], "1.00x", launches=0
        )


def accelerated(folder: Path) -> Checkout:
    """Return a checkout whose loss and sampler are replaced."""
    checkout = Checkout(folder)
    with checkout.active(), contextlib.redirect_stdout(sys.stderr):
        for module in ("models.patchnce", "models.networks"):
            if not accelerate.patch(importlib.import_module(module)):
                raise RuntimeError(f"{folder}: nothing was replaced in {module}")
    return checkout


def measure(comparison: Comparison, rounds: int, seconds: float) -> Row:
    """Measure both sides in turn. Each round of a side lasts about `seconds`."""
    calls = [call for call in (comparison.ours, comparison.theirs) if call is not None]
    repeats = []
    for call in calls:
        call(), call()
        repeats.append(max(1, int(seconds / max(1e-6, _cpu_seconds(call, 3)))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for own, call, repeat in zip(times, calls, repeats, strict=True):
            own.append(_cpu_seconds(call, repeat) * 1e6)
    ours, theirs = median(times[0]), median(times[1]) if len(times) > 1 else None
    ratio = median(o / t for o, t in zip(*times, strict=True)) if len(times) > 1 else None
    launch = ours / comparison.launches if theirs is None and comparison.launches else None
    return Row(comparison.name, ours, theirs, ratio, launch, comparison.goal)


def _cpu_seconds(call: Call, repeat: int) -> float:
    torch.cuda.synchronize()
    began = time.process_time()  # of all threads: the backward pass has one of its own
    for _ in range(repeat):
        call()
    return (time.process_time() - began) / repeat


def line(row: Row) -> str:
    """Format a row."""
    text = f"{row.name:62} {row.ours_us:9.1f} us"
    if row.published_us is not None and row.ratio is not None:
        text += f"  published {row.published_us:9.1f} us  ratio {row.ratio:.2f}x"
    elif row.per_launch_us is not None:
        text += f"  {row.per_launch_us:.1f} us per launch"
    return text + (f"  (goal {row.goal})" if row.goal else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 2 after an error message if there is no CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for host.json")
    parser.add_argument("--published", nargs="+", default=[], metavar="DIR", help="a checkout of CUT")
    parser.add_argument(
        "--only", nargs="+", default=["losses", "layers", "steps"], choices=["losses", "layers", "steps"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    if not torch.cuda.is_available():
        print("error: PyTorch finds no CUDA device, nor libraries that stand in for one", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    parts = {"losses": losses, "layers": layers, "steps": partial(steps, find_checkouts(options.published))}
    rows = []
    for name, part in parts.items():
        for comparison in part() if name in options.only else ():
            rows.append(measure(comparison, options.rounds, 1.0 if name == "steps" else 0.05))
            print(line(rows[-1]), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {"machine": machine.facts(DEVICE), "rows": [asdict(row) for row in rows]}
        (options.out / "host.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
