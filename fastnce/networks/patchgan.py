"""PatchGAN discriminators (Isola et al., CVPR 2017; published `NLayerDiscriminator`, `PixelDiscriminator`)."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import BlurDown, Norm, norm_layer, run_all


class PatchGAN(nn.Module):
    """Judges overlapping patches: (images, channels, height, width) to one logit a patch, (images, 1, h, w).

    Args:
        in_channels: of the pictures.
        width: channels after the first convolution (published `ndf`).
        layers: halvings: 3 judges 70x70 patches (published "basic").
        antialias: blur-down after stride-1 convolutions in place of strided ones.
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
        # One pass over fakes and reals together gives the same logits as two.
        self.pictures_independent = norm != "batch"

    def forward(self, x: Tensor) -> Tensor:
        return run_all(list(self.model), x)


class PixelGAN(nn.Module):
    """Judges each pixel on its own by 1x1 convolutions: one logit a pixel, (images, 1, height, width)."""

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
