"""Build networks by their published names."""

from __future__ import annotations

from ..common.initialise import init_weights
from .layers import Norm
from .patchgan import PatchGAN, PixelGAN
from .resnet import ResnetGenerator
from .restorer import Restorer
from .stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from .unet import UnetGenerator

GENERATORS = ("resnet_9blocks", "resnet_6blocks", "resnet_4blocks", "unet_256", "unet_128", "stylegan2", "restorer")
DISCRIMINATORS = ("basic", "n_layers", "pixel", "stylegan2")

Generator = ResnetGenerator | UnetGenerator | StyleGAN2Generator | Restorer
Discriminator = PatchGAN | PixelGAN | StyleGAN2Discriminator


def build_generator(
    name: str,
    in_channels: int = 3,
    out_channels: int = 3,
    width: int = 64,
    *,
    norm: Norm = "instance",
    dropout: bool = False,
    antialias: bool = True,
    antialias_up: bool | None = None,
    init_type: str = "xavier",
    init_gain: float = 0.02,
    resolution: int = 64,
) -> Generator:
    """Build and initialise a generator by its name (one of `GENERATORS`).

    Only "stylegan2" uses `resolution`. "stylegan2" and "restorer" have their own initialisation and no norm layers of
    the kind `norm`.
    """
    network: Generator
    if name in ("stylegan2", "restorer"):
        if norm == "batch" or dropout:
            raise ValueError(f'generator "{name}" has neither batch norm nor dropout: do not set norm and dropout')
        if name == "stylegan2":
            return StyleGAN2Generator(in_channels, out_channels, width, resolution)
        if in_channels != out_channels:
            raise ValueError(
                f'generator "restorer" adds to its input: in_channels={in_channels} and out_channels={out_channels} '
                f"must be equal"
            )
        return Restorer(in_channels, width)
    if name.startswith("resnet_") and name in GENERATORS:
        blocks = int(name.removeprefix("resnet_").removesuffix("blocks"))
        network = ResnetGenerator(in_channels, out_channels, width, blocks, norm, dropout, antialias, antialias_up)
    elif name in GENERATORS:
        network = UnetGenerator(in_channels, out_channels, 8 if name == "unet_256" else 7, width, norm, dropout)
    else:
        raise ValueError(f"generator must be one of {', '.join(GENERATORS)}, not {name!r}")
    init_weights(network, init_type, init_gain)
    return network


def build_discriminator(
    name: str,
    in_channels: int = 3,
    width: int = 64,
    *,
    layers: int = 3,
    norm: Norm = "instance",
    antialias: bool = True,
    init_type: str = "xavier",
    init_gain: float = 0.02,
    resolution: int = 64,
) -> Discriminator:
    """Build and initialise a discriminator by its published name (one of `DISCRIMINATORS`).

    Only "n_layers" uses `layers`, and only "stylegan2" uses `resolution`.
    """
    network: Discriminator
    if name == "stylegan2":
        return StyleGAN2Discriminator(in_channels, width, resolution)
    if name in ("basic", "n_layers"):
        network = PatchGAN(in_channels, width, 3 if name == "basic" else layers, norm, antialias)
    elif name == "pixel":
        network = PixelGAN(in_channels, width, norm)
    else:
        raise ValueError(f"discriminator must be one of {', '.join(DISCRIMINATORS)}, not {name!r}")
    init_weights(network, init_type, init_gain)
    return network
