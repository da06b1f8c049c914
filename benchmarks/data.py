"""The data path: images per second that it delivers, against those that a step consumes (P9).

python benchmarks/run.py --out DIR --only data
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.cases import Case, Context, Provider, Row
from benchmarks.measure import measure, measure_rest
from benchmarks.step import our_provider, pictures
from fastnce.commands.bench import write_pictures
from fastnce.data.opening import decoded
from fastnce.data.unpaired import UnpairedData

BATCH = 8


def data(context: Context) -> Iterator[Row]:
    """Batches of 8 crops: resident, beyond the memory budget, decoded each time; and the step that consumes them."""
    side = 32 if context.quick else 256
    with tempfile.TemporaryDirectory() as folder:
        count = 4 if context.quick else 64
        write_pictures(Path(folder), count, side)
        rows = list(measure(_case(Path(folder), side, context), context))
        rows.append(_building(Path(folder), side, count))
        # on a CPU, measure the step with one image: the rate is the same, and a batch of 8 would take minutes
        images = BATCH if context.device.type != "cpu" else 1
        rows += measure(_step(images, side, context), context)
        rates = (row.images_per_s for row in rows if row.benchmark == "data step" and row.images_per_s)
        consumed = max(rates, default=None)
        for row in rows:
            if consumed and row.images_per_s and row.benchmark != "data step":
                row.add_note(f"{row.images_per_s / consumed:.1f}x the rate of the step")
            yield row
        yield from measure_rest(context)  # before the folder is deleted


def _case(folder: Path, side: int, context: Context) -> Case:
    on_gpu = context.device.type != "cpu"
    resident = "cache in device memory" if on_gpu else "cache mapped from the disk"
    providers = [Provider("fastnce", _batches(folder, side, context.device, None), note=resident)]
    if on_gpu:
        call = _batches(folder, side, context.device, 0)
        providers.append(Provider("fastnce, beyond the budget", call, note="crops copied to the device per step"))
    note = "as the published loaders do, in one process; our own version"
    providers.append(Provider("decoded each time", _decoding(folder, side, context.device), note=note))
    return Case("data", {"images": BATCH, "side": side}, tuple, providers)


def _batches(folder: Path, side: int, device: torch.device, budget: int | None) -> Callable[[], object]:
    more = {} if budget is None else {"cache_budget": budget}
    loader = UnpairedData(folder, load_size=side * 286 // 256, crop_size=side, batch=BATCH, device=device, **more)
    position = [0]

    def call() -> object:
        position[0] += 1
        return loader.batch(position[0])

    return call


def _decoding(folder: Path, side: int, device: torch.device) -> Callable[[], object]:
    files = [sorted((folder / domain).iterdir()) for domain in ("trainA", "trainB")]
    rng = random.Random(0)
    larger = side * 286 // 256

    def one(path: Path) -> torch.Tensor:
        picture = decoded(path)[0].convert("RGB").resize((larger, larger), Image.Resampling.BICUBIC)
        top, left = (rng.randrange(larger - side + 1) for _ in range(2))
        picture = picture.crop((left, top, left + side, top + side))
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)

    def call() -> object:
        return [torch.stack([one(rng.choice(domain)) for _ in range(BATCH)]).to(device) for domain in files]

    return call


def _building(folder: Path, side: int, count: int) -> Row:
    """Measure decoding and resizing of all images, once before training."""
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        UnpairedData(folder, load_size=side * 286 // 256, crop_size=side, cache_dir=cache)
        seconds = time.perf_counter() - began
    row = Row("data cache built", "fastnce", "eager", images=2 * count, side=side, rounds=1)
    row.p20_ms = row.p50_ms = row.p80_ms = seconds * 1e3
    row.images_per_s, row.note = 2 * count / seconds, "once, before training; both domains counted"
    return row


def _step(images: int, side: int, context: Context) -> Case:
    precision = "fp32" if context.device.type == "cpu" else "bf16"
    provider = our_provider("cut", context, precision, note=f"consumes the batches, {precision}", graph=True)
    return Case(
        "data step", {"images": images, "side": side}, lambda: pictures(images, side, context.device), [provider]
    )
