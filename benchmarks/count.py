"""What a call costs, counted rather than measured: FLOP, bytes moved, launches and live memory.

with FakeTensorMode():      # or on tensors that exist
    with Count() as count:
        call()
count.flop, count.bytes, count.launches, count.peak

Every operator that PyTorch dispatches is seen, also those of the backward. On fake tensors (`count_step`) nothing is
computed, so a step at any size is counted in seconds on any machine.

- FLOP: PyTorch's own formulas for convolutions and products; 2 a multiply-add.
- bytes: each operator reads its inputs and writes its outputs once, from and to memory; a view moves nothing, a gather
  only what it picks. What two launches need is read twice
  (`READ_TWICE`).
- launches: one an operator, or as `LAUNCHES` says; as eager PyTorch launches on CUDA.
- live memory: storages born and not yet dead, at the highest. Scratch memory of libraries is not seen.
"""

from __future__ import annotations

import json
import math
import os
import random
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

FREE = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._local_scalar_dense,
    aten.set_, aten.resize_, aten.lift_fresh, aten.result_type, aten._unsafe_view, aten.sym_size, aten.is_same_size,
}  # fmt: skip
"""Nothing is launched."""

LAUNCHES = {
    aten.native_group_norm: 2,  # moments, then the map
    aten.native_group_norm_backward: 3,  # sums of the gradient, coefficients, then the map
    aten.topk: 4, aten.sort: 4, aten.randperm: 4,
    aten.index_put: 2, aten.index_put_: 4,  # sorted for determinism when it accumulates
    aten.native_layer_norm_backward: 3,
    aten.linalg_vector_norm: 0,  # of gradients: a GPU takes those of all tensors at once, with what follows
}  # fmt: skip
"""Launches of operators that take more than one; the rest takes one."""

READ_TWICE = {
    "native_group_norm": (0,),
    "native_group_norm_backward": (0, 1),
    "convolution_backward": (0,),
    "instance_norm": (0,),
    "instance_norm_backward": (0, 1),
}
"""Positions of what two launches read: a norm's maps, and a convolution's gradient, for inputs and for weights."""

OURS = {
    "head": 5, "project": 1, "project_backward": 4, "nce_forward": 1, "nce_keys": 1, "nce_layers": 3,
    "row_gradients": 1, "draw_ids": 2, "instance_norm": 3, "instance_norm_backward": 3, "few_outputs": 2,
    "few_outputs_backward": 4,
}  # fmt: skip
"""Launches of our own operators that take more than one."""

OF_PATCHES = {"head", "project", "project_backward"}
"""Operators of ours that read patches of maps, never whole maps."""

GATHERS = {aten.index, aten.index_select, aten.gather, aten.embedding, aten.slice, aten.select}
SCATTERS = {aten.index_put, aten.index_put_, aten.index_add_, aten.index_add, aten.scatter_add_, aten.scatter_}

CHUNK = 65536 * 320
"""Numbers that one launch of a fused optimiser takes."""

TENSORS_A_LAUNCH = {"_fused_adam_": 36, "_fused_sgd_": 48}
"""And how many tensors at most."""


@dataclass
class Cost:
    """Of one operator, or of all of one kind."""

    calls: int = 0
    flop: float = 0.0
    bytes: float = 0.0
    launches: int = 0


@dataclass
class Work:
    """One operator as it was called: what the prediction adds up."""

    name: str
    flop: float
    bytes: float
    launches: int
    dtype: torch.dtype
    tiles: float = 0.0
    """Tiles of 128 x 128 outputs that its matrix product has, 0 for others."""


class Count(TorchDispatchMode):
    """Counts while it is active; `works` keeps every operator, `live` and `peak` are bytes above what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def flop(self) -> float:
        return sum(work.flop for work in self.works)

    @property
    def bytes(self) -> float:
        return sum(work.bytes for work in self.works)

    @property
    def launches(self) -> int:
        return sum(work.launches for work in self.works)

    def by_operator(self) -> dict[str, Cost]:
        """Totals by operator, the largest traffic first."""
        found: dict[str, Cost] = defaultdict(Cost)
        for work in self.works:
            cost = found[work.name]
            cost.calls += 1
            cost.flop += work.flop
            cost.bytes += work.bytes
            cost.launches += work.launches
        return dict(sorted(found.items(), key=lambda item: -item[1].bytes))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense and isinstance(args[0], torch._subclasses.FakeTensor):
            return 0  # a check of values: there are none
        before = [t.untyped_storage() for t in _tensors((args, kwargs))]
        for storage in before:
            self._known.add(storage)
        out = func(*args, **kwargs)
        born = [t for t in _tensors(out) if t.untyped_storage() not in self._known]
        for tensor in born:
            self._allocate(tensor.untyped_storage())
        if packet in FREE or _checks_ids(packet, args):
            return out
        written = born + [t for t in _mutated(func, args, kwargs) if t is not None]
        if written:
            self.works.append(self._work(func, args, kwargs, out, written))
        return out

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size

    def _work(self, func, args, kwargs, out, written: list[Tensor]) -> Work:
        packet = func.overloadpacket
        formula = flop_registry.get(packet)
        flop = float(formula(*args, **kwargs, out_val=out)) if formula else _our_flop(packet, args, out)
        wide = [t for t in _tensors(out) if t.is_floating_point()] or _tensors((args, kwargs)) or written
        dtype = max((t for t in wide), key=lambda t: t.numel()).dtype
        name = func.name().split("::")[1].split(".")[0]
        return Work(
            name,
            flop,
            _traffic(packet, args, kwargs, written),
            _launches(packet, args),
            dtype,
            _tiles(packet, args, out),
        )


def _our_flop(packet, args, out) -> float:
    """Of the operators of ours that are convolutions."""
    if packet.__name__ == "few_outputs":
        return 2.0 * out[:, :1].numel() * args[1].numel()
    if packet.__name__ == "few_outputs_backward":
        return 2.0 * args[0][:, :1].numel() * args[2].numel() * sum(args[4:6])
    return 0.0


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes; an expanded tensor has no more than its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _mutated(func, args, kwargs) -> Iterator[Tensor]:
    """The arguments that the operator writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _checks_ids(packet, args) -> bool:
    """The CPU's look at patch ids, which a GPU's step does not take."""
    return packet in (aten.min, aten.max) and len(args) == 1 and args[0].dtype == torch.int64


def _traffic(packet, args, kwargs, written: list[Tensor]) -> float:
    if packet.__name__ == "_fused_sgd_":
        return 0.0  # puts back what a bad step changed: in a good one nothing moves
    if packet.__name__ in OF_PATCHES:
        return 2.0 * sum(_size(t) for t in written)
    sources = {id(t): t for t in _tensors((args, kwargs))}.values()
    out = sum(_size(t) for t in written)
    if packet in GATHERS:
        return 2.0 * out + sum(_size(t) for t in sources if not t.is_floating_point())
    if packet in SCATTERS:
        values = [t for t in sources if t is not args[0]]
        return 2.0 * sum(_size(t) for t in values)
    total = out + sum(_size(t) for t in sources)
    total += sum(_size(args[position]) for position in READ_TWICE.get(packet.__name__, ()))
    overwritten = packet.__name__.rstrip("_") in ("fill", "zero", "uniform", "normal", "random", "copy")
    return float(total - (_size(written[0]) if overwritten and written[0] is args[0] else 0))


def _launches(packet, args) -> int:
    if packet is aten.convolution:
        return 1 + (args[2] is not None)  # the bias is added by a launch of its own
    if packet is aten.convolution_backward:
        return sum(bool(wanted) for wanted in args[-1])
    if packet.__name__ in TENSORS_A_LAUNCH:
        numbers = sum(t.numel() for t in args[0])
        return max(math.ceil(len(args[0]) / TENSORS_A_LAUNCH[packet.__name__]), math.ceil(numbers / CHUNK))
    return OURS.get(packet.__name__, LAUNCHES.get(packet, 1))


def _tiles(packet, args, out) -> float:
    """How many tiles of 128 x 128 outputs a product or convolution has; of a backward those of its inputs'."""
    if packet is aten.convolution:
        images, channels, *sides = out.shape
        return math.ceil(images * math.prod(sides) / 128) * math.ceil(channels / 128)
    if packet is aten.convolution_backward:
        images, _, *sides = args[1].shape
        return math.ceil(images * math.prod(sides) / 128) * math.ceil(args[1].shape[1] / 128)
    if packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
        *batch, rows, columns = out.shape
        return math.prod(batch) * math.ceil(rows / 128) * math.ceil(columns / 128)
    return 0.0


# --- whole steps on fake tensors ----------------------------------------------------------------------------------


@dataclass
class Counted:
    """A step: its operators, its highest live memory, and what stays between steps, in bytes."""

    count: Count
    parameters: int
    """Weights and Adam's moments."""

    @property
    def peak(self) -> int:
        return self.parameters + self.count.peak

    @property
    def least_bytes(self) -> float:
        """What is moved if everything between products is fused with them: their operands and results, and Adam."""
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
    """Count a step of a method at side x side, with Adam's moments there already.

    Args:
        name: of `fastnce.methods.PRESETS`.
        precision: "fp32" or "bf16".
        network: changes to the preset's `NetworkOptions`.
        prepare: given the built `Step`, before it runs (to choose implementations of layers).
        fake: False runs it, to hold the counting against a measurement.
        changes: to the method's options.
    """
    from contextlib import nullcontext

    from fastnce.engine.options import OptimOptions
    from fastnce.engine.step import Step
    from fastnce.methods import Batch, NetworkOptions
    from fastnce.methods.presets import PRESETS

    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        preset = PRESETS[name]
        options = preset.options()
        for key, value in changes.items():
            setattr(options, key, value)
        method = preset.method(options, NetworkOptions(**{**preset.sections.get("network", {}), **(network or {})}))
        # one layout, so that counts do not depend on the CPU that counts
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
    """FLOP and least bytes of steps, kept in a file: counting takes seconds of a CPU while a GPU waits.

    Args:
        file: JSON, read and written; None keeps them in memory.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self.known: dict[str, tuple[float, float]] = {}

    def get(
        self, name: str, images: int, side: int, precision: str, network: dict[str, Any] | None = None
    ) -> tuple[float, float]:
        """(FLOP, least bytes) of `count_step`'s step; small networks are run instead, which is faster."""
        key = f"{name} {images} {side} {precision} {sorted((network or {}).items())}"
        if key not in self.known and self.file is not None and self.file.exists():
            self.known |= {k: tuple(v) for k, v in json.loads(self.file.read_text()).items()}
        if key not in self.known:
            counted = count_step(name, images, side, precision, network=network, fake=not network)
            self.known[key] = counted.count.flop, counted.least_bytes
            if self.file is not None:
                part = self.file.with_suffix(f".{os.getpid()}")
                part.write_text(json.dumps(self.known))
                part.replace(self.file)
        return self.known[key]
