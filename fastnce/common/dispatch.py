"""Choose the implementation of an operation: Triton kernels or plain PyTorch.

Losses (`fastnce.nce.impl.dispatch`) and layers (`fastnce.networks.layers`) both use `choose`. Where it returns
`KERNELS`, they call `first_use.trusted`, which checks the kernels once.
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
    """The chosen implementation, and the reason."""

    implementation: Literal["triton", "eager"]
    reason: str

    @property
    def triton(self) -> bool:
        return self.implementation == "triton"


FORCED_EAGER = Choice("eager", "implementation='eager' was given")
FORCED_TRITON = Choice("triton", "implementation='triton' was given")
ON_CPU = Choice("eager", "the tensors are on the CPU, where plain PyTorch is faster than Triton's interpreter")
KERNELS = Choice("triton", "the kernels support this device, dtype and size")


def is_default(device: torch.device) -> bool:
    """Whether kernels are the default on this device, and are checked there at their first use.

    Tests replace this function, so that tensors on the CPU take the path of an accelerator.
    """
    return device.type != "cpu"


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run on tensors of this device and dtype, or None if they can."""
    return "Triton is not installed" if operators is None else operators.obstacle(device, dtype)


def check_implementation(implementation: object) -> None:
    """ValueError unless this is None or the name of an implementation."""
    if implementation is not None and not (isinstance(implementation, str) and implementation in IMPLEMENTATIONS):
        raise ValueError(f'implementation must be None, "triton" or "eager", not {implementation!r}')


def choose(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, limit: str | None = None
) -> Choice:
    """Choose the implementation of one call.

    Args:
        implementation: "triton" or "eager" forces one; None uses the kernels on accelerators if they can run.
        device, dtype: of the tensors.
        limit: another reason why the kernels cannot run, such as a size.

    Returns:
        a choice that follows from the arguments alone. `KERNELS` (the same object) means that the kernels are the
        default; `first_use.trusted` then checks whether they are right on the device.

    Raises:
        ValueError: the kernels are forced and cannot run, or the implementation is unknown.
    """
    check_implementation(implementation)
    if implementation == "eager":
        return FORCED_EAGER
    if implementation is None and not is_default(device):
        return ON_CPU
    found = obstacle(device, dtype) or limit
    if found is not None:
        if implementation == "triton":
            raise ValueError(f"implementation='triton' cannot run here: {found}")
        return Choice("eager", found)
    return KERNELS if implementation is None else FORCED_TRITON
