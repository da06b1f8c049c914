"""Define the Triton kernels as PyTorch operators, and say where they can run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from ..kernels import common
from .namespace import NAMESPACE

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_library = torch.library.Library(NAMESPACE, "DEF")


class Operator:
    """A PyTorch operator around kernels: calls without a tracer or a mode skip PyTorch's dispatcher.

    The dispatcher costs more CPU time than the launch: it packs and unpacks each tensor of a list.
    """

    def __init__(self, op: Any, run: Callable) -> None:
        self.op, self._run = op, run

    def __call__(self, *arguments: Any) -> Any:
        first = arguments[0]
        if untraced(first[0] if isinstance(first, (list, tuple)) else first) and plain(arguments):
            return self._run(*arguments)
        return self.op(*arguments)


def plain(arguments: Sequence[Any]) -> bool:
    """Whether no tensor, also in lists, has a class of its own."""
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            if not plain(argument):
                return False
        elif isinstance(argument, torch.Tensor) and type(argument) not in PLAIN:
            return False
    return True


def untraced(tensor: torch.Tensor) -> bool:
    """Whether kernels can be called directly for such a tensor: nothing traces or transforms, and it has memory."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in PLAIN
        and not _modes()
        and not _transforms()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not tensor.is_meta
    )


PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types of tensors without a class of their own, such as those of distributed tensors."""
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active


RUNS: dict[str, Callable] = {}
"""What computes each operator, by name: a benchmark counts its launches on tensors without memory."""


def operator(schema: str, run: Callable, fake: Callable, tags: Sequence[torch.Tag] = ()) -> Operator:
    """Define `torch.ops.fastnce.<name>`: `run` computes it, `fake` returns empty results of its shapes."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=tuple(tags))
    for key in ("CPU", "CUDA", "XPU"):  # CPU runs Triton's interpreter; CUDA includes ROCm
        _library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    RUNS[name] = run
    return Operator(getattr(getattr(torch.ops, NAMESPACE), name).default, run)


_NEWEST = (99, 0)


@functools.cache
def _device_capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else _NEWEST


def _capability(index: int | None) -> tuple[int, int]:
    """Return the compute capability. Without a device, or while tracing, assume the newest."""
    return _NEWEST if torch.compiler.is_compiling() else _device_capability(index)


def uses_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels multiply such tensors in TF32, as PyTorch allows now."""
    return common.precision(common.architecture(device), dtype) == "tf32"


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run on such tensors, or None if they can."""
    if device.type == "cpu" and not common.INTERPRET.value:
        return "the tensors are on the CPU, and Triton's interpreter is off (set TRITON_INTERPRET=1 before the import)"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"there is no kernel for {device.type}"
    if device.type == "cuda" and torch.version.hip is None and (capability := _capability(device.index)) < (8, 0):
        return f"the kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    if dtype not in DTYPES:
        return f"the kernels compute in bfloat16, float16 or float32, not {dtype}"
    return None
