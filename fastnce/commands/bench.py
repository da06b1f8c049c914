"""Measure this machine in under two minutes, and how close training comes to its peak rates.

fastnce bench
fastnce bench --device cpu --json bench.json

It measures the machine's peak rates (a large copy, a square matrix product), then the contrastive loss, the chain from
feature maps to gradients, CUT's training step and the data path, each with the shortest time that the peak rates allow.
`benchmarks/run.py` of the repository compares the library with other implementations.
"""

from __future__ import annotations

import functools
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from .. import PatchNCEHead, __version__, patch_nce
from ..common.timing import ceilings, default_device, device_name, floor_ms, percentiles, time_interleaved
from ..common.writing import write_whole
from ..data.encoding import encoded
from ..data.unpaired import UnpairedData
from ..engine.choices import pick_precision
from ..engine.cudagraph import WARM_UP
from ..engine.options import OptimOptions
from ..engine.step import Step
from ..methods import Batch, NetworkOptions
from ..methods.presets import PRESETS
from .parsing import command_parser

BUDGET = 110.0
"""Seconds after which no further case starts."""


@dataclass
class Line:
    """One line of the table. `rate` is in `unit` (rows or images per second). None fields were not measured."""

    work: str
    milliseconds: float | None = None
    rate: float | None = None
    unit: str = ""
    floor_milliseconds: float | None = None
    note: str = ""


Case = tuple[str, Callable[[], Line]]


def cases(device: torch.device, limits: dict[str, float], quick: bool = False) -> Iterator[Case]:
    """Yield (name, function that measures it) of each case, the cheap ones first."""
    cpu = device.type == "cpu"
    rows = (64,) if quick else (256, 1024, 4096) if cpu else (256, 4096, 16384)
    for count in rows:
        yield f"InfoNCE, {count} rows", functools.partial(_infonce, count, device, limits, quick)
    side = 32 if quick else 128 if cpu else 256
    yield f"chain, {side}x{side}", functools.partial(_chain, side, device, limits, quick)
    seen: dict[int, float] = {}
    for images in (1,) if cpu else (1, 8):
        yield (
            f"CUT step, {side}x{side}, B={images}",
            functools.partial(_step, images, side, device, limits, quick, seen),
        )
    yield f"data, {side}x{side}, B=8", functools.partial(_data, device, quick, seen, side)


def _time(call: Callable[[], Any], device: torch.device, quick: bool, seconds: float = 2.0) -> float:
    call()
    return percentiles(time_interleaved({"": call}, device, 0.05 if quick else seconds)[""])[1]


def _infonce(count: int, device: torch.device, limits: dict[str, float], quick: bool) -> Line:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    queries, keys = (F.normalize(torch.randn(count, 256, device=device), dim=1).to(dtype) for _ in range(2))
    queries.requires_grad_()

    def call() -> None:
        torch.autograd.grad(patch_nce(queries, keys), queries)

    name = str(dtype).removeprefix("torch.")
    ms = _time(call, device, quick)
    floor = floor_ms(4.0 * count**2 * 256, 3.0 * count * 256 * dtype.itemsize, name, limits)
    return Line("", ms, count / ms * 1e3, "rows/s", floor, f"{name}, loss and query gradient, D=256")


def _chain(side: int, device: torch.device, limits: dict[str, float], quick: bool) -> Line:
    shapes = [(3, side + 6), (128, side), (256, side // 2), (256, side // 4), (256, side // 4)]
    query_maps, key_maps = ([torch.randn(1, c, s, s, device=device) for c, s in shapes] for _ in range(2))
    query_maps = [m.requires_grad_() for m in query_maps]
    patches = min(256, (side // 4) ** 2)
    head = PatchNCEHead([c for c, _ in shapes], dim=256, patches=patches, temperature=0.07).to(device)
    leaves = [*query_maps, *head.parameters()]

    def call() -> None:
        torch.autograd.grad(head(query_maps, key_maps), leaves)

    ms = _time(call, device, quick)
    flop = sum(8.0 * patches * (c * 256 + 256 * 256) for c, _ in shapes) + 4.0 * len(shapes) * patches**2 * 256
    traffic = 4.0 * sum(c * (s * s + 2 * patches) for c, s in shapes)
    floor = floor_ms(flop, traffic, "float32", limits)
    return Line("", ms, 1e3 / ms, "images/s", floor, f"float32, 5 layers, {patches} patches, gradients of maps and F")


def _step(
    images: int, side: int, device: torch.device, limits: dict[str, float], quick: bool, seen: dict[int, float]
) -> Line:
    preset = PRESETS["cut"]
    small: dict[str, Any] = {"width": 8, "discriminator_width": 8} if quick else {}
    method = preset.method(preset.options(), NetworkOptions(**small)).to(device)
    precision = pick_precision("auto", device)
    step = Step(method, OptimOptions(), precision, graph=device.type == "cuda")
    batch = Batch(*(torch.rand(2, images, 3, side, side, device=device) * 2 - 1))

    def call() -> None:
        step.run(batch, method.draw(random.Random(0)))

    with FlopCounterMode(display=False) as counter:
        call()
    for _ in range(WARM_UP if step.graphs else 0):
        call()
    ms = _time(call, device, quick, 5.0)
    seen[images] = images / ms * 1e3
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    if dtype == "float32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        dtype = "tf32"
    floor = floor_ms(float(counter.get_total_flops()), None, dtype, limits)
    form = "without a CUDA graph" if step.graphs is None or step.graphs.failed else "in a CUDA graph"
    note = f"{dtype}, {counter.get_total_flops() / 1e9:.0f} GFLOP per step, {form}, not compiled"
    return Line("", ms, seen[images], "images/s", floor, note + (", toy networks" if quick else ""))


def _data(device: torch.device, quick: bool, seen: dict[int, float], side: int) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), 2 if quick else 16, 300)
        load = side * 286 // 256
        data = UnpairedData(folder, load_size=load, crop_size=side, batch=8, device=device)
        position = [0]

        def call() -> None:
            data.batch(position[0])
            position[0] += 1

        ms = _time(call, device, quick)
        rate = 8e3 / ms  # counts pairs with one picture of each domain, as the step does
        note = "pairs from a cache of decoded pictures"
        if seen:
            consumed = seen[max(seen)]
            note += f"; {rate / consumed:.0f}x the rate of the step above"
        return Line("", ms, rate, "images/s", None, note)


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Write `count` PNG files of noise, side x side, to each of trainA and trainB, as data for measurements."""
    rng = np.random.default_rng(0)
    for domain in ("trainA", "trainB"):
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
            file = folder / domain / f"{i}.png"
            file.write_bytes(encoded(pixels, file, compress_level=1))


def run(device: torch.device, quick: bool = False, say: Callable[[str], None] = print) -> tuple[list[Line], dict]:
    """Measure and print; return the lines and the peak rates. The note of a failed case begins with "failed"."""
    began = time.monotonic()
    limits = ceilings(device, quick)
    say(f"fastnce {__version__}, torch {torch.__version__}, {device_name(device)}, {torch.get_num_threads()} threads")
    products = {k.split("_")[1]: v for k, v in limits.items() if k.startswith("matmul_") and k.endswith("per_s")}
    rates = ", ".join(f"{name} {flop / 1e12:.3g} TFLOP/s" for name, flop in products.items())
    say(f"peak rates: copy {limits['copy_bytes_per_s'] / 1e9:.3g} GB/s, products {rates}")
    if device.type == "cpu":
        say("no accelerator: measuring small sizes on the CPU; they do not predict the speed of a GPU")
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if load > (os.cpu_count() or 1):
            say(f"the machine is busy (load {load:.1f}): an idle machine is faster than these figures")
    say(f"\n{'':26}{'ms':>10}{'per second':>20}{'floor ms':>10}{'of floor':>9}")
    lines = []
    for name, measure in cases(device, limits, quick):
        if time.monotonic() - began > BUDGET:
            line = Line(name, note="not run: no time left")
        else:
            try:
                line = measure()
            except Exception as error:  # such as out of memory, a compiler, a driver: report it and continue
                line = Line(name, note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
        line.work = name
        lines.append(line)
        say(_text(line))
    return lines, limits


def _text(line: Line) -> str:
    ms, floor = line.milliseconds, line.floor_milliseconds
    cells = f"{'' if ms is None else format(ms, '.3f'):>10}"
    rate = "" if line.rate is None else format(line.rate, ",.0f" if line.rate >= 1e3 else ".4g")
    cells += f"{f'{rate} {line.unit}':>20}"
    cells += f"{'' if floor is None else format(floor, '.3f'):>10}"
    cells += f"{'' if floor is None or not ms else format(floor / ms, '.0%'):>9}"
    return f"{line.work:26}{cells}  {line.note}"


def main(arguments: list[str]) -> int:
    """Measure the loss, a training step and the data path on this machine, and compare them with its peak rates.

    The exit code is 1 if a case failed or there was no time left for it.
    """
    parser = command_parser("bench", main)
    parser.add_argument("--device", help="cpu, cuda, ...; default the accelerator if there is one")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, only to check that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args(arguments)
    try:
        device = default_device(args.device)
        torch.zeros(1, device=device).item()  # fails on the device meta, which has no values
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.absolute().parent} to write it into")
    torch.manual_seed(0)
    lines, limits = run(device, args.quick)
    if args.json:
        facts = {"fastnce": __version__, "torch": torch.__version__, "device": device_name(device), "ceilings": limits}
        figures = json.dumps(facts | {"lines": [asdict(line) for line in lines]}, indent=1) + "\n"
        write_whole(args.json, figures.encode())
    return 1 if any(line.milliseconds is None for line in lines) else 0
