"""The published networks, and the two functions that build one from its published name."""

from __future__ import annotations

from .layers import BlurDown, BlurUp, InstanceNorm, Norm, init_weights
from .patchgan import PatchGAN, PixelGAN
from .resnet import ResnetGenerator
from .unet import UnetGenerator

GENERATORS = ("resnet_9blocks", "resnet_6blocks", "resnet_4blocks", "unet_256", "unet_128")
DISCRIMINATORS = ("basic", "n_layers", "pixel")


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
) -> ResnetGenerator | UnetGenerator:
    """A generator by its published name (one of `GENERATORS`), initialised."""
    network: ResnetGenerator | UnetGenerator
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
) -> PatchGAN | PixelGAN:
    """A discriminator by its published name (one of `DISCRIMINATORS`), initialised; `layers` is for "n_layers"."""
    network: PatchGAN | PixelGAN
    if name in ("basic", "n_layers"):
        network = PatchGAN(in_channels, width, 3 if name == "basic" else layers, norm, antialias)
    elif name == "pixel":
        network = PixelGAN(in_channels, width, norm)
    else:
        raise ValueError(f"discriminator must be one of {', '.join(DISCRIMINATORS)}, not {name!r}")
    init_weights(network, init_type, init_gain)
    return network


__all__ = [
    "DISCRIMINATORS",
    "GENERATORS",
    "BlurDown",
    "BlurUp",
    "InstanceNorm",
    "Norm",
    "PatchGAN",
    "PixelGAN",
    "ResnetGenerator",
    "UnetGenerator",
    "build_discriminator",
    "build_generator",
    "init_weights",
]
