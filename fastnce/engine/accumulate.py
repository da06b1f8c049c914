"""Compute a batch in parts, one after another: the memory of one part, the gradients of the whole.

Losses are means over images. If no loss and no layer combines several images (see `Method.whole_batch`), the mean of
the parts' gradients is the gradient of the whole. Each part draws its own patch ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.taps import Tap
from ..methods.base import Batch, Draws, Method


def check_parts(method: Method, parts: int) -> None:
    """ValueError if this method cannot be computed in parts."""
    if parts < 1:
        raise ValueError(f"optim.accumulate must be at least 1, not {parts}")
    reason = method.whole_batch()
    if parts > 1 and reason:
        raise ValueError(f"optim.accumulate={parts} would change what is computed: {reason}")


def split(batch: Batch, draws: Draws, parts: int) -> list[tuple[Batch, Draws]]:
    """Split both domains, and given patch ids, into equal parts; ValueError if the batch is not divisible."""
    images = batch.a.shape[0]
    if images % parts or batch.b.shape[0] != images:
        raise ValueError(f"data.batch={images} cannot be computed in optim.accumulate={parts} equal parts")
    ids: list[Any] = [None] * parts
    if draws.patch_ids is not None:
        ids = [[[_share(i, part, parts) for i in call] for call in draws.patch_ids] for part in range(parts)]
    pairs = zip(batch.a.chunk(parts), batch.b.chunk(parts), strict=True)
    return [(Batch(a, b), Draws(draws.flip, own)) for (a, b), own in zip(pairs, ids, strict=True)]


def _share(ids: Tensor, part: int, parts: int) -> Tensor:
    """The patch ids of one part: all of (patches,), or the rows of its own images of (images, patches)."""
    return ids if ids.dim() == 1 else ids.chunk(parts)[part]


def detached(value: Any) -> Any:
    """The same tensors, in the same lists and dicts, without their autograd graph."""
    if isinstance(value, Tensor | Tap):
        return value.detach()
    if isinstance(value, dict):
        return {key: detached(one) for key, one in value.items()}
    return [detached(one) for one in value] if isinstance(value, list | tuple) else value


class Mean:
    """The mean of gradients and losses over the parts, summed in place."""

    def __init__(self, parts: int):
        self.share = 1.0 / parts
        self.gradients: list[Tensor | None] | None = None
        self.losses: dict[str, Tensor] = {}

    def add(self, gradients: tuple[Tensor | None, ...], losses: dict[str, Tensor]) -> None:
        if self.gradients is None:
            self.gradients = [None if g is None else g * self.share for g in gradients]
        else:
            pairs = [(s, g) for s, g in zip(self.gradients, gradients, strict=True) if s is not None and g is not None]
            torch._foreach_add_([s for s, _ in pairs], [g for _, g in pairs], alpha=self.share)
        for name, value in losses.items():
            value = value.detach() * self.share
            self.losses[name] = self.losses[name] + value if name in self.losses else value
