"""The published networks."""

from ..common.initialise import init_weights
from .build import DISCRIMINATORS, GENERATORS, build_discriminator, build_generator
from .contracts import Discriminator, Generator
from .layers import (
    BlurDown,
    BlurUp,
    InstanceNorm,
    Norm,
    channels_last,
    fuse_neighbours,
    leave_out_biases,
    set_implementation,
)
from .munit import MUNITGenerator
from .norms import AffineInstanceNorm
from .patchgan import PatchGAN, PixelGAN, TilePatchGAN
from .resnet import ResnetGenerator
from .restorer import Restorer
from .stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from .unet import UnetGenerator

__all__ = [
    "DISCRIMINATORS",
    "GENERATORS",
    "AffineInstanceNorm",
    "BlurDown",
    "BlurUp",
    "Discriminator",
    "Generator",
    "InstanceNorm",
    "MUNITGenerator",
    "Norm",
    "PatchGAN",
    "PixelGAN",
    "ResnetGenerator",
    "Restorer",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "TilePatchGAN",
    "UnetGenerator",
    "build_discriminator",
    "build_generator",
    "channels_last",
    "fuse_neighbours",
    "init_weights",
    "leave_out_biases",
    "set_implementation",
]
