"""Your own generator: a small encoder and decoder whose features PatchNCE contrasts.

fastnce train fastcut --data DIR --out RUN \\
    network.generator=examples/own_generator.py:SmallGenerator loss.nce_layers=0,1,2
python examples/own_generator.py                       # the same on small images, for three steps
"""

from __future__ import annotations

from collections.abc import Sequence

from pictures import train_small
from torch import Tensor, nn

from fastnce.networks import InstanceNorm


class SmallGenerator(nn.Module):
    """Stages 0 to 2 encode, stage 3 decodes. `fastnce.networks.Generator` describes every member."""

    factor = 2  # both sides of an image are multiples of this
    features_repeat = True  # no dropout, no batch norm

    def __init__(self, in_channels: int, out_channels: int, width: int):
        super().__init__()
        self.channels = [width, 2 * width, 2 * width]
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(in_channels, width, 7, padding=3), InstanceNorm(width), nn.ReLU()),
                nn.Sequential(nn.Conv2d(width, 2 * width, 4, 2, padding=1), InstanceNorm(2 * width), nn.ReLU()),
                nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), InstanceNorm(2 * width), nn.ReLU()),
                nn.Sequential(nn.ConvTranspose2d(2 * width, out_channels, 4, 2, padding=1), nn.Tanh()),
            ]
        )

    def forward(self, x: Tensor, layers: Sequence[int] = (), encode_only: bool = False):
        features = []
        for position, stage in enumerate(self.stages):
            x = stage(x)
            if position in layers:
                features.append(x)
            if encode_only and len(features) == len(layers):
                return features
        return (x, features) if layers else x

    def feature_channels(self, layers: Sequence[int]) -> list[int]:
        if any(layer > 2 for layer in layers):
            raise ValueError(f"SmallGenerator has the layers 0 to 2, not {max(layers)}")
        return [self.channels[layer] for layer in layers]


def main() -> int:
    return train_small("fastcut", f"network.generator={__file__}:SmallGenerator", "loss.nce_layers=0,1,2")


if __name__ == "__main__":
    main()
