"""Autocast, for operations that choose their own precision."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to which the current autocast converts this tensor for a matrix product."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which operations on this device keep the dtype of their inputs."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
