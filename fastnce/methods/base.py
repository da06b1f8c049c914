"""The contract between the training engine and a method."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.imports import CodeError, first_line
from ..common.options import check
from ..networks import ResnetGenerator
from ..networks.contracts import check_output
from ..networks.tracing import ReadsValue, is_own
from .checks import Sizes, extremes, trace_shapes
from .network_options import MOST_CHANNELS as MOST_CHANNELS
from .network_options import NetworkOptions as NetworkOptions

WEIGHT = {"low": 0, "high": 1e6}
"""Range of the weight of a loss term."""
TEMPERATURE = {"low": 1e-4, "high": 1e4}
"""Range of the temperature of a softmax over similarities between -1 and 1."""
MOST_PATCHES = 2**24
"""The locations of a 4096x4096 map."""
PROJECTOR_HELP = (
    'codes (published netF): "mlp_sample": of an MLP; "sample": the features; "reshape": their means over a 4x4 grid'
)
LEARN_HELP = "train the temperature with F, from the given one on, between 0.01 and 1 (as CLIP)"
GP_HELP = "weight of WGAN-GP's penalty on the slope of each discriminator; with gan_mode=wgangp only"


class Batch(NamedTuple):
    """The images of one step, each (images, channels, height, width) in [-1, 1]."""

    a: Tensor
    b: Tensor


@dataclass
class Draws:
    """The random choices of one step.

    The host decides on the flip ahead of the step, because it selects which computation runs. The step draws patch ids
    on the device unless they are given: `patch_ids[NCE call][layer]` is (patches,), in the paper's order of calls.
    """

    flip: bool = False
    patch_ids: list[list[Tensor]] | None = None


class Group(NamedTuple):
    """Modules whose parameters one Adam updates; `lr` and `betas` replace those of the run."""

    modules: tuple[nn.Module, ...]
    lr: float | None = None
    betas: tuple[float, float] | None = None


Losses = dict[str, Tensor]
"""Scalars to log, by name."""
Outputs = dict[str, Any]
"""Whatever `Method.generate` hands to the losses, by name."""


class Phase(NamedTuple):
    """A loss, and the names of the groups that it updates.

    `loss` takes the batch, the outputs of `Method.generate` and the draws. It returns the scalar to differentiate and
    the losses to log. `apart` says that this loss uses nothing that the phases before it update; their updates may then
    wait until its gradients are known.
    """

    loss: Callable[[Batch, Outputs, Draws], tuple[Tensor, Losses]]
    groups: tuple[str, ...]
    apart: bool = False


class Method(nn.Module):
    """The contract of a training method: its networks, its losses and its defaults.

    The constructor takes `(options, network)`: an instance of the dataclass that the section `loss` of a configuration
    is read into, and `NetworkOptions`. It builds the networks and keeps them as attributes.

    In each step the engine calls `draw`, `prepare`, `generate`, and then each phase's loss in order. After a loss, it
    computes the gradients and updates the phase's groups. From `prepare` on, the step may be recorded in a CUDA graph
    or compiled: it must not read a value back from the device, and must not draw from Python's `random`.

    Required members: `generators`, `groups`, `phases`, `generate`, `translate`; and `Options`, the dataclass of the
    section `loss`, for a method that is named by an import path. All other members have defaults.
    """

    options: Any
    gp: float = 0.0
    """Weight of WGAN-GP's penalty; 0 for other adversarial losses."""

    def generators(self) -> dict[str, nn.Module]:
        """Networks that make images, by name; the one from A to B is the first.

        Translation uses these alone. A name is a Python identifier, such as "G" or "G_A".
        """
        raise NotImplementedError

    def discriminators(self) -> dict[str, nn.Module]:
        """Networks that judge images, by name."""
        return {}

    def projectors(self) -> dict[str, nn.Module]:
        """Networks that map features to codes, by name."""
        return {}

    def networks(self) -> dict[str, nn.Module]:
        """Every network by name, in the order in which checkpoints and ranks take them."""
        return {**self.generators(), **self.discriminators(), **self.projectors()}

    def groups(self) -> dict[str, Group]:
        """Parameter groups by name, in the order of the published optimisers. Each has an Adam of its own."""
        raise NotImplementedError

    def phases(self) -> tuple[Phase, ...]:
        """Losses and the groups that they update, in the paper's order."""
        raise NotImplementedError

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        """Compute what the phases share, such as translated images and feature maps."""
        raise NotImplementedError

    def translate(self, a: Tensor) -> Tensor:
        """Translate images from A to B, as after training."""
        raise NotImplementedError

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Named images for sample grids, each like `batch.a`."""
        return {"A": batch.a, "fake_B": self.translate(batch.a.clone())}  # a user's code may change its input

    def discriminator_losses(self) -> dict[str, tuple[str, ...]]:
        """For each discriminator, the logged losses whose sum is near 0 once it has won; the monitor warns then.

        Leave out a discriminator whose loss has no such limit, such as a critic of WGAN-GP.
        """
        return {}

    def identity_losses(self) -> tuple[str, ...]:
        """The logged losses that ask the generator to leave images of B unchanged.

        If one of them is logged, the monitor warns when such images change more than before.
        """
        return ()

    def extra_state_modules(self) -> dict[str, nn.Module]:
        """Other modules that the next step depends on, such as pools of images. Checkpoints store them."""
        return {}

    def draw(self, rng: random.Random) -> Draws:
        """Make the random choices of one step that the host has to know."""
        return Draws()

    def prepare(self, batch: Batch) -> None:
        """Make state whose size follows from the images, unless it is there.

        It is called before every step, so that a compiled step never makes state itself.
        """

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Follow a schedule: called before the first step of each epoch, from 1 to `epochs`, and of a continued run.

        What a step reads of it must be a tensor on the device, changed in place, because steps may be recorded.
        """

    def finish(self, bad: Tensor) -> None:
        """Change what follows the updates of a step, such as an averaged projector; nothing if `bad`, () bool."""

    def check(self, batch_size: int, height: int, width: int) -> None:
        """Refuse crops that cannot be trained on: `check_options`, then `check_sizes` of this one size."""
        self.check_options(batch_size)
        crops = {(height, width): f"crops of {width}x{height}"}
        self.check_sizes(batch_size, crops, crops, "change data.crop_size")

    def check_options(self, batch_size: int) -> None:
        """Refuse options that contradict each other, whatever the sizes of the images; subclasses add to it.

        Raises:
            ValueError: a sentence that names the options.
        """
        if batch_size < 1:
            raise ValueError(f"data.batch must be at least 1, not {batch_size}")

    def check_sizes(self, batch_size: int, a: Sizes, b: Sizes, remedy: str) -> None:
        """Refuse image sizes that cannot be trained on, before anything is computed; subclasses add to it.

        Args:
            a, b: the sizes of each domain; any of A's may meet any of B's in a step.
            remedy: what to do about a size that does not fit.

        Raises:
            ValueError: sides that a generator cannot take, or images too small for one of the networks.
        """
        generators = self.generators()
        for name, network in {**generators, **self.discriminators()}.items():
            sizes = self.sizes_of(name, a, b)
            factor = getattr(network, "factor", 1)
            role = "generator" if name in generators else "discriminator"
            for (height, width), what in sizes.items():
                if height % factor or width % factor:
                    raise ValueError(
                        f"{what} do not fit {role} {name}: both sides must be multiples of {factor}; {remedy}"
                    )
            for height, width in extremes(sizes):
                what = sizes[height, width]
                try:
                    output = trace_shapes(network, batch_size, height, width)
                except ReadsValue as error:
                    raise ValueError(f"network {name} cannot be checked: {error}") from None
                except Exception as error:
                    if is_own(network) and not isinstance(error, RuntimeError | ValueError):
                        raise CodeError(f"network {name} fails on {what}: {first_line(error)}") from error
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    sentence = (
                        f"{what} do not fit network {name}, {remedy}, or the options of network.{role} ({reason})"
                    )
                    raise ValueError(sentence) from None
                if wrong := check_output(output, batch_size, (height, width) if name in generators else None):
                    raise ValueError(f"{what} do not fit network {name}: for {batch_size} images it {wrong}")
        if self.gp > 0 and len(both := list({**a, **b}.values())) > 1:
            raise ValueError(
                f"WGAN-GP needs real and fake pictures of one size, which {both[0]} and {both[1]} are not: "
                f"{remedy}, or leave its penalty out with loss.lambda_gp=0"
            )

    def sizes_of(self, name: str, a: Sizes, b: Sizes) -> Sizes:
        """The sizes of the images that the network of this name takes: by default those of both domains."""
        return {**a, **b}

    def whole_batch(self, *, ranks: bool = False) -> str:
        """Why a batch cannot be computed in parts, as a clause; empty if every image is computed on its own.

        Args:
            ranks: the parts are the shares of several ranks, which may exchange their keys.
        """
        if norms := {module for module in self.modules() if isinstance(module, nn.BatchNorm2d)}:
            judging = {module for network in self.discriminators().values() for module in network.modules()}
            key = "network.discriminator_norm" if norms <= judging else "network.norm"
            return f"batch norm takes its statistics over the whole batch ({key}=instance does not)"
        exchanged = ranks and getattr(self.options, "gather_negatives", False)
        if getattr(self.options, "negatives", "image") == "batch" and not exchanged:
            return "loss.negatives=batch contrasts pictures of the whole batch (loss.negatives=image does not)"
        if getattr(self.options, "external", "none") == "bank":
            return "loss.external=bank would show a part what the parts before it put in the bank"
        return ""

    def share_keys(self, others: Callable[[Tensor], Tensor]) -> None:
        """With several ranks: take the keys of the others as negatives too, if an option of the method says so.

        Args:
            others: returns the tensors of the other ranks for a constant one, (...) -> (ranks - 1, ...).
        """

    def share_draws(self, rank: int, world: int) -> None:
        """With several ranks: draw the random numbers of single images for the images of all ranks.

        All ranks draw the same numbers. Image i of this rank is image i * world + rank of the whole batch.
        """


def check_ranges(options: Any, network: NetworkOptions) -> None:
    """Refuse options that are out of range; ValueError names the first one."""
    check(options, "loss")
    check(network, "network")


def together(network: nn.Module, pictures: Sequence[Tensor], *, independent: bool, **arguments: Any) -> list[Any]:
    """Apply `network` to several batches of images, in one pass if they have one size and do not influence each other.

    Args:
        independent: the network computes each image on its own (no batch norm).
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


def tapping(generator: nn.Module, wanted: bool = True) -> dict[str, bool]:
    """Return the arguments with which `generator` hands out taps in place of features; none if it cannot.

    A method passes them where it does no more with the features than sample and project rows (see `common.taps`).
    """
    own = isinstance(generator, ResnetGenerator) and type(generator).forward is ResnetGenerator.forward
    plain = own and not generator._forward_hooks and "forward" not in generator.__dict__
    return {"taps": True} if wanted and plain else {}
