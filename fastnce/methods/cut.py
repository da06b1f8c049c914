"""CUT and FastCUT: Park et al., Contrastive Learning for Unpaired Image-to-Image Translation (ECCV 2020)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..common.options import option
from ..nce import PatchNCEHead
from ..nce.api import Negatives
from ..nce.selection import attention_patch_ids, dense_patch_ids, pooled_maps
from .augment import AUGMENT_HELP, Augment
from .base import (
    GP_HELP,
    LEARN_HELP,
    MOST_CHANNELS,
    MOST_PATCHES,
    PROJECTOR_HELP,
    TEMPERATURE,
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
)
from .checks import check_contrast, check_learned_temperature, drawn_rows
from .losses import SATURATING_HELP, GANMode, gradient_penalty
from .pool import MOST_POOLED, POOL_HELP, ImagePool, check_pool_sizes
from .terms import Terms, judge
from .weighting import OPTIONS_HELP, WEIGHTING_HELP, WEIGHTING_NAMES, find_weighting


@dataclass
class CUTOptions:
    """CUT's terms; the defaults are the published ones."""

    lambda_gan: float = option(1.0, "weight of the GAN loss", **WEIGHT)
    lambda_nce: float = option(1.0, "weight of PatchNCE: higher keeps more of the input's content", **WEIGHT)
    nce_idt: bool = option(True, "also PatchNCE between y and G(y): keeps colours, costs a second image per step")
    nce_layers: list[int] = option(
        [0, 4, 8, 12, 16], "generator layers whose features are contrasted", low=0, ascending=True
    )
    temperature: float = option(
        0.07, "PatchNCE temperature: lower concentrates on the hardest negatives", **TEMPERATURE
    )
    temperatures: list[float] = option(
        [], "one temperature per layer instead of `temperature`; empty: the same for all", **TEMPERATURE
    )
    patches: int = option(
        256,
        "locations drawn per image and layer (all if a map has fewer); 0: every location",
        low=0,
        high=MOST_PATCHES,
    )
    learn_temperature: bool = option(False, LEARN_HELP)
    projector: Literal["mlp_sample", "sample", "reshape"] = option("mlp_sample", PROJECTOR_HELP)
    projection: int = option(256, "width of the projector F (published netF_nc)", low=1, high=MOST_CHANNELS)
    negatives: Negatives = option("image", '"image": other patches of the same image; "batch": patches of all images')
    selection: Literal["uniform", "attention"] = option(
        "uniform",
        '"uniform": random locations; "attention": least attention entropy (QS-Attn), in maps of up to 4096 locations',
    )
    weighting: str = option("none", WEIGHTING_HELP, choices=WEIGHTING_NAMES, imports=True)
    weighting_options: str = option("", OPTIONS_HELP, anything=True)
    symmetric: bool = option(False, "average both directions: keys are also contrasted with the queries")
    gather_negatives: bool = option(
        False, "with several ranks, negatives=batch uses the images of all ranks, as one process would"
    )
    flip_equivariance: bool = option(False, "FastCUT: mirror the images in half of the steps, and their features back")
    gan_mode: GANMode = option("lsgan", "lsgan, vanilla, wgangp, nonsaturating or hinge")
    lambda_gp: float = option(10.0, GP_HELP, **WEIGHT)
    saturating: bool = option(False, SATURATING_HELP)
    pool_size: int = option(0, POOL_HELP, low=0, high=MOST_POOLED)
    augment: str = option("", AUGMENT_HELP, anything=True)
    reuse_key_features: bool = option(
        True, "use the features of the pass that computes G(x) as keys; false encodes x again"
    )

    @classmethod
    def fastcut(cls) -> CUTOptions:
        return cls(lambda_nce=10.0, nce_idt=False, flip_equivariance=True)


ATTENTION_LOCATIONS = 4096
"""Locations of the largest map whose attention is computed: locations^2 values, 64 MiB per image in float32."""


class CUT(Method):
    """One generator, one discriminator, one projector; D is updated first, then G and F together."""

    Options = CUTOptions

    keys_learn = False
    """Whether a loss differentiates the features of the real images too."""
    taps_keys = True
    """Whether `projects_rows` holds for the features of the real images too."""

    def __init__(self, options: CUTOptions, network: NetworkOptions):
        super().__init__()
        check_ranges(options, network)
        if not (options.lambda_gan > 0 or options.lambda_nce > 0):
            raise ValueError("every term has weight 0: set loss.lambda_gan or loss.lambda_nce above 0")
        check_learned_temperature(options.learn_temperature, options.lambda_nce)
        if options.temperatures and len(options.temperatures) != len(options.nce_layers):
            raise ValueError(
                f"loss.temperatures must be empty or one per layer: {len(options.temperatures)} are given for "
                f"{len(options.nce_layers)} layers"
            )
        if options.nce_idt and network.in_channels != network.out_channels:
            raise ValueError(
                f"nce_idt translates y with the same generator as x: network.in_channels={network.in_channels} and "
                f"out_channels={network.out_channels} must be equal, or loss.nce_idt=false"
            )
        if network.in_channels != network.out_channels and options.lambda_nce > 0:
            raise ValueError(
                f"PatchNCE encodes G(x) with G: network.in_channels={network.in_channels} and "
                f"out_channels={network.out_channels} must be equal, or loss.lambda_nce=0"
            )
        if options.gather_negatives and (options.negatives, options.weighting, options.symmetric) != (
            "batch",
            "none",
            False,
        ):
            raise ValueError(
                "loss.gather_negatives=true makes one batch of all ranks' pictures: it needs loss.negatives=batch, "
                "loss.weighting=none and loss.symmetric=false"
            )
        self.options = options
        self.gp = options.lambda_gp if options.gan_mode == "wgangp" else 0.0
        self.augment = Augment(options.augment)
        self.pool = ImagePool(options.pool_size)
        self.layers = list(options.nce_layers)
        self.generator = network.build_generator()
        self.discriminator = network.build_discriminator(network.out_channels)
        self.head = PatchNCEHead(
            self.generator.feature_channels(self.layers),
            options.projection,
            options.patches or 1,  # 0: all locations are passed in, none is drawn
            options.temperatures or options.temperature,
            negatives=options.negatives,
            weighting=find_weighting(options.weighting, options.weighting_options),
            symmetric=options.symmetric,
            use_mlp=options.projector == "mlp_sample",
            learn_temperature=options.learn_temperature,
            init_type=network.init_type,
            init_gain=network.init_gain,
        )

    def generators(self):
        return {"G": self.generator}

    def discriminators(self):
        return {"D": self.discriminator}

    def projectors(self):
        return {"F": self.head}

    def networks(self):
        return {**self.generators(), **self.projectors(), **self.discriminators()}

    def discriminator_losses(self):
        return {} if self.gp > 0 else {"D": ("D_real", "D_fake")}

    def identity_losses(self) -> tuple[str, ...]:
        return ("NCE_Y",)

    def groups(self):
        groups = {"G": Group((self.generator,)), "D": Group((self.discriminator,)), "F": Group((self.head,))}
        if not self.trains_projector:
            del groups["F"]
        return groups

    @property
    def trains_projector(self) -> bool:
        """Whether F has parameters that PatchNCE trains."""
        return self.options.lambda_nce > 0 and any(True for _ in self.head.parameters())

    def phases(self):
        return Phase(self.d_loss, ("D",)), Phase(self.g_loss, ("G", "F") if self.trains_projector else ("G",))

    def extra_state_modules(self) -> dict[str, nn.Module]:
        return {"pool": self.pool} if self.pool.size else {}

    def prepare(self, batch: Batch) -> None:
        self.pool.prepare(batch.a, batch.b.shape[1])

    def share_keys(self, others: Callable[[Tensor], Tensor]) -> None:
        if self.options.gather_negatives:
            self.head.others = others

    def share_draws(self, rank: int, world: int) -> None:
        self.augment.rank, self.augment.world = rank, world

    def check_options(self, batch_size: int) -> None:
        super().check_options(batch_size)
        options = self.options
        if options.lambda_nce > 0 and options.projector == "reshape" and options.selection != "uniform":
            raise ValueError("loss.projector=reshape contrasts a whole grid: it needs loss.selection=uniform")
        alone = options.patches == 1 and options.projector != "reshape"
        if options.lambda_nce > 0 and alone and (options.negatives == "image" or batch_size == 1):
            raise ValueError(
                f"there is nothing to contrast with loss.patches=1, loss.negatives={options.negatives} and "
                f"data.batch={batch_size}: draw more patches, or contrast within a batch of several crops"
            )

    def check_sizes(self, batch_size: int, a: Sizes, b: Sizes, remedy: str) -> None:
        options = self.options
        if self.contrasts_both and len(both := list({**a, **b}.values())) > 1:
            raise ValueError(
                f"{both[0]} and {both[1]} cannot go through G in one batch, as loss.nce_idt=true needs: {remedy}, or "
                f"set loss.nce_idt=false"
            )
        check_pool_sizes(options.pool_size, a, remedy)
        super().check_sizes(batch_size, a, b, remedy)
        if options.lambda_nce > 0:
            pooled = options.projector == "reshape"  # to 16 locations, whatever the size
            rows = drawn_rows(self.generator, self.layers, 0 if pooled else options.patches, self.sizes_of("G", a, b))
            exchanged = options.gather_negatives and not pooled
            alike = "loss.gather_negatives=true exchanges as many with every rank" if exchanged else ""
            check_contrast(rows, self.layers, options.negatives == "image" or batch_size == 1, alike, remedy)

    def sizes_of(self, name: str, a: Sizes, b: Sizes) -> Sizes:
        return super().sizes_of(name, a, b) if name in self.discriminators() or self.contrasts_both else a

    @property
    def contrasts_both(self) -> bool:
        """Whether the generator also receives B, in one batch with A."""
        return self.options.nce_idt and self.options.lambda_nce > 0

    @property
    def projects_rows(self) -> bool:
        """Whether the loss reads no more of the features than a few rows per image, at distinct locations."""
        options = self.options
        return options.patches > 0 and options.projector != "reshape" and options.selection == "uniform"

    def draw(self, rng: random.Random) -> Draws:
        return Draws(flip=self.options.flip_equivariance and rng.random() < 0.5)

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        options, generator = self.options, self.generator
        both = self.contrasts_both
        if both and batch.a.shape != batch.b.shape:
            raise ValueError(
                f"A {tuple(batch.a.shape)} and B {tuple(batch.b.shape)} go through G in one batch: crop both to one "
                f"size (data.crop_size), or set loss.nce_idt=false"
            )
        real = torch.cat([batch.a, batch.b]) if both else batch.a
        keys = None
        # The features of a mirrored image are not the mirrored features, so x is then encoded separately.
        if options.reuse_key_features and options.lambda_nce > 0 and not draws.flip and generator.features_repeat:
            fake, features = generator(real, self.layers, **tapping(generator, self.projects_rows and self.taps_keys))
            keys = features if self.keys_learn else [feature.detach() for feature in features]
        else:
            fake = generator(real.flip(3) if draws.flip else real)
        n = batch.a.shape[0]
        outputs: Outputs = {"fake": fake, "fake_B": fake[:n], "real": real, "keys": keys}
        if both:
            outputs["idt_B"] = fake[n:]
        return outputs

    def d_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        fakes, reals = self.pool(outputs["fake_B"]), batch.b
        fake, real = self.augment(fakes), self.augment(reals)
        judged_fake, judged_real = judge(self.discriminator, [fake, real], self.discriminator.pictures_independent)
        terms = Terms()
        terms.gan("D_real", judged_real, True, self.options.gan_mode, share=0.5)
        terms.gan("D_fake", judged_fake, False, self.options.gan_mode, share=0.5)
        total, losses = terms.total()
        if self.gp > 0:
            losses["D_GP"] = 0.5 * self.gp * gradient_penalty(self.augment.before(self.discriminator), reals, fakes)
            total = total + losses["D_GP"]
        return total, losses

    def g_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        total, losses = self.g_terms(outputs, draws).total()
        return total, losses | {"G": total}

    def g_terms(self, outputs: Outputs, draws: Draws) -> Terms:
        """Return the terms of the loss of G and F."""
        options = self.options
        terms = Terms()
        if options.lambda_gan > 0:
            judged = self.discriminator(self.augment(outputs["fake_B"]))
            generators = not options.saturating
            terms.gan("G_GAN", judged, True, options.gan_mode, for_generator=generators, weight=options.lambda_gan)
        if options.lambda_nce > 0:
            nce = self._contrast(outputs, draws)
            terms.given(["NCE", "NCE_Y"][: len(nce)], nce, weight=options.lambda_nce, share=1.0 / len(nce))
        return terms

    def _contrast(self, outputs: Outputs, draws: Draws) -> Tensor:
        """Compute PatchNCE of (x, G(x)) and, with the identity term, of (y, G(y)): (directions,)."""
        queries, keys, directions = self.maps(outputs, draws)
        ids = self._patch_ids(keys, directions, draws)
        return self.head(queries, keys, directions=directions, patch_ids=ids).reshape(directions)

    def maps(self, outputs: Outputs, draws: Draws) -> tuple[list[Tensor], list[Tensor], int]:
        """Return the features of the fakes, those of the real images, and the number of directions."""
        taps = tapping(self.generator, self.projects_rows)
        queries = self.generator(outputs["fake"], self.layers, encode_only=True, **taps)
        if draws.flip:
            queries = [query.flip(3) for query in queries]
        keys = outputs["keys"]
        if keys is None:
            with torch.set_grad_enabled(self.keys_learn and torch.is_grad_enabled()):
                taps = tapping(self.generator, self.projects_rows and self.taps_keys)
                keys = self.generator(outputs["real"], self.layers, encode_only=True, **taps)
        if self.options.projector == "reshape":
            queries, keys = pooled_maps(queries), pooled_maps(keys)
        return queries, keys, 2 if "idt_B" in outputs else 1

    def _patch_ids(self, keys: list[Tensor], directions: int, draws: Draws):
        """Return the locations for the head, or None if the head shall draw them."""
        options = self.options
        if draws.patch_ids is not None:
            return draws.patch_ids if directions > 1 else draws.patch_ids[0]
        if options.patches == 0 or options.projector == "reshape":
            return dense_patch_ids(keys)
        if options.selection == "uniform":
            return None
        return [
            attention_patch_ids(key, options.patches)[0] if key[0, 0].numel() <= ATTENTION_LOCATIONS else uniform
            for key, uniform in zip(keys, self.head.draw_ids(keys, directions), strict=True)
        ]

    def translate(self, a: Tensor) -> Tensor:
        return self.generator(a)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        pictures = {"A": batch.a, "fake_B": self.generator(batch.a), "B": batch.b}
        if self.options.nce_idt:
            pictures["idt_B"] = self.generator(batch.b)
        return pictures
