"""Memory on a CPU: keep it between steps, measure it, and check whether a step fits into it."""

from __future__ import annotations

import ctypes
import platform
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.imports import is_import_path
from ..methods.base import Batch, Method, NetworkOptions
from ..methods.checks import channels_of
from ..networks.tracing import empty_images, is_own, without_memory

LESS = (
    "lower data.batch, data.crop_size, network.width or loss.pool_size, raise optim.accumulate, or set "
    "run.checkpoint_activations=true"
)

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; returns whether the C library supports it (glibc does).

    By default, glibc maps every block beyond 32 MiB anew, and the system clears it page by page. At 256x256 that is
    every large map of every step, and a tenth of a step's time in float32 (docs/performance.md). The setting affects
    the whole process, so only programs should call this. Peak memory grows by a few per cent, until the process ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))


def available_memory() -> int | None:
    """Bytes that this process can still allocate, by the system and its control group; None if unknown."""
    rooms = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                rooms.append(1024 * int(line.split()[1]))
    except OSError:
        pass
    try:
        group = Path("/sys/fs/cgroup")
        rooms.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no group, or "max"
        pass
    return min(rooms) if rooms else None


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def too_large(error: BaseException) -> str:
    """The message for a failed allocation."""
    reason = (str(error).splitlines() or [""])[0][:200]
    return f"memory is too small for this training ({reason}): {LESS}"


def kept_bytes(network: nn.Module, pictures: Tensor) -> int:
    """Bytes that autograd keeps of a pass of `network`, without the parameters. Both are tensors without memory."""
    own = {id(p) for p in network.parameters()}
    kept: dict[int, Tensor] = {}  # by storage: several operations may keep the same tensor

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(pictures)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def check_networks(size: int, needed: int = 0) -> None:
    """Refuse networks that this machine's memory cannot hold.

    Args:
        size: bytes of the parameters.
        needed: bytes that they take with all that belongs to them; at least `size`.

    Raises:
        ValueError: both, and what to lower.
    """
    needed, room = max(size, needed), available_memory()
    if room is not None and needed > room:
        raise ValueError(
            f"networks of {size / 4e6:,.0f} M parameters take at least {_gib(needed)} of memory, and {_gib(room)} are "
            f"there: lower network.width, network.discriminator_width or loss.projection"
        )


def check_networks_fit(network: NetworkOptions) -> None:
    """Refuse published networks that memory cannot hold, before a user's method builds them on the CPU."""
    size = 0
    for name, build in (
        (network.generator, network.build_generator),
        (network.discriminator, lambda: network.build_discriminator(network.out_channels)),
    ):
        if not is_import_path(name):
            with suppress(ValueError):  # the method may not use this network, and names the error otherwise
                size += sum(p.nbytes for p in build().parameters())
    check_networks(size)


def check_room(
    method: Method, images: int, sides: tuple[int, int] | None, *, device: torch.device, sixteen_bits: bool = False
) -> None:
    """Refuse a training that cannot fit into this machine's memory: the system would kill the process silently.

    Only the least that training needs is counted, so a training that passes may still be too large. For an accelerator,
    which reports that its memory is full, only the networks count, because they are built here first.

    Args:
        method: as `fastnce.config.build.plan` returns, with the blocks that will be recomputed.
        images: images of each domain in one part of a batch.
        sides: height and width of the crops; None if images keep their own size.
        sixteen_bits: feature maps have 16 bits.

    Raises:
        ValueError: what is too large, by how much, and what to lower.
    """
    room = available_memory()
    if room is None:
        return
    on_cpu = device.type == "cpu"
    size = sum(p.nbytes for p in method.parameters())
    needed = size * (4 if on_cpu else 1)  # with gradients and Adam's moments
    needed += sum(b.nbytes for b in method.buffers())
    check_networks(size, needed)
    if sides is None or not on_cpu:
        return
    generator = next(iter(method.generators().values()))
    own, shape = is_own(generator), (images, channels_of(generator), *sides)
    # an estimate must not refuse what a user's generator does, such as torch.func.grad
    with suppress(Exception) if own else nullcontext(), without_memory(generator):
        pictures = empty_images(shape, own=own)
        needed += kept_bytes(generator, pictures) // (2 if sixteen_bits else 1)
    if type(method).prepare.__module__.startswith("fastnce."):  # not a user's, which may read images
        before = sum(b.nbytes for b in method.buffers())
        pictures = torch.empty(shape, device="meta")
        method.prepare(Batch(pictures, pictures))  # makes pools of images
        needed += sum(b.nbytes for b in method.buffers()) - before
    if needed > room:
        height, width = sides
        raise ValueError(
            f"a step with {images} {'picture' if images == 1 else 'pictures'} of {width}x{height} at once takes at "
            f"least {_gib(needed)} of memory, and {_gib(room)} are there: {LESS}"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
