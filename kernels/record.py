"""Makes plans: runs a planned function on tensors without memory, and keeps what it allocates, launches and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import common
from .common import RECORDING, Recorded, architecture
from .plan import INTERPRETED, Field, Launch, Plan, State
from .specialise import specialised

ALIGNMENT = 256
"""Of the tensors in a common buffer, in bytes."""


class NotPlannable(Exception):
    """A planned function computes with PyTorch: it runs without a plan."""


class _OnlyViews(TorchDispatchMode):
    """Within: an operation that computes raises `NotPlannable`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        view = any(returned.alias_info is not None for returned in schema.returns)
        writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
        if writes or not (view or "empty" in schema.name):
            raise NotPlannable(schema.name)
        return func(*args, **(kwargs or {}))


def make_plan(function: Callable, arguments: Any, options: Any, device: torch.device) -> Plan | None:
    """Record a planned function and compile what it launches; None if it cannot be planned."""
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
            slots.add_results(result)
            slots.add_scratch([launch.arguments for launch in launches])
            returned = slots.function(result)
            passed = [slots.function(launch.all_arguments(), not INTERPRETED) for launch in launches]
        except NotPlannable:
            return None
    if INTERPRETED:
        ready = [_interpreted(launch, of) for launch, of in zip(launches, passed, strict=True)]
        return Plan(-1, tuple(slots.allocations), tuple(ready), returned, tuple(slots.state))
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        ready = [_compiled(launch, slots.aligned, of) for launch, of in zip(launches, passed, strict=True)]
    return Plan(index, tuple(slots.allocations), tuple(ready), returned, tuple(slots.state))


def _compiled(launch: Recorded, aligned: Callable[[Tensor], bool], arguments: Callable) -> Launch:
    """Compile a launch for the current device."""
    stand_ins = specialised(launch.kernel, launch.arguments, aligned)
    found = launch.kernel.warmup(*stand_ins, grid=(1,), **launch.options)
    found = found.result() if hasattr(found, "result") else found  # compiled in a thread
    return Launch(found, found.run, found.function, found.packed_metadata, launch.blocks, arguments)


def _interpreted(launch: Recorded, arguments: Callable) -> Launch:
    count = len(launch.arguments)

    def run(kernel: Any, blocks: int, values: tuple[Any, ...], options: dict[str, Any]) -> None:
        common.start(kernel, blocks, *values[:count], **options)

    return Launch(launch.kernel, run, None, launch.options, launch.blocks, arguments)


class _Slots:
    """Numbers the tensors of a plan: first its inputs, then what it allocates.

    Each result has an allocation of its own. The tensors of a `State` share one, and so do those that are not returned.
    """

    def __init__(self, inputs: list[Tensor], aligned: bool) -> None:
        self._tensors = list(inputs)  # keeps the storages: another one could otherwise get the same identity
        self._place = {_storage(tensor): (number, 0) for number, tensor in enumerate(inputs)}
        self._inputs, self._aligned = len(inputs), aligned
        self._whole = dict(enumerate(inputs))
        self.allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []
        self.state: list[Field] = []
        self._state_number = -1
        self._types: list[type] = []

    def add_results(self, result: Any) -> None:
        """Place the tensors that the function returns."""
        states = [value for value in _flat(result) if isinstance(value, State)]
        for value in _flat(result):
            if isinstance(value, Tensor) and _storage(value) not in self._place:
                if value.storage_offset() or value.untyped_storage().nbytes() != _extent(value):
                    raise NotPlannable("a part of an allocation is returned")
                number = self._allocate(tuple(value.shape), value.stride(), value.dtype)
                self._whole[number] = value
                self._place[_storage(value)] = number, 0
                self._tensors.append(value)
        for state in states:
            self._state_number = self._share(list(state.tensors))
            for tensor in state.tensors:
                number, base = self._place[_storage(tensor)]
                if number != self._state_number:
                    raise NotPlannable("a state contains an argument or a result")
                offset = int(base + tensor.storage_offset() * tensor.element_size())
                self.state.append(Field(offset, _extent(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype))

    def add_scratch(self, launches: Any) -> None:
        """Place all other tensors of the launches."""
        self._share([value for value in _flat(launches) if isinstance(value, Tensor)])

    def _share(self, tensors: list[Tensor]) -> int:
        """Place those tensors that have no place yet in one buffer; return its number."""
        total, bases = 0, {}
        for tensor in tensors:
            if _storage(tensor) not in self._place and _storage(tensor) not in bases:
                bases[_storage(tensor)] = total
                total += -(-tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
                self._tensors.append(tensor)
        if not bases:
            return -1
        number = self._allocate((max(total, 1),), (1,), torch.uint8)
        self._place |= {storage: (number, base) for storage, base in bases.items()}
        return number

    def _allocate(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> int:
        self.allocations.append((size, stride, dtype))
        return self._inputs + len(self.allocations) - 1

    def aligned(self, tensor: Tensor) -> bool:
        """Whether the address of a tensor is always a multiple of 16."""
        own = self._aligned or self._place[_storage(tensor)][0] >= self._inputs
        return own and tensor.storage_offset() * tensor.element_size() % 16 == 0

    def function(self, value: Any, addresses: bool = False) -> Callable[[list[Any]], Any]:
        """Return a function of the list of all tensors, or of their addresses, that returns a nested value.

        It is compiled from an expression, because it runs at every call.
        """
        return eval(
            f"lambda t: {self._text(value, addresses)}", {"view": _view, "dtypes": _DTYPES, "types": self._types}
        )

    def _text(self, value: Any, addresses: bool) -> str:
        if isinstance(value, State):
            return f"t[{self._state_number}]" if value.tensors else "None"
        if isinstance(value, Tensor):
            return self._address(value) if addresses else self._tensor(value)
        if isinstance(value, list):
            return f"[{', '.join(self._text(item, addresses) for item in value)}]"
        if isinstance(value, tuple):
            fields = ", ".join(self._text(item, addresses) for item in value)
            if hasattr(value, "_fields") and not addresses:  # the interpreter reads fields by their names
                self._types.append(type(value))
                return f"types[{len(self._types) - 1}]({fields})"
            return f"({fields},)" if value else "()"
        if value is None or isinstance(value, bool):
            return repr(value)
        if isinstance(value, int | float):
            return repr(int(value) if isinstance(value, int) else float(value))  # also for NumPy's floats
        raise NotPlannable(f"a value of {type(value).__name__}")

    def _address(self, value: Tensor) -> str:
        number, base = self._place[_storage(value)]
        offset = base + value.storage_offset() * value.element_size()
        return f"t[{number}] + {offset}" if offset else f"t[{number}]"

    def _tensor(self, value: Tensor) -> str:
        number, base = self._place[_storage(value)]
        whole = self._whole.get(number)
        if whole is not None and _geometry(value) == _geometry(whole):
            return f"t[{number}]"
        offset = base + value.storage_offset() * value.element_size()
        dtype = f"dtypes[{_DTYPES.index(value.dtype)}]"
        return f"view(t[{number}], {offset}, {_extent(value)}, {dtype}, {tuple(value.shape)}, {value.stride()})"


_DTYPES = (torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32)


def _view(whole: Tensor, offset: int, extent: int, dtype: torch.dtype, shape: Any, stride: Any) -> Tensor:
    """A view that begins `offset` bytes after the first element of `whole`."""
    if whole.dtype == dtype:
        return whole.as_strided(shape, stride, whole.storage_offset() + offset // dtype.itemsize)
    return Field(offset, extent, shape, stride, dtype).of(whole)


def _flat(value: Any) -> list[Any]:
    """All values in nested lists and tuples; a `State` is one value."""
    if isinstance(value, (list, tuple)) and not isinstance(value, State):
        return [inner for item in value for inner in _flat(item)]
    return [value]


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _extent(tensor: Tensor) -> int:
    """The bytes from the first to the last element of a tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())
