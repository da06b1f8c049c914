"""What a run's settings mean on its device: precision, compilation, TF32."""

from __future__ import annotations

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto" is bf16 on an accelerator that computes in it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16"


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
    on = {
        "products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
    }
    return "TF32 in float32 " + ", ".join(f"{what}: {'on' if used else 'off'}" for what, used in on.items())
