"""Compare the kernels of a step with plain PyTorch on the step's own data (`run.check_every`).

A rehearsal of the step runs within `LiveCheck`, which sees every kernel operator with its inputs: each contrastive call
with its rows or its maps and patch ids, and each norm, pad, blur and last convolution. For each it computes the kernels
and plain PyTorch again, forward and gradients, and compares both with float64.

The kernels disagree if their error is above the gate of the dtype (`fastnce.common.agreement`) and above the gate plus
twice the error of plain PyTorch in the same dtype: both round, and live data may be harder than the data of the gates.
Gradients through the ReLU of a float32 MLP are left out: rounding moves a hidden unit across the corner now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..common import dispatch
from ..common.agreement import Check, KernelFailed
from ..common.first_use import in_own_thread
from ..nce.impl.uses import measure as nce  # None without Triton, when no operator exists either
from ..networks.uses import away_from_the_bias, away_from_the_corner, measure_layer

Measure = Callable[..., Iterator[Check]]


class Disagreement(NamedTuple):
    """A kernel whose numbers differ from plain PyTorch's."""

    kernel: str
    what: str

    def sentence(self, step: int) -> str:
        return f"at step {step:,} the kernels of {self.kernel} disagree with plain PyTorch: {self.what}"


def measure_of(name: str, arguments: Sequence[Any]) -> Measure | None:
    """Return the measure of a kernel operator for these arguments; None for operators of backward passes."""
    if name == "instance_norm":
        x, residual, *options = arguments
        x = away_from_the_corner(x) if options[1] != 1.0 else x
        # the operator does not know whether the output without the pad is used; a residual block's is
        inner = residual is not None and options[2] > 0
        return partial(measure_layer, name, [x, *_listed(residual)], (*options, inner))
    if name == "activate":
        x, bias, *options = arguments
        return partial(measure_layer, name, [away_from_the_bias(x, bias), *_listed(bias)], options)
    if name in ("blur_down", "blur_up"):
        return partial(measure_layer, name, [arguments[0]], ())
    if name == "reflect_pad":
        x, height, _ = arguments
        return partial(measure_layer, "reflection_pad", [x], ((height - x.shape[2]) // 2,))
    if name == "few_outputs":
        x, weight, bias, padding = arguments
        return partial(measure_layer, "few_outputs_convolution", [x, weight, *_listed(bias)], (padding,))
    if name == "nce_forward":
        queries, keys, extra, log_weight, pair_weight, temperatures, decoupled, unit, gradient, scales = arguments
        groups = queries[0].shape[0]
        more = [given[0] if given else None for given in (extra, log_weight, pair_weight)]
        return partial(
            nce.measure_rows, queries[0].flatten(0, 1), keys[0].flatten(0, 1), *more, groups=groups,
            temperature=_read(temperatures, scales)[0], decoupled=decoupled, unit=unit, wanted=(gradient, False, False),
        )  # fmt: skip
    if name == "nce_layers":
        queries, keys, extra, temperatures, groups, directions, other, divide, unit, _, scales = arguments
        return partial(
            nce.measure_layers, queries, keys, extra, temperatures=_read(temperatures, scales), groups=groups,
            directions=directions, other=other, divide=divide, unit=unit,
        )  # fmt: skip
    if name == "head":
        query_maps, key_maps, ids, query_mlp, key_mlp, temperatures, groups, directions, dtype, _ = arguments
        return partial(
            nce.measure_head, query_maps, key_maps, ids, query_mlp, key_mlp, temperatures=temperatures, groups=groups,
            directions=directions, dtype=dtype, distinct=_distinct(ids),
            with_gradients=_differentiable(query_mlp, dtype),
        )  # fmt: skip
    if name == "project":
        maps, ids, mlp, dtype, _ = arguments
        gradients = _differentiable(mlp, dtype)
        return partial(nce.measure_projection, maps, ids, mlp, dtype, distinct=_distinct(ids), with_gradients=gradients)
    if name == "draw_ids":
        return lambda plain=False: iter(()) if plain else nce.measure_ids(*arguments)
    return None


NAMES = {
    "nce_forward": "patch_nce",
    "nce_layers": "patch_nce_layers",
    "head": "PatchNCEHead",
    "project": "project_patches",
    "reflect_pad": "reflection_pad",
    "few_outputs": "few_outputs_convolution",
}
"""Operators whose family has another name."""


def _read(temperatures: Sequence[float], scales: Sequence[Tensor]) -> Sequence[float | Tensor]:
    """Return the temperatures of a call; as tensors if it learns them, so that the same kernels run again."""
    return [1.0 / scale[0] for scale in scales] or temperatures


def _listed(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def _distinct(ids: Sequence[Tensor]) -> bool:
    return all(bool((i.sort(dim=1).values.diff(dim=1) != 0).all()) for i in ids)


def _differentiable(mlp: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return not mlp or dtype != torch.float32


class LiveCheck(TorchDispatchMode):
    """Within: every kernel operator of a forward pass is compared with plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.compared = 0
        """Calls that have been compared."""
        self.families: set[str] = set()
        """The kernels that have been compared."""
        self.found: Disagreement | None = None
        """The first disagreement."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        forward = torch._C._current_graph_task_id() == -1
        if func.namespace == "fastnce" and forward and self.found is None:
            name = func._schema.name.removeprefix("fastnce::")
            measure = measure_of(name, args)
            if measure is not None:
                self.compared += 1
                self.families.add(NAMES.get(name, name))
                what = in_own_thread(lambda: disagreement(measure))
                if what:
                    self.found = Disagreement(f"{NAMES.get(name, name)} (call {self.compared})", what)
        return result


def disagreement(measure: Measure) -> str:
    """Compare the kernels with plain PyTorch; return how they differ, or "".

    Without enough memory, or with exact results that are not finite, nothing is compared.
    """
    try:
        checks = list(measure())
        if all(check.ok for check in checks):
            return ""
        plain = {check.name: check for check in measure(plain=True)}
    except KernelFailed as error:
        return str(error)
    except (torch.OutOfMemoryError, ArithmeticError):
        return ""
    for check in checks:
        other = plain.get(check.name)
        limit = (check.gate or 0.0) + (0.0 if other is None else 2 * other.error)
        if not check.error <= limit:
            ours, theirs = check.values
            values = "" if ours != ours and theirs != theirs else f": {ours:.6g} in place of {theirs:.6g}"
            return f"{check.name} has an error of {check.error:.1e}, the limit is {limit:.1e}{values}"
    return ""


def nothing_to_compare(device: torch.device) -> str:
    """Return why `run.check_every` compares nothing on this device, or ""."""
    if not dispatch.is_default(device):
        return "plain PyTorch computes on the CPU, and no kernels run there"
    return dispatch.obstacle(device, torch.float32) or ""
