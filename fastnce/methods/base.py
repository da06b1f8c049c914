"""What the training engine asks of a paper.

A method is its networks, its losses and its defaults. The engine knows nothing else of it: it calls `generate` once a
step, then each phase's loss in the paper's order, and updates the phase's parameter groups.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..networks import Norm, build_discriminator, build_generator
from ..options import option


@dataclass
class NetworkOptions:
    """Which networks to build; the defaults are CUT's."""

    generator: str = option(
        "resnet_9blocks", "resnet_9blocks, resnet_6blocks, resnet_4blocks, unet_256, unet_128, stylegan2, restorer"
    )
    discriminator: str = option("basic", "basic (70x70 PatchGAN), n_layers, pixel or stylegan2")
    width: int = option(
        64, "channels after the generator's first convolution (published ngf); cost grows as its square"
    )
    discriminator_width: int = option(64, "the same for the discriminator (published ndf)")
    discriminator_layers: int = option(3, "halvings of the n_layers discriminator; more judge larger patches")
    resolution: int = option(64, "side of the crops that stylegan2 networks are made for; a power of two")
    in_channels: int = option(3, "channels of domain A")
    out_channels: int = option(3, "channels of domain B")
    norm: Norm = option("instance", "instance, batch or none")
    dropout: bool = option(False, "dropout in the generator's blocks")
    antialias: bool = option(True, "blur before halving, in both networks; false halves by strided convolutions")
    antialias_up: bool = option(True, "blur after doubling; false doubles by transposed convolutions")
    init_type: str = option("xavier", "normal, xavier, kaiming or orthogonal")
    init_gain: float = option(0.02, "scale of the initial weights")

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

    def networks(self) -> dict[str, nn.Module]:
        """Networks by their published name ("G", "D_A", ...), for checkpoints and published files."""
        raise NotImplementedError

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
        """Refuse crops that cannot be trained on, before anything is computed; subclasses add what they need.

        Shapes are traced on the meta device: nothing is allocated.

        Raises:
            ValueError: sides that a generator cannot take, or pictures too small for one of the networks.
        """
        if batch_size < 1:
            raise ValueError(f"data.batch must be at least 1, not {batch_size}")
        for name, network in self.networks().items():
            factor = getattr(network, "factor", 1)
            if height % factor or width % factor:
                raise ValueError(
                    f"crops of {height}x{width} do not fit generator {name}: both sides must be multiples of {factor}"
                )
            if name[0] in "GD":
                try:
                    trace_shapes(network, batch_size, height, width)
                except (RuntimeError, ValueError) as error:
                    reason = str(error).splitlines()[0]
                    raise ValueError(
                        f"crops of {height}x{width} do not fit network {name}, change data.crop_size ({reason})"
                    ) from None

    def whole_batch(self) -> str:
        """Why a batch cannot be computed in parts, as a clause; empty where each picture is a matter of its own."""
        if any(isinstance(module, nn.BatchNorm2d) for module in self.modules()):
            return "batch norm takes its statistics over the whole batch (network.norm=instance does not)"
        if getattr(self.options, "negatives", "image") == "batch":
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


def check_choices(options: Any) -> None:
    """Refuse a loss option that is none of those its type lists (a configuration file holds any text)."""
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            known = ", ".join(f'"{choice}"' for choice in get_args(hint))
            raise ValueError(f"loss.{name} must be one of {known}, not {value!r}")


def trace_shapes(network: nn.Module, images: int, height: int, width: int, **arguments: Any) -> Any:
    """What `network` returns for pictures of this size, as tensors without memory."""
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    first = next(p for p in network.parameters() if p.dim() == 4)  # the convolution that sees the picture
    pictures = torch.empty(images, first.shape[1], height, width, device="meta", dtype=first.dtype)
    with torch.no_grad():
        return functional_call(network, {k: t.to("meta") for k, t in state.items()}, (pictures,), arguments)


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
