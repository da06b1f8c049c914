"""Count the cost of a call instead of measuring it: FLOP, bytes moved, launches and live memory.

with FakeTensorMode():      # or on real tensors
    with Count() as count:
        call()
count.flop, count.bytes, count.launches, count.peak

`Count` sees every operator that PyTorch dispatches, including the backward pass. Fake tensors compute nothing, so a
step of any size is counted in seconds on any machine (`step_costs.py`).

- FLOP: PyTorch's formulas for convolutions and products; 2 per multiply-add.
- bytes: each operator reads its inputs from memory and writes its outputs to memory once. A view moves nothing, a
  gather only the selected elements. Inputs that two launches need are read twice (`READ_TWICE`).
- launches: as eager PyTorch on CUDA, one per operator or as in `LAUNCHES`. Our layers (`LAYERS`) are asked: they run
  on tensors without memory, and each launch moves its tensors once.
- live memory: the peak of allocated storages, without scratch memory of libraries.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fastnce.kernels.common import RECORDING
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastnce.common.operators import RUNS

aten = torch.ops.aten

FREE = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._local_scalar_dense,
    aten.set_, aten.resize_, aten.lift_fresh, aten.result_type, aten._unsafe_view, aten.sym_size, aten.is_same_size,
}  # fmt: skip
"""Operators that launch nothing."""

LAUNCHES = {
    aten.native_group_norm: 2,  # moments, then the map
    aten.native_group_norm_backward: 3,  # sums of the gradient, coefficients, then the map
    aten.topk: 4, aten.sort: 4, aten.randperm: 4,
    aten.index_put: 2, aten.index_put_: 4,  # sorted for determinism when it accumulates
    aten.native_layer_norm_backward: 3,
    aten.linalg_vector_norm: 0,  # gradient norms: a GPU computes all of them in one launch with the next operator
}  # fmt: skip
"""Launches of operators that do not take exactly one."""

READ_TWICE = {
    "native_group_norm": (0,),
    "native_group_norm_backward": (0, 1),
    "convolution_backward": (0,),
}
"""Positions of arguments that two launches read: a norm's maps, and a convolution's upstream gradient."""

OURS = {
    "head": 5, "project": 1, "project_backward": 4, "nce_forward": 1, "nce_keys": 1, "nce_layers": 3,
    "row_gradients": 1, "draw_ids": 2, "few_outputs": 2,
    "few_outputs_backward": 4,
}  # fmt: skip
"""Launches of our own operators that are not in `LAYERS`."""

LAYERS = {
    "instance_norm", "instance_norm_backward", "activate", "activate_backward", "blur_down", "blur_down_backward",
    "blur_up", "blur_up_backward", "reflect_pad", "reflect_pad_backward",
}  # fmt: skip
"""Our operators whose launches are recorded. Each launch moves all its tensors once, those between launches too."""

ARCHITECTURE = "sm_90"
"""Of the GPU whose launches are recorded: how many there are depends on the tiles."""

OF_PATCHES = {"head", "project", "project_backward"}
"""Our operators that read only patches of maps."""

GATHERS = {aten.index, aten.index_select, aten.gather, aten.embedding, aten.slice, aten.select}
SCATTERS = {aten.index_put, aten.index_put_, aten.index_add_, aten.index_add, aten.scatter_add_, aten.scatter_}

CHUNK = 65536 * 320
"""The most elements that one launch of a fused optimiser updates."""

TENSORS_PER_LAUNCH = {"_fused_adam_": 36, "_fused_sgd_": 48}
"""The most tensors per launch of a fused optimiser."""


@dataclass
class Cost:
    """The total cost of all calls of an operator."""

    calls: int = 0
    flop: float = 0.0
    bytes: float = 0.0
    launches: int = 0


@dataclass
class Work:
    """The cost of one operator call."""

    name: str
    flop: float
    bytes: float
    launches: int
    dtype: torch.dtype
    tiles: float = 0.0
    """Number of 128 x 128 output tiles of a matrix product; 0 for other operators."""


class Count(TorchDispatchMode):
    """Count while active. `works` lists every operator; `live` and `peak` are bytes above those at the start."""

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
        """Return totals by operator, the largest traffic first."""
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
            return 0  # a check of values, which fake tensors do not have
        before = [t.untyped_storage() for t in _tensors((args, kwargs))]
        for storage in before:
            self._known.add(storage)
        out = func(*args, **kwargs)
        new = [t for t in _tensors(out) if t.untyped_storage() not in self._known]
        for tensor in new:
            self._allocate(tensor.untyped_storage())
        if packet in FREE or _checks_ids(packet, args):
            return out
        written = new + [t for t in _mutated(func, args, kwargs) if t is not None]
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
        candidates = [t for t in _tensors(out) if t.is_floating_point()] or _tensors((args, kwargs)) or written
        dtype = max(candidates, key=lambda t: t.numel()).dtype
        name = func.name().split("::")[1].split(".")[0]
        launched = _recorded(name, args) if name in LAYERS and func.namespace == "fastnce" else []
        return Work(
            name,
            flop,
            sum(launched) if launched else _traffic(packet, args, kwargs, written),
            len(launched) or _launches(packet, args),
            dtype,
            _tiles(packet, args, out),
        )


def _our_flop(packet, args, out) -> float:
    """Return the FLOP of our operators that are convolutions."""
    if packet.__name__ == "few_outputs":
        return 2.0 * out[:, :1].numel() * args[1].numel()
    if packet.__name__ == "few_outputs_backward":
        return 2.0 * args[0][:, :1].numel() * args[2].numel() * sum(args[4:6])
    return 0.0


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, (list, tuple)):
        return []
    return [tensor for item in nested for tensor in _tensors(item)]


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor; an expanded tensor has no more than its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _mutated(func, args, kwargs) -> Iterator[Tensor]:
    """Yield the arguments that the operator writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _checks_ids(packet, args) -> bool:
    """Return whether this is the validation of patch ids, which runs only on a CPU."""
    return packet in (aten.min, aten.max) and len(args) == 1 and args[0].dtype == torch.int64


def _traffic(packet, args, kwargs, written: list[Tensor]) -> float:
    if packet.__name__ == "_fused_sgd_":
        return 0.0  # restores the state after a bad step; a good step moves nothing
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


def _recorded(name: str, args) -> list[float]:
    """Run one of our operators on tensors without memory, and return the bytes that each of its launches moves."""

    def without_memory(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return value

    with unset_fake_temporarily(), RECORDING.on(ARCHITECTURE) as launches:
        RUNS[name](*map(without_memory, args))
    return [
        float(sum(_size(tensor) for tensor in {id(t): t for t in _tensors(launch.arguments)}.values()))
        for launch in launches
    ]


def _launches(packet, args) -> int:
    if packet is aten.convolution:
        return 1 + (args[2] is not None)  # a separate launch adds the bias
    if packet is aten.convolution_backward:
        return sum(bool(needed) for needed in args[-1])
    if packet.__name__ in TENSORS_PER_LAUNCH:
        elements = sum(t.numel() for t in args[0])
        return max(math.ceil(len(args[0]) / TENSORS_PER_LAUNCH[packet.__name__]), math.ceil(elements / CHUNK))
    return OURS.get(packet.__name__, LAUNCHES.get(packet, 1))


def _tiles(packet, args, out) -> float:
    """Return the number of 128 x 128 output tiles of a product or convolution; for a backward, of its input."""
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
