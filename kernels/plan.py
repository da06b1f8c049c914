"""A plan: the allocations and launches of a function for tensors of one layout, ready to be replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .common import INTERPRET

TRITON_VERSIONS = ("3.6", "3.7")
"""Versions whose compiled kernels take the arguments that `Plan` passes. Others launch through `kernel[grid]`."""

INTERPRETED = bool(INTERPRET.value)
USABLE = INTERPRETED or (torch.version.hip is None and ".".join(triton.__version__.split(".")[:2]) in TRITON_VERSIONS)


class Launch(NamedTuple):
    """A compiled kernel, and its arguments as a function of the addresses (of the tensors in the interpreter)."""

    kernel: Any
    run: Callable
    function: Any
    metadata: Any
    blocks: int
    arguments: Callable[[list[Any]], tuple[Any, ...]]


class Field(NamedTuple):
    """The place of one tensor of a `State` in the common buffer."""

    offset: int
    bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor as a view of the buffer."""
        return buffer.narrow(0, self.offset, self.bytes).view(self.dtype).as_strided(self.shape, self.stride)


class State(NamedTuple):
    """Tensors that a planned function returns in one common buffer of bytes: they cost one allocation."""

    tensors: tuple[Tensor, ...]


class Plan(NamedTuple):
    """What a planned function does for tensors of one layout."""

    device: int
    """The index of the CUDA device."""
    allocations: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    launches: tuple[Launch, ...]
    result: Callable[[list[Tensor]], Any]
    state: tuple[Field, ...]
    """Where the tensors of the returned `State` are."""

    def replay(self, tensors: list[Tensor]) -> Any:
        """Allocate, launch, and return what the function returns. `tensors`: its arguments; the list is extended."""
        if INTERPRETED:
            for size, stride, dtype in self.allocations:
                tensors.append(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))
            for kernel, run, _, options, blocks, arguments in self.launches:
                run(kernel, blocks, arguments(tensors), options)
        elif torch._C._cuda_getDevice() == self.device:
            self._launch(tensors)
        else:
            with torch.cuda.device(self.device):
                self._launch(tensors)
        return self.result(tensors)

    def _launch(self, tensors: list[Tensor]) -> None:
        for size, stride, dtype in self.allocations:
            tensors.append(_empty_strided(size, stride, dtype))
        addresses = [tensor.data_ptr() for tensor in tensors]
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if _hooked(_RUNTIME.launch_enter_hook) or _hooked(_RUNTIME.launch_exit_hook):  # a profiler
            for kernel, _, _, _, blocks, arguments in self.launches:
                kernel[(blocks, 1, 1)](*arguments(addresses), stream=stream)
            return
        for _, run, function, metadata, blocks, arguments in self.launches:
            run(blocks, 1, 1, stream, function, metadata, None, None, None, *arguments(addresses))


_RUNTIME = triton.knobs.runtime
_empty_strided = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
"""The allocation that compiled code uses, on the current device: half the CPU time of `torch.empty_strided`."""


def _hooked(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))
