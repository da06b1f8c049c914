"""Copies of weights in 16 bits that kernels may read in place of the weights, while a step holds them.

A kernel that multiplies in 16 bits rounds float32 weights itself, in every program that reads them. A copy that is made
once has the same bits, is half as large, and can be copied to the matrix unit without passing through registers.
Gradients are those of the weights: autograd does not see the copies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class _Held(threading.local):
    def __init__(self) -> None:
        self.copies: dict[int, tuple[Tensor, int, Tensor]] = {}
        """By the identity of a weight: the weight, its version, its copy."""


_HELD = _Held()


@contextmanager
def narrowed(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> Iterator[None]:
    """Within: `copies_of` finds `copies`, one per weight, until the weight changes."""
    before = _HELD.copies
    held = {id(w): (w, w._version, copy) for w, copy in zip(weights, copies, strict=True)}
    _HELD.copies = {**before, **held}
    try:
        yield
    finally:
        _HELD.copies = before


def have_copies(mlp: Sequence[Tensor]) -> bool:
    """Whether `copies_of` finds copies in one of the 16-bit dtypes."""
    return any(copies_of(mlp, dtype) is not None for dtype in (torch.bfloat16, torch.float16))


def copies_of(mlp: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor] | None:
    """Return weight1, bias1, weight2, bias2, ... with copies in `dtype` in place of the weights.

    None if a weight has no such copy, or has changed since it was copied.
    """
    held = _HELD.copies
    if not held or not mlp:
        return None
    found = list(mlp)
    for i in range(0, len(found), 2):
        weight, version, copy = held.get(id(found[i]), (None, 0, None))
        if copy is None or weight is not found[i] or version != weight._version or copy.dtype is not dtype:
            return None
        found[i] = copy
    return found
