"""Compile a part of the step whole, or say once why it runs uncompiled."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config


def _backward_now() -> AbstractContextManager:
    """Within: a backward is compiled together with its forward, not when a loss is first differentiated."""
    name = "force_non_lazy_backward_lowering"
    if not hasattr(torch._functorch.config, name):  # an older PyTorch
        return nullcontext()
    return torch._functorch.config.patch({name: True})


class Compiled:
    """A function compiled as one graph for fixed shapes; itself where the compiler does not take it.

    Which of both is decided at the first call, forward and backward: a compiler that fails in the middle of training
    must not end it. (The step's functions change nothing before they return, so they can be called again.)

    Args:
        function: pure but for its module's buffers.
        backend: of `torch.compile`.
    """

    def __init__(self, function: Callable[..., Any], backend: str = "inductor"):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.compiled: Callable[..., Any] | None = torch.compile(
            function, fullgraph=True, dynamic=False, backend=backend
        )
        self.seconds = 0.0
        """What the first call took: compiling, most of all."""

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            return self.function(*args)
        if self.seconds:
            return self.compiled(*args)
        began = time.perf_counter()
        try:
            with _backward_now():
                result = self.compiled(*args)
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            warnings.warn(f"{self.name} runs uncompiled: {reason[:300]}", stacklevel=2)
            self.compiled = None
            return self.function(*args)
        self.seconds = time.perf_counter() - began
        return result
