"""The section `network` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.initialise import INIT_TYPES
from ..common.options import option
from ..networks import Norm
from ..networks.build import DISCRIMINATORS, GENERATORS, build_discriminator, build_generator

MOST_CHANNELS = 65_536


@dataclass
class NetworkOptions:
    """The section `network`: which networks to build. The defaults are CUT's."""

    generator: str = option(
        "resnet_9blocks",
        "resnet_9blocks, resnet_6blocks, resnet_4blocks, resnet_cat, unet_256, unet_128, stylegan2, smallstylegan2, "
        "restorer, or your own (mynets.py:Net)",
        choices=tuple(GENERATORS),
        imports=True,
    )
    discriminator: str = option(
        "basic",
        "basic (70x70 PatchGAN), n_layers, pixel, patch (tiles of 16x16), stylegan2, tilestylegan2, or your own "
        "(mynets.py:Net)",
        choices=tuple(DISCRIMINATORS),
        imports=True,
    )
    width: int = option(
        64,
        "channels after the generator's first convolution (published ngf); cost grows as its square",
        low=1,
        high=MOST_CHANNELS,
    )
    discriminator_width: int = option(64, "the same for the discriminator (published ndf)", low=1, high=MOST_CHANNELS)
    discriminator_layers: int = option(
        3, "halvings of the n_layers discriminator; more judge larger patches", low=1, high=12
    )
    resolution: int = option(
        64, "side of the crops that stylegan2 networks are made for; a power of two", low=8, high=4_096
    )
    stylegan2_downsampling: int = option(
        1,
        "halvings of the generators stylegan2 and smallstylegan2 (published stylegan2_G_num_downsampling)",
        low=0,
        high=10,
    )
    in_channels: int = option(3, "channels of domain A", low=1, high=MOST_CHANNELS)
    out_channels: int = option(3, "channels of domain B", low=1, high=MOST_CHANNELS)
    norm: Norm = option("instance", "instance, batch or none")
    discriminator_norm: Literal["", "instance", "batch", "none"] = option(
        "", "instance, batch or none, for the discriminator (published normD); empty: as `norm`"
    )
    norm_affine: bool = option(
        False, "learn a weight and a bias in each instance norm of both networks, as some CycleGANs do"
    )
    spectral_norm: bool = option(
        False, "limit each convolution of the discriminator to gain 1 (spectral norm); steadier, and it learns slower"
    )
    dropout: bool = option(False, "dropout in the generator's blocks")
    antialias: bool = option(True, "blur before halving, in both networks; false halves by strided convolutions")
    antialias_up: bool = option(True, "blur after doubling; false doubles by transposed convolutions")
    init_type: str = option("xavier", "normal, xavier, kaiming or orthogonal", choices=INIT_TYPES)
    init_gain: float = option(0.02, "scale of the initial weights", low=1e-6, high=100)

    def build_generator(self, reverse: bool = False):
        """Build a generator from domain A to B, or from B to A with `reverse`."""
        channels = (self.out_channels, self.in_channels) if reverse else (self.in_channels, self.out_channels)
        return build_generator(
            self.generator,
            *channels,
            self.width,
            norm=self.norm,
            norm_affine=self.norm_affine,
            dropout=self.dropout,
            antialias=self.antialias,
            antialias_up=self.antialias_up,
            init_type=self.init_type,
            init_gain=self.init_gain,
            resolution=self.resolution,
            stylegan2_downsampling=self.stylegan2_downsampling,
        )

    def build_discriminator(self, channels: int):
        """Build a discriminator of images with so many channels."""
        norm = self.discriminator_norm or self.norm
        return build_discriminator(
            self.discriminator,
            channels,
            self.discriminator_width,
            layers=self.discriminator_layers,
            norm=norm,
            norm_affine=self.norm_affine and norm == "instance" and "stylegan2" not in self.discriminator,
            antialias=self.antialias,
            init_type=self.init_type,
            init_gain=self.init_gain,
            resolution=self.resolution,
            spectral_norm=self.spectral_norm,
        )
