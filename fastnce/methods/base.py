"""What the training engine asks of a paper.

A method is its networks, its losses and its defaults. The engine knows nothing else of it: it calls `generate` once a
step, then each phase's loss in the paper's order, and updates the phase's parameter groups.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..common.initialise import INIT_TYPES
from ..common.options import check, option
from ..networks import Norm
from ..networks.build import DISCRIMINATORS, GENERATORS, build_discriminator, build_generator

MOST_CHANNELS = 65_536
WEIGHT = {"low": 0, "high": 1e6}
"""Of a loss's term."""
TEMPERATURE = {"low": 1e-4, "high": 1e4}
"""Of a softmax over likenesses between -1 and 1."""
MOST_PATCHES = 2**24
"""Locations of a map of 4096x4096."""
GP_HELP = "weight of WGAN-GP's penalty on the slope of each discriminator; with gan_mode=wgangp only"


@dataclass
class NetworkOptions:
    """Which networks to build; the defaults are CUT's."""

    generator: str = option(
        "resnet_9blocks",
        "resnet_9blocks, resnet_6blocks, resnet_4blocks, unet_256, unet_128, stylegan2, restorer, or your own "
        "(mynets.py:Net)",
        choices=tuple(GENERATORS),
        imports=True,
    )
    discriminator: str = option(
        "basic",
        "basic (70x70 PatchGAN), n_layers, pixel, stylegan2, or your own (mynets.py:Net)",
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
    in_channels: int = option(3, "channels of domain A", low=1, high=MOST_CHANNELS)
    out_channels: int = option(3, "channels of domain B", low=1, high=MOST_CHANNELS)
    norm: Norm = option("instance", "instance, batch or none")
    dropout: bool = option(False, "dropout in the generator's blocks")
    antialias: bool = option(True, "blur before halving, in both networks; false halves by strided convolutions")
    antialias_up: bool = option(True, "blur after doubling; false doubles by transposed convolutions")
    init_type: str = option("xavier", "normal, xavier, kaiming or orthogonal", choices=INIT_TYPES)
    init_gain: float = option(0.02, "scale of the initial weights", low=1e-6, high=100)

    def build_generator(self, reverse: bool = False):
        """Domain A to B; `reverse` for B to A."""
        channels = (self.out_channels, self.in_channels) if reverse else (self.in_channels, self.out_channels)
        return build_generator(
            self.generator,
            *channels,
            self.width,
            norm=self.norm,
            dropout=self.dropout,
            antialias=self.antialias,
            antialias_up=self.antialias_up,
            init_type=self.init_type,
            init_gain=self.init_gain,
            resolution=self.resolution,
        )

    def build_discriminator(self, channels: int):
        return build_discriminator(
            self.discriminator,
            channels,
            self.discriminator_width,
            layers=self.discriminator_layers,
            norm=self.norm,
            antialias=self.antialias,
            init_type=self.init_type,
            init_gain=self.init_gain,
            resolution=self.resolution,
        )


class Batch(NamedTuple):
    """One step's pictures, each (images, channels, height, width) in [-1, 1]."""

    a: Tensor
    b: Tensor


@dataclass
class Draws:
    """One step's random choices.

    The flip is decided on the host ahead of the step, because it selects which computation runs. Patch ids are drawn on
    the device inside the step unless given: [NCE call][layer] -> (patches,), in the paper's order of calls.
    """

    flip: bool = False
    patch_ids: list[list[Tensor]] | None = None


class Group(NamedTuple):
    """Parameters that one optimiser updates, and where it departs from the run's learning rate and betas."""

    modules: tuple[nn.Module, ...]
    lr: float | None = None
    betas: tuple[float, float] | None = None


Sizes = Mapping[tuple[int, int], str]
"""(height, width) of pictures, each with what a message calls them, in the plural."""
Losses = dict[str, Tensor]
Outputs = dict[str, Any]


class Phase(NamedTuple):
    """A loss, and the names of the groups that it updates.

    `apart`: nothing that the phases before it update takes part in this loss, so that their updates may wait for its
    gradients.
    """

    loss: Callable[[Batch, Outputs, Draws], tuple[Tensor, Losses]]
    groups: tuple[str, ...]
    apart: bool = False


class Method(nn.Module):
    """A paper: subclasses build their networks in `__init__` and define the members below."""

    options: Any
    gp: float = 0.0
    """Weight of WGAN-GP's penalty; 0 for other adversarial losses."""

    def generators(self) -> dict[str, nn.Module]:
        """Networks that make images, by name; the one from A to B is the first."""
        raise NotImplementedError

    def discriminators(self) -> dict[str, nn.Module]:
        """Networks that judge images, by name."""
        return {}

    def projectors(self) -> dict[str, nn.Module]:
        """Networks that map features to codes, by name."""
        return {}

    def networks(self) -> dict[str, nn.Module]:
        """Every network by name, in the order in which they are stored and exchanged between ranks."""
        return {**self.generators(), **self.discriminators(), **self.projectors()}

    def discriminator_losses(self) -> dict[str, tuple[str, ...]]:
        """For each discriminator that can win, the names of the logged losses whose sum is near 0 when it has won."""
        return {}

    def identity_losses(self) -> tuple[str, ...]:
        """Names of the logged losses that keep images of domain B as they are."""
        return ()

    def groups(self) -> dict[str, Group]:
        """Parameter groups by name, in the order of the published optimisers."""
        raise NotImplementedError

    def phases(self) -> tuple[Phase, ...]:
        """Losses and what they update, in the paper's order."""
        raise NotImplementedError

    def extra_state_modules(self) -> dict[str, nn.Module]:
        """What the next step depends on besides the networks (pools of fakes, banks of codes): kept in checkpoints of a
        run, but not a network to export."""
        return {}

    def check(self, batch_size: int, height: int, width: int) -> None:
        """Refuse crops that cannot be trained on: `check_options`, then `check_sizes` of this one size."""
        self.check_options(batch_size)
        crops = {(height, width): f"crops of {width}x{height}"}
        self.check_sizes(batch_size, crops, crops, "change data.crop_size")

    def check_options(self, batch_size: int) -> None:
        """Refuse options that do not go together, whatever the pictures' sizes; subclasses add what they need.

        Raises:
            ValueError: a sentence that names the options.
        """
        if batch_size < 1:
            raise ValueError(f"data.batch must be at least 1, not {batch_size}")

    def check_sizes(self, batch_size: int, a: Sizes, b: Sizes, remedy: str) -> None:
        """Refuse pictures of a size that cannot be trained on, before anything is computed; subclasses add to it.

        Shapes are traced on the meta device: nothing is allocated.

        Args:
            a, b: the sizes of each domain; any of A's may meet any of B's in a step.
            remedy: what to do about a size that does not fit.

        Raises:
            ValueError: sides that a generator cannot take, or pictures too small for one of the networks.
        """
        for name, network in {**self.generators(), **self.discriminators()}.items():
            sizes = self.sizes_of(name, a, b)
            factor = getattr(network, "factor", 1)
            for (height, width), what in sizes.items():
                if height % factor or width % factor:
                    raise ValueError(
                        f"{what} do not fit generator {name}: both sides must be multiples of {factor}; {remedy}"
                    )
            for height, width in extremes(sizes):
                try:
                    trace_shapes(network, batch_size, height, width)
                except (RuntimeError, ValueError) as error:
                    what, reason = sizes[height, width], str(error).splitlines()[0]
                    raise ValueError(f"{what} do not fit network {name}, {remedy} ({reason})") from None
        if self.gp > 0 and len(both := list({**a, **b}.values())) > 1:
            raise ValueError(
                f"WGAN-GP needs real and fake pictures of one size, which {both[0]} and {both[1]} are not: "
                f"{remedy}, or leave its penalty out with loss.lambda_gp=0"
            )

    def sizes_of(self, name: str, a: Sizes, b: Sizes) -> Sizes:
        """The sizes of the pictures that a network sees."""
        return {**a, **b}

    def whole_batch(self, *, ranks: bool = False) -> str:
        """Why a batch cannot be computed in parts, as a clause; empty where each picture is a matter of its own.

        Args:
            ranks: the parts are the shares of several ranks, which may exchange their keys.
        """
        if any(isinstance(module, nn.BatchNorm2d) for module in self.modules()):
            return "batch norm takes its statistics over the whole batch (network.norm=instance does not)"
        exchanged = ranks and getattr(self.options, "gather_negatives", False)
        if getattr(self.options, "negatives", "image") == "batch" and not exchanged:
            return "loss.negatives=batch contrasts pictures of the whole batch (loss.negatives=image does not)"
        if getattr(self.options, "external", "none") == "bank":
            return "loss.external=bank would show a part what the parts before it put in the bank"
        return ""

    def share_keys(self, others: Callable[[Tensor], Tensor]) -> None:
        """Several ranks: take the others' keys as negatives too, where the method has such an option that is on.

        Args:
            others: a constant tensor to those of the other ranks, (...) -> (ranks - 1, ...).
        """

    def draw(self, rng: random.Random) -> Draws:
        """The random choices that the host makes for one step."""
        return Draws()

    def prepare(self, batch: Batch) -> None:
        """Make state whose size follows from the pictures', unless it is there.

        Called before every step, so that a compiled step never makes state itself.
        """

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        """Everything that the phases share: translated pictures and kept features."""
        raise NotImplementedError

    def translate(self, a: Tensor) -> Tensor:
        """A to B, as used after training."""
        raise NotImplementedError

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Named pictures for sample grids, each like `batch.a`."""
        return {"A": batch.a, "fake_B": self.translate(batch.a)}


def check_ranges(options: Any, network: NetworkOptions) -> None:
    """Refuse options outside of what they accept; ValueError names the first one."""
    check(options, "loss")
    check(network, "network")


def trace_shapes(network: nn.Module, images: int, height: int, width: int, **arguments: Any) -> Any:
    """What `network` returns for pictures of this size, as tensors without memory."""
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    first = next(p for p in network.parameters() if p.dim() == 4)  # the convolution that sees the picture
    pictures = torch.empty(images, first.shape[1], height, width, device="meta", dtype=first.dtype)
    with torch.no_grad():
        return functional_call(network, {k: t.to("meta") for k, t in state.items()}, (pictures,), arguments)


def extremes(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The smallest and the largest sizes, by height and width: what is too small or too large for a network is among
    them. A data set may have thousands of sizes."""
    found: dict[tuple[int, int], None] = {}
    for sign in (1, -1):
        least = math.inf
        for height, width in sorted(sizes, key=lambda size: (sign * size[0], sign * size[1])):
            if sign * width < least:
                least = sign * width
                found[height, width] = None
    return list(found)


def drawn_rows(generator: nn.Module, layers: Sequence[int], patches: int, sizes: Sizes) -> dict[str, list[int]]:
    """How many locations of each layer are contrasted, for pictures of the extreme sizes, by what they are called.

    Args:
        patches: drawn at most; 0 takes all.
    """
    rows = {}
    for height, width in extremes(sizes):
        maps = trace_shapes(generator, 1, height, width, layers=layers, encode_only=True)
        channels, found = generator.feature_channels(layers), [m.shape[1] for m in maps]  # type: ignore[operator]
        if found != list(channels):
            raise ValueError(f"feature_channels gives {channels}, and the feature maps have {found} channels")
        locations = [m.shape[2] * m.shape[3] for m in maps]
        rows[sizes[height, width]] = [min(n, patches or n) for n in locations]
    return rows


def check_contrast(rows: dict[str, list[int]], layers: Sequence[int], alone: bool, alike: str, remedy: str) -> None:
    """Refuse sizes whose maps leave nothing to contrast, or give other counts of rows where they must be alike.

    Args:
        rows: as `drawn_rows`.
        alone: a location has negatives of its own picture only.
        alike: why the counts must be alike, as a clause; empty where they need not.
    """
    first, counts = next(iter(rows.items()))
    for what, found in rows.items():
        for layer, count, other in zip(layers, found, counts, strict=True):
            if alone and count == 1:
                raise ValueError(
                    f"{what} have a single location at layer {layer} of loss.nce_layers, which leaves nothing to "
                    f"contrast: leave the layer out, or {remedy}"
                )
            if alike and count != other:
                raise ValueError(
                    f"{what} give {count} locations at layer {layer} and {first} give {other}, but {alike}: lower "
                    f"loss.patches to {min(count, other)}, or {remedy}"
                )


def together(network: nn.Module, pictures: Sequence[Tensor], *, independent: bool, **arguments: Any) -> list[Any]:
    """`network` on several batches of pictures: one pass where they are of one size and do not influence each other.

    Args:
        independent: the network computes each picture on its own (no batch norm).
        arguments: passed on, such as a generator's `layers`.

    Returns:
        what `network` returns, a tensor or (tensor, list of feature maps), for each batch.
    """
    if not independent or any(p.shape[1:] != pictures[0].shape[1:] for p in pictures):
        return [network(p, **arguments) for p in pictures]
    sizes = [len(p) for p in pictures]
    result = network(torch.cat(list(pictures)), **arguments)
    if isinstance(result, Tensor):
        return list(result.split(sizes))
    output, features = result
    maps = zip(*(feature.split(sizes) for feature in features), strict=True)
    return list(zip(output.split(sizes), map(list, maps), strict=True))
