"""Triton kernels of rows as PyTorch operators with gradients; `triton_maps` has those that start from maps.

The operators (`torch.ops.fastnce.*`) take lists of tensors and have fakes, so `torch.compile` traces through them
without a graph break. Each gradient is an `autograd.Function` around an operator; its forward pass already computes the
query gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...common.autograd import FirstOrderOnly, apply, fast_apply, with_fast_path
from ...common.first_use import epoch
from ...common.operators import PLAIN, operator, plain, untraced
from ...kernels import nce, nce_keys
from ...kernels.common import fp32_precision
from ...kernels.plan import INTERPRETED
from ...kernels.planned import PlanCache, plan_of, planned
from .learned import scales_of, with_temperature
from .transforms import split_examples, transforms_active, with_examples

# InfoNCE of grouped rows


def _nce_forward(queries, keys, extra, log_weight, pair_weight, temperatures, decoupled, unit, gradient, scales):
    return nce.nce_forward(
        queries, keys, extra, log_weight, pair_weight, temperatures, scales, decoupled=decoupled, unit=unit,
        gradient=gradient,
    )  # fmt: skip


def _nce_forward_fake(queries, keys, extra, log_weight, pair_weight, temperatures, decoupled, unit, gradient, scales):
    rows = sum(q.shape[0] * q.shape[1] for q in queries)
    loss, negative, positive = (queries[0].new_empty(rows, dtype=torch.float32) for _ in range(3))
    return loss, negative, positive, [q.new_empty(q.shape) for q in queries] if gradient else []


def _nce_keys(queries, keys, log_weight, pair_weight, temperatures, negative, coefficient, extra, scales):
    return nce_keys.nce_key_gradients(
        queries, keys, log_weight, pair_weight, temperatures, negative, coefficient, scales, extra=extra
    )


_nce_forward_op = operator(
    "nce_forward(Tensor[] queries, Tensor[] keys, Tensor[] extra, Tensor[] log_weight, Tensor[] pair_weight, "
    "float[] temperatures, bool decoupled, bool unit, bool gradient, Tensor[] scales) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
    _nce_forward,
    _nce_forward_fake,
)
_nce_keys_op = operator(
    "nce_keys(Tensor[] queries, Tensor[] keys, Tensor[] log_weight, Tensor[] pair_weight, float[] temperatures, "
    "Tensor negative, Tensor coefficient, bool extra, Tensor[] scales) -> Tensor[]",
    _nce_keys,
    lambda queries, keys, *_: [k.new_empty(k.shape) for k in keys],
)


def _listed(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


@with_fast_path
class _NCERows(torch.autograd.Function):
    @staticmethod
    def forward(queries, keys, extra, log_weight, pair_weight, scale, temperature, decoupled, unit, with_gradient):
        groups, rows, _ = queries.shape
        loss, negative, positive, gradient = _nce_forward_op(
            [queries],
            [keys],
            [] if extra is None else [extra.expand(groups, -1, -1)],
            _listed(log_weight),
            _listed(pair_weight),
            [temperature],
            decoupled,
            unit,
            with_gradient,
            _listed(scale),
        )
        shape = (groups, rows)
        ready = gradient[0] if with_gradient else queries.new_empty(0)
        return loss.view(shape), negative.view(shape), positive.view(shape), ready

    @staticmethod
    def batched(info, in_dims, *inputs):
        *tensors, scale, temperature, decoupled, unit, with_gradient = inputs
        if in_dims[5] is not None:
            raise ValueError("the kernels take one temperature for all examples of vmap: use implementation='eager'")
        many = info.batch_size
        tensors = [with_examples(x, dim, many) for x, dim in zip(tensors, in_dims, strict=False)]
        with_gradient = with_gradient or (torch.is_grad_enabled() and tensors[0].requires_grad)
        return split_examples(apply(_NCERows, *tensors, scale, temperature, decoupled, unit, with_gradient), many)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *leaves, log_weight, pair_weight, scale, temperature, decoupled, _, _ = inputs
        _, negative, positive, gradient = output
        ctx.mark_non_differentiable(negative, positive, gradient)
        ctx.set_materialize_grads(False)  # no launch for outputs without a gradient
        ctx.temperature, ctx.decoupled = temperature, decoupled
        rest = (log_weight, pair_weight, scale, negative, positive)
        if not any(ctx.needs_input_grad[1:3]):
            rest = (None,) * 5  # keys are constants: the stored gradient is enough for the backward
        # Constant keys are not saved: a NegativeBank overwrites its keys before the backward pass.
        leaves = [leaf if i == 0 or ctx.needs_input_grad[i] else None for i, leaf in enumerate(leaves)]
        ctx.save_for_backward(gradient, *leaves, *rest)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * 10
        gradient, queries, keys, extra, log_weight, pair_weight, scale, negative, positive = ctx.saved_tensors
        gradients: list[Tensor | None] = [None, None, None]
        with torch.no_grad():
            if ctx.needs_input_grad[0]:
                gradients[0] = (gradient * upstream[:, :, None]).to(queries.dtype)
            if any(ctx.needs_input_grad[1:3]):
                share = upstream if ctx.decoupled else upstream * torch.sigmoid(negative - positive)
                shared = [ctx.temperature], negative.flatten(), share.flatten()
            if ctx.needs_input_grad[1]:
                weights = _listed(log_weight), _listed(pair_weight)
                gradients[1] = _nce_keys_op([queries], [keys], *weights, *shared, False, _listed(scale))[0]
            if ctx.needs_input_grad[2]:
                grouped = queries if extra.shape[0] == queries.shape[0] else queries.flatten(0, 1)[None]
                gradients[2] = _nce_keys_op([grouped], [extra], [], [], *shared, True, _listed(scale))[0]
        if torch.is_grad_enabled():
            sources = [leaf for leaf in [queries, keys, extra, upstream] if leaf is not None and leaf.requires_grad]
            gradients = [None if g is None else FirstOrderOnly.apply(g, *sources) for g in gradients]
        return *gradients, *(None,) * 7


@planned(products="matmul")
def _flat_rows(
    queries: Tensor, keys: Tensor, extra: Tensor | None, log_weight: Tensor | None, pair_weight: Tensor | None,
    scale: Tensor | None, *, groups: int, temperature: float, decoupled: bool, unit: bool, gradient: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Losses and positive logits (rows,), and dq (rows, dim), of (rows, dim)."""
    loss, _, positive, gradients = nce.nce_forward(
        [queries.unflatten(0, (groups, -1))],
        [keys.unflatten(0, (groups, -1))],
        [] if extra is None else [extra.expand(groups, -1, -1)],
        _listed(log_weight),
        _listed(pair_weight),
        [temperature],
        _listed(scale),
        decoupled=decoupled,
        unit=unit,
        gradient=gradient,
        statistics=statistics,
    )
    return loss, positive, gradients[0].flatten(0, 1) if gradient else None


class _ConstantKeys(torch.autograd.Function):
    """`_NCERows` for keys and extra keys without a gradient, outside of tracers: as little Python as possible."""

    @staticmethod
    def forward(ctx, queries, compute):
        loss, positive, gradient = compute()
        ctx.save_for_backward(queries, gradient)
        if positive is loss:
            return loss
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(positive)
        return loss, positive

    @staticmethod
    def backward(ctx, upstream, _=None):
        if upstream is None:
            return None, None
        queries, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradient = (gradient * upstream.detach()[:, None]).to(queries.dtype)
            sources = [leaf for leaf in (queries, upstream) if leaf.requires_grad]
            return FirstOrderOnly.apply(gradient, *sources), None
        gradient = gradient * upstream.unsqueeze(1)
        if gradient.dtype is not queries.dtype:
            gradient = gradient.to(queries.dtype)
        return gradient, None


_constant_keys = fast_apply(_ConstantKeys)

_SETTLED = PlanCache()


def repeated(queries: Tensor, keys: Tensor, *settings: Any) -> Tensor | None:
    """Return the losses (rows,) if `remember` has kept a call with the same key; else None.

    Checks and choices of a call depend only on the types, shapes, dtypes and devices of its arguments. They cost more
    CPU time than the launch, and are not made again.
    """
    if not _simple(queries, keys, settings):
        return None
    gradient = queries.requires_grad and torch.is_grad_enabled()
    plan = _SETTLED.get(_key(queries, keys, gradient, settings))
    if plan is None:
        return None
    if gradient:
        return _constant_keys(queries, lambda: plan.replay([queries, keys]))
    return plan.replay([queries, keys])[0]


def remember(queries: Tensor, keys: Tensor, options: dict[str, Any], *settings: Any) -> None:
    """Keep the plan of a call that passed its checks. `settings`: all else that they depend on, as hashable values."""
    if _simple(queries, keys, settings):
        gradient = queries.requires_grad and torch.is_grad_enabled()
        plan = plan_of(_flat_rows, queries, keys, *[None] * 4, **options, gradient=gradient, statistics=False)
        if plan is not None:
            _SETTLED[_key(queries, keys, gradient, settings)] = plan


def _simple(queries: Tensor, keys: Tensor, settings: tuple[Any, ...]) -> bool:
    if not (
        untraced(queries)
        and (queries.is_cuda or INTERPRETED)
        and type(keys) in PLAIN
        and not torch.is_autocast_enabled(queries.device.type)
    ):
        return False
    try:
        hash(settings)
    except TypeError:  # such as a list in place of a name
        return False
    return True


def _key(queries: Tensor, keys: Tensor, gradient: bool, settings: tuple[Any, ...]) -> tuple[Any, ...]:
    return (
        queries.shape, queries.stride(), queries.dtype, queries.device, queries.data_ptr() & 15,
        keys.shape, keys.stride(), keys.dtype, keys.device, keys.data_ptr() & 15,
        gradient, epoch(), fp32_precision("cuda", "matmul"), settings,
    )  # fmt: skip


def nce_losses(
    queries: Tensor,
    keys: Tensor,
    extra_keys_GED: Tensor | None = None,
    pair_log_weight_GSS: Tensor | None = None,
    pair_weight_GSS: Tensor | None = None,
    groups: int = 1,
    temperature: float | Tensor = 0.07,
    decoupled: bool = False,
    unit: bool = False,
    statistics: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `eager.nce_losses`; with `unit`, the kernel needs no running maximum.

    Without `statistics`, the second result may be the first.
    """
    scale = None
    if isinstance(temperature, Tensor):
        queries, (scale,) = with_temperature(queries, temperature), scales_of([temperature])
        temperature = 1.0  # not used beside the scale
    if extra_keys_GED is not None and transforms_active():
        extra_keys_GED = extra_keys_GED.expand(groups, -1, -1)  # `vmap` joins examples and groups
    enabled = torch.is_grad_enabled()
    with_gradient = enabled and queries.requires_grad
    constant = not (enabled and (keys.requires_grad or (extra_keys_GED is not None and extra_keys_GED.requires_grad)))
    tensors = queries, keys, extra_keys_GED, pair_log_weight_GSS, pair_weight_GSS, scale
    if constant and untraced(queries) and plain(tensors):
        compute = functools.partial(
            _flat_rows, *tensors, groups=groups, temperature=temperature, decoupled=decoupled, unit=unit,
            gradient=with_gradient, statistics=statistics,
        )  # fmt: skip
        if not with_gradient:
            return compute()[:2]
        found = _constant_keys(queries, compute)
        return found if isinstance(found, tuple) else (found, found)
    outputs = apply(
        _NCERows,
        queries.unflatten(0, (groups, -1)),
        keys.unflatten(0, (groups, -1)),
        extra_keys_GED,
        pair_log_weight_GSS,
        pair_weight_GSS,
        scale,
        temperature,
        decoupled,
        unit,
        with_gradient,
    )
    loss, _, positive, _ = outputs
    return loss.flatten(), positive.flatten()
