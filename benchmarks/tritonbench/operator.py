"""InfoNCE as an operator of tritonbench: the cases of `benchmarks/loss.py`, its inputs and its baselines.

ln -s REPOSITORY/benchmarks/tritonbench CHECKOUT/tritonbench/operators/patch_nce
cd CHECKOUT && PYTHONPATH=REPOSITORY python run.py --op patch_nce --mode fwd_bwd --metrics latency,speedup,tflops,error

tritonbench names an operator by its place among its modules, so it can only be imported through that link. With
`--mode fwd` our forward pass also computes the query gradient; with `fwd_no_grad` it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tritonbench.utils.triton_op import (
    BenchmarkOperator,
    Mode,
    register_benchmark,
    register_metric,
    register_x_val,
)

from benchmarks import baselines, loss
from benchmarks.cases import Case, Context
from fastnce import patch_nce

MOST_EXACT_ROWS = 4096
"""The error is measured up to this number of rows: beyond, float64 logits take gigabytes."""


class Operator(BenchmarkOperator):
    """Mean InfoNCE of unit rows, keys constant, and its query gradient."""

    DEFAULT_METRICS = ["latency", "speedup"]  # noqa: RUF012 - as in the base class

    def get_input_iter(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield queries and keys (rows, dim) of each case, in the dtype of `--precision` or of the case."""
        for case in self.cases():
            queries, keys = case.make_inputs()
            if self.dtype is not None:
                queries, keys = queries.detach().to(self.dtype), keys.to(self.dtype)
            yield queries.detach().requires_grad_(self.requires_grad), keys

    def cases(self) -> list[Case]:
        """The InfoNCE cases of `loss.py` on this device, the smallest first."""
        context = Context(torch.device(self.device))
        found = loss.infonce_cases(context)
        return sorted((c for c in found if c.benchmark == "infonce"), key=lambda case: case.size["patches"])

    @register_benchmark(baseline=True)
    def cross_entropy(self, queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
        return lambda: baselines.normalized_cross_entropy(queries, keys, loss.TEMPERATURE).mean()

    @register_benchmark()
    def fastnce(self, queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
        return lambda: patch_nce(queries, keys, temperature=loss.TEMPERATURE)

    @register_benchmark()
    def fastnce_unit_rows(self, queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
        return lambda: patch_nce(queries, keys, temperature=loss.TEMPERATURE, unit_rows=True)

    @register_benchmark()
    def cut(self, queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
        return lambda: baselines.cut_loss(queries, keys, temperature=loss.TEMPERATURE).mean()

    @register_benchmark(fwd_only=True)  # its backward pass runs once, and tritonbench repeats it
    def linear_cross_entropy(self, queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise NotImplementedError("F.linear_cross_entropy needs PyTorch 2.13")
        return lambda: baselines.linear_cross_entropy(queries, keys, loss.TEMPERATURE).mean()

    @register_x_val(label="rows, dim")
    def get_x_val(self, example_inputs: Any) -> tuple[int, int]:
        return tuple(example_inputs[0].shape)

    def get_bwd_fn(self, fwd_fn: Callable[[], Tensor]) -> Callable[[], None]:
        value = fwd_fn()
        return lambda: value.backward(retain_graph=True)

    def get_grad_to_none(self, args: Any) -> list[Tensor]:
        """The queries: without a gradient of an earlier call, nothing is added to it."""
        return [args[0]]

    @register_metric()
    def flops(self, fn: Any, example_inputs: Any, metrics: Any) -> float:
        """Return the least operations of the mode: each of the two passes needs one product of (rows, rows, dim)."""
        rows, dim = example_inputs[0].shape
        passes = 2 if self.mode == Mode.FWD_BWD else 1
        return passes * 2.0 * rows * rows * dim

    @register_metric()
    def error(self, fn: Callable[[], Any], example_inputs: Any, metrics: Any) -> float | None:
        """Return the largest error against float64, relative to the largest value: of the loss, or of the gradient.

        Of the gradient, the part along its row is left out: `cross_entropy` normalises the rows, which removes it. None
        above `MOST_EXACT_ROWS` rows.
        """
        queries, keys = example_inputs
        if len(queries) > MOST_EXACT_ROWS:
            return None
        exact_queries = queries.detach().double().requires_grad_()
        logits = exact_queries @ keys.double().T / loss.TEMPERATURE
        exact = F.cross_entropy(logits, torch.arange(len(keys), device=keys.device))
        queries.grad = None
        found = fn()
        if self.mode in (Mode.BWD, Mode.FWD_BWD):
            (exact,) = torch.autograd.grad(exact, exact_queries)
            exact, found = (across(gradient.double(), exact_queries.detach()) for gradient in (exact, queries.grad))
        if found is None:  # `fwd_no_grad` returns nothing
            return None
        return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def across(gradients: Tensor, rows: Tensor) -> Tensor:
    """Return the gradients without their parts along the rows."""
    units = F.normalize(rows, dim=1)
    return gradients - (gradients * units).sum(1, keepdim=True) * units
