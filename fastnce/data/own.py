"""A user's own data set, named by `data.dataset`."""

from __future__ import annotations

from typing import Any

import torch

from ..common.imports import CodeError, load_object

MEMBERS = ("steps_per_epoch", "batch", "samples", "digest")
"""The members that `fastnce.engine.contracts.DataSet` requires."""


def open_own(
    name: str,
    options: Any,
    *,
    channels: int,
    batch: int,
    seed: int,
    rank: int,
    world: int,
    device: torch.device,
) -> Any:
    """Build `Name(options, channels=..., seed=..., rank=..., world=..., device=...)` and check its first batch.

    Args:
        name: import path of the class, such as mydata.py:MyData.
        options: the section `data` of the configuration.
        batch: images of each domain in a batch.

    Raises:
        CodeError: a member is missing, or the batch is not two float tensors (batch, channels, height, width).
    """
    key = f"data.dataset={name}"
    found = load_object(name, "data.dataset")
    try:
        data = found(options, channels=channels, seed=seed, rank=rank, world=world, device=device)
    except ValueError as error:
        raise CodeError(f"{key}: {error}") from error
    except Exception as error:
        call = f"{name.rpartition(':')[2]}(options, channels=, seed=, rank=, world=, device=)"
        raise CodeError(f"{key}: {call} fails: {type(error).__name__}: {error}") from error
    missing = [member for member in MEMBERS if not hasattr(data, member)]
    if missing:
        raise CodeError(f"{key} lacks {', '.join(missing)}: see fastnce.engine.contracts.DataSet")
    try:
        images = data.batch(0, decaying=False)
    except ValueError:
        raise
    except Exception as error:
        raise CodeError(f"{key}: batch(0, decaying=False) fails: {type(error).__name__}: {error}") from error
    wanted = f"two float tensors ({batch}, {channels}, height, width)"
    if not isinstance(images, tuple | list) or len(images) != 2:
        raise CodeError(f"{key}: batch must return A and B, {wanted}, not a {type(images).__name__}")
    for domain, one in zip("AB", images, strict=True):
        if not isinstance(one, torch.Tensor) or one.dim() != 4 or not one.dtype.is_floating_point:
            raise CodeError(f"{key}: batch must return {wanted}; {domain} is {_kind(one)}")
        if tuple(one.shape[:2]) != (batch, channels):
            raise CodeError(f"{key}: batch must return {wanted}; {domain} is {tuple(one.shape)}")
    return data


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
