"""What `torch.func` needs of the losses: problems under `vmap` become groups of one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def transforms_active() -> bool:
    """Whether a transform of `torch.func` is active, outside of a compiler, which cannot trace the question."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def with_examples(x: Tensor | None, dim: int | None, examples: int) -> Tensor | None:
    """Move the examples of `vmap`, at `dim`, to the front and join them with the first dimension, the rows or groups.

    Args:
        dim: None for a tensor that all examples share; it is repeated.
    """
    if x is None:
        return None
    apart = x.expand(examples, *x.shape) if dim is None else x.movedim(dim, 0)
    return apart.flatten(0, 1)


def split_examples(outputs: Sequence[Tensor], examples: int) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Undo `with_examples` for the results; also return where their examples are, as `vmap` wants it."""
    return tuple(x.unflatten(0, (examples, -1)) for x in outputs), (0,) * len(outputs)


def is_batched(x: Any) -> bool:
    """Whether `vmap` hides a dimension of a tensor."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    while isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def check_vmap(tensors: Sequence[Tensor | None], keys: Sequence[Tensor | None]) -> None:
    """Refuse `vmap` where keys get a gradient: its pass is not a call with more groups.

    Args:
        tensors: all tensors of the loss.
        keys: those that act as keys.

    Raises:
        ValueError: what to do instead.
    """
    if any(k is not None and k.requires_grad for k in keys) and any(map(is_batched, tensors)):
        raise ValueError(
            "vmap over patch_nce gives no gradient to keys, nor to queries with symmetric=True: pass the rows of all "
            "examples in one call, with images= set to the number of all images"
        )
