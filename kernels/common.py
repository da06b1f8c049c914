"""Parts that all kernels share: the matrix product, rounding, the launch, and the name of the architecture."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter: TRITON_INTERPRET was set when this module was imported."""

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LN2_HIGH: tl.constexpr = tl.constexpr(0.693145751953125)
"""The first 16 bits of log(2): the product with a small integer is exact in float32."""
LN2_LOW: tl.constexpr = tl.constexpr(1.4286068203094173e-06)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. The interpreter would multiply the bit patterns of bfloat16, so it gets float32."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def long_dot(a, b, acc, PRECISION: tl.constexpr):
    """`dot` over a long inner dimension, in parts of 64 for exact float32: it keeps whole inner rows in registers."""
    PARTS: tl.constexpr = a.shape[1] // 64
    if INTERPRET or a.dtype != tl.float32 or PARTS < 2 or PRECISION != "ieee":
        return dot(a, b, acc, PRECISION)
    else:
        a = tl.permute(tl.reshape(a, [a.shape[0], PARTS, 64]), [1, 0, 2])
        b = tl.reshape(b, [PARTS, 64, b.shape[1]])
        return acc + tl.sum(tl.dot(a, b, input_precision="ieee"), 0)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x rounded to the nearest value of `dtype`. The interpreter would truncate float32 to bfloat16."""
    if INTERPRET and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def number_of(problems, block, COUNT: tl.constexpr):
    """The index, among the COUNT problems of a launch, of the problem that a block belongs to."""
    number = block * 0
    for i in tl.static_range(1, COUNT):
        number = tl.where(block >= problems[i].first_block, i, number)
    return number


@triton.jit
def fields_of(problems, block, COUNT: tl.constexpr):
    """The fields of the problem that a block belongs to, in order: `One(*fields_of(problems, block, COUNT))`.

    Problems are named tuples of one class with a field `first_block`. A field has the same type in all problems. The
    compiler removes fields that a kernel does not read.
    """
    found = problems[0]
    for i in tl.static_range(1, COUNT):
        here = block >= problems[i].first_block
        fields = ()
        for f in tl.static_range(len(found)):
            fields += (tl.where(here, problems[i][f], found[f]),)  # type: ignore[assignment]
        found = fields
    return found


@triton.jit
def bound(count):
    """`count` as the end of a loop. The interpreter of Triton 3.6 cannot convert its scalars for numpy 2.4."""
    if INTERPRET:
        return count.handle.data.item()
    else:
        return count


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
    """The name of a device's architecture: sm_90, gfx942, xpu, or interpreter for the CPU."""
    if device.type == "meta":
        return RECORDING.architecture
    return _architecture(device.type, device.index)


def precision(arch: str, dtype: torch.dtype, convolution: bool = False) -> str:
    """How a kernel multiplies: "tf32" if PyTorch's float32 products may use TF32, else "ieee".

    PyTorch has one setting for convolutions (TF32 by default) and one for other products. NVIDIA_TF32_OVERRIDE=0
    disables TF32 in NVIDIA's libraries and therefore here.
    """
    if dtype != torch.float32 or not arch.startswith("sm_") or os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return "ieee"
    # reading `allow_tf32` is an error after a program has set `fp32_precision`
    allowed = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if allowed.fp32_precision == "tf32" else "ieee"


fp32_precision = torch._C._get_fp32_precision_getter
"""The setting that `precision` reads: of ("cuda", "matmul") or ("cuda", "conv")."""


def block_dim(dim: int) -> int:
    """The width of a tile for rows of this length: a power of two. Rows of up to 64 share one kernel."""
    return max(64, triton.next_power_of_2(dim))


def dense_rows(rows: Tensor) -> Tensor:
    """The same rows, copied only if the elements of a row are not adjacent in memory."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


class Recorded(NamedTuple):
    """A launch that `RECORDING` kept; its tensors have no memory."""

    kernel: Any
    blocks: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def all_arguments(self) -> tuple[Any, ...]:
        """The arguments of the kernel in order; None for those that are constants of the compiled kernel."""
        return *self.arguments, *[None] * (len(self.kernel.arg_names) - len(self.arguments))


class Recording(threading.local):
    """The launches on tensors without memory, of each thread. `record.py` uses it."""

    architecture = ""
    launches: list[Recorded] | None = None

    @contextlib.contextmanager
    def on(self, arch: str) -> Iterator[list[Recorded]]:
        """Within: `launch` keeps launches in the returned list, and tensors without memory are on this architecture."""
        before = self.architecture, self.launches
        self.architecture, self.launches = arch, []
        try:
            yield self.launches
        finally:
            self.architecture, self.launches = before


RECORDING = Recording()


def launch(kernel: Callable, blocks: int, like: Tensor, *args, **options) -> None:
    """Start `blocks` programs on the device of `like`, which need not be the current device."""
    if blocks == 0:
        return
    if like.device.type == "meta" and RECORDING.launches is not None:
        RECORDING.launches.append(Recorded(kernel, blocks, args, options))
        return
    device: contextlib.AbstractContextManager = contextlib.nullcontext()
    if like.device.type != "cpu":
        device = torch.accelerator.device_index(like.device.index)
    with device:
        start(kernel, blocks, *args, **options)


def start(kernel: Any, blocks: int, *args, **options) -> None:
    """Start `blocks` programs of a kernel through Triton, on the current device or in the interpreter."""
    kernel[(blocks,)](*args, **options)
