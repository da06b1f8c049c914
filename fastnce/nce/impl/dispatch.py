"""Choose the implementation of a contrastive loss, once per call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.dispatch import KERNELS, Choice, Implementation, choose
from ...common.first_use import followed
from ...common.precision import autocast_dtype

try:
    from . import planned_calls, triton_layers, triton_maps, triton_rows
except ImportError:  # no Triton for this platform
    planned_calls = triton_layers = triton_maps = triton_rows = None  # type: ignore[assignment]

MLPs = Sequence[tuple[Tensor, Tensor, Tensor, Tensor]] | None

MAX_WIDTH = 512
"""The largest number of channels or dims that the kernels support: a row must fit on chip."""

FLOAT32_ROWS = 1024
"""Up to this many rows per group, float32 uses the kernels by default. They cannot use the matrix units for exact
products, but need fewer launches, which outweighs that in small problems. Larger ones use PyTorch's products."""

MANY_FLOAT32_ROWS = Choice(
    "eager", f"float32 problems of more than {FLOAT32_ROWS:,} rows per group use PyTorch's products"
)
DIFFERENT_LAYERS = Choice("eager", "layers differ in dtype or in the width of their MLPs")


def which(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    dim: int = 256,
    rows: int = 256,
    implementation: Implementation = None,
) -> Choice:
    """Return the implementation that `patch_nce` uses for such rows, and the reason.

    Args:
        device, dtype: of queries and keys. Under autocast, pass its dtype.
        dim: length of each row.
        rows: rows per group.
        implementation: as in `patch_nce`.

    Returns:
        a `Choice`: `implementation`, "triton" or "eager", and `reason`, a clause.

    Raises:
        ValueError: `implementation="triton"` cannot run on this device, dtype or size.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a device such as cpu or cuda:0, not {device!r}") from error
    choice = choose_rows(implementation, device, dtype, dim, rows)
    return followed("patch_nce", device, dtype) if choice is KERNELS else choice


def choose_rows(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, width: int, rows: int
) -> Choice:
    """Choose for rows of this width, with `rows` rows per group.

    A choice that is `KERNELS` has to be passed through `first_use.trusted`, with a use of the module `uses`.
    """
    limit = f"the kernels hold at most {MAX_WIDTH} channels or dims, not {width}" if width > MAX_WIDTH else None
    choice = choose(implementation, device, dtype, limit)
    if implementation is None and choice.triton and dtype == torch.float32 and rows > FLOAT32_ROWS:
        return MANY_FLOAT32_ROWS
    return choice


def choose_maps(
    implementation: Implementation, maps: Sequence[Tensor], mlps: MLPs, patches: int
) -> tuple[Choice, list[torch.dtype]]:
    """Choose for sampling `patches` locations per map; also return the dtype in which each layer is projected.

    The kernels need the same dtype, and MLPs of the same width, in all layers. See `choose_rows` about `KERNELS`.
    """
    dtypes = [autocast_dtype(m) if mlps is None else autocast_dtype(mlps[0][0]) for m in maps]
    outputs = {mlp[2].shape for mlp in mlps or []}
    width = max([m.shape[1] for m in maps] + [shape[0] for shape in outputs])
    uniform = len(set(dtypes)) == 1 and len(outputs) <= 1
    if not uniform and implementation == "triton":
        raise ValueError(f"implementation='triton' cannot run here: {DIFFERENT_LAYERS.reason}")
    choice = choose_rows(implementation, maps[0].device, dtypes[0], width, patches)
    return choice if uniform or not choice.triton else DIFFERENT_LAYERS, dtypes
