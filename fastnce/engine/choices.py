"""What a run's settings mean on its device: precision, compilation, TF32; and which layout of maps it wants."""

from __future__ import annotations

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" is the first accelerator, else the CPU; ValueError where the named one is not there."""
    if name == "auto":
        if torch.accelerator.is_available():
            return torch.accelerator.current_accelerator() or torch.device("cpu")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"run.device={name} cannot be used here ({reason}); auto, cpu or a device that is there"
        ) from None
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto" is bf16 on an accelerator that computes in it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16"


def pick_layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Channels-last on accelerators, and on CPUs whose bf16 products run in matrix units (AMX).

    Other convolutions of a CPU take either layout at the same speed, and everything between them is faster in the plain
    one (measured: docs/performance.md).
    """
    if device.type != "cpu":
        return torch.channels_last
    return torch.channels_last if dtype == torch.bfloat16 and has_amx() else torch.contiguous_format


def has_amx() -> bool:
    """Whether this CPU has matrix units that PyTorch may use."""
    # not a public function, but the only one that PyTorch 2.11 has
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def pick_compile(name: str, device: torch.device) -> bool | str:
    """ "auto" compiles on accelerators: on a CPU it takes minutes and gains little."""
    if name not in ("auto", "true", "false", "whole"):
        raise ValueError(f"run.compile must be auto, true, false or whole, not {name!r}")
    if name == "whole":
        return "whole"
    return name == "true" or (name == "auto" and device.type != "cpu")


def set_tf32(name: str, device: torch.device) -> str:
    """Allow or forbid TF32, which keeps 10 bits of float32's 23, in products and convolutions; returns what holds.

    "auto" leaves the library's choice, which is (PyTorch 2.13) convolutions in TF32 and other products exact.
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
    """In products, and in convolutions, on CUDA devices, whichever of PyTorch's two interfaces said so."""
    # reading `allow_tf32` is an error where a program has set `fp32_precision`
    libraries = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    products, convolutions = (library.fp32_precision == "tf32" for library in libraries)
    return products, convolutions
