"""PatchGAN discriminators (Isola et al., CVPR 2017; published `NLayerDiscriminator`, `PixelDiscriminator`)."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import BlurDown, Norm, norm_layer, run_all


class PatchGAN(nn.Module):
    """Score overlapping patches: (images, channels, height, width) to one logit per patch, (images, 1, h, w).

    Args:
        in_channels: of the images.
        width: channels after the first convolution (published `ndf`).
        layers: number of halvings. With 3, the patches have 70x70 pixels (published "basic").
        norm: "instance", "batch" or "none".
        antialias: use stride-1 convolutions and blur-down instead of strided convolutions.
    """

    def __init__(
        self, in_channels: int = 3, width: int = 64, layers: int = 3, norm: Norm = "instance", antialias: bool = True
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"a PatchGAN has at least 1 layer, not {layers}")
        stride = 1 if antialias else 2
        channels = width
        model: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=stride, padding=1), nn.LeakyReLU(0.2, True)]
        for i in range(1, layers + 1):
            if antialias:
                model.append(BlurDown(channels))
            last = i == layers
            wider = min(2**i, 8) * width
            model += [
                nn.Conv2d(channels, wider, 4, stride=1 if last else stride, padding=1, bias=norm == "instance"),
                norm_layer(norm, wider),
                nn.LeakyReLU(0.2, True),
            ]
            channels = wider
        model.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.model = nn.Sequential(*model)
        # One pass over fake and real images together gives the same logits as two passes.
        self.pictures_independent = norm != "batch"

    def forward(self, x: Tensor) -> Tensor:
        return run_all(list(self.model), x)


class PixelGAN(nn.Module):
    """Score each pixel with 1x1 convolutions: one logit per pixel, (images, 1, height, width)."""

    def __init__(self, in_channels: int = 3, width: int = 64, norm: Norm = "instance"):
        super().__init__()
        bias = norm == "instance"
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, width, 1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(width, 2 * width, 1, bias=bias),
            norm_layer(norm, 2 * width),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(2 * width, 1, 1, bias=bias),
        )
        self.pictures_independent = norm != "batch"

    def forward(self, x: Tensor) -> Tensor:
        return run_all(list(self.net), x)
