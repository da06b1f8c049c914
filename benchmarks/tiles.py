"""Measure which tiles are fastest on this GPU, for the table in `kernels/configs.py`.

python benchmarks/tiles.py --out FILE.json               # about a minute if the kernels are already compiled
python benchmarks/tiles.py --out FILE.json --only nce    # only workloads whose name begins with nce

Each workload runs first with the tile of the table. A candidate whose result differs is marked wrong; one that the
device refuses is listed with the reason. The three fastest are measured again, interleaved with the tile of the table,
before anything is printed. A difference of less than a few percent is noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from fastnce.kernels import (  # noqa: E402  # noqa: E402
    blur,
    chosen,
    few_outputs,
    few_outputs_backward,
    instance_norm,
    instance_norm_backward,
    nce,
    norm_tiles,
)
from fastnce.kernels.configs import Tile  # noqa: E402
from fastnce.kernels.planned import forget_plans  # noqa: E402
from torch import Tensor  # noqa: E402

from fastnce import PatchNCEHead  # noqa: E402
from fastnce.common.narrowed import narrowed  # noqa: E402
from fastnce.common.timing import capture, default_device, synchronize, time_interleaved  # noqa: E402

SAME = 2e-2
"""The largest relative difference between the results of two tiles, for sums of 16-bit numbers."""
BEST = 3
"""Candidates that are measured again."""
NONE = Tile(0, 0, 0, 0)
"""Stands for no tile: a norm of a small plane then takes two launches."""


@dataclass
class Workload:
    """A call of kernels whose tile is to be chosen."""

    name: str
    chooser: str
    """The function of `chooser_of` that returns the tile."""
    candidates: Sequence[Tile]
    call: Callable[..., Any]
    inputs: list[tuple] = field(default_factory=lambda: [()])
    chooser_of: Any = chosen


@dataclass
class Found:
    """The time of one tile for one workload.

    ms is None if it did not run; `why` is the reason. again_ms is the time interleaved with the best ones.
    """

    work: str
    tile: Tile | None
    ms: float | None = None
    again_ms: float | None = None
    why: str = ""


def tiles(ms: Sequence[int], ns: Sequence[int], warps: Sequence[int], stages: Sequence[int]) -> list[Tile]:
    return [Tile(*sizes) for sizes in itertools.product(ms, ns, warps, stages)]


def unit_rows(groups: int, rows: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return F.normalize(torch.randn(groups, rows, 256, device=device), dim=2).to(dtype)


def nce_workloads(device: torch.device, quick: bool) -> Iterator[Workload]:
    """InfoNCE of many rows, and of five layers in two directions."""
    large = 256 if quick else 16384
    many = [(unit_rows(1, large, device), unit_rows(1, large, device))]
    layers = [
        ([unit_rows(2, 256, device) for _ in range(5)], [unit_rows(2, 256, device) for _ in range(5)]) for _ in range(8)
    ]
    wide = [*tiles((128,), (32, 64, 128), (8,), (2, 3, 4)), *tiles((64,), (64, 128), (4, 8), (2, 3))]
    small = [*tiles((16,), (64, 128), (4, 8), (2, 3)), *tiles((32, 64), (64,), (4, 8), (2, 3))]
    for form, unit, temperature in (("unit", True, 0.07), ("checked", False, 0.07), ("online", False, 0.01)):

        def one(q: Tensor, k: Tensor, unit=unit, temperature=temperature) -> Any:
            return nce.nce_forward([q], [k], [], [], [], [temperature], decoupled=False, unit=unit, gradient=True)

        def five(q: Sequence[Tensor], k: Sequence[Tensor], unit=unit, temperature=temperature) -> Any:
            return nce.nce_forward(q, k, [], [], [], [temperature] * 5, decoupled=False, unit=unit, gradient=True)

        yield Workload(f"nce {large} rows, {form}", "nce_tile", wide, one, many)
        if form != "online":
            yield Workload(f"nce 5 layers, {form}", "nce_tile", small, five, layers)


def chain_workloads(device: torch.device, quick: bool) -> Iterator[Workload]:
    """Sampling and projection of the five published layers, with gradients, in bfloat16."""
    side = 32 if quick else 256
    shapes = [(3, side + 6), (128, side), (256, side // 2), (256, side // 4), (256, side // 4)]
    head = PatchNCEHead([c for c, _ in shapes], dim=256, patches=16 if quick else 256).to(device)

    def maps() -> list[Tensor]:
        drawn = [torch.randn(1, c, s, s, device=device, dtype=torch.bfloat16) for c, s in shapes]
        return [m.contiguous(memory_format=torch.channels_last) for m in drawn]

    pairs = [([m.requires_grad_() for m in maps()], maps()) for _ in range(1 if quick else 4)]
    weights = list(head.parameters())
    multiplied = [w for w in weights if w.dim() == 2]
    copies = [w.detach().bfloat16() for w in multiplied]  # as a training step makes them

    def call(queries: list[Tensor], keys: list[Tensor]) -> Any:
        torch.manual_seed(0)
        with torch.autocast(device.type, torch.bfloat16), narrowed(multiplied, copies):
            loss = head(queries, keys)
        return loss, *torch.autograd.grad(loss, [*queries, *weights])

    project = tiles((16, 32, 64), (16, 32, 64), (4, 8), (1, 2, 3))
    yield Workload("chain, project", "project_tile", project, call, pairs)
    products = tiles((32, 64, 128), (32, 64, 128), (4, 8), (2, 3))
    yield Workload("chain, weight gradient", "weight_gradient_tile", products, call, pairs)


def layer_workloads(device: torch.device, quick: bool) -> Iterator[Workload]:
    """Norms and blurs of the published generator's maps, channels-last, in bfloat16."""
    candidates = [
        Tile(elements // channels, channels, warps, 1)
        for elements, channels, warps in itertools.product((1024, 2048, 4096), (32, 64, 128), (4, 8))
    ]

    def drawn(channels: int, side: int) -> Tensor:
        x = torch.randn(1, channels, side, side, device=device, dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last)

    for channels, side in ((256, 64), (128, 128), (64, 256)):
        side = 16 if quick else side
        fit = [tile for tile in candidates if tile.block_n <= channels]
        inputs = [(drawn(channels, side),) for _ in range(1 if quick else 16)]
        norm = [(x, instance_norm.instance_norm(x, None, 1e-5, 0.0, 0)[1]) for (x,) in inputs]
        size = f"{channels}x{side}x{side}"

        def forward(x: Tensor) -> Any:
            return instance_norm.instance_norm(x, None, 1e-5, 0.0, 1)[0]

        def backward(x: Tensor, statistics: Tensor) -> Any:
            return instance_norm_backward.instance_norm_backward(x, None, x, statistics, 0.0, 0)[0]

        def folded(padded: Tensor, x: Tensor, statistics: Tensor) -> Any:
            return instance_norm_backward.instance_norm_backward(padded, None, x, statistics, 0.0, 1)[0]

        if channels < 256:
            yield Workload(f"norm {size}", "norm_tile", fit, forward, inputs, norm_tiles)
            yield Workload(f"norm backward {size}", "norm_tile", fit, backward, norm, norm_tiles)
        if channels == 256:  # in one launch; NONE is the tile of two
            padded = [(drawn(channels, side + 2), *pair) for pair in norm]
            whole = [Tile(side * side, few, warps, 1) for few in (4, 8, 16) for warps in (8, 16, 32)]
            whole = [NONE, *whole]
            yield Workload(f"norm {size}, one launch", "whole_tile", whole, forward, inputs, norm_tiles)
            yield Workload(f"norm backward {size}, one launch", "whole_tile", whole, backward, norm, norm_tiles)
            yield Workload(f"norm backward {size}, padded", "whole_tile", whole, folded, padded, norm_tiles)
        else:
            half = (side + 1) // 2
            yield Workload(f"blur down {size}", "layer_tile", fit, lambda x, h=half: blur.blur_down(x, h, h), inputs)
            twice = 2 * side
            yield Workload(f"blur up {size}", "layer_tile", fit, lambda x, h=twice: blur.blur_up(x, h, h), inputs)
            halved = [(drawn(channels, half),) for _ in inputs]
            doubled = [(drawn(channels, twice),) for _ in inputs[::4]]

            def down_back(x: Tensor, s: int = side) -> Tensor:
                return blur.blur_down_backward(x, s, s)

            def up_back(x: Tensor, s: int = side) -> Tensor:
                return blur.blur_up_backward(x, s, s)

            yield Workload(f"blur down backward {size}", "layer_tile", fit, down_back, halved)
            yield Workload(f"blur up backward {size}", "layer_tile", fit, up_back, doubled)


def few_outputs_workloads(device: torch.device, quick: bool) -> Iterator[Workload]:
    """The ResNet generator's last convolution on two padded images, in bfloat16."""
    side = 22 if quick else 262
    forward = [
        *tiles((64, 128), (1, 2), (4,), (2, 3, 4)),
        *tiles((256,), (1,), (8,), (2, 3)),
        *tiles((128,), (2, 4), (8,), (2, 3)),
        *tiles((64,), (4,), (4,), (2, 3)),
    ]
    map_gradient = [*tiles((64, 128), (64,), (4,), (1, 2, 3, 4)), *tiles((128, 256), (64,), (8,), (2, 3))]
    weight_gradient = [
        *tiles((64, 128), (64, 128), (4,), (2, 3, 4)),
        *tiles((64,), (256,), (8,), (2, 3)),
        *tiles((128,), (256,), (8,), (2,)),
        *tiles((64,), (128, 512), (8,), (3,)),
        *tiles((64,), (256,), (4,), (3,)),
    ]
    inputs, gradients = [], []
    for _ in range(1 if quick else 6):
        x = torch.randn(2, 64, side, side, device=device, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(3, 64, 7, 7, device=device), torch.randn(3, device=device)
        weight = weight.contiguous(memory_format=torch.channels_last)
        inputs.append((x, weight, bias))
        gradients.append((torch.randn_like(few_outputs.few_outputs(x, weight, bias, 0)), x, weight))

    def of_map(gradient: Tensor, x: Tensor, weight: Tensor) -> Any:
        return few_outputs_backward.few_outputs_backward(gradient, x, weight, 0, True, False, False)[0]

    def of_weight(gradient: Tensor, x: Tensor, weight: Tensor) -> Any:
        return few_outputs_backward.few_outputs_backward(gradient, x, weight, 0, False, True, True)[1:]

    def value(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return few_outputs.few_outputs(x, weight, bias, 0)

    name, chooser = f"last convolution 2x64x{side}x{side}", "few_outputs_tile"
    yield Workload(f"{name}, forward", chooser, forward, value, inputs)
    yield Workload(f"{name}, map's gradient", chooser, map_gradient, of_map, gradients)
    yield Workload(f"{name}, weight's gradient", chooser, weight_gradient, of_weight, gradients)


GROUPS = {
    "nce": nce_workloads,
    "chain": chain_workloads,
    "layers": layer_workloads,
    "few outputs": few_outputs_workloads,
}


def flat(result: Any) -> Tensor:
    """All numbers of a result in one vector."""
    if isinstance(result, Tensor):
        return result.detach().float().flatten()
    return torch.cat([flat(part) for part in result]) if result else torch.empty(0)


def _pick(tile: Tile, *_: Any, **__: Any) -> Tile | None:
    return None if tile == NONE else tile


def measured(work: Workload, device: torch.device, seconds: float) -> list[Found]:
    """Measure the tile of the table (tile None), then every candidate, then the best ones again."""
    expected, ready, found = None, {}, []
    for tile in (None, *work.candidates):
        result = Found(work.name, tile)
        found.append(result)
        pick = getattr(work.chooser_of, work.chooser) if tile is None else partial(_pick, tile)
        try:
            forget_plans()  # they keep the tile of an earlier candidate
            with mock.patch.object(work.chooser_of, work.chooser, pick):
                values = flat(work.call(*work.inputs[0]))
                synchronize(device)
                call = capture(work.call, work.inputs) if device.type == "cuda" else lambda: work.call(*work.inputs[0])
            expected = values if expected is None else expected
            apart = ((values - expected).norm() / expected.norm()).item()
            if not apart <= SAME:
                result.why = f"wrong: {apart:.1e} apart"
            times = time_interleaved({"": call}, device, seconds, least_ms=2.0)[""]
            result.ms = sorted(times)[len(times) // 2] / len(work.inputs)
            ready[id(result)] = call
        except Exception as error:  # too much shared memory, for example
            result.why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    forget_plans()
    fastest = sorted((f for f in found[1:] if f.ms is not None and not f.why), key=lambda f: f.ms or 0.0)[:BEST]
    again = [f for f in (found[0], *fastest) if id(f) in ready]
    times = time_interleaved({str(id(f)): ready[id(f)] for f in again}, device, 4 * seconds, least_ms=5.0)
    for f in again:
        ordered = sorted(times[str(id(f))])
        f.again_ms = ordered[len(ordered) // 2] / len(work.inputs)
    return found


def line(found: Sequence[Found]) -> str:
    """One line: the time of the table's tile and of the best candidates."""
    ran = [f for f in found[1:] if f.again_ms is not None]
    ran.sort(key=lambda f: f.again_ms or 0.0)
    fastest = [f"{f.again_ms * 1e3:.1f} us {tuple(asdict(f.tile).values())}" for f in ran if f.again_ms and f.tile]
    current = found[0].again_ms
    return f"{found[0].work}: {f'{current * 1e3:.1f} us' if current else found[0].why} | {' | '.join(fastest)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all workloads; the file is rewritten after each. Returns 0."""
    parser = argparse.ArgumentParser(prog="benchmarks/tiles.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON of everything measured")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only workloads whose name begins with one of these")
    parser.add_argument("--seconds", type=float, default=0.03, help="time per candidate; default 0.03")
    parser.add_argument("--minutes", type=float, default=5.0, help="start no workload after this time; default 5")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test that everything runs")
    options = parser.parse_args(argv)
    device = default_device()
    torch.manual_seed(0)
    began, everything = time.monotonic(), []
    for group in GROUPS.values():
        for work in group(device, options.quick):
            if options.only and not work.name.startswith(tuple(options.only)):
                continue
            if time.monotonic() - began > 60 * options.minutes:
                print(f"{work.name}: skipped, the time limit has passed", flush=True)
                continue
            found = measured(work, device, options.seconds)
            print(line(found), flush=True)
            everything += [asdict(f) for f in found]
            part = options.out.with_suffix(".part")
            part.write_text(json.dumps(everything, indent=1))
            os.replace(part, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
