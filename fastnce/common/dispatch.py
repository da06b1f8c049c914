"""Which implementation computes an operation: the Triton kernels or plain PyTorch.

Losses (`fastnce.nce.impl.dispatch`) and layers (`fastnce.networks.layers`) both decide here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

try:
    from . import operators
except ImportError:  # no Triton for this platform
    operators = None  # type: ignore[assignment]

Implementation = Literal["triton", "eager"] | None
IMPLEMENTATIONS = (None, "triton", "eager")


class Choice(NamedTuple):
    """The implementation that runs, and why."""

    implementation: Literal["triton", "eager"]
    reason: str

    @property
    def triton(self) -> bool:
        return self.implementation == "triton"


ASKED_EAGER = Choice("eager", "implementation='eager' was given")
ASKED_TRITON = Choice("triton", "implementation='triton' was given")
ON_CPU = Choice("eager", "the tensors are on the CPU, where plain PyTorch is faster than Triton's interpreter")
KERNELS = Choice("triton", "the kernels support this device, dtype and size")


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on tensors of this device and dtype, or None."""
    return "Triton is not installed" if operators is None else operators.obstacle(device, dtype)


def choose(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, limit: str | None = None
) -> Choice:
    """Decide for one call.

    Args:
        implementation: the caller's wish: "triton" and "eager" insist, None takes the kernels on accelerators.
        device, dtype: of the tensors.
        limit: a further reason why the kernels cannot run, such as a size.

    Raises:
        ValueError: the kernels are asked for and cannot run, or there is no such implementation.
    """
    if implementation is not None and not (isinstance(implementation, str) and implementation in IMPLEMENTATIONS):
        raise ValueError(f'implementation must be None, "triton" or "eager", not {implementation!r}')
    if implementation == "eager":
        return ASKED_EAGER
    if implementation is None and device.type == "cpu":
        return ON_CPU
    found = obstacle(device, dtype) or limit
    if found is not None:
        if implementation == "triton":
            raise ValueError(f"implementation='triton' cannot run here: {found}")
        return Choice("eager", found)
    return KERNELS if implementation is None else ASKED_TRITON
