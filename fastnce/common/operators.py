"""What the Triton kernels of rows and of layers share as PyTorch operators: their definition, where they run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels import common

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_library = torch.library.Library("fastnce", "DEF")


def operator(schema: str, run: Any, fake: Any, tags: Sequence[torch.Tag] = ()) -> Any:
    """Define `torch.ops.fastnce.<name>`, and return it: what it runs on a device, and the shapes that it returns."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=tuple(tags))
    for key in ("CPU", "CUDA", "XPU"):  # CPU is Triton's interpreter, CUDA is ROCm as well
        _library.impl(name, run, key)
    torch.library.register_fake(f"fastnce::{name}", fake, lib=_library)
    return getattr(torch.ops.fastnce, name)


_NEWEST = (99, 0)


@functools.cache
def _ask(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else _NEWEST


def _capability(index: int | None) -> tuple[int, int]:
    """Of a CUDA device. Where there is none, and in a function that is traced and can ask for none, the newest's."""
    return _NEWEST if torch.compiler.is_compiling() else _ask(index)


def uses_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels' products of such tensors are TF32, as the library allows now."""
    return common.precision(common.architecture(device), dtype) == "tf32"


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on such tensors, or None."""
    if device.type == "cpu" and not common.INTERPRET.value:
        return "the tensors are on the CPU, and Triton's interpreter is off (TRITON_INTERPRET=1 before the import)"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"there is no kernel for {device.type}"
    if device.type == "cuda" and torch.version.hip is None and (capability := _capability(device.index)) < (8, 0):
        return f"the kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    if dtype not in DTYPES:
        return f"the kernels compute in bfloat16, float16 or float32, not {dtype}"
    return None
