"""Choose device, precision, memory layout, compilation and TF32 from the settings of a run."""

from __future__ import annotations

import warnings

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" is the first accelerator, else the CPU; ValueError if the named device is not available."""
    if name == "auto":
        if torch.accelerator.is_available():
            return torch.accelerator.current_accelerator() or torch.device("cpu")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it stores no data")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # PyTorch goes on about other builds and devices
        raise ValueError(
            f"run.device={name} cannot be used here ({reason}); use auto, cpu or an available device"
        ) from None
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto" is bf16 on an accelerator that supports it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16"


def pick_layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Channels-last on accelerators, and for bf16 on CPUs with matrix units (AMX).

    Other convolutions on a CPU are equally fast in both layouts, and the layers between them are faster in the
    contiguous one (measured: docs/performance.md).
    """
    if device.type != "cpu":
        return torch.channels_last
    return torch.channels_last if dtype == torch.bfloat16 and has_amx() else torch.contiguous_format


def has_amx() -> bool:
    """Whether this CPU has matrix units that PyTorch can use."""
    # a private function, the only one in PyTorch 2.11
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def pick_compile(name: str, device: torch.device) -> bool | str:
    """ "auto" compiles on accelerators; on a CPU, compiling takes minutes and gains little."""
    if name not in ("auto", "true", "false", "whole"):
        raise ValueError(f"run.compile must be auto, true, false or whole, not {name!r}")
    if name == "whole":
        return "whole"
    return name == "true" or (name == "auto" and device.type != "cpu")


def set_tf32(name: str, device: torch.device) -> str:
    """Allow or forbid TF32, which keeps 10 of float32's 23 bits, in matrix products and convolutions.

    "auto" leaves PyTorch's choice: in version 2.13, TF32 in convolutions only.

    Returns:
        a sentence with the settings; empty on devices other than CUDA.
    """
    if name not in ("auto", "true", "false"):
        raise ValueError(f"run.tf32 must be auto, true or false, not {name!r}")
    if device.type != "cuda":
        return ""
    if name != "auto":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "true"
    on = zip(("products", "convolutions"), tf32_allowed(), strict=True)
    return "TF32 in float32 " + ", ".join(f"{what}: {'on' if used else 'off'}" for what, used in on)


def tf32_allowed() -> tuple[bool, bool]:
    """Whether TF32 is on in (products, convolutions) on CUDA, whichever of PyTorch's two interfaces set it."""
    # reading `allow_tf32` is an error if the program has set `fp32_precision`
    libraries = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    products, convolutions = (library.fp32_precision == "tf32" for library in libraries)
    return products, convolutions


def pick_streams(wanted: bool, device: torch.device, compiled: bool | str) -> bool:
    """Whether independent work runs at the same time; one warning if `compiled` leaves nothing that does.

    Raises:
        ValueError: it is wanted on a device that is no CUDA device.
    """
    if wanted and device.type != "cuda":
        raise ValueError(f"run.streams=true needs a CUDA device, not {device.type}: leave it false")
    if wanted and compiled:
        warnings.warn("run.streams=true has no effect on a compiled step: set run.compile=false too", stacklevel=2)
    return wanted and not compiled
