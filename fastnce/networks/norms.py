"""The norm behind a convolution, and instance norm with a learned weight and bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.taps import Tap
from .layers import InstanceNorm, Norm, own_precision


class AffineInstanceNorm(InstanceNorm):
    """Instance norm, then a learned weight and bias per channel: `nn.InstanceNorm2d(channels, affine=True)`.

    The kernels normalise. PyTorch multiplies and adds, so an activation, a pad or a blur has a launch of its own. At
    first the weights are 1 and the biases 0; the published initialisation leaves them so.

    weight, bias: (channels,). Maps of 16 bits are scaled and shifted in the precision of the weights, then rounded.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(channels, eps)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Tensor,
        slope: float = 1.0,
        margin: int = 0,
        residual: Tensor | None = None,
        blur: int = 0,
        tap: Tap | None = None,
    ) -> Tensor:
        """See `InstanceNorm.forward`."""
        return self._ended(self.scaled(super().forward(x, tap=tap)), slope, margin, residual, blur)

    def with_inner(self, x: Tensor, slope: float, margin: int, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `InstanceNorm.with_inner`."""
        y = self(x, slope, 0, residual)
        with own_precision(y):
            return F.pad(y, (margin,) * 4, mode="reflect"), y

    def scaled(self, y: Tensor) -> Tensor:
        """Multiply a normalised map by the weight and add the bias, in its dtype and layout."""
        with own_precision(y):  # autocast would keep float32 behind 16-bit maps
            return torch.addcmul(self.bias[:, None, None], y, self.weight[:, None, None]).to(y.dtype)


def norm_layer(norm: Norm, channels: int, affine: bool = False) -> nn.Module:
    """Return the normalisation that follows a convolution.

    Args:
        norm: "instance", "batch" or "none".
        affine: give instance norm a learned weight and bias, which batch norm has in any case.

    Raises:
        ValueError: an unknown norm, or `affine` without instance norm.
    """
    if norm not in ("instance", "batch", "none"):
        raise ValueError(f'norm must be "instance", "batch" or "none", not {norm!r}')
    if affine and norm != "instance":
        raise ValueError(f"network.norm_affine=true is for instance norm, not for norm={norm}: leave it false")
    if norm == "instance":
        return AffineInstanceNorm(channels) if affine else InstanceNorm(channels)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()
