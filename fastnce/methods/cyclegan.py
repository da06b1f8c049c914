"""CycleGAN: Zhu et al., Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks (ICCV 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.options import option
from .base import (
    GP_HELP,
    WEIGHT,
    Batch,
    Draws,
    Group,
    Losses,
    Method,
    NetworkOptions,
    Outputs,
    Phase,
    Sizes,
    check_ranges,
    together,
)
from .losses import GANMode, gan_loss, gradient_penalty

MOST_POOLED = 10**6


@dataclass
class CycleGANOptions:
    """The options of CycleGAN's loss; the defaults are the published ones."""

    lambda_a: float = option(10.0, "weight of the cycle A, B, A: higher keeps more of A's content", **WEIGHT)
    lambda_b: float = option(10.0, "weight of the cycle B, A, B", **WEIGHT)
    lambda_identity: float = option(
        0.5, "weight of the identity loss relative to the cycle weights: keeps colours; 0 leaves it out", **WEIGHT
    )
    pool_size: int = option(
        50,
        "past fakes kept per domain for the discriminators to judge; 0 shows the latest only",
        low=0,
        high=MOST_POOLED,
    )
    gan_mode: GANMode = option("lsgan", "lsgan, vanilla, wgangp, nonsaturating or hinge")
    lambda_gp: float = option(10.0, GP_HELP, **WEIGHT)


class ImagePool(nn.Module):
    """A pool of past fakes, so that a discriminator judges a history of them (Shrivastava et al., CVPR 2017).

    Until the pool is full, every image is stored and returned. After that, with probability 1/2, an image replaces a
    random one of the pool, which is returned; otherwise it is returned itself. Everything runs on the device, with
    fixed shapes and without branches, so that a step can be captured.

    Args:
        size: the number of images kept; 0 returns every image.
    """

    pictures: Tensor
    count: Tensor

    def __init__(self, size: int):
        super().__init__()
        if size < 0:
            raise ValueError(f"pool_size must be at least 0, not {size}")
        self.size = size
        # allocated by `prepare`, when the size of the images is known
        self.register_buffer("pictures", torch.empty(0))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def prepare(self, like: Tensor, channels: int) -> None:
        """Allocate the pool for images of this size and so many channels; ValueError if it has another size.

        The pool takes the memory format of `like`, also after loading a checkpoint, which does not store it. Images of
        two formats, judged in one batch, would be computed in the slower one.
        """
        shape = (channels, *like.shape[2:])
        if self.size == 0:
            return
        if not self.pictures.numel():
            self.pictures = like.new_zeros(self.size, *shape)
        elif self.pictures.shape[1:] != shape:
            raise ValueError(
                f"a pool of {tuple(self.pictures.shape[1:])} pictures cannot take {shape}: all crops of a run must be "
                f"of one size, or loss.pool_size=0"
            )
        channels_last = like.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.pictures = self.pictures.contiguous(memory_format=layout)

    @torch.no_grad()
    def forward(self, fakes: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Return the images for the discriminator to judge, without gradient, of the shape of `fakes`.

        An image that is not finite is never stored.

        Args:
            fakes: (images, channels, height, width).
            uniform: (images, 2) in [0, 1), whether each image is exchanged (above 1/2) and for which one of the pool;
                drawn if None.
        """
        fakes = fakes.detach()
        if self.size == 0:
            return fakes
        if self.pictures.shape[1:] != fakes.shape[1:]:
            self.prepare(fakes, fakes.shape[1])
        if uniform is None:
            uniform = torch.rand(len(fakes), 2, device=fakes.device)
        judged = []
        for fake, (coin, place) in zip(fakes.split(1), uniform.unbind(), strict=True):
            filling = self.count < self.size
            slot = torch.where(filling, self.count, (place * self.size).long()).clamp_max(self.size - 1)
            old = self.pictures.index_select(0, slot)
            change = ~filling & (coin > 0.5)
            keep = (filling | change) & fake.isfinite().all()
            judged.append(torch.where(change, old, fake))
            self.pictures.index_copy_(0, slot, torch.where(keep, fake, old))
            self.count.add_((filling & keep).long())
        return torch.cat(judged)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        stored = state_dict.get(f"{prefix}pictures")
        if stored is not None and stored.numel() and (stored.dim() != 4 or len(stored) != self.size):
            args[-1].append(f"{prefix}pictures is {tuple(stored.shape)}, this pool has {self.size} pictures")  # errors
            return
        if stored is not None and stored.shape != self.pictures.shape:
            self.pictures = self.pictures.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class TwoWay(Method):
    """The base of CycleGAN, DCLGAN and DCD-GAN: generators from A to B and back, and a discriminator per domain.

    By the published names, G_A generates B from A and D_A judges B; G_B generates A and D_B judges A.
    """

    def __init__(self, network: NetworkOptions, gan_mode: GANMode, lambda_gp: float, pool_size: int):
        super().__init__()
        self.gan_mode = gan_mode
        self.gp = lambda_gp if gan_mode == "wgangp" else 0.0
        self.generator_a = network.build_generator()
        self.generator_b = network.build_generator(reverse=True)
        self.discriminator_a = network.build_discriminator(network.out_channels)
        self.discriminator_b = network.build_discriminator(network.in_channels)
        self.pool_a = ImagePool(pool_size)
        self.pool_b = ImagePool(pool_size)

    def generators(self) -> dict[str, nn.Module]:
        return {"G_A": self.generator_a, "G_B": self.generator_b}

    def discriminators(self) -> dict[str, nn.Module]:
        return {"D_A": self.discriminator_a, "D_B": self.discriminator_b}

    def discriminator_losses(self) -> dict[str, tuple[str, ...]]:
        return {} if self.gp > 0 else {name: (name,) for name in self.discriminators()}

    def identity_losses(self) -> tuple[str, ...]:
        return "idt_A", "idt_B"

    def extra_state_modules(self) -> dict[str, nn.Module]:
        return {"pool_A": self.pool_a, "pool_B": self.pool_b} if self.pool_a.size else {}

    def prepare(self, batch: Batch) -> None:
        """Allocate the pools. A fake has the size of its input and the channels of its own domain."""
        self.pool_b.prepare(batch.a, batch.b.shape[1])
        self.pool_a.prepare(batch.b, batch.a.shape[1])

    def check_sizes(self, batch_size: int, a: Sizes, b: Sizes, remedy: str) -> None:
        for sizes in (a, b):
            if self.pool_a.size and len(sizes) > 1:
                first, second = list(sizes.values())[:2]
                raise ValueError(
                    f"loss.pool_size={self.pool_a.size} remembers fakes of one size, but {first} and {second} are of "
                    f"one domain: {remedy}, or set loss.pool_size=0"
                )
        super().check_sizes(batch_size, a, b, remedy)

    def groups(self) -> dict[str, Group]:
        return {
            "G": Group((self.generator_a, self.generator_b)),
            "D": Group((self.discriminator_a, self.discriminator_b)),
        }

    def translate_both(self, batch: Batch, identity: bool, layers: Sequence[int] = ()) -> Outputs:
        """Compute fake_B = G_A(A) and fake_A = G_B(B), and with `identity` also idt_A = G_A(B) and idt_B = G_B(A).

        With `layers`, keys_A and keys_B are the features of G_A(A) and G_B(B) at these layers.
        """
        outputs: Outputs = {}
        for domain, other, generator, real in (
            ("A", "B", self.generator_a, batch),
            ("B", "A", self.generator_b, batch[::-1]),
        ):
            pictures = real if identity else real[:1]
            made = together(generator, pictures, independent=generator.features_repeat, layers=layers)
            if layers:
                outputs[f"keys_{domain}"] = made[0][1]
                made = [picture for picture, _ in made]
            outputs[f"fake_{other}"] = made[0]
            if identity:
                outputs[f"idt_{domain}"] = made[1]
        return outputs

    def d_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        """The losses of both discriminators, which judge fakes from their pools."""
        losses: Losses = {}
        for name, discriminator, pool, fake, real in (
            ("D_A", self.discriminator_a, self.pool_b, outputs["fake_B"], batch.b),
            ("D_B", self.discriminator_b, self.pool_a, outputs["fake_A"], batch.a),
        ):
            independent = discriminator.pictures_independent
            fake = pool(fake)
            judged_real, judged_fake = together(discriminator, [real, fake], independent=independent)
            losses[name] = 0.5 * (
                gan_loss(judged_real, True, self.gan_mode) + gan_loss(judged_fake, False, self.gan_mode)
            )
            if self.gp > 0:
                losses[f"{name}_GP"] = 0.5 * self.gp * gradient_penalty(discriminator, real, fake)
        total = losses["D_A"] + losses["D_B"]
        return total + losses["D_A_GP"] + losses["D_B_GP"] if self.gp > 0 else total, losses

    def adversarial(self, outputs: Outputs, *, saturating: bool = False) -> Losses:
        """The GAN losses G_A and G_B of the generators; `saturating` takes the hinge of DCLGAN's code."""
        judged_b, judged_a = self.discriminator_a(outputs["fake_B"]), self.discriminator_b(outputs["fake_A"])
        return {
            name: gan_loss(judged, True, self.gan_mode, for_generator=not saturating)
            for name, judged in (("G_A", judged_b), ("G_B", judged_a))
        }

    def translate(self, a: Tensor) -> Tensor:
        return self.generator_a(a)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        fake_b, fake_a = self.generator_a(batch.a), self.generator_b(batch.b)
        return {"A": batch.a, "fake_B": fake_b, "rec_A": self.generator_b(fake_b), "B": batch.b, "fake_A": fake_a}


class CycleGAN(TwoWay):
    """GAN, cycle and identity losses; the generators are updated first, then the discriminators."""

    Options = CycleGANOptions

    def __init__(self, options: CycleGANOptions, network: NetworkOptions):
        check_ranges(options, network)
        if options.lambda_identity > 0 and network.in_channels != network.out_channels:
            raise ValueError(
                f"the identity loss feeds B to G_A: network.in_channels={network.in_channels} and "
                f"out_channels={network.out_channels} must be equal, or loss.lambda_identity=0"
            )
        super().__init__(network, options.gan_mode, options.lambda_gp, options.pool_size)
        self.options = options

    def phases(self):
        # the discriminators judge fakes from before the generators' update
        return Phase(self.g_loss, ("G",)), Phase(self.d_loss, ("D",), apart=True)

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        outputs = self.translate_both(batch, identity=self.options.lambda_identity > 0)
        outputs["rec_A"] = self.generator_b(outputs["fake_B"])
        outputs["rec_B"] = self.generator_a(outputs["fake_A"])
        return outputs

    def g_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        options = self.options
        losses = self.adversarial(outputs)
        losses["cycle_A"] = options.lambda_a * F.l1_loss(outputs["rec_A"], batch.a)
        losses["cycle_B"] = options.lambda_b * F.l1_loss(outputs["rec_B"], batch.b)
        if options.lambda_identity > 0:
            losses["idt_A"] = options.lambda_b * options.lambda_identity * F.l1_loss(outputs["idt_A"], batch.b)
            losses["idt_B"] = options.lambda_a * options.lambda_identity * F.l1_loss(outputs["idt_B"], batch.a)
        total = torch.stack(list(losses.values())).sum()
        return total, losses | {"G": total}
