"""InfoNCE on plain PyTorch with its own gradient: the path of the CPU, and of every device without Triton.

Two things make it faster and smaller than differentiating the definition. The query gradient is formed in the forward
pass from the same exponentials as the loss (keys are constants of the loss, so the gradient of a row is one weighted
sum of keys), and rows are worked in blocks, so the (rows, rows) logits never stand in memory whole.

The positive stays out of the sum over negatives: loss = log(1 + exp(logsumexp_negatives - positive)) keeps its digits
where `logsumexp - positive` cancels, that is, for confident rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...common.autograd import FirstOrderOnly, apply, with_fast_path

BLOCK_ELEMENTS = 1 << 20
"""Logits worked at once on a CPU: 4 MiB in float32, little enough for its caches."""
DEVICE_BLOCK_ELEMENTS = 1 << 22
"""The same elsewhere, where every block costs launches."""

Block = tuple[slice, ...]
"""Groups (where there are several) and rows that are worked at once."""


def _blocks(queries: Tensor, keys: Tensor, extra_keys: Tensor | None) -> Iterator[Block | None]:
    """Blocks that hold at most so many logits each; None where one holds everything."""
    elements = BLOCK_ELEMENTS if queries.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    groups = queries.shape[0] if queries.dim() == 3 else 1
    rows, columns = queries.shape[-2], keys.shape[-2]
    if extra_keys is not None:
        columns += extra_keys.shape[-2]
    if groups * rows * columns <= elements:
        yield None
        return
    few_rows, few_groups = max(1, elements // columns), max(1, elements // (rows * columns))
    for group in range(0, groups, few_groups):
        for row in range(0, rows, few_rows):
            part = slice(row, min(row + few_rows, rows))
            yield (part,) if queries.dim() == 2 else (slice(group, min(group + few_groups, groups)), part)


def _part(tensor: Tensor | None, block: Block | None) -> Any:
    """A block's groups and rows. (Slicing is not free: everyday problems are one block.)"""
    return tensor if tensor is None or block is None else tensor[block]


def _groups(tensor: Tensor | None, block: Block | None) -> Any:
    return tensor if tensor is None or block is None else tensor[block[:-1]]


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, the factor inside of the product."""
    multiply = torch.addmm if left.dim() == 2 else torch.baddbmm
    return multiply(left.new_empty(1), left, right, beta=0, alpha=scale)  # of the first, nothing is read


def _split(matrix: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """The columns of the group's own keys, and those of the extra keys, which follow."""
    count = keys.shape[-2]
    return (matrix, None) if matrix.shape[-1] == count else (matrix[..., :count], matrix[..., count:])


def _solve(
    tensors: list[Any], scale: float, decoupled: bool, block: Block | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and positive logit of a block's rows, and the slope of the loss by each product `queries @ keys / T`.

    `tensors` as of `_grouped`. The slope is in two parts: the matrix, in the place of the logits, and a factor for each
    of its rows.
    """
    queries, keys, extra_keys, pair_log_weight, pair_weight = tensors
    asking = _part(queries, block)
    logits = _product(asking, _groups(keys, block).mT, scale)
    if extra_keys is not None:
        logits = torch.cat((logits, _product(asking, _groups(extra_keys, block).mT, scale)), dim=-1)
    inside, _ = _split(logits, keys)
    diagonal = inside.diagonal(0 if block is None else block[-1].start, dim1=-2, dim2=-1)
    positive = diagonal.clone()
    if pair_weight is not None:
        inside.mul_(_part(pair_weight, block))
    if pair_log_weight is not None:
        inside.add_(_part(pair_log_weight, block))
    diagonal.fill_(-torch.inf)
    top = logits.amax(dim=-1)
    without = pair_log_weight is not None or logits.shape[-1] == 1  # perhaps there are rows without a negative
    if without:
        top.masked_fill_(top == -torch.inf, 0.0)
    weights = logits.sub_(top[..., None]).exp_()
    total = weights.sum(dim=-1)
    margin = total.log().add_(top).sub_(positive)
    if without:
        total.masked_fill_(total == 0.0, 1.0)
    # beyond the threshold softplus is its argument, to the last digit of a float64
    loss = margin.clone() if decoupled else torch.nn.functional.softplus(margin, threshold=40.0)
    factor = total.reciprocal() if decoupled else margin.sigmoid_().div_(total)
    if pair_weight is not None:
        inside.mul_(_part(pair_weight, block))
    diagonal.copy_(total.neg_())  # the positive's own key
    return loss, positive, weights, factor


@with_fast_path
class _NCERows(torch.autograd.Function):
    """Rows are flat outside, (groups * rows, dim), and grouped inside where there are several groups."""

    @staticmethod
    def forward(queries, keys, extra_keys, pair_log_weight, pair_weight, groups, scale, decoupled, with_gradient):
        tensors = _grouped(groups, queries, keys, extra_keys, pair_log_weight, pair_weight)
        queries, keys, extra_keys = tensors[:3]
        done = []
        for block in _blocks(queries, keys, extra_keys):
            loss, positive, slope, factor = _solve(tensors, scale, decoupled, block)
            gradient = loss.new_empty(0, 1)
            if with_gradient:
                inside, outside = _split(slope, keys)
                gradient = _product(inside, _groups(keys, block), scale)
                if outside is not None:
                    gradient += _product(outside, _groups(extra_keys, block), scale)
            # views, even where the shape is right: PyTorch 2.11's compiler mistakes outputs that flatten() hands on
            gradient = gradient.view(-1, gradient.shape[-1])
            done.append((loss.view(-1), positive.view(-1), gradient, factor.view(-1)))
        if len(done) == 1:  # nothing to put together
            return done[0]
        return tuple(torch.cat(parts) for parts in zip(*done, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *leaves, pair_log_weight, pair_weight, ctx.groups, ctx.scale, ctx.decoupled, _ = inputs
        _, positive, gradient, factor = output
        ctx.mark_non_differentiable(positive, gradient, factor)
        ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
        weights = (pair_log_weight, pair_weight)
        if not any(ctx.needs_input_grad[1:3]):
            weights = (None, None)  # keys are constants: the ready gradient is all the backward needs
            leaves = [leaves[0], None, None]  # nor are they kept: a NegativeBank overwrites them before the backward
        ctx.save_for_backward(gradient, factor, *leaves, *weights)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * 9
        gradient, factor, *saved = ctx.saved_tensors
        leaves = saved[:3]
        if not (torch.is_grad_enabled() or any(ctx.needs_input_grad[1:3])):  # the everyday case, without ceremony
            return (gradient * (factor * upstream)[:, None]).to(leaves[0].dtype), *(None,) * 8
        gradients: list[Tensor | None] = [None, None, None]
        with torch.no_grad():
            if ctx.needs_input_grad[0]:
                gradients[0] = gradient * (factor * upstream)[:, None]
            if any(ctx.needs_input_grad[1:3]):
                gradients[1:] = _key_gradients(saved, ctx.groups, ctx.scale, ctx.decoupled, upstream)
            gradients = [None if g is None else g.to(leaf.dtype) for g, leaf in zip(gradients, leaves, strict=True)]
        if torch.is_grad_enabled():
            sources = [leaf for leaf in [*leaves, upstream] if leaf is not None and leaf.requires_grad]
            gradients = [None if g is None else FirstOrderOnly.apply(g, *sources) for g in gradients]
        return *gradients, None, None, None, None, None, None


def _grouped(groups: int, queries: Tensor, keys: Tensor, *others: Tensor | None) -> list[Any]:
    """(queries, keys, extra keys, the pairs' two weights), rows as (groups, rows of a group, dim).

    Of one group all come without that dimension: products of matrices are launched cheaper than of batches of one.
    float64 stays, everything else is computed in float32.
    """
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    queries, keys = queries.to(wide), keys.to(wide)
    if groups == 1:
        return [queries, keys, *(None if other is None else other[0].to(wide) for other in others)]
    shape = (groups, -1, queries.shape[1])
    rest = (None if other is None else other.to(wide) for other in others)
    return [queries.reshape(shape), keys.reshape(shape), *rest]


def _key_gradients(
    saved: list[Any], groups: int, scale: float, decoupled: bool, up: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Second pass, for keys that are not constants: dk_j = sum_i up_i * slope_ij * q_i / T."""
    tensors = _grouped(groups, *saved)
    queries, keys, extra_keys = tensors[:3]
    d_keys = torch.zeros_like(keys)
    d_extra = None if extra_keys is None else torch.zeros_like(extra_keys)
    up = up.reshape(queries.shape[:-1])
    for block in _blocks(queries, keys, extra_keys):
        _, _, slope, factor = _solve(tensors, scale, decoupled, block)
        inside, outside = _split(slope, keys)
        weighted = _part(queries, block) * (factor * _part(up, block))[..., None]
        _groups(d_keys, block).add_(_product(inside.mT, weighted, scale))
        if d_extra is not None and outside is not None:
            _groups(d_extra, block).add_(_product(outside.mT, weighted, scale))
    if d_extra is not None:
        d_extra = d_extra.view(groups, -1, d_extra.shape[-1])
    return d_keys.flatten(0, -2), d_extra


def nce_losses(
    queries: Tensor,
    keys: Tensor,
    extra_keys_GED: Tensor | None = None,
    pair_log_weight_GSS: Tensor | None = None,
    pair_weight_GSS: Tensor | None = None,
    groups: int = 1,
    temperature: float = 0.07,
    decoupled: bool = False,
    unit: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss, positive logit) of flat rows, (groups * rows, dim); each (groups * rows,).

    float32, or float64 for float64. Differentiable once, with respect to queries, keys and extra keys, which may be
    (1, count, dim) for all groups. 16-bit inputs are widened to float32 first. `unit`, that rows have unit length, is
    of no use here.
    """
    if extra_keys_GED is not None:
        extra_keys_GED = extra_keys_GED.expand(groups, -1, -1)
    weights = pair_log_weight_GSS, pair_weight_GSS
    with_gradient = torch.is_grad_enabled() and queries.requires_grad
    options = groups, 1.0 / temperature, decoupled, with_gradient
    loss, positive, _, _ = apply(_NCERows, queries, keys, extra_keys_GED, *weights, *options)
    return loss, positive


def nce_rows(queries_GSD: Tensor, keys_GSD: Tensor, extra_keys_GED: Tensor | None = None, **options):
    """As `reference.nce_rows`, options as of `nce_losses`: (loss, logsumexp, positive logit), each (groups, rows)."""
    groups, rows, _ = queries_GSD.shape
    flat = queries_GSD.flatten(0, 1), keys_GSD.flatten(0, 1)
    loss, positive = (t.view(groups, rows) for t in nce_losses(*flat, extra_keys_GED, groups=groups, **options))
    return loss, loss + positive, positive
