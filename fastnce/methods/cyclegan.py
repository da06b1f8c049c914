"""CycleGAN: Zhu et al., Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks (ICCV 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..common.beside import beside
from ..common.options import option
from .augment import AUGMENT_HELP, Augment
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
    tapping,
    together,
)
from .losses import SATURATING_HELP, GANMode, gradient_penalty
from .pool import MOST_POOLED, ImagePool, check_pool_sizes
from .terms import Judged, Terms, judge


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
    saturating: bool = option(False, SATURATING_HELP)
    augment: str = option("", AUGMENT_HELP, anything=True)


class TwoWay(Method):
    """The base of CycleGAN, DCLGAN and DCD-GAN: generators from A to B and back, and a discriminator per domain.

    By the published names, G_A generates B from A and D_A judges B; G_B generates A and D_B judges A.
    """

    def __init__(self, network: NetworkOptions, gan_mode: GANMode, lambda_gp: float, pool_size: int, augment: str):
        super().__init__()
        self.augment = Augment(augment)
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

    def share_draws(self, rank: int, world: int) -> None:
        self.augment.rank, self.augment.world = rank, world

    def check_sizes(self, batch_size: int, a: Sizes, b: Sizes, remedy: str) -> None:
        for sizes in (a, b):
            check_pool_sizes(self.pool_a.size, sizes, remedy)
        super().check_sizes(batch_size, a, b, remedy)

    def groups(self) -> dict[str, Group]:
        return {
            "G": Group((self.generator_a, self.generator_b)),
            "D": Group((self.discriminator_a, self.discriminator_b)),
        }

    def translate_both(
        self, batch: Batch, identity: bool, layers: Sequence[int] = (), flip: bool = False, taps: bool = False
    ) -> Outputs:
        """Compute fake_B = G_A(A) and fake_A = G_B(B), and with `identity` also idt_A = G_A(B) and idt_B = G_B(A).

        With `layers`, keys_A and keys_B are the features of G_A(A) and G_B(B) at these layers. With `flip`, the fakes
        are those of the mirrored images. With `taps`, features may be taps.
        """

        def half(domain: str, other: str, generator: nn.Module, own: Tensor, foreign: Tensor) -> Outputs:
            outputs: Outputs = {}
            first = own.flip(3) if flip else own
            pictures = [first, foreign] if identity else [first]
            independent = generator.features_repeat
            more = tapping(generator, taps and bool(layers))
            made = together(generator, pictures, independent=independent, layers=layers, **more)  # type: ignore[arg-type]
            if layers:
                outputs[f"keys_{domain}"] = made[0][1]
                made = [picture for picture, _ in made]
            outputs[f"fake_{other}"] = made[0]
            if identity:
                outputs[f"idt_{domain}"] = made[1]
            return outputs

        one, other = beside(
            lambda: half("A", "B", self.generator_a, batch.a, batch.b),
            lambda: half("B", "A", self.generator_b, batch.b, batch.a),
        )
        return one | other

    def d_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        """The losses of both discriminators, which judge fakes from their pools."""

        def judged(
            discriminator: nn.Module, pool: ImagePool, fake: Tensor, real: Tensor
        ) -> tuple[list[Judged], Losses]:
            fake = pool(fake)
            independent = discriminator.pictures_independent
            outputs = judge(discriminator, [self.augment(real), self.augment(fake)], bool(independent))
            if self.gp == 0:
                return outputs, {}
            penalty = gradient_penalty(self.augment.before(discriminator), real, fake)
            return outputs, {"GP": 0.5 * self.gp * penalty}

        found = beside(
            lambda: judged(self.discriminator_a, self.pool_b, outputs["fake_B"], batch.b),
            lambda: judged(self.discriminator_b, self.pool_a, outputs["fake_A"], batch.a),
        )
        terms = Terms()
        penalties: Losses = {}
        for name, ((real, fake), penalty) in zip(("D_A", "D_B"), found, strict=True):
            terms.gan(name, real, True, self.gan_mode, weight=0.5)
            terms.gan(name, fake, False, self.gan_mode, weight=0.5)
            penalties |= {f"{name}_{kind}": value for kind, value in penalty.items()}
        total, losses = terms.total()
        for value in penalties.values():
            total = total + value
        return total, losses | penalties

    def adversarial(
        self, terms: Terms, outputs: Outputs, *, saturating: bool = False, weight: float = 1.0, share: float = 1.0
    ) -> None:
        """Add the GAN losses G_A and G_B of the generators; `saturating` takes the hinge of DCLGAN's code."""
        judged_b, judged_a = beside(
            lambda: self.discriminator_a(self.augment(outputs["fake_B"])),
            lambda: self.discriminator_b(self.augment(outputs["fake_A"])),
        )
        for name, judged in ("G_A", judged_b), ("G_B", judged_a):
            terms.gan(name, judged, True, self.gan_mode, for_generator=not saturating, weight=weight, share=share)

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
        super().__init__(network, options.gan_mode, options.lambda_gp, options.pool_size, options.augment)
        self.options = options

    def phases(self):
        # the discriminators judge fakes from before the generators' update
        return Phase(self.g_loss, ("G",)), Phase(self.d_loss, ("D",), apart=True)

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        outputs = self.translate_both(batch, identity=self.options.lambda_identity > 0)
        outputs["rec_A"], outputs["rec_B"] = beside(
            lambda: self.generator_b(outputs["fake_B"]), lambda: self.generator_a(outputs["fake_A"])
        )
        return outputs

    def g_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        options = self.options
        terms = Terms()
        self.adversarial(terms, outputs, saturating=options.saturating)
        terms.distance("cycle_A", outputs["rec_A"], batch.a, weight=options.lambda_a)
        terms.distance("cycle_B", outputs["rec_B"], batch.b, weight=options.lambda_b)
        if options.lambda_identity > 0:
            terms.distance("idt_A", outputs["idt_A"], batch.b, weight=options.lambda_b * options.lambda_identity)
            terms.distance("idt_B", outputs["idt_B"], batch.a, weight=options.lambda_a * options.lambda_identity)
        total, losses = terms.total()
        return total, losses | {"G": total}
