"""Maps that lack their biases, for the measurement of kernels that read taps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.agreement import leaves
from ...common.taps import Tap, opened

Lists = Sequence[Tensor]


class Biased:
    """Maps as leaves that lack the given biases, leaves too, for the measurement of taps."""

    def __init__(self, maps: Lists, biases: Sequence[Tensor | None], taps: Sequence[int]) -> None:
        self.maps, self.taps = maps, taps
        self.biases = [None if b is None else leaves([b.to(m.device)])[0] for b, m in zip(biases, maps, strict=False)]
        self.given = [b for b in self.biases if b is not None]

    def opened(self) -> list[Tensor | Tap]:
        if not self.taps:
            return list(self.maps)
        each = zip(self.maps, self.biases, self.taps, strict=True)
        return [opened(m, b) if kind else m for m, b, kind in each]

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """The maps with their biases, rounded to the dtype in which the kernels read them."""
        if not self.given:
            return list(self.maps)
        each = zip(self.maps, self.biases, strict=True)
        return [m if b is None else as_stored(m + b.to(m.dtype)[:, None, None], dtype) for m, b in each]

    def joined(self, gradients: Lists) -> Lists:
        """Gradients of maps, MLPs and biases, with that of a bias in one tensor with that of its map."""
        if not self.given or not gradients:
            return gradients
        found, biases = list(gradients[: -len(self.given)]), iter(gradients[-len(self.given) :])
        for i, bias in enumerate(self.biases):
            if bias is not None:
                found[i] = torch.cat([found[i].flatten(), next(biases).to(found[i].dtype)])
        return found


def as_stored(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Round unit rows to the dtype in which the kernels store them. The gradient passes unchanged."""
    return rows + (rows.detach().to(dtype).to(rows.dtype) - rows.detach())
