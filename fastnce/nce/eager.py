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

from .autograd import Once, call, directly

BLOCK_ELEMENTS = 1 << 22
"""Logits held at once (16 MiB in float32)."""


Block = tuple[slice, slice]
"""Groups and rows that are worked at once."""


def _blocks(groups: int, rows: int, columns: int) -> Iterator[Block | None]:
    """Blocks that hold at most BLOCK_ELEMENTS logits each; None where one holds everything."""
    per_group = rows * columns
    if groups * per_group <= BLOCK_ELEMENTS:
        yield None
        return
    if per_group <= BLOCK_ELEMENTS:
        step = max(1, BLOCK_ELEMENTS // max(per_group, 1))
        for start in range(0, groups, step):
            yield slice(start, min(start + step, groups)), slice(0, rows)
        return
    step = max(1, BLOCK_ELEMENTS // columns)
    for group in range(groups):
        for start in range(0, rows, step):
            yield slice(group, group + 1), slice(start, min(start + step, rows))


def _part(tensor: Tensor, block: Block | None) -> Tensor:
    """A block's groups and rows. (Slicing is not free: a tenth of the overhead, where everything is one block.)"""
    return tensor if block is None else tensor[block]


def _groups(tensor: Tensor, block: Block | None) -> Tensor:
    return tensor if block is None else tensor[block[0]]


def _product(rows: Tensor, others: Tensor, scale: float) -> Tensor:
    """scale * rows @ others^T a group, the factor inside of the product."""
    out = rows.new_empty(rows.shape[0], rows.shape[1], others.shape[1])
    return torch.baddbmm(out, rows, others.transpose(1, 2), beta=0, alpha=scale)


def _diagonal(logits: Tensor, block: Block | None) -> Tensor:
    """Where the positives stand."""
    return logits.diagonal(offset=0 if block is None else block[1].start, dim1=1, dim2=2)


def _logits(queries, keys, extra_keys, pair_log_weight, pair_weight, scale, block: Block | None):
    """Scaled logits of one block: the diagonal (the positives) apart and -inf in the matrix."""
    asking = _part(queries, block)
    logits = _product(asking, _groups(keys, block), scale)
    diagonal = _diagonal(logits, block)
    positive = diagonal.clone()
    if pair_weight is not None:
        logits.mul_(_part(pair_weight, block))
    if pair_log_weight is not None:
        logits.add_(_part(pair_log_weight, block))
    diagonal.fill_(-torch.inf)
    outside = None if extra_keys is None else _product(asking, _groups(extra_keys, block), scale)
    return logits, outside, positive


def _negatives(logits: Tensor, outside: Tensor | None, finite: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """logsumexp over the negatives (-inf where there is none), and their exponentials with the sum that divides them.

    `finite` says that every row has a negative among the logits that is not -inf.
    """
    top = logits.amax(dim=2)
    if outside is not None:
        top = torch.maximum(top, outside.amax(dim=2))
    if not finite:
        top = torch.where(top == -torch.inf, 0.0, top)
    weights = logits.sub_(top[:, :, None]).exp_()
    total = weights.sum(dim=2)
    if outside is not None:
        outside = outside.sub_(top[:, :, None]).exp_()
        total = total + outside.sum(dim=2)
    negative = top.add_(total.log())
    return negative, weights, total if finite else torch.where(total > 0, total, 1.0), outside


def _widen(*tensors: Any) -> list[Any]:
    """float64 stays, everything else is computed in float32."""
    return [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]


@directly
class _NCERows(torch.autograd.Function):
    """Rows are flat outside, (groups * rows, dim), and grouped inside: a view less to differentiate."""

    @staticmethod
    def forward(queries, keys, extra_keys, pair_log_weight, pair_weight, groups, scale, decoupled, with_gradient):
        queries, keys, extra_keys = _grouped(groups, queries, keys, extra_keys)
        rows = queries.shape[1]
        columns = rows + (0 if extra_keys is None else extra_keys.shape[1])
        finite = rows > 1 and pair_log_weight is None
        done = []
        for block in _blocks(groups, rows, columns):
            logits, outside, positive = _logits(queries, keys, extra_keys, pair_log_weight, pair_weight, scale, block)
            negative, weights, total, outside = _negatives(logits, outside, finite)
            margin = negative - positive
            # beyond the threshold softplus is its argument, to the last digit of a float64
            loss = margin.clone() if decoupled else torch.nn.functional.softplus(margin, threshold=40.0)
            factor = gradient = queries.new_empty(0)
            if with_gradient:
                if pair_weight is not None:
                    weights.mul_(_part(pair_weight, block))
                # how much of the row's probability lies on its negatives, divided by T: left to the backward, which
                # multiplies every row by its upstream gradient anyway
                share = torch.full_like(margin, scale) if decoupled else torch.sigmoid(margin).mul_(scale)
                factor = share.div_(total).view(-1)
                _diagonal(weights, block).copy_(total.neg())  # less the positive's own key
                gradient = torch.bmm(weights, _groups(keys, block))
                if outside is not None:
                    gradient.baddbmm_(outside, _groups(extra_keys, block))
                gradient = gradient.view(-1, gradient.shape[2])
            done.append((loss.view(-1), negative.view(-1), positive.view(-1), gradient, factor))
        if len(done) == 1:  # nothing to put together
            return done[0]
        return tuple(torch.cat(parts) for parts in zip(*done, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *leaves, pair_log_weight, pair_weight, ctx.groups, ctx.scale, ctx.decoupled, _ = inputs
        _, negative, positive, gradient, factor = output
        ctx.mark_non_differentiable(negative, positive, gradient, factor)
        ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
        extra = (pair_log_weight, pair_weight, negative, positive)
        if not any(ctx.needs_input_grad[1:3]):
            extra = (None,) * 4  # keys are constants: the ready gradient is all the backward needs
            leaves = [leaves[0], None, None]  # nor are they kept: a NegativeBank overwrites them before the backward
        ctx.save_for_backward(gradient, factor, *leaves, *extra)

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
            gradients = [None if g is None else Once.apply(g, *sources) for g in gradients]
        return *gradients, None, None, None, None, None, None


def _grouped(groups: int, queries: Tensor, keys: Tensor, extra_keys: Tensor | None) -> list[Any]:
    queries, keys, extra_keys = _widen(queries, keys, extra_keys)
    shape = (groups, queries.shape[0] // groups, queries.shape[1])
    return [queries.reshape(shape), keys.reshape(shape), extra_keys]


def _key_gradients(
    saved: list[Any], groups: int, scale: float, decoupled: bool, up: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Second pass, for keys that are not constants: dk_j = sum_i up_i * w_ij * q_i / T, less the positive's part."""
    queries, keys, extra_keys = _grouped(groups, *saved[:3])
    pair_log_weight, pair_weight, negative, positive = saved[3:]
    rows = queries.shape[1]
    d_keys = torch.zeros_like(keys)
    d_extra = None if extra_keys is None else torch.zeros_like(extra_keys)
    share = (up if decoupled else up * torch.sigmoid(negative - positive)).view(groups, rows)
    columns = rows + (0 if extra_keys is None else extra_keys.shape[1])
    finite = rows > 1 and pair_log_weight is None
    for block in _blocks(groups, rows, columns):
        logits, outside, _ = _logits(queries, keys, extra_keys, pair_log_weight, pair_weight, scale, block)
        _, weights, total, outside = _negatives(logits, outside, finite)
        if pair_weight is not None:
            weights.mul_(_part(pair_weight, block))
        _diagonal(weights, block).copy_(total.neg())
        weighted = _part(queries, block) * (_part(share, block) * scale / total)[:, :, None]
        _groups(d_keys, block).add_(torch.bmm(weights.transpose(1, 2), weighted))
        if d_extra is not None and outside is not None:
            _groups(d_extra, block).add_(torch.bmm(outside.transpose(1, 2), weighted))
    return d_keys.flatten(0, 1), d_extra


def nce_losses(
    queries: Tensor,
    keys: Tensor,
    extra_keys_GED: Tensor | None = None,
    *,
    groups: int,
    temperature: float,
    pair_log_weight_GSS: Tensor | None = None,
    pair_weight_GSS: Tensor | None = None,
    decoupled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logsumexp of the negatives, positive logit) of flat rows, (groups * rows, dim); each (groups * rows,).

    float32, or float64 for float64. Differentiable once, with respect to queries, keys and extra keys. 16-bit inputs
    are widened to float32 first.
    """
    with_gradient = torch.is_grad_enabled() and queries.requires_grad
    return call(
        _NCERows,
        queries,
        keys,
        extra_keys_GED,
        *_widen(pair_log_weight_GSS, pair_weight_GSS),
        groups,
        1.0 / temperature,
        decoupled,
        with_gradient,
    )[:3]


def nce_rows(
    queries_GSD: Tensor, keys_GSD: Tensor, extra_keys_GED: Tensor | None = None, *, decoupled: bool = False, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.nce_rows`, options as of `nce_losses`: (loss, logsumexp, positive logit), each (groups, rows)."""
    shape = queries_GSD.shape[:2]
    loss, negative, positive = (
        flat.view(shape)
        for flat in nce_losses(
            queries_GSD.flatten(0, 1),
            keys_GSD.flatten(0, 1),
            extra_keys_GED,
            groups=shape[0],
            decoupled=decoupled,
            **options,
        )
    )
    return loss, negative if decoupled else torch.logaddexp(negative, positive), positive
