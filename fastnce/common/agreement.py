"""Compare kernels with exact results: error gates, unit rows of any confidence, and one measured error as a line.

`fastnce doctor`, the check at the first use of a kernel and `run.check_every` share these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .imports import first_line

LOSS_GATES = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
GRADIENT_GATES = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
SAMPLING_GATES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative norms of errors against float64 on the same rounded inputs. The gates of sampling in 16 bits are four times
those of gradients: rows, activations and weights are rounded at each layer, in PyTorch as in this library."""
MLP_GRADIENT_GATES = SAMPLING_GATES | {torch.float16: SAMPLING_GATES[torch.bfloat16]}
"""Of gradients through an MLP: the kernels multiply those of float16 rows in bfloat16, for its range."""

TEMPERATURE = 0.07
UPSTREAM = 1024.0
"""Factor of the loss when gradients are computed, as a loss scaler applies it: otherwise the gradients of confident
rows underflow float16."""


def logit_rounding(temperature: float = TEMPERATURE) -> float:
    """Return the relative error of a confident row's loss that comes from the rounding of its logits in float32.

    A logit of 1/T has an error of at most 2^-24 / T. The loss of a confident row is nearly exp(negatives - positive),
    so its relative error is the absolute error of the two logits and their sum.
    """
    return 3 * 2.0**-24 / temperature


@dataclass(frozen=True)
class Check:
    """One measured error. With gate None it is only reported and cannot fail.

    `values` are two numbers for a message, of the kernels and exact, such as a mean loss.
    """

    name: str
    error: float
    gate: float | None
    note: str = ""
    values: tuple[float, float] = (math.nan, math.nan)

    @property
    def ok(self) -> bool:
        return self.gate is None or self.error <= self.gate  # False for NaN

    def line(self) -> str:
        word = "report" if self.gate is None else "ok" if self.ok else "FAIL"
        gate = "" if self.gate is None else f"  (gate {self.gate:.0e})"
        return f"{word:6}  {self.name:58}  error {self.error:.1e}{gate}" + (f"  {self.note}" if self.note else "")


def relative(measured: Tensor, exact: Tensor) -> float:
    """Return the norm of the error, divided by the norm of the exact result (float64)."""
    exact = exact.detach()
    return ((measured.detach().to(exact.device).double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def relative_per_row(measured: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the relative error of each loss.

    A norm over all rows would hide confident rows, whose loss is near 0. Losses below 1e-20 count as 1e-20.
    """
    exact = exact.detach()
    errors = (measured.detach().to(exact.device).double() - exact) / exact.clamp_min(1e-20)
    return errors.square().mean().sqrt().item()


def unit_rows(shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    """Return random float64 rows of unit length; the last dimension is the row."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu"), dim=-1).to(device)


def confident_queries(keys: Tensor, probability: float | Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Unit rows whose positive has about this probability among the keys, or the highest that unit rows allow.

    Args:
        keys: float64 unit rows (rows, dim).
        probability: one number, or one per row (rows, 1) on the keys' device.
    """
    away = unit_rows(tuple(keys.shape), keys.device, seed=2)
    away = F.normalize(away - (away * keys).sum(1, keepdim=True) * keys, dim=1)
    negatives = torch.logsumexp(away @ keys.T / temperature, dim=1, keepdim=True)
    share = torch.as_tensor(probability, dtype=torch.float64, device=keys.device)
    cosine = (temperature * (negatives + (share / (1 - share)).log())).clamp(min=-1.0, max=1.0)
    return cosine * keys + (1 - cosine**2).clamp_min(0.0).sqrt() * away


class KernelFailed(Exception):
    """A kernel did not compile, launch or finish; the message is the first line of the error."""


T = TypeVar("T")


def run_kernels(function: Callable[[], T], device: torch.device) -> T:
    """Call a function that launches kernels, and wait for the device.

    Raises:
        KernelFailed: it raised an error, or the device did. Lack of memory is raised as it is.
    """
    try:
        result = function()
        wait(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise KernelFailed(first_line(error)) from error
    return result


def wait(device: torch.device) -> None:
    """Wait until the device has done all its work. An error of earlier work is raised here."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def exact_device(device: torch.device) -> torch.device:
    """Return where float64 is computed for tensors of a device: there, or on the CPU if it has no float64."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).sum().item()
    except (RuntimeError, TypeError):
        return torch.device("cpu")
    return device


def leaves(tensors: Iterable[Tensor], wanted: Sequence[bool] | bool = True) -> list[Tensor]:
    """Return the tensors detached, as leaves of a new graph. `wanted`: which of them require a gradient."""
    tensors = list(tensors)
    flags = [wanted] * len(tensors) if isinstance(wanted, bool) else wanted
    return [t.detach().requires_grad_(flag) for t, flag in zip(tensors, flags, strict=True)]


def widened(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Return float64 copies on a device; integer tensors keep their type."""
    return [t.detach().to(device, torch.float64 if t.is_floating_point() else t.dtype) for t in tensors]


def pattern(like: Tensor) -> Tensor:
    """Return float32 values from -0.5 to 1 of a tensor's shape that look random: a gradient to test with.

    Their mean is not 0, so that sums over them are not much smaller than their terms.
    """
    index = torch.arange(like.numel(), device=like.device, dtype=torch.float32) % 65_521
    return ((index * 12.9898).sin() * 437.58).frac().view(like.shape) * 0.75 + 0.25


def compared(
    names: Sequence[str], measured: Sequence[Tensor], exact: Sequence[Tensor], gates: Sequence[float]
) -> Iterator[Check]:
    """Yield one check of the relative norm per pair of tensors, with their root mean squares as values.

    Raises:
        ArithmeticError: an exact result is not finite, so nothing can be compared with it.
    """
    for name, ours, theirs, gate in zip(names, measured, exact, gates, strict=True):
        if not theirs.detach().norm().isfinite():
            raise ArithmeticError(f"{name} is not finite in float64")
        values = [t.detach().double().square().mean().sqrt().item() for t in (ours, theirs)]
        yield Check(name, relative(ours, theirs), gate, values=(values[0], values[1]))
