"""A queue of past keys on the device: extra negatives that cost no forward pass (He et al., MoCo, CVPR 2020).

bank = NegativeBank(4096, [256] * 5)
loss = patch_nce(q, k, extra_keys=bank.keys()[layer])
bank.enqueue(rows)       # one (count, dim) per layer, after the loss has used the bank
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import checks
from .impl.rows import normalize_rows


class NegativeBank(nn.Module):
    """A queue of the last `size` keys of each layer, first in, first out.

    Until the queue is full, the rows not yet written hold random rows of unit length, as in MoCo: weak negatives, which
    are replaced one after another. Buffers and pointer are on the device and part of the `state_dict`. Shapes never
    change and nothing waits for the device, so a CUDA graph can record `enqueue`.

    Args:
        size: rows kept per layer, at least 1.
        dims: width of the rows of each layer, at least 1.
        dtype: floating dtype of the stored rows; use the dtype of the queries.
        generator: for the random rows.

    Raises:
        ValueError: an invalid value.
    """

    pointer: Tensor

    def __init__(
        self,
        size: int,
        dims: Sequence[int],
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.size = checks.count("size", size)
        checks.listed("dims", dims, "widths, one per layer")
        self.dims = [checks.count(f"dims[{layer}]", dim) for layer, dim in enumerate(dims)]
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype, not {dtype}")
        for layer, dim in enumerate(self.dims):
            rows = normalize_rows(torch.randn(size, dim, device=device, generator=generator))
            self.register_buffer(f"rows_{layer}", rows.to(dtype))
        self.register_buffer("pointer", torch.zeros(len(self.dims), dtype=torch.int64, device=device))

    def keys(self) -> list[Tensor]:
        """Return (size, dim) per layer, in no particular order: the buffers themselves, which `enqueue` overwrites.

        If a loss of these rows must give the keys a gradient, differentiate it before the next `enqueue`. With constant
        keys, as published, the order does not matter.
        """
        return [self.get_buffer(f"rows_{layer}") for layer in range(len(self.dims))]

    @torch.no_grad()
    def enqueue(self, rows: Sequence[Tensor]) -> None:
        """Replace the oldest rows by one (count, dim) of keys per layer; of more than `size` rows, use the last ones.

        Raises:
            ValueError: rows of another shape or device, or not of a floating dtype; the bank is then unchanged.
        """
        checks.listed("rows", rows, "tensors, one per layer", len(self.dims))
        for layer, (new, kept) in enumerate(zip(rows, self.keys(), strict=True)):
            checks.tensor(f"rows[{layer}]", new)
            if new.dim() != 2 or new.shape[1] != self.dims[layer]:
                raise ValueError(f"rows[{layer}] must be (count, {self.dims[layer]}), not {tuple(new.shape)}")
            if new.device != kept.device:
                raise ValueError(f"rows[{layer}] is on {new.device}, the bank on {kept.device}: move one of them")
        for layer, (new, kept) in enumerate(zip(rows, self.keys(), strict=True)):
            new = new[-self.size :].to(kept.dtype)
            start = self.pointer[layer]
            positions = (start + torch.arange(new.shape[0], device=kept.device)) % self.size
            kept.index_copy_(0, positions, new)
            start.copy_((start + new.shape[0]) % self.size)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Like `nn.Module.load_state_dict`, but if it fails, nothing is loaded."""
        checks.state(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def extra_repr(self) -> str:
        return f"size={self.size}, dims={self.dims}"
