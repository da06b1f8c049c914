"""Stateless layers, as `kernels.kernelize` puts them in place of the `forward` of a user's own modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .nce import patch_nce


class PatchNCELoss(nn.Module):
    """The `forward` of CUT's `PatchNCELoss`, for modules whose attribute `opt` has CUT's options.

    It reads `opt.nce_T`, `opt.batch_size` and `opt.nce_includes_all_negatives_from_minibatch` at each call.
    """

    can_torch_compile: bool = True

    opt: Any

    def forward(self, feat_q: Tensor, feat_k: Tensor) -> Tensor:
        """Return the losses (rows,) of two (rows, dim), image after image. Keys are constants."""
        every = self.opt.nce_includes_all_negatives_from_minibatch
        return patch_nce(
            feat_q,
            feat_k,
            images=1 if every else self.opt.batch_size,
            temperature=self.opt.nce_T,
            reduction="none",
        )
