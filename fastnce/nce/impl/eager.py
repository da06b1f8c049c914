"""InfoNCE in plain PyTorch with its own gradient, for CPUs and for devices without Triton.

It is faster and needs less memory than differentiating the definition, for two reasons. The forward pass computes the
query gradient from the exponentials of the loss (keys are constants, so the gradient of a row is one weighted sum of
keys). And rows are processed in blocks, so the (rows, rows) logits are never in memory as a whole.

The sum over negatives does not include the positive: loss = log(1 + exp(logsumexp_negatives - positive)) stays accurate
for confident rows, where `logsumexp - positive` cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...common.autograd import FirstOrderOnly, apply, with_fast_path
from .transforms import split_examples, with_examples

BLOCK_ELEMENTS = 1 << 20
"""Logits per block on a CPU: 4 MiB in float32, small enough for its caches."""
DEVICE_BLOCK_ELEMENTS = 1 << 22
"""The same on other devices, where every block costs launches."""

Block = tuple[slice, ...]
"""The groups (if there are several) and rows of a block, as slices."""


def _blocks(queries: Tensor, keys: Tensor, extra_keys: Tensor | None) -> Iterator[Block | None]:
    """Yield blocks of at most that many logits each; None if one block is enough for everything."""
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
    """Return a block's groups and rows. Without a block, slicing is skipped: it has a cost."""
    return tensor if tensor is None or block is None else tensor[block]


def _groups(tensor: Tensor | None, block: Block | None) -> Any:
    """Return a block's groups with all their rows."""
    return tensor if tensor is None or block is None else tensor[block[:-1]]


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale * left @ right, with the factor applied inside the product."""
    multiply = torch.addmm if left.dim() == 2 else torch.baddbmm
    return multiply(left.new_empty(1), left, right, beta=0, alpha=scale)  # with beta=0, the first is not read


def _split(matrix: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the columns of the group's own keys, and those of the extra keys, which follow."""
    count = keys.shape[-2]
    return (matrix, None) if matrix.shape[-1] == count else (matrix[..., :count], matrix[..., count:])


def _loss_and_slope(
    tensors: list[Any], scale: float, decoupled: bool, block: Block | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute a block's losses, positive logits, and the derivative of the loss by each product `queries @ keys / T`.

    `tensors` comes from `_grouped`. The derivative has two parts: a matrix, which overwrites the logits, and a factor
    for each of its rows.
    """
    queries, keys, extra_keys, pair_log_weight, pair_weight = tensors
    block_queries = _part(queries, block)
    logits = _product(block_queries, _groups(keys, block).mT, scale)
    if extra_keys is not None:
        logits = torch.cat((logits, _product(block_queries, _groups(extra_keys, block).mT, scale)), dim=-1)
    inside, _ = _split(logits, keys)
    diagonal = inside.diagonal(0 if block is None else block[-1].start, dim1=-2, dim2=-1)
    positive = diagonal.clone()
    if pair_weight is not None:
        inside.mul_(_part(pair_weight, block))
    if pair_log_weight is not None:
        inside.add_(_part(pair_log_weight, block))
    diagonal.fill_(-torch.inf)
    top = logits.amax(dim=-1)
    may_lack_negatives = pair_log_weight is not None or logits.shape[-1] == 1
    if may_lack_negatives:
        top.masked_fill_(top == -torch.inf, 0.0)
    weights = logits.sub_(top[..., None]).exp_()
    total = weights.sum(dim=-1)
    margin = total.log().add_(top).sub_(positive)
    if may_lack_negatives:
        total.masked_fill_(total == 0.0, 1.0)
    # above the threshold softplus equals its argument, even in float64
    loss = margin.clone() if decoupled else torch.nn.functional.softplus(margin, threshold=40.0)
    factor = total.reciprocal() if decoupled else margin.sigmoid_().div_(total)
    if pair_weight is not None:
        inside.mul_(_part(pair_weight, block))
    diagonal.copy_(total.neg_())  # the slope of the positive
    return loss, positive, weights, factor


@with_fast_path
class _NCERows(torch.autograd.Function):
    """InfoNCE of flat rows (groups * rows, dim), which are grouped inside if there are several groups."""

    @staticmethod
    def forward(queries, keys, extra_keys, pair_log_weight, pair_weight, groups, scale, decoupled, with_gradient):
        tensors = _grouped(groups, queries, keys, extra_keys, pair_log_weight, pair_weight)
        queries, keys, extra_keys = tensors[:3]
        results = []
        for block in _blocks(queries, keys, extra_keys):
            loss, positive, slope, factor = _loss_and_slope(tensors, scale, decoupled, block)
            gradient = loss.new_empty(0, 1)
            if with_gradient:
                inside, outside = _split(slope, keys)
                gradient = _product(inside, _groups(keys, block), scale)
                if outside is not None:
                    gradient += _product(outside, _groups(extra_keys, block), scale)
            # view, not flatten: PyTorch 2.11's compiler mishandles outputs that flatten() returns unchanged
            gradient = gradient.view(-1, gradient.shape[-1])
            results.append((loss.view(-1), positive.view(-1), gradient, factor.view(-1)))
        if len(results) == 1:  # nothing to concatenate
            return results[0]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    @staticmethod
    def batched(info, in_dims, *inputs):
        *tensors, groups, scale, decoupled, with_gradient = inputs
        many = info.batch_size
        tensors = [with_examples(x, dim, many) for x, dim in zip(tensors, in_dims, strict=False)]
        # an outer `grad` is seen here, below the examples
        with_gradient = with_gradient or (torch.is_grad_enabled() and tensors[0].requires_grad)
        return split_examples(apply(_NCERows, *tensors, groups * many, scale, decoupled, with_gradient), many)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *leaves, pair_log_weight, pair_weight, ctx.groups, ctx.scale, ctx.decoupled, _ = inputs
        _, positive, gradient, factor = output
        ctx.mark_non_differentiable(positive, gradient, factor)
        ctx.set_materialize_grads(False)  # make no zeros for outputs without a gradient
        weights = (pair_log_weight, pair_weight)
        if not any(ctx.needs_input_grad[1:3]):
            weights = (None, None)  # keys are constants: the stored gradient is enough for the backward
            leaves = [leaves[0], None, None]  # do not keep keys: a NegativeBank overwrites them before the backward
        ctx.save_for_backward(gradient, factor, *leaves, *weights)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * 9
        gradient, factor, *saved = ctx.saved_tensors
        leaves = saved[:3]
        if not (torch.is_grad_enabled() or any(ctx.needs_input_grad[1:3])):  # the common case, with the least work
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
    """Return queries, keys, extra keys and the two weights of pairs, with rows as (groups, rows of a group, dim).

    A single group has no group dimension: a product of matrices is cheaper to launch than a batch of one. float64 stays
    float64; everything else is computed in float32.
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
    """Compute the gradients of keys and extra keys in a second pass: dk_j = sum_i up_i * slope_ij * q_i / T."""
    tensors = _grouped(groups, *saved)
    queries, keys, extra_keys = tensors[:3]
    d_keys = torch.zeros_like(keys)
    d_extra = None if extra_keys is None else torch.zeros_like(extra_keys)
    up = up.reshape(queries.shape[:-1])
    for block in _blocks(queries, keys, extra_keys):
        _, _, slope, factor = _loss_and_slope(tensors, scale, decoupled, block)
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
    temperature: float | Tensor = 0.07,
    decoupled: bool = False,
    unit: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (loss, positive logit) of flat rows (groups * rows, dim); each is (groups * rows,).

    The results are float32, or float64 for float64; 16-bit inputs are widened to float32 first. They can be
    differentiated once, with respect to queries, keys and extra keys, which may be (1, count, dim) for all groups.
    `unit`, whether rows have unit length, is not used here. A temperature may be a tensor (), which gets a gradient.
    """
    if isinstance(temperature, Tensor):
        wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
        queries, temperature = queries.to(wide) / temperature.to(wide), 1.0
    if extra_keys_GED is not None:
        extra_keys_GED = extra_keys_GED.expand(groups, -1, -1)
    weights = pair_log_weight_GSS, pair_weight_GSS
    with_gradient = torch.is_grad_enabled() and queries.requires_grad
    options = groups, 1.0 / temperature, decoupled, with_gradient
    loss, positive, _, _ = apply(_NCERows, queries, keys, extra_keys_GED, *weights, *options)
    return loss, positive
