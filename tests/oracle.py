"""What the tests of the kernels share: data of a chosen confidence, the float64 oracle, error gates, a launch count."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
import torch
import triton
from fastnce.kernels import common, sample
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastnce.nce.impl import eager, reference
from fastnce.nce.impl import triton_layers as fused_layers
from fastnce.nce.impl import triton_maps as fused_maps
from fastnce.nce.impl import triton_rows as fused

DEVICE = torch.device("cpu" if common.INTERPRET.value else torch.accelerator.current_accelerator() or "cpu")
"""The interpreter runs on the CPU; elsewhere the kernels run on the device."""

GRADIENT_GATE = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
LOSS_GATE = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


def error(ours: Tensor, oracle: Tensor) -> float:
    """Relative norm of the difference, or the norm itself where the oracle is zero."""
    oracle = oracle.detach().double().cpu()
    return float((ours.detach().double().cpu() - oracle).norm() / (oracle.norm() if oracle.norm() > 0 else 1.0))


def unit_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.randn(*shape)
    return (rows / rows.norm(dim=-1, keepdim=True)).to(dtype)


def confident_pair(groups: int, rows: int, dim: int, p: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Unit queries and keys, and the temperature at which the positives' probability is p on average."""
    q = unit_rows(groups, rows, dim)
    k = q + 0.3 * torch.randn(groups, rows, dim) / dim**0.5
    q, k = q.to(dtype), (k / k.norm(dim=-1, keepdim=True)).to(dtype)
    low, high = 1e-3, 100.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        loss, _, _ = reference.nce_rows(q.double(), k.double(), temperature=middle)
        low, high = (middle, high) if float(torch.exp(-loss).mean()) > p else (low, middle)
    return q, k, 1 / float(torch.tensor(1 / low, dtype=torch.float32))  # as inexact as the rows, not more


@dataclass
class Oracle:
    """Loss, stats and gradients of `reference.nce_rows` in float64 on the same rounded inputs."""

    loss: Tensor
    logsumexp: Tensor
    positive: Tensor
    d_queries: Tensor
    d_keys: Tensor
    d_extra: Tensor | None


def oracle(q: Tensor, k: Tensor, upstream: Tensor, extra: Tensor | None = None, **options) -> Oracle:
    """`extra` may be (1, count, dim) for all groups."""
    leaves = [None if x is None else x.detach().double().cpu().requires_grad_() for x in (q, k, extra)]
    grouped = None if extra is None else leaves[2].expand(q.shape[0], -1, -1)
    wide = {name: x.double().cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    loss, logsumexp, positive = reference.nce_rows(leaves[0], leaves[1], grouped, **wide)
    (loss * upstream.double().cpu()).sum().backward()
    return Oracle(
        loss.detach(), logsumexp.detach(), positive.detach(), *(None if x is None else x.grad for x in leaves)
    )


def eager_rows(q: Tensor, k: Tensor, extra_keys_GED: Tensor | None = None, **options) -> tuple[Tensor, Tensor, Tensor]:
    """`eager.nce_losses` with the arguments and results of `reference.nce_rows`."""
    groups, rows, _ = q.shape
    found = eager.nce_losses(q.flatten(0, 1), k.flatten(0, 1), extra_keys_GED, groups=groups, **options)
    loss, positive = (t.view(groups, rows) for t in found)
    return loss, loss + positive, positive


def eager_error(q: Tensor, k: Tensor, truth: Oracle, upstream: Tensor, **options) -> tuple[float, float]:
    """(loss error, gradient error) of the eager path on the same inputs."""
    leaf = q.detach().requires_grad_()
    loss, _, _ = eager_rows(leaf, k, **options)
    (d_q,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    return error(loss, truth.loss), error(d_q, truth.d_queries)


LIBRARY_VIEWS = (
    "view", "_unsafe_view", "detach", "split", "select", "unsqueeze", "expand", "as_strided", "slice", "permute",
    "transpose", "alias", "unflatten", "flatten", "narrow", "empty", "new_empty", "t.",
    "min.", "max.", "_local_scalar_dense",
)  # fmt: skip
"""Operators that launch nothing. The last three check ids, which is done unasked on the CPU alone."""


IMPLEMENTATIONS = {
    "nce_forward": fused._nce_forward,
    "nce_keys": fused._nce_keys,
    "draw_ids": sample.draw_ids,
    "project": fused_maps._project,
    "project_backward": fused_maps._project_backward,
    "head": fused_maps._head,
    "nce_layers": fused_layers._layers,
    "row_gradients": fused_layers._row_gradients,
}


class _Operators(TorchDispatchMode):
    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("fastnce."):
            with _Operators(self.names):  # what runs inside of our operators counts, they themselves do not
                return IMPLEMENTATIONS[name.split(".")[1]](*args, **(kwargs or {}))
        if not any(name.removeprefix("aten.").startswith(view) for view in LIBRARY_VIEWS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def count_launches(monkeypatch, names: list[str]) -> None:
    """Append the name of every Triton kernel that is launched from now on, in the interpreter or on a device."""
    start = common.start

    def interpreted(kernel, blocks, *args, **options):
        names.append(kernel.fn.__name__)
        with _disable_current_modes():  # the interpreter moves data by operators of its own
            start(kernel, blocks, *args, **options)

    def on_device(metadata):
        names.append(metadata.get()["name"])

    if common.INTERPRET.value:
        monkeypatch.setattr(common, "start", interpreted)
    else:
        monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [on_device])


@dataclass
class Launches:
    """Within `with`: Triton launches, and library operators that would launch something on a device."""

    kernels: list[str] = field(default_factory=list)
    library: list[str] = field(default_factory=list)

    def __enter__(self):
        self.within = ExitStack()
        count_launches(self.within.enter_context(pytest.MonkeyPatch.context()), self.kernels)
        self.within.enter_context(_Operators(self.library))
        return self

    def __exit__(self, *details):
        self.within.close()
