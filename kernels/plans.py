"""Plans: what the host does for a launch is done once per layout of the tensors, and replayed afterwards.

Triton's own launch binds, specialises and packs its arguments at every call. With tuples of tensors that costs more
CPU time than everything else in an uncaptured loss. A function with the decorator `planned` runs once on tensors
without memory for each layout (shapes, strides, dtypes, alignment). That run records which tensors the function
allocates, which kernels it launches with which numbers, and what it returns. Every later call allocates the same
tensors and starts the compiled kernels directly, with only the addresses replaced.

A planned function may allocate tensors, view them and launch kernels; anything else is noticed, and the function then
runs without a plan. Plans are for CUDA with a version of Triton in `TRITON_VERSIONS`. Elsewhere, and in Triton's
interpreter, the function simply runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .common import INTERPRET, RECORDING, Recorded, architecture, product_settings
from .specialise import specialised

F = TypeVar("F", bound=Callable)

TRITON_VERSIONS = ("3.6", "3.7")
"""Versions whose compiled kernels take the arguments that `Plan` passes. Others launch through `kernel[grid]`."""

USABLE = (
    not INTERPRET.value and torch.version.hip is None and ".".join(triton.__version__.split(".")[:2]) in TRITON_VERSIONS
)

MOST_PLANS = 4096
"""The most plans of one function. Beyond them all are discarded: a plan is made in milliseconds."""


class Launch(NamedTuple):
    """A compiled kernel, and its arguments as a function of the addresses."""

    kernel: Any
    run: Callable
    function: Any
    metadata: Any
    blocks: int
    arguments: Callable[[list[int]], tuple[Any, ...]]

    @classmethod
    def compiled(cls, launch: Recorded, aligned: Callable[[Tensor], bool], arguments: Callable) -> Launch:
        """Compile a recorded launch for the current device."""
        stand_ins = specialised(launch.kernel, launch.arguments, aligned)
        found = launch.kernel.warmup(*stand_ins, grid=(1,), **launch.options)
        found = found.result() if hasattr(found, "result") else found  # compiled in a thread
        return cls(found, found.run, found.function, found.packed_metadata, launch.blocks, arguments)


class Plan(NamedTuple):
    """What a planned function does for tensors of one layout."""

    index: int  # of the device
    allocations: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    launches: tuple[Launch, ...]
    result: Callable[[list[Tensor]], Any]

    def replay(self, tensors: list[Tensor]) -> Any:
        """Allocate, launch, and return what the function returns. `tensors`: its arguments; the list is extended."""
        if torch._C._cuda_getDevice() == self.index:
            self._allocate_and_launch(tensors)
        else:
            with torch.cuda.device(self.index):
                self._allocate_and_launch(tensors)
        return self.result(tensors)

    def _allocate_and_launch(self, tensors: list[Tensor]) -> None:
        for size, stride, dtype in self.allocations:
            tensors.append(_empty_strided(size, stride, dtype))
        addresses = [tensor.data_ptr() for tensor in tensors]
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        if _hooked(_RUNTIME.launch_enter_hook) or _hooked(_RUNTIME.launch_exit_hook):  # a profiler
            for kernel, _, _, _, blocks, arguments in self.launches:
                kernel[(blocks, 1, 1)](*arguments(addresses), stream=stream)
            return
        for _, run, function, metadata, blocks, arguments in self.launches:
            run(blocks, 1, 1, stream, function, metadata, None, None, None, *arguments(addresses))


_RUNTIME = triton.knobs.runtime
_empty_strided = torch._C._dynamo.guards._empty_strided_cuda
"""The allocation that compiled code uses, on the current device: half the CPU time of `torch.empty_strided`."""


def _hooked(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


class _OnlyViews(TorchDispatchMode):
    """Within: an operation that computes on the tensors of a plan raises `NotPlannable`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        computes = "empty" not in schema.name and not any(r.alias_info is not None for r in schema.returns)
        if computes and schema.returns and any(isinstance(r.type, torch.TensorType) for r in schema.returns):
            raise NotPlannable(schema.name)
        return func(*args, **(kwargs or {}))


class NotPlannable(Exception):
    """A planned function computes with PyTorch: it runs without a plan."""


def planned(function: F | None = None, *, products: bool = False) -> Any:
    """Decorator: replay the host work of a function that only allocates, views and launches.

    Its positional arguments are tensors, lists of tensors, and hashable values. Its keyword arguments are hashable and
    have the same order at every call. All tensors are on one device. `products`: the function also depends on how PyTorch multiplies float32.
    """
    if function is None:
        return functools.partial(planned, products=products)
    return function if not USABLE else _planned(function, products)


_caches: list[dict[Any, Plan | None]] = []


def forget_plans() -> None:
    """Discard all plans, because something that they do not depend on by themselves has changed, such as the tiles."""
    for cache in _caches:
        cache.clear()


def _planned(function: Callable, products: bool) -> Callable:
    cache: dict[Any, Plan | None] = {}
    _caches.append(cache)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        tensors: list[Tensor] = []
        key: list[Any] = [*options.values()]
        for argument in arguments:
            if isinstance(argument, Tensor):
                tensors.append(argument)
                key += (argument.shape, argument.stride(), argument.dtype, argument.data_ptr() & 15 == 0)
            elif argument is None:
                key.append(None)
            elif isinstance(argument, (list, tuple)):
                key.append(len(argument))
                for item in argument:
                    if isinstance(item, Tensor):
                        tensors.append(item)
                        key += (item.shape, item.stride(), item.dtype, item.data_ptr() & 15 == 0)
                    else:
                        key.append(item)
            else:
                key.append(argument)
        device = tensors[0].device
        if device.type != "cuda":
            return function(*arguments, **options)
        key.append(device)
        if products:
            key.append(product_settings())
        whole = tuple(key)
        try:
            plan = cache[whole]
        except KeyError:
            if len(cache) >= MOST_PLANS:
                cache.clear()
            plan = cache[whole] = make_plan(function, arguments, options, device)
        return function(*arguments, **options) if plan is None else plan.replay(tensors)

    return call


def make_plan(function: Callable, arguments: Any, options: Any, device: torch.device) -> Plan | None:
    """Run a function on tensors without memory and compile what it launches; None if it cannot be planned."""
    inputs: list[Tensor] = []
    aligned = True

    def without_memory(argument: Any) -> Any:
        nonlocal aligned
        if isinstance(argument, Tensor):
            aligned = aligned and argument.data_ptr() & 15 == 0
            size, stride = argument.shape, argument.stride()
            inputs.append(torch.empty_strided(size, stride, dtype=argument.dtype, device="meta"))
            return inputs[-1]
        if isinstance(argument, (list, tuple)) and not hasattr(argument, "_fields"):
            return type(argument)(map(without_memory, argument))
        return argument

    with torch.inference_mode(False), torch.no_grad(), RECORDING.on(architecture(device)) as launches:
        given = [without_memory(argument) for argument in arguments]
        try:
            with _OnlyViews():
                result = function(*given, **options)
            slots = _Slots(inputs, aligned)
            slots.add((result, [launch.arguments for launch in launches]))
            returned = slots.function(result, "t")
            addresses = [slots.function(launch.all_arguments(), "p") for launch in launches]
        except NotPlannable:
            return None
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        ready = tuple(
            Launch.compiled(launch, slots.aligned, of_addresses)
            for launch, of_addresses in zip(launches, addresses, strict=True)
        )
    return Plan(index, tuple(slots.allocations), ready, returned)


class _Slots:
    """Numbers the storages of a recording: first its inputs, then what it allocates."""

    def __init__(self, inputs: list[Tensor], aligned: bool) -> None:
        self._kept = list(inputs)  # a storage that were freed could lend its identity to the next
        self._number = {_storage(tensor): i for i, tensor in enumerate(inputs)}
        self._whole = {i: tensor for i, tensor in enumerate(inputs)}
        self._inputs, self._aligned = len(inputs), aligned
        self.allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []

    def add(self, value: Any) -> None:
        """Number the storages of all tensors in nested lists and tuples."""
        if isinstance(value, Tensor):
            if _storage(value) not in self._number:
                if value.storage_offset() or value.untyped_storage().nbytes() != _extent(value):
                    raise NotPlannable("a part of an allocation")
                self._number[_storage(value)] = number = len(self._number)
                self._whole[number] = value
                self.allocations.append((tuple(value.shape), value.stride(), value.dtype))
                self._kept.append(value)
        elif isinstance(value, list | tuple):
            for item in value:
                self.add(item)

    def aligned(self, tensor: Tensor) -> bool:
        """Whether the address of a tensor is always a multiple of 16."""
        own = self._aligned or self._number[_storage(tensor)] >= self._inputs
        return own and tensor.storage_offset() * tensor.element_size() % 16 == 0

    def function(self, value: Any, name: str) -> Callable:
        """A function of the list `name` that returns a nested value, compiled because it runs at every call."""
        return eval(f"lambda {name}: {self._text(value, name)}")  # of our own names and numbers

    def _text(self, value: Any, name: str) -> str:
        """A Python expression of a nested value, in which tensors are taken from the list `name`.

        The list "p" holds addresses, "t" tensors.
        """
        if isinstance(value, Tensor):
            number = self._number[_storage(value)]
            if name == "p":
                offset = value.storage_offset() * value.element_size()
                return f"p[{number}] + {offset}" if offset else f"p[{number}]"
            whole = self._whole[number]
            if (value.shape, value.stride(), value.dtype) == (whole.shape, whole.stride(), whole.dtype):
                return f"t[{number}]"
            if value.dtype != whole.dtype or number < self._inputs:
                raise NotPlannable("a view of an argument, or of another dtype")
            return f"t[{number}].as_strided({tuple(value.shape)}, {value.stride()}, {value.storage_offset()})"
        if isinstance(value, list):
            return f"[{', '.join(self._text(item, name) for item in value)}]"
        if isinstance(value, tuple):
            return f"({''.join(self._text(item, name) + ', ' for item in value)})"
        if value is None or isinstance(value, bool | int | float):
            return repr(value)
        raise NotPlannable(f"a value of {type(value).__name__}")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _extent(tensor: Tensor) -> int:
    """The bytes from the first to the last element of a tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
