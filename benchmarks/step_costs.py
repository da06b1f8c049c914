"""Count whole training steps on fake tensors, and keep the results in a file."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.count import Count
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, NetworkOptions
from fastnce.methods.presets import PRESETS


@dataclass
class Counted:
    """The cost of a step: its operators, its peak of live bytes, and the bytes that persist between steps."""

    count: Count
    parameters: int
    """Bytes of weights and Adam's moments."""

    @property
    def peak(self) -> int:
        return self.parameters + self.count.peak

    @property
    def least_bytes(self) -> float:
        """Traffic if everything between matrix products is fused into them: their operands and results, and Adam."""
        return sum(work.bytes for work in self.count.works if work.flop or work.name == "_fused_adam_")


def count_step(
    name: str,
    images: int,
    side: int,
    precision: str = "fp32",
    *,
    network: dict[str, Any] | None = None,
    prepare: Callable[[Any], None] = lambda _: None,
    fake: bool = True,
    **changes: Any,
) -> Counted:
    """Count a step of a method at side x side, with Adam's moments already allocated.

    Args:
        name: of `fastnce.methods.PRESETS`.
        precision: "fp32" or "bf16".
        network: changes to the preset's `NetworkOptions`.
        prepare: called with the built `Step` before it runs, for example to choose implementations of layers.
        fake: False runs the step on real tensors, to compare the counts with a measurement.
        changes: to the method's options.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        preset = PRESETS[name]
        options = preset.options()
        for key, value in changes.items():
            setattr(options, key, value)
        method = preset.method(options, NetworkOptions(**{**preset.sections.get("network", {}), **(network or {})}))
        # a fixed layout, so that counts do not depend on the CPU
        step = Step(method, OptimOptions(), precision, layout=torch.contiguous_format)
        prepare(step)
        batch = Batch(*(torch.rand(2, images, 3, side, side) * 2 - 1))
        for group in step.groups.values():
            group.prepare()
        with Count() as count:
            step.run(batch, method.draw(random.Random(0)))
        kept = {id(t.untyped_storage()): t for t in step.state().values() if t.is_floating_point()}
        return Counted(count, sum(t.untyped_storage().nbytes() for t in kept.values()))


class Counts:
    """FLOP and least bytes of steps, cached in a file, because counting takes seconds during which a GPU waits.

    Args:
        file: JSON, read and written; None caches in memory.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self.known: dict[str, tuple[float, float]] = {}

    def get(
        self,
        name: str,
        images: int,
        side: int,
        precision: str,
        network: dict[str, Any] | None = None,
        changes: dict[str, Any] | None = None,
    ) -> tuple[float, float]:
        """Return (FLOP, least bytes) from `count_step`. Small networks run on real tensors, which is faster."""
        changes = changes or {}
        key = f"{name} {images} {side} {precision} {sorted(((network or {}) | changes).items())}"
        if key not in self.known and self.file is not None and self.file.exists():
            self.known |= {k: tuple(v) for k, v in json.loads(self.file.read_text()).items()}
        if key not in self.known:
            counted = count_step(name, images, side, precision, network=network, fake=not network, **changes)
            self.known[key] = counted.count.flop, counted.least_bytes
            if self.file is not None:
                part = self.file.with_suffix(f".{os.getpid()}")
                part.write_text(json.dumps(self.known))
                part.replace(self.file)
        return self.known[key]
