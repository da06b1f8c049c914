"""Temperatures that are tensors: their checks, and CLIP's learned one.

loss = patch_nce(queries, keys, temperature=t)     # t: a tensor (), which gets its gradient
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.messages import shown
from . import checks
from .impl.learned import bounded

LOWEST, HIGHEST = 0.01, 1.0
"""Range of a learned temperature: CLIP's limits of its logits' scale, 1 to 100."""

Temperature = float | Tensor
"""A number, or a tensor () that the host does not read."""


def given_temperature(value: Any, device: torch.device) -> Temperature:
    """Check T: a number, or a tensor of one element on this device, which is returned with the shape ().

    The value of a tensor is checked on the CPU alone: elsewhere it would have to be waited for.
    """
    if not isinstance(value, Tensor):
        return checks.temperature(value)
    checks.tensor("temperature", value)
    if value.numel() != 1:
        raise ValueError(f"temperature must be a number or a tensor of one element, not {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"temperature is on {value.device}, queries are on {device}: move one of them")
    if _readable(value):
        checks.number("temperature", value.item(), checks.LEAST_TEMPERATURE, checks.MOST_TEMPERATURE)
    return value.reshape(())


def given_temperatures(value: Any, layers: int, device: torch.device) -> list[Temperature]:
    """Check T, one for all layers or one per layer; return one per layer: tensors () if any is a tensor."""
    if isinstance(value, Tensor) and value.dim() == 1 and len(value) == layers:
        value = value.unbind()
    if not isinstance(value, Tensor) and not (hasattr(value, "__len__") and any(isinstance(t, Tensor) for t in value)):
        return list(checks.temperatures(value, layers))
    every = list(value) if not isinstance(value, Tensor) else [value] * layers
    if len(every) != layers:
        raise ValueError(f"temperature must be one number or {layers}, not {len(every)}")
    checked = [given_temperature(t, device) for t in every]
    return [t if isinstance(t, Tensor) else torch.full((), t, dtype=torch.float32, device=device) for t in checked]


def per_direction(temperatures: Sequence[Temperature], directions: int) -> list[Temperature]:
    """Return each layer's temperature once per direction, in the order of flat lists."""
    return [t for t in temperatures for _ in range(directions)]


def lowest_of(temperatures: Sequence[Temperature]) -> float:
    """Return the lowest that is known without reading a tensor: kernels are chosen, and checked, for it."""
    return min(t if isinstance(t, float) else LOWEST for t in temperatures)


def _readable(value: Tensor) -> bool:
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


class LearnedTemperature(nn.Module):
    """Temperatures that are trained with the projector: T = exp(-log_scale), from 0.01 to 1.

    Radford et al., Learning Transferable Visual Models From Natural Language Supervision (CLIP, ICML 2021, section 2.5
    and its code): the parameter is the logarithm of 1 / T, and 1 / T is at most 100. CLIP clamps the parameter after a
    step; here its value is clamped where it is used, and a gradient that leads further out is dropped.

    Args:
        initial: the first T of each layer, from 0.01 to 1; with `shared`, one T serves all layers.

    Raises:
        ValueError: a temperature out of this range.
    """

    def __init__(self, initial: Sequence[float], shared: bool):
        super().__init__()
        for t in initial:
            if not LOWEST <= t <= HIGHEST:
                raise ValueError(f"a learned temperature must begin from {LOWEST:g} to {HIGHEST:g}, not {shown(t)}")
        self.layers = len(initial)
        first = [initial[0]] if shared else list(initial)
        self.log_scale = nn.Parameter(torch.tensor([-math.log(t) for t in first], dtype=torch.float32))

    def forward(self) -> list[Tensor]:
        """Return T of each layer, tensors (), always in range."""
        log_scale = bounded(self.log_scale, -math.log(HIGHEST), -math.log(LOWEST))
        return list(log_scale.neg().exp().expand(self.layers).unbind())


def learned_temperatures(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the present value of every learned temperature of these networks, by the name to log it under.

    The name is `temperature`; with one T per layer `temperature_0`, `temperature_1`, ...; and if several networks learn
    one, the network's name comes first (`F1_temperature`).

    Returns:
        tensors () without gradient, on their devices. Nothing waits for the device.
    """
    found = {
        name: module
        for name, network in networks.items()
        for module in network.modules()
        if isinstance(module, LearnedTemperature)
    }
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, learned in found.items():
            key = "temperature" if len(found) == 1 else f"{name}_temperature"
            each = learned()
            if len(learned.log_scale) == 1:
                values[key] = each[0]
            else:
                values |= {f"{key}_{layer}": t for layer, t in enumerate(each)}
    return values
