"""The interfaces of generators and discriminators, and the checks of a user's own networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Generator(Protocol):
    """A network from images to images: an `nn.Module` that is built as `Net(in_channels, out_channels, width)`.

    Every method needs `forward`; methods that contrast features also need `feature_channels`. The other members are
    optional, with the defaults below. If the constructor has arguments `norm`, `dropout`, `antialias`, `antialias_up`
    or `resolution`, they receive the options of the same name.
    """

    out_channels: int
    """Channels of the output. Default: the constructor's `out_channels`."""
    factor: int
    """Both sides of an image must be multiples of this. Default 1."""
    smallest: int
    """The smallest accepted side of an image. Default: `factor`."""
    features_repeat: bool
    """Whether `forward(x, layers)` returns the same features as `forward(x, layers, encode_only=True)`, independent of
    the other images: true without dropout and batch norm. One pass then serves for both. Default False."""

    def forward(self, x: Tensor, layers: Sequence[int] = (), encode_only: bool = False) -> Any:
        """Translate (images, in_channels, height, width) in [-1, 1] to (images, out_channels, height, width).

        With `layers`, return (output, list of feature maps); with `encode_only`, return that list alone. A feature map
        is (images, channels, height, width); each layer may have its own size.
        """

    def feature_channels(self, layers: Sequence[int]) -> list[int]:
        """Return the channels of the feature map at each layer; raise ValueError for a layer that does not exist."""

    def residual_blocks(self) -> list[nn.Module]:
        """Optional: modules from one tensor to one tensor, which `run.checkpoint_activations` recomputes."""

    def tile_layers(self) -> list[nn.Module]:
        """Optional, for exact tiles: the modules in the order in which they are applied.

        Supported are convolutions, transposed convolutions that double the size, reflection pads, blurs, instance
        norms, pixel shuffles and pointwise activations.
        """


class Discriminator(Protocol):
    """A network that judges images: an `nn.Module` that is built as `Net(in_channels, width)`.

    If the constructor has arguments `layers`, `norm`, `antialias` or `resolution`, they receive the options of the same
    name.
    """

    pictures_independent: bool
    """Whether each image is judged independently: true without batch norm. Real and generated images then share a pass.
    Default False."""

    def forward(self, x: Tensor) -> Tensor:
        """Return one score, or a map of scores, for each image of (images, in_channels, height, width)."""


def build_own(found: Any, name: str, key: str, *arguments: int, **options: Any) -> nn.Module:
    """Build a network from the options that its constructor names.

    Args:
        found: the class or function.
        name, key: the import path and the option that holds it, for messages; `key` is empty for our own networks.

    Raises:
        ValueError: it is not callable, it fails, or it does not return a module.
    """
    if not callable(found):
        raise ValueError(f"{key}={name} must be a class of torch.nn.Module, not {type(found).__name__}")
    named = inspect.signature(found).parameters
    taken = {option: value for option, value in options.items() if option in named}
    if not key:
        return found(*arguments, **taken)
    try:
        built = found(*arguments, **taken)
    except ValueError as error:
        raise ValueError(f"{key}={name}: {error}") from None
    except Exception as error:
        call = f"{name.rpartition(':')[2]}({', '.join(map(str, arguments))})"
        raise ValueError(f"{key}={name}: {call} fails: {type(error).__name__}: {error}") from error
    if not isinstance(built, nn.Module):
        raise ValueError(f"{key}={name} must return a torch.nn.Module, not {type(built).__name__}")
    return built


def check_generator(network: nn.Module, name: str, in_channels: int, out_channels: int) -> None:
    """Give missing optional members their defaults, and check that a user's generator meets the contract.

    Raises:
        ValueError: a missing member, or an output of a wrong shape; the message names it.
    """
    key = f"network.generator={name}"
    accepted = inspect.signature(network.forward).parameters
    if any(argument not in accepted for argument in ("layers", "encode_only")):
        raise ValueError(f"{key}: forward must take (x, layers=(), encode_only=False)")
    defaults = {"factor": 1, "out_channels": out_channels, "features_repeat": False}
    for member, value in defaults.items():
        _default(network, member, value)
    _default(network, "smallest", network.factor)
    if not hasattr(network, "feature_channels"):
        network.feature_channels = _no_features(key)  # type: ignore[assignment]
    factor, smallest = int(network.factor), int(network.smallest)  # type: ignore[arg-type]
    side = max(64, smallest) + -max(64, smallest) % factor
    output = _traced(network, key, in_channels, side)
    wanted = (1, out_channels, side, side)
    if not isinstance(output, Tensor) or tuple(output.shape) != wanted:
        found = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"{key}: forward of (1, {in_channels}, {side}, {side}) must return {wanted}, not {found}")


def check_discriminator(network: nn.Module, name: str, in_channels: int) -> None:
    """Give missing optional members their defaults, and check that a user's discriminator meets the contract."""
    key = f"network.discriminator={name}"
    _default(network, "pictures_independent", False)
    output = _traced(network, key, in_channels, 256)
    if not isinstance(output, Tensor) or output.shape[:1] != (1,):
        found = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"{key}: forward of (1, {in_channels}, 256, 256) must return scores (1, ...), not {found}")


def trace_shapes(network: nn.Module, images: int, channels: int, height: int, width: int, **arguments: Any) -> Any:
    """Return the output of `network` for images of this size, as meta tensors, which need no memory."""
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    inputs = torch.empty(images, channels, height, width, device="meta", dtype=dtype)
    with torch.no_grad():
        return functional_call(network, {k: t.to("meta") for k, t in state.items()}, (inputs,), arguments)


def _traced(network: nn.Module, key: str, channels: int, side: int) -> Any:
    if not any(p.dim() == 4 for p in network.parameters()):
        raise ValueError(f"{key} has no convolution")
    try:
        return trace_shapes(network, 1, channels, side, side)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{key}: forward fails on (1, {channels}, {side}, {side}): {reason}") from error


def _default(network: nn.Module, member: str, value: Any) -> None:
    if not hasattr(network, member):
        setattr(network, member, value)


def _no_features(key: str) -> Callable[[Sequence[int]], list[int]]:
    def feature_channels(layers: Sequence[int]) -> list[int]:
        raise ValueError(f"{key} has no feature_channels(layers), which methods that contrast features need")

    return feature_channels
