"""What the kernels share: the matrix product, the launch, and the name of the device's architecture."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Kernels run in Triton's interpreter (TRITON_INTERPRET was set when this module was imported)."""

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LN2_HIGH: tl.constexpr = tl.constexpr(0.693145751953125)
"""The first 16 bits of log(2): its product with a small whole number is exact in float32."""
LN2_LOW: tl.constexpr = tl.constexpr(1.4286068203094173e-06)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32. The interpreter multiplies bfloat16 as bit patterns, so it gets float32."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x rounded to nearest in `dtype`. The interpreter would cut the low bits of a float32 off to make a bfloat16."""
    if INTERPRET and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@functools.cache
def _architecture(kind: str, index: int | None) -> str:
    if kind == "cpu":
        return "interpreter"
    if kind == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(index)
        return f"sm_{major}{minor}"
    if kind == "cuda":
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    return kind


def architecture(device: torch.device) -> str:
    """sm_90, gfx942, xpu, or interpreter for the CPU."""
    return _architecture(device.type, device.index)


def block_dim(dim: int) -> int:
    """The width of a tile that holds rows of this length: a power of two. Narrow rows share the kernel of 64."""
    return max(64, triton.next_power_of_2(dim))


def dense_rows(rows: Tensor) -> Tensor:
    """The same rows, copied only when the elements of a row are not side by side."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def launch(kernel: Callable, blocks: int, like: Tensor, *args, **options) -> None:
    """Start `blocks` programs on the device of `like`, which need not be the current one."""
    if blocks == 0:
        return
    device: contextlib.AbstractContextManager = contextlib.nullcontext()
    if like.device.type != "cpu":
        device = torch.accelerator.device_index(like.device.index)
    with device:
        kernel[(blocks,)](*args, **options)  # type: ignore[index]
