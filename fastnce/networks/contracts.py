"""The interfaces of generators and discriminators, and the checks of a user's own networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..common.imports import CodeError, first_line
from ..common.messages import shown
from .tracing import trace_shapes


class Generator(Protocol):
    """A network from images to images: an `nn.Module` that is built as `Net(in_channels, out_channels, width)`.

    Every method needs `forward`; methods that contrast features also need `feature_channels`. The other members are
    optional, with the defaults below. If the constructor has arguments `norm`, `norm_affine`, `dropout`, `antialias`,
    `antialias_up`, `resolution` or `stylegan2_downsampling`, they receive the options of the same name.
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

    If the constructor has arguments `layers`, `norm`, `norm_affine`, `antialias` or `resolution`, they receive the
    options of the same name; `norm` is `network.discriminator_norm` if that is set, and `norm_affine` is true only with
    instance norm.
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
        CodeError: it is not callable, it fails, or it does not return a module.
    """
    if not callable(found) or isinstance(found, nn.Module):
        kind = f"an instance of {type(found).__name__}" if isinstance(found, nn.Module) else type(found).__name__
        raise CodeError(f"{key}={name} must be a class of torch.nn.Module, not {kind}")
    try:
        named: Iterable[str] = inspect.signature(found).parameters
    except ValueError:  # such as a class of torch.jit.ScriptModule
        named = ()
    taken = {option: value for option, value in options.items() if option in named}
    if not key:
        return found(*arguments, **taken)
    call = f"{name.rpartition(':')[2]}({', '.join(map(str, arguments))})"
    try:
        built = found(*arguments, **taken)
    except Exception as error:
        raise CodeError(f"{key}={name}: {call} fails: {first_line(error)}") from error
    if not isinstance(built, nn.Module):
        raise CodeError(f"{key}={name} must return a torch.nn.Module, not {type(built).__name__}")
    parameters = dict(built.named_parameters())
    if not parameters:
        raise CodeError(f"{key}={name} has no parameters to train")
    if not any(isinstance(tensor, nn.UninitializedParameter) or tensor.dim() == 4 for tensor in parameters.values()):
        raise CodeError(f"{key}={name} has no convolution")
    for parameter, tensor in parameters.items():
        if isinstance(tensor, nn.UninitializedParameter):
            raise CodeError(f"{key}={name}: {parameter} has no shape yet; give lazy modules their sizes")
        if tensor.is_meta:
            raise CodeError(f"{key}={name}: {parameter} is on the device meta; give it values")
        if tensor.dtype != torch.float32:
            raise CodeError(f"{key}={name}: {parameter} is {tensor.dtype}; build float32, run.precision does the rest")
    return built


def check_generator(
    network: nn.Module, name: str, in_channels: int, out_channels: int, build: Callable[[], nn.Module] | None
) -> None:
    """Give missing optional members their defaults, and check that a user's generator meets the contract.

    Args:
        build: builds the same network, to trace its output; None if that was done before.

    Raises:
        CodeError: a missing member, or an output of a wrong shape; the message names it.
    """
    key = f"network.generator={name}"
    accepted = inspect.signature(network.forward).parameters
    missing = any(argument not in accepted for argument in ("layers", "encode_only"))
    if missing or accepted["layers"].kind is inspect.Parameter.KEYWORD_ONLY:  # it is passed by its position
        raise CodeError(f"{key}: forward must take (x, layers=(), encode_only=False)")
    defaults = {"factor": 1, "in_channels": in_channels, "out_channels": out_channels, "features_repeat": False}
    for member, value in defaults.items():
        _default(network, member, value)
    _default(network, "smallest", network.factor)
    for member in ("factor", "smallest", "in_channels", "out_channels"):
        value = getattr(network, member)
        if type(value) is not int or value < 1:
            raise CodeError(f"{key}: {member} must be a whole number of at least 1, not {value!r}")
    _guard_features(network, key)
    factor, smallest = int(network.factor), int(network.smallest)  # type: ignore[arg-type]
    side = fitting_side(64, factor, smallest)
    if build is not None:
        _check_output(build, key, in_channels, (side, side + factor), out_channels)


def check_discriminator(network: nn.Module, name: str, in_channels: int, build: Callable[[], nn.Module] | None) -> None:
    """As `check_generator`, for a user's discriminator."""
    key = f"network.discriminator={name}"
    _default(network, "pictures_independent", False)
    _default(network, "in_channels", in_channels)
    if build is not None:
        _check_output(build, key, in_channels, (256, 256), None)


def fitting_side(side: int, factor: int, smallest: int) -> int:
    """The least side of an image that is at least `side` and that a generator with these members takes."""
    side = max(side, smallest)
    return side + -side % factor


def check_output(output: Any, images: int, size: tuple[int, int] | None, channels: int | None = None) -> str:
    """What is wrong with a network's output, as a clause; empty if nothing is.

    Args:
        images: that the output must have.
        size: (height, width) of a generator's output; None for scores, which may have any.
        channels: of a generator's output; None for any number.
    """
    found = f"{tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if size is None:
        good = isinstance(output, Tensor) and output.dim() > 0 and output.shape[0] == images
        return "" if good else f"returns {found} instead of scores ({images}, ...)"
    good = isinstance(output, Tensor) and output.dim() == 4 and tuple(output.shape[2:]) == size
    good = good and output.shape[0] == images and channels in (None, output.shape[1])
    wanted = f"({images}, {'channels' if channels is None else channels}, {size[0]}, {size[1]})"
    return "" if good else f"returns {found} instead of {wanted}"


def _check_output(
    build: Callable[[], nn.Module], key: str, channels: int, size: tuple[int, int], out: int | None
) -> None:
    """Check the output of a network that is built for this alone: hooks may change what they belong to."""
    shape = f"(2, {channels}, {size[0]}, {size[1]})"
    with torch.random.fork_rng(devices=[]):
        network = build()
    try:
        output = trace_shapes(network, 2, channels, *size)
    except Exception as error:
        raise CodeError(f"{key}: forward fails on {shape}: {first_line(error)}") from error
    if wrong := check_output(output, 2, None if out is None else size, out):
        raise CodeError(f"{key}: forward of {shape} {wrong}")


def _default(network: nn.Module, member: str, value: Any) -> None:
    if not hasattr(network, member):
        setattr(network, member, value)


def _guard_features(network: nn.Module, key: str) -> None:
    """Let errors of the user's `feature_channels` name the option that chooses layers."""
    own: Any = getattr(network, "feature_channels", None)

    def feature_channels(layers: Sequence[int]) -> list[int]:
        if own is None:
            raise CodeError(f"{key} has no feature_channels(layers), which methods that contrast features need")
        call = f"feature_channels({list(layers)})"
        try:
            found = list(own(layers))
        except Exception as error:
            raise CodeError(f"{key}: {call} fails: {first_line(error)}; loss.nce_layers chooses its layers") from error
        if wrong := [channels for channels in found if type(channels) is not int or channels < 1]:
            raise CodeError(f"{key}: {call} must return whole numbers of at least 1, not {shown(wrong[0])}")
        return found

    network.feature_channels = feature_channels  # type: ignore[assignment]
