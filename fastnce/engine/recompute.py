"""Recompute the generators' residual blocks in the backward pass: less memory for more time.

A block then keeps only its input instead of every map inside. At 256x256, the nine blocks of the published generator
account for about a third of the memory that a step keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..methods.base import Method
from ..networks.munit import ContentBlock
from ..networks.resnet import ResnetBlock
from ..networks.restorer import GatedBlock
from ..networks.stylegan2 import ResBlock

BLOCKS = (ResnetBlock, ResBlock, GatedBlock, ContentBlock)


def recompute_blocks(method: Method) -> int:
    """Let every residual block of the generators recompute its inner maps; returns the number of blocks.

    Raises:
        ValueError: the generators have no residual blocks.
    """
    blocks = blocks_of(method)
    for block in blocks:
        block.forward = _forgetful(block, block.forward)
    return len(blocks)


def blocks_of(method: Method) -> list[nn.Module]:
    """Every residual block of the generators; ValueError where there is none."""
    generators = list(method.generators().values())
    blocks: list[nn.Module] = [module for net in generators for module in net.modules() if isinstance(module, BLOCKS)]
    own: list[Any] = [net for net in generators if hasattr(net, "residual_blocks")]
    blocks += [block for net in own for block in net.residual_blocks()]
    if not blocks:
        kind = type(generators[0]).__name__
        raise ValueError(f"run.checkpoint_activations: {kind} has no residual blocks to compute again; leave it false")
    return blocks


def _forgetful(block: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    # Dropout has to repeat its random numbers. Keeping their state cannot be recorded in a CUDA graph.
    random = any(isinstance(module, nn.Dropout) for module in block.modules())

    def forget(x: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return forward(x)
        return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=random)

    return forget
