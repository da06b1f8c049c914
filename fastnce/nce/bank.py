"""A queue of past keys on the device: extra negatives that cost no forward pass (He et al., MoCo, CVPR 2020).

bank = NegativeBank(4096, [256] * 5)
loss = patch_nce(q, k, extra_keys=bank.keys()[layer])
bank.enqueue(rows)       # one (count, dim) a layer, after the loss has used the bank
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import checks
from .impl.rows import normalize_rows


class NegativeBank(nn.Module):
    """The last `size` keys of every layer, first in, first out.

    Before it is full, places not yet written hold random rows of unit length, as in MoCo: weak negatives, replaced in
    turn. Buffers and pointer live on the device and are part of the `state_dict`; shapes never change and nothing waits
    for the device, so a CUDA graph may hold `enqueue`.

    Args:
        size: rows kept a layer, at least 1.
        dims: width of the rows of each layer, at least 1.
        dtype: of the rows kept, a floating one; give it that of the queries.
        generator: for the random rows.

    Raises:
        ValueError: a value that makes no sense.
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
        """(size, dim) a layer, in no particular order: the buffers themselves, overwritten by `enqueue`.

        A loss that was formed from them must be differentiated before the next `enqueue` if keys need a gradient from
        it; with constant keys, as published, it need not.
        """
        return [self.get_buffer(f"rows_{layer}") for layer in range(len(self.dims))]

    @torch.no_grad()
    def enqueue(self, rows: Sequence[Tensor]) -> None:
        """Put one (count, dim) of keys a layer in the place of the oldest; of more than `size` rows, the last ones.

        Raises:
            ValueError: rows of another shape, of no floating dtype or on another device; the bank stays as it was.
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
            places = (start + torch.arange(new.shape[0], device=kept.device)) % self.size
            kept.index_copy_(0, places, new)
            start.copy_((start + new.shape[0]) % self.size)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As `nn.Module.load_state_dict`, but where that raises after having loaded a part, this loads nothing."""
        checks.state(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def extra_repr(self) -> str:
        return f"size={self.size}, dims={self.dims}"
