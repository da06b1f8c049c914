"""PatchNCE of all layers and directions of a method in one call: on a device one launch for the lot.

nce1, nce2 = patch_nce_layers([q1, q2], [k1, k2], images=batch, cosine=True)   # each q, k: one (rows, dim) a layer
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import api, checks
from .api import Implementation, Negatives
from .impl import eager

try:
    from .impl import triton_layers as fused_layers
except ImportError:  # no Triton for this platform
    fused_layers = None  # type: ignore[assignment]

Rows = Sequence[Sequence[Tensor]]
"""One list a direction, in it one tensor a layer."""


def cosine_rows(rows: Tensor) -> Tensor:
    """(rows, dim) divided by their length, as `F.cosine_similarity` does: by 1e-8 where they are shorter, so rows of
    zeros stay. 16-bit rows by way of float32."""
    wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    return (wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-8)).to(rows.dtype)


def patch_nce_layers(
    queries: Rows,
    keys: Rows,
    *,
    images: int = 1,
    negatives: Negatives = "image",
    temperature: float | Sequence[float] = 0.07,
    extra_keys: Rows | Literal["other"] | None = None,
    cosine: bool = False,
    unit_rows: bool = False,
    implementation: Implementation = None,
) -> Tensor:
    """`patch_nce` of each layer and direction: float32 (directions,), the mean over rows, then over layers.

    Args:
        queries, keys: (rows, dim), rows = images * patches, image after image; the directions of a layer alike. Keys
            are constants.
        images, negatives: of one direction, as in `patch_nce`; a direction never sees the rows of another.
        temperature: T > 0, one for all layers or one a layer.
        extra_keys: more negatives, constants: (count, dim) or (groups, count, dim) for each layer and direction, taken
            as they are; the two directions of a layer alike. "other" takes the queries of the other of two directions,
            group by group (DCD-GAN: the same picture's codes in the other branch).
        cosine: divide queries and keys (and "other" ones) by their length, see `cosine_rows` (DCLGAN).
        unit_rows, implementation: as in `patch_nce`. Kernels want layers of one dtype.

    Raises:
        ValueError: lists that do not fit together, and what `patch_nce` refuses.
    """
    other = isinstance(extra_keys, str) and extra_keys == "other"
    nested: dict[str, Any] = {"queries": queries, "keys": keys}
    if not (extra_keys is None or other):
        nested["extra_keys"] = extra_keys
    directions, layers = checks.nested(nested)
    if other and directions != 2:
        raise ValueError(f'extra_keys="other" wants two directions, not {directions}')
    temperatures = checks.temperatures(temperature, layers)
    # flat lists, the directions of a layer one after another
    asking, answers = ([side[d][i] for i in range(layers) for d in range(directions)] for side in (queries, keys))
    dtypes = {api._autocast_dtype(q) for q in asking}
    asking, answers = ([x.to(api._autocast_dtype(x)) for x in side] for side in (asking, answers))
    extra: list[Tensor | None] = [None] * len(asking)
    if "extra_keys" in nested:
        extra = [nested["extra_keys"][d][i].to(asking[0].dtype) for i in range(layers) for d in range(directions)]
    groups = 0
    for i, (q, k, e) in enumerate(zip(asking, answers, extra, strict=True)):
        groups = checks.rows(q, k, images, negatives, e, None, False)
        first = asking[i - i % directions]
        if q.shape != first.shape or q.dtype != first.dtype:
            raise ValueError(f"the directions of layer {i // directions} must have queries of one shape and dtype")
        if q.device != asking[0].device:
            raise ValueError(f"queries are on {asking[0].device} and {q.device}: move one of them")
    width, size = max(q.shape[1] for q in asking), max(q.shape[0] for q in asking) // groups
    wanted = api._use_triton(implementation, asking[0].device, asking[0].dtype, width, size)
    if wanted and len(dtypes) > 1 and implementation == "triton":
        raise ValueError("implementation='triton' cannot run here: layers differ in dtype")
    with api._without_autocast(asking[0].device):
        if wanted and len(dtypes) == 1:
            return fused_layers.nce_layers(
                asking,
                answers,
                [e if e.dim() == 3 else e[None] for e in extra if e is not None],
                temperatures=[t for t in temperatures for _ in range(directions)],
                groups=groups,
                directions=directions,
                other=other,
                divide=cosine,
                unit=unit_rows,
            )
        means = []
        for i, t in enumerate(temperatures):
            here = slice(i * directions, (i + 1) * directions)
            q, k = torch.cat(asking[here]), torch.cat(answers[here]).detach()
            if cosine:
                q, k = cosine_rows(q), cosine_rows(k)
            if other:
                e = q.detach().unflatten(0, (2, groups, -1)).flip(0).flatten(0, 1)
            else:
                e = _grouped(extra[here], groups)
            loss, _ = eager.nce_losses(q, k, e, groups=directions * groups, temperature=t)
            means.append(loss.unflatten(0, (directions, -1)).mean(dim=1))
        return torch.stack(means).mean(dim=0)


def _grouped(extra: Sequence[Tensor | None], groups: int) -> Tensor | None:
    """(directions * groups, count, dim) of one layer's extra keys."""
    wide = [(e if e.dim() == 3 else e[None]).detach().expand(groups, -1, -1) for e in extra if e is not None]
    return torch.cat(wide) if wide else None
