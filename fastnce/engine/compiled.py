"""Compile the step, in parts or as one graph; one warning says why if it runs uncompiled."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from ..methods.base import Batch, Draws, Losses


def _backward_now() -> AbstractContextManager:
    """Within: compile a backward together with its forward, not when a loss is first differentiated."""
    name = "force_non_lazy_backward_lowering"
    if not hasattr(torch._functorch.config, name):  # a private setting, which another version may not have
        return nullcontext()
    return torch._functorch.config.patch({name: True})


class Compiled:
    """A function compiled as one graph for fixed shapes. If compiling fails, the function itself runs.

    A compiler error must not end a training: neither at the first call, forward and backward, nor when a later call
    (FastCUT's mirrored step) is compiled anew. The function has not run by then, so it can be called again.

    Args:
        function: changes nothing but buffers of its module.
        backend: of `torch.compile`.
    """

    def __init__(self, function: Callable[..., Any], backend: str = "inductor"):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.compiled: Callable[..., Any] | None = torch.compile(
            function, fullgraph=True, dynamic=False, backend=backend
        )
        self.seconds = 0.0
        """Duration of the first call, most of which is compiling."""

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            return self.function(*args)
        began = time.perf_counter()
        try:
            with nullcontext() if self.seconds else _backward_now():  # it costs a fraction of a millisecond
                result = self.compiled(*args)
            self.seconds = self.seconds or time.perf_counter() - began
            return result
        except Exception as error:
            if self.seconds and not _from_compiler(error):
                raise
            warnings.warn(f"{self.name} runs uncompiled: {_reason(error)}", stacklevel=2)
            self.compiled = None
        return self.function(*args)  # outside of the handler, because the error keeps memory alive


def _from_compiler(error: Exception) -> bool:
    """Whether the compiler raised it, and not the compiled code."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # slow to import

    return isinstance(error, TorchDynamoException | FailOnRecompileLimitHit)


def _reason(error: Exception) -> str:
    """The error's first line and the compiler's explanation, if any: the first line alone is only a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    why = [line.removeprefix("Explanation: ") for line in lines[1:] if line.startswith("Explanation: ")]
    return ": ".join([lines[0], *why[:1]])[:300]


TRACES_GRADIENTS = "trace_autograd_ops"
"""The compiler's setting that allows `torch.autograd.grad` in traced code; PyTorch 2.11 and 2.13 have it."""


def whole_obstacle(ranks: int = 1, parts: int = 1) -> str:
    """Why a step of several ranks or parts cannot be compiled as one graph, as a clause; empty if it can."""
    import torch._dynamo.config  # slow to import

    if not hasattr(torch._dynamo.config, TRACES_GRADIENTS):
        return f"PyTorch {torch.__version__} does not trace gradients"
    if ranks > 1:
        return "several ranks exchange gradients in it"
    return f"it is computed in optim.accumulate={parts} parts" if parts > 1 else ""


StepFunction = Callable[[Batch, Draws], tuple[Losses, Tensor]]
"""Updates every network; returns the losses, and whether a gradient was not finite, () bool."""


class CompiledWhole:
    """A step compiled as one graph: generate, and every phase's loss, gradients and Adam.

    Gradients are traced, not recorded for later, so the compiler sees across forward and backward when a map is needed.

    Args:
        traced: the step in operations that the compiler can trace. It must change the same tensors as `launched`, so
            that the two can continue each other.
        launched: the same step for a call in which the compiler refuses `traced`.
        backend: of `torch.compile`.
    """

    def __init__(self, traced: StepFunction, launched: StepFunction, backend: str):
        self.launched = launched
        self.compiled: StepFunction = torch.compile(traced, fullgraph=True, dynamic=False, backend=backend)
        self.seconds = 0.0
        """Duration of the first call, most of which is compiling."""
        self.kinds: set[bool] = set()
        """The values of `Draws.flip` that have been compiled."""
        self.usable = True
        """False once the compiler has failed; later steps then run in parts."""

    def __call__(self, batch: Batch, draws: Draws) -> tuple[Losses, Tensor]:
        """Update every network; returns the losses, and whether a gradient was not finite, () bool."""
        began = time.perf_counter()
        try:
            result = self._compiled(batch, draws)
            self.kinds.add(draws.flip)
            self.seconds = self.seconds or time.perf_counter() - began
            return result
        except Exception as error:
            if self.seconds and not _from_compiler(error):
                raise
            warnings.warn(f"the step is compiled in parts, not whole: {_reason(error)}", stacklevel=2)
            self.usable = False
        return self.launched(batch, draws)

    def _compiled(self, batch: Batch, draws: Draws) -> tuple[Losses, Tensor]:
        """Run the compiled step. Its setting costs a fraction of a millisecond, so compiled kinds do without it."""
        if draws.flip in self.kinds:
            try:
                return self.compiled(batch, draws)
            except Exception as error:
                if not _from_compiler(error):
                    raise
        # a new kind, or a known one that has to be compiled anew and has not run yet
        with torch._dynamo.config.patch({TRACES_GRADIENTS: True}):
            return self.compiled(batch, draws)
