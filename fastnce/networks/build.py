"""Build networks by name: the published ones, and a user's own by import path.

To add a generator, write its class in a file of this folder (see `contracts.Generator`) and add it to `GENERATORS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..common.imports import is_import_path, load_object
from ..common.initialise import init_weights
from ..common.messages import nearest
from .contracts import build_own, check_discriminator, check_generator
from .layers import Norm
from .munit import MUNITGenerator
from .patchgan import PatchGAN, PixelGAN, TilePatchGAN
from .resnet import ResnetGenerator
from .restorer import Restorer
from .spectral import add_spectral_norm
from .stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from .tracing import on_cpu
from .unet import UnetGenerator


def _unet(
    in_channels: int, out_channels: int, width: int, norm: Norm, dropout: bool, norm_affine: bool, *, downs: int
) -> UnetGenerator:
    return UnetGenerator(in_channels, out_channels, downs, width, norm, dropout, norm_affine)


def _stylegan2(
    in_channels: int,
    out_channels: int,
    width: int,
    norm: Norm,
    dropout: bool,
    resolution: int,
    stylegan2_downsampling: int,
    small: bool = False,
) -> StyleGAN2Generator:
    _refuse_norms("smallstylegan2" if small else "stylegan2", norm, dropout)
    halvings = stylegan2_downsampling
    if small:
        return StyleGAN2Generator(in_channels, out_channels, width, resolution, 2, downsampling=halvings, noise=False)
    return StyleGAN2Generator(in_channels, out_channels, width, resolution, downsampling=halvings)


def _munit(in_channels: int, out_channels: int, width: int, norm: Norm, dropout: bool) -> MUNITGenerator:
    if norm != "instance" or dropout:
        raise ValueError(
            'generator "resnet_cat" has instance norm and no dropout: keep the defaults of norm and dropout '
            "(network.discriminator_norm is free)"
        )
    return MUNITGenerator(in_channels, out_channels, width)


def _restorer(in_channels: int, out_channels: int, width: int, norm: Norm, dropout: bool) -> Restorer:
    _refuse_norms("restorer", norm, dropout)
    if in_channels != out_channels:
        raise ValueError(
            f'generator "restorer" adds to its input: in_channels={in_channels} and out_channels={out_channels} '
            f"must be equal"
        )
    return Restorer(in_channels, width)


def _refuse_affine(key: str, name: str, found: Callable[..., nn.Module]) -> None:
    if "norm_affine" not in inspect.signature(found).parameters:
        raise ValueError(
            f"network.norm_affine=true does not fit {key}={name}, which has no instance norm with weights: leave it "
            f"false, or choose another {key.rpartition('.')[2]}"
        )


def _refuse_norms(name: str, norm: Norm, dropout: bool) -> None:
    if norm == "batch" or dropout:
        raise ValueError(
            f'generator "{name}" has neither batch norm nor dropout: keep the defaults of norm and dropout'
        )


GENERATORS: dict[str, Callable[..., nn.Module]] = {
    "resnet_9blocks": partial(ResnetGenerator, blocks=9),
    "resnet_6blocks": partial(ResnetGenerator, blocks=6),
    "resnet_4blocks": partial(ResnetGenerator, blocks=4),
    "unet_256": partial(_unet, downs=8),
    "unet_128": partial(_unet, downs=7),
    "resnet_cat": _munit,
    "stylegan2": _stylegan2,
    "smallstylegan2": partial(_stylegan2, small=True),
    "restorer": _restorer,
}
"""Called with (in_channels, out_channels, width), and with those of norm, norm_affine, dropout, antialias,
antialias_up, resolution and stylegan2_downsampling that are arguments of the function."""


def _basic(in_channels: int, width: int, norm: Norm, antialias: bool, norm_affine: bool) -> PatchGAN:
    return PatchGAN(in_channels, width, 3, norm, antialias, norm_affine)


DISCRIMINATORS: dict[str, Callable[..., nn.Module]] = {
    "basic": _basic,
    "n_layers": PatchGAN,
    "pixel": PixelGAN,
    "patch": TilePatchGAN,
    "stylegan2": StyleGAN2Discriminator,
    "tilestylegan2": StyleGAN2Discriminator,  # as published: `define_D` never builds the class that cuts tiles
}
"""Called with (in_channels, width), and with those of layers, norm, norm_affine, antialias and resolution that are
arguments."""

OWN_INITIALISATION = (StyleGAN2Generator, StyleGAN2Discriminator, Restorer)
"""Networks that initialise themselves: `init_type` and `init_gain` have no effect."""


def build_generator(
    name: str,
    in_channels: int = 3,
    out_channels: int = 3,
    width: int = 64,
    *,
    norm: Norm = "instance",
    norm_affine: bool = False,
    dropout: bool = False,
    antialias: bool = True,
    antialias_up: bool | None = None,
    init_type: str = "xavier",
    init_gain: float = 0.02,
    resolution: int = 64,
    stylegan2_downsampling: int = 1,
) -> Any:
    """Build and initialise a generator.

    Args:
        name: one of `GENERATORS`, or the import path of a class such as mynets.py:Net (see `contracts.Generator`).
        in_channels, out_channels: of the images.
        width: channels after the first convolution.
        norm, dropout, antialias, antialias_up, resolution: for the networks that have them. "stylegan2",
            "smallstylegan2" and "restorer" have neither instance nor batch norm, and initialise themselves.
        norm_affine: learn a weight and a bias in every instance norm of a ResNet or a U-Net.
        stylegan2_downsampling: halvings of "stylegan2" and "smallstylegan2".
        init_type, init_gain: see `init_weights`. A class with the attribute `own_initialisation = True` is not
            initialised.

    Raises:
        ValueError: an unknown name, options that the network does not support, or a user's class that does not meet the
            contract.
    """
    own = is_import_path(name)
    if name not in GENERATORS and not own:
        known = f"{', '.join(GENERATORS)}, or an import path"
        raise ValueError(f"generator must be one of {known}, not {name!r}{nearest(name, GENERATORS)}")
    found = load_object(name, "network.generator") if own else GENERATORS[name]
    if norm_affine and not own:
        _refuse_affine("network.generator", name, found)
    options = {
        "norm": norm,
        "norm_affine": norm_affine,
        "dropout": dropout,
        "antialias": antialias,
        "antialias_up": antialias_up,
        "resolution": resolution,
        "stylegan2_downsampling": stylegan2_downsampling,
    }
    build = partial(
        build_own, found, name, "network.generator" if own else "", in_channels, out_channels, width, **options
    )
    if not own:
        return _initialised(build(), init_type, init_gain)
    with on_cpu():
        return _initialised(_own(build, check_generator, name, in_channels, out_channels), init_type, init_gain)


def build_discriminator(
    name: str,
    in_channels: int = 3,
    width: int = 64,
    *,
    layers: int = 3,
    norm: Norm = "instance",
    norm_affine: bool = False,
    antialias: bool = True,
    init_type: str = "xavier",
    init_gain: float = 0.02,
    resolution: int = 64,
    spectral_norm: bool = False,
) -> Any:
    """Build and initialise a discriminator.

    Args:
        name: one of `DISCRIMINATORS`, or the import path of a class (see `contracts.Discriminator`).
        in_channels: of the images.
        width: channels after the first convolution.
        layers: number of halvings, for "n_layers".
        norm, antialias, resolution, init_type, init_gain: as in `build_generator`.
        norm_affine: learn a weight and a bias in every instance norm of a PatchGAN or a PixelGAN.
        spectral_norm: divide the weight of each convolution by its largest singular value (`networks.spectral`).

    Raises:
        ValueError: as in `build_generator`.
    """
    own = is_import_path(name)
    if spectral_norm and own:
        raise ValueError(
            f"network.spectral_norm=true is for the discriminators of this package: in {name}, call "
            f"torch.nn.utils.parametrizations.spectral_norm yourself"
        )
    if spectral_norm and "stylegan2" in name:
        raise ValueError(
            f"network.spectral_norm=true does not fit network.discriminator={name}, which scales its weights itself: "
            f"choose basic, n_layers, pixel or patch"
        )
    if name not in DISCRIMINATORS and not own:
        known = f"{', '.join(DISCRIMINATORS)}, or an import path"
        raise ValueError(f"discriminator must be one of {known}, not {name!r}{nearest(name, DISCRIMINATORS)}")
    found = load_object(name, "network.discriminator") if own else DISCRIMINATORS[name]
    if norm_affine and not own:
        _refuse_affine("network.discriminator", name, found)
    options = {
        "layers": layers,
        "norm": norm,
        "norm_affine": norm_affine,
        "antialias": antialias,
        "resolution": resolution,
    }
    build = partial(build_own, found, name, "network.discriminator" if own else "", in_channels, width, **options)
    if not own:
        network = _initialised(build(), init_type, init_gain)
        return add_spectral_norm(network) if spectral_norm else network
    with on_cpu():
        return _initialised(_own(build, check_discriminator, name, in_channels), init_type, init_gain)


_checked: dict[tuple[Any, ...], Any] = {}
"""Users' networks that met the contract, by their class and arguments. The values keep the classes alive."""


def _own(build: partial[nn.Module], check: Callable[..., None], *arguments: Any) -> nn.Module:
    """Build a user's network and check it; its output is traced only the first time that it is built in this way."""
    found, *rest = build.args
    key = (id(found), *rest, *build.keywords.items())
    network = build()
    check(network, *arguments, None if key in _checked else build)
    _checked[key] = found
    return network


def _initialised(network: nn.Module, init_type: str, init_gain: float) -> nn.Module:
    if isinstance(network, OWN_INITIALISATION) or getattr(network, "own_initialisation", False):
        return network
    return init_weights(network, init_type, init_gain)
