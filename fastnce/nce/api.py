"""The contrastive operation as it is called: check the arguments, choose an implementation, reduce.

from fastnce import patch_nce
loss = patch_nce(queries, keys, images=batch, temperature=0.07)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import checks
from .impl import eager
from .impl.rows import gather_patches, mlp, normalize_rows

try:
    from .impl import triton_maps as fused_maps
    from .impl import triton_rows as fused
except ImportError:  # no Triton for this platform
    fused = fused_maps = None  # type: ignore[assignment]

Negatives = Literal["image", "batch"]
NEGATIVES = ("image", "batch")
Reduction = Literal["mean", "sum", "none"]
Implementation = Literal["triton", "eager"] | None
IMPLEMENTATIONS = (None, "triton", "eager")

FLOAT32_ROWS = 1024
"""Up to so many rows a group, float32 runs in the kernels by choice: few launches matter more than the exact products,
which the matrix unit does not do. Larger problems go to the library's products."""


def patch_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    images: int = 1,
    negatives: Negatives = "image",
    temperature: float = 0.07,
    extra_keys: Tensor | None = None,
    pair_log_weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    decoupled: bool = False,
    symmetric: bool = False,
    detach_keys: bool = True,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    unit_rows: bool = False,
    implementation: Implementation = None,
):
    """PatchNCE: each query against the key of the same row (its positive) and the other keys of its group.

    `loss_i = logsumexp_j(q_i.k_j / T) - q_i.k_i / T` (CUT, eq. 3-4). Rows are taken as they are: `project_patches` and
    `PatchSampleF` give them unit length.

    Args:
        queries, keys: (rows, dim), rows = images * patches, image after image; any floating dtype, the same for both.
        images: number of pictures that the rows come from, at least 1; it divides the rows.
        negatives: "image" contrasts within a picture (CUT, FastCUT), "batch" within all rows (SinCUT, DCLGAN).
        temperature: T, a number from 1e-30 to 1e30. To learn it, pass `queries / T` and `temperature=1.0`: T may then
            be a tensor and gets its gradient through the queries.
        extra_keys: more negatives: (count, dim) for all groups or (groups, count, dim); groups is `images` for
            "image", 1 for "batch". They receive a gradient when they require one. Like the weights below they may have
            any floating dtype and lie on the device of the queries.
        pair_log_weight: (groups, rows of a group, rows of a group), added to the logits of negatives: MoNCE's weights
            as logarithms (Zhan et al., CVPR 2022). -inf leaves a negative out. The diagonal is ignored. Constant.
        pair_weight: the same shape, multiplies the logits of negatives: hDCE's relation weights (Jung et al.,
            CVPR 2022). The diagonal is ignored. Constant.
        query_weight: (rows,), multiplies each row's loss (adaptive supervised PatchNCE, Li et al., MICCAI 2023).
        decoupled: leave the positive out of the denominator (decoupled contrastive learning, Yeh et al., ECCV 2022).
        symmetric: mean of both directions, each key being a query of the queries too.
        detach_keys: keys are constants, as published.
        reduction: "mean" over rows, "sum" or "none".
        return_stats: also return a dict of "logsumexp" and "positive" (logits, (rows,), without gradient).
        unit_rows: a promise that no row of queries, keys and extra keys is longer than 1: it saves a kernel the check
            whether their exponentials stay in range, and longer rows may then overflow.
        implementation: None chooses, "triton" and "eager" insist. Under autocast, float32 rows are taken in its dtype,
            as a matrix product would; logits and losses stay float32. Float32 rows are multiplied exactly unless
            the library's products may use TF32 (`torch.set_float32_matmul_precision`): see `products`.

    Returns:
        a float32 (float64 for float64 input) scalar, or (rows,) for "none"; with the stats if asked.

    Raises:
        ValueError: an argument that makes no sense, or an implementation that cannot run here.
    """
    groups = checks.rows(queries, keys, images, negatives, extra_keys, query_weight, decoupled)
    temperature = checks.temperature(temperature)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if detach_keys:
        keys = keys.detach()
    size = queries.shape[0] // groups
    if pair_log_weight is not None:
        pair_log_weight = checks.pairs("pair_log_weight", pair_log_weight, queries, groups, size)
    if pair_weight is not None:
        pair_weight = checks.pairs("pair_weight", pair_weight, queries, groups, size)
    dtype = _autocast_dtype(queries)
    if dtype is not queries.dtype:
        queries, keys = queries.to(dtype), keys.to(dtype)
    if extra_keys is not None:
        extra_keys = (extra_keys if extra_keys.dim() == 3 else extra_keys[None]).to(dtype)
    triton = _use_triton(implementation, queries.device, dtype, queries.shape[1], size)
    rows: Any = fused.nce_losses if triton else eager.nce_losses
    options = groups, temperature, decoupled, unit_rows
    with _without_autocast(queries.device):
        loss, positive = rows(queries, keys, extra_keys, pair_log_weight, pair_weight, *options)
        stats = {"logsumexp": (loss + positive).detach(), "positive": positive.detach()} if return_stats else {}
        if symmetric:
            transposed = [None if w is None else w.transpose(1, 2) for w in (pair_log_weight, pair_weight)]
            # the other direction: keys ask, queries answer; with constant keys the gradient still reaches the queries
            other, _ = rows(keys, queries, extra_keys, *transposed, *options)
            loss = 0.5 * (loss + other)
    if query_weight is not None:
        loss = loss * query_weight.to(loss.dtype)
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    if return_stats:
        return loss, stats
    return loss


def sample_patch_ids(
    locations: int,
    patches: int,
    *,
    images: int | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Distinct locations of a map, uniformly without replacement, drawn on the device (no transfer from the host).

    Args:
        locations: height * width of the map.
        patches: how many to draw; all of them, in random order, when there are fewer.
        images: None draws one set for all pictures (published); a number draws a set for each.

    Returns:
        int64 (patches,) or (images, patches).

    Raises:
        ValueError: a count that is not a whole number of at least 1.
    """
    locations, patches = checks.count("locations", locations), checks.count("patches", patches)
    shape = (locations,) if images is None else (checks.count("images", images), locations)
    scores = torch.rand(shape, device=device, generator=generator)
    return scores.topk(min(patches, locations), dim=-1, sorted=False).indices


def project_patches(
    maps: Sequence[Tensor],
    patch_ids: Sequence[Tensor],
    mlps: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]] | None = None,
    *,
    distinct_ids: bool = False,
    check_ids: bool = False,
    implementation: Implementation = None,
) -> list[Tensor]:
    """Rows of every map at its ids, through its two-layer MLP if given, divided by their length plus 1e-7.

    Args:
        maps: one (images, channels, height, width) a layer, of any floating dtype, all on one device.
        patch_ids: one (patches,) for all images, or (sets, patches), a layer: the images share the sets equally, in
            order (sets = images: each its own). int64, on the device of the maps.
        mlps: one (weight1 (dim, channels), bias1, weight2 (dim, dim), bias2) a layer, as in `nn.Linear`, all of one
            dtype.
        distinct_ids: no location appears twice in a set; the backward is then one launch shorter.
        check_ids: look whether all ids lie inside of their maps. On the CPU this is always done, elsewhere it waits for
            the device; unchecked, a row from outside is NaN or stops the device.
        implementation: None chooses, "triton" and "eager" insist.

    Returns:
        one (images * patches, dim) a layer, image after image (CUT, `PatchSampleF`), in the dtype of the weights (of
        the map without MLPs); under autocast in its dtype. The length is taken in float32 whatever the dtype, and
        float32 products are exact unless the library's may use TF32, see `products`.

    Raises:
        ValueError: lists that do not fit together, and tensors of another shape, dtype or device than the above.
    """
    checks.maps("maps", maps)
    checks.ids(patch_ids, maps, check_ids)
    if mlps is not None:
        checks.mlps(mlps, maps)
    ids = [i[None] if i.dim() == 1 else i for i in patch_ids]
    dtypes = [_autocast_dtype(m) if mlps is None else _autocast_dtype(mlps[0][0]) for m in maps]
    if _use_triton_for_maps(implementation, maps, mlps, dtypes, max(i.shape[1] for i in ids)):
        return fused_maps.project_rows(maps, ids, mlps, dtypes[0], distinct_ids)
    rows = []
    for layer, (feature_map, given, dtype) in enumerate(zip(maps, ids, dtypes, strict=True)):
        images = feature_map.shape[0]
        one_set = patch_ids[layer].dim() == 1
        sampled = gather_patches(
            feature_map, given[0] if one_set else given.repeat_interleave(images // given.shape[0], dim=0)
        )
        sampled = sampled.flatten(0, 1)
        # Unprojected rows are as short as 1e-6 at first: their gradients, of 1 / length, leave float16's range.
        inner = torch.float32 if dtype == torch.float16 else dtype
        with _without_autocast(feature_map.device):
            projected = sampled if mlps is None else mlp(sampled.to(inner), _cast(mlps[layer], inner))
        wide = projected if projected.dtype == torch.float64 else projected.float()
        rows.append(normalize_rows(wide).to(dtype))
    return rows


def products(dtype: torch.dtype, device: torch.device) -> str:
    """How rows of this dtype are multiplied there: "exact", "tf32" (as the library allows now), or the 16-bit dtype."""
    if dtype in (torch.bfloat16, torch.float16):
        return str(dtype).removeprefix("torch.")
    # the kernels do as the library does
    return "tf32" if fused is not None and fused.operators.uses_tf32(device, dtype) else "exact"


def _cast(mlp: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight1, bias1, weight2, bias2 = (tensor.to(dtype) for tensor in mlp)
    return weight1, bias1, weight2, bias2


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product would take this tensor."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def _without_autocast(device: torch.device):
    """Losses are computed in the dtype of their rows and float32: no product inside is to be cast again."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _use_triton(name: Implementation, device: torch.device, dtype: torch.dtype, width: int, rows: int) -> bool:
    """Whether the kernels compute this; a ValueError where they must and cannot."""
    checks.choice("implementation", name, IMPLEMENTATIONS)
    if name == "eager" or (name is None and device.type == "cpu"):
        return False
    obstacle = "Triton is not installed" if fused is None else fused.obstacle(device, dtype, width)
    if obstacle is not None and name == "triton":
        raise ValueError(f"implementation='triton' cannot run here: {obstacle}")
    return obstacle is None and (name == "triton" or dtype != torch.float32 or rows <= FLOAT32_ROWS)


def _use_triton_for_maps(name: Implementation, maps, mlps, dtypes: list[torch.dtype], patches: int) -> bool:
    """The same for the sampling kernels, which want one dtype, and MLPs of one shape, for all layers."""
    second = {four[2].shape for four in mlps or []}
    width = max([m.shape[1] for m in maps] + [shape[0] for shape in second])
    alike = len(set(dtypes)) == 1 and len(second) <= 1
    if not alike and name == "triton":
        raise ValueError(
            "implementation='triton' cannot run here: layers differ in dtype or in the width of their MLPs"
        )
    return _use_triton(name, maps[0].device, dtypes[0], width, patches) and alike
