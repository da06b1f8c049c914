"""FSeSim and LSeSim: Zheng et al., The Spatially-Correlative Loss for Various Image Translation Tasks (CVPR 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.options import option
from ..nce.api import sample_patch_ids
from ..nce.spatial import SpatialLoss, contrast_similarity, self_similarity, spatial_loss
from ..networks import init_weights
from ..networks.published import read_weights
from ..networks.vgg import HALVED, VGG16
from .augment import AUGMENT_HELP, Augment
from .base import (
    MOST_PATCHES,
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
    together,
)
from .jitter import color_jitter
from .losses import GANMode, gradient_penalty
from .pool import MOST_POOLED, ImagePool, check_pool_sizes
from .terms import Terms, judge

LEAST_CHANNELS = 32


@dataclass
class LSeSimOptions:
    """The terms of the spatially-correlative loss; the defaults are those of the released option files: FSeSim."""

    lambda_spatial: float = option(
        10.0, "weight of the spatial loss: higher keeps more of the input's shapes", **WEIGHT
    )
    lambda_spatial_idt: float = option(0.0, "weight of the spatial loss between y and G(y)", **WEIGHT)
    lambda_identity: float = option(0.0, "weight of the L1 distance between y and G(y)", **WEIGHT)
    vgg_weights: str = option(
        "", "file of VGG16's weights, as torchvision's vgg16-397923af.pth; it must be named to train", anything=True
    )
    vgg_layers: list[int] = option(
        [4, 7, 9], "ReLUs of VGG16, from 0, whose features are compared (published attn_layers)",
        low=0, high=12, ascending=True,
    )  # fmt: skip
    patches: int = option(
        256, "locations drawn per layer (all if a map has fewer); 0: every location", low=0, high=MOST_PATCHES
    )
    patch_size: int = option(64, "side of the window that each location is compared with", low=2, high=16_384)
    loss_mode: SpatialLoss = option("cos", '"cos" or "l1": the distance between self-similarities')
    use_norm: bool = option(False, "cosines as self-similarities; false: tanh of products")
    learned: bool = option(False, "LSeSim: train 1x1 convolutions F for the self-similarities (published learned_attn)")
    jitter: bool = option(
        False, "with learned, F also contrasts images with copies in other colours (published augment)"
    )
    temperature: float = option(0.07, "temperature of F's contrastive loss (published T)", **TEMPERATURE)
    pool_size: int = option(
        50, "past fakes kept for the discriminator to judge; 0 shows the latest only", low=0, high=MOST_POOLED
    )
    augment: str = option("", AUGMENT_HELP, anything=True)
    gan_mode: GANMode = option("lsgan", "lsgan, vanilla, wgangp, nonsaturating or hinge")
    lambda_gradient: float = option(0.0, "weight of WGAN-GP's penalty on the slope of the discriminator", **WEIGHT)

    @classmethod
    def lsesim(cls) -> LSeSimOptions:
        return cls(learned=True, jitter=True)


class SimilarityConvs(nn.Module):
    """The network F: two 1x1 convolutions per layer, `conv_0`, `conv_1` and so on."""

    def __init__(self, channels: list[int]):
        super().__init__()
        for layer, count in enumerate(channels):
            inner = max(LEAST_CHANNELS, count // 4)
            self.add_module(
                f"conv_{layer}", nn.Sequential(nn.Conv2d(count, inner, 1), nn.ReLU(), nn.Conv2d(inner, inner, 1))
            )
        init_weights(self, "normal", 0.02)  # whatever the other networks have, as released

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [conv(x) for conv, x in zip(self.children(), maps, strict=True)]


class LSeSim(Method):
    """A generator and a discriminator, and a loss between the self-similarities of VGG16's features of x and G(x).

    F is updated first if there is one, then D, then G.
    """

    Options = LSeSimOptions

    options: LSeSimOptions

    def __init__(self, options: LSeSimOptions, network: NetworkOptions):
        super().__init__()
        check_ranges(options, network)
        self.options = options
        self.identity = options.lambda_identity > 0 or options.lambda_spatial_idt > 0
        if self.identity and network.in_channels != network.out_channels:
            raise ValueError(
                f"loss.lambda_identity and loss.lambda_spatial_idt feed y to G: network.in_channels="
                f"{network.in_channels} and out_channels={network.out_channels} must be equal, or both weights 0"
            )
        for key in ("in_channels", "out_channels"):
            if (channels := getattr(network, key)) not in (1, 3):
                raise ValueError(
                    f"VGG16 takes images of 1 or 3 channels, so network.{key} must be 1 or 3, not {channels}"
                )
        if options.jitter and not options.learned:
            raise ValueError("loss.jitter=true needs loss.learned=true: only F contrasts copies in other colours")
        self.gp = options.lambda_gradient
        self.augment = Augment(options.augment)
        self.layers = list(options.vgg_layers)
        path = options.vgg_weights
        self.vgg = VGG16(max(self.layers) + 1, read_weights(path) if path else None, f"loss.vgg_weights={path}")
        self.generator = network.build_generator()
        self.discriminator = network.build_discriminator(network.out_channels)
        self.convs = SimilarityConvs(self.vgg.channels(self.layers)) if options.learned else None
        self.pool = ImagePool(options.pool_size)

    def generators(self):
        return {"G": self.generator}

    def discriminators(self):
        return {"D": self.discriminator}

    def projectors(self):
        return {} if self.convs is None else {"F": self.convs}

    def discriminator_losses(self):
        return {} if self.gp > 0 or self.options.gan_mode == "wgangp" else {"D": ("D_real", "D_fake")}

    def identity_losses(self) -> tuple[str, ...]:
        return ("idt_B",)

    def extra_state_modules(self) -> dict[str, nn.Module]:
        return {"pool": self.pool} if self.pool.size else {}

    def groups(self):
        groups = {"G": Group((self.generator,)), "D": Group((self.discriminator,))}
        return groups if self.convs is None else {**groups, "F": Group((self.convs,))}

    def phases(self):
        phases = Phase(self.d_loss, ("D",)), Phase(self.g_loss, ("G",))
        return phases if self.convs is None else (Phase(self.f_loss, ("F",)), *phases)

    def share_draws(self, rank: int, world: int) -> None:
        self.augment.rank, self.augment.world = rank, world

    def prepare(self, batch: Batch) -> None:
        self.pool.prepare(batch.a, batch.b.shape[1])

    def check_options(self, batch_size: int) -> None:
        super().check_options(batch_size)
        if not self.options.vgg_weights:
            raise ValueError(
                "the spatial loss compares features of a trained VGG16: name the file of its weights with "
                "loss.vgg_weights, such as torchvision's vgg16-397923af.pth"
            )

    def check_sizes(self, batch_size: int, a: Sizes, b: Sizes, remedy: str) -> None:
        check_pool_sizes(self.options.pool_size, a, remedy)
        factor = 2 ** (1 + sum(max(self.layers) >= layer for layer in HALVED))
        for sizes in (a, b) if self.options.learned or self.identity else (a,):
            for (height, width), what in sizes.items():
                if min(height, width) < factor:
                    raise ValueError(
                        f"{what} leave fewer than 2x2 locations at ReLU {max(self.layers)} of loss.vgg_layers: "
                        f"{remedy}, or leave the layer out"
                    )
        both = list({**a, **b}.values())
        if self.options.learned and len(both) > 1:
            raise ValueError(f"loss.learned=true contrasts {both[0]} with {both[1]}, of another size: {remedy}")
        super().check_sizes(batch_size, a, b, remedy)

    def sizes_of(self, name: str, a: Sizes, b: Sizes) -> Sizes:
        return super().sizes_of(name, a, b) if name == "D" or self.identity else a

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        made = together(
            self.generator, batch if self.identity else batch[:1], independent=self.generator.features_repeat
        )
        return {"fake_B": made[0]} | ({"idt_B": made[1]} if self.identity else {})

    def f_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        """F's loss: locations of x find those of G(x), and of a copy of x in other colours, among those of y."""
        source, target, other = batch.a, outputs["fake_B"].detach(), batch.b
        if self.options.jitter:
            source, copy = torch.cat([source, source]), self.jitter(batch.a)
            if copy.shape[1] != target.shape[1]:  # grey and colour: VGG16 sees grey as three equal channels
                target, copy = target.expand(-1, 3, -1, -1), copy.expand(-1, 3, -1, -1)
            target = torch.cat([target, copy])
            other = torch.cat([other, self.jitter(batch.b)])
        with torch.no_grad():
            maps = [self.vgg(pictures, self.layers) for pictures in (source, target, other.flip(2, 3))]
        ids = self._ids(maps[0], draws, 0)
        sources, targets, others = (self._similarities(found, ids) for found in maps)
        losses = [
            contrast_similarity(s, t, o, self.options.temperature)
            for s, t, o in zip(sources, targets, others, strict=True)
        ]
        loss = torch.stack(losses).mean()
        return loss, {"spatial": loss}

    def jitter(self, pictures: Tensor) -> Tensor:
        """Return copies of images in other colours."""
        return color_jitter(pictures)

    def d_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        options = self.options
        fake, real = self.pool(outputs["fake_B"]), batch.b
        independent = self.discriminator.pictures_independent
        shown = [self.augment(real), self.augment(fake)]
        judged_real, judged_fake = judge(self.discriminator, shown, independent)
        terms = Terms()
        terms.gan("D_real", judged_real, True, options.gan_mode, share=0.5)
        terms.gan("D_fake", judged_fake, False, options.gan_mode, share=0.5)
        total, losses = terms.total()
        if self.gp > 0:
            losses["D_Gradient"] = self.gp * gradient_penalty(self.augment.before(self.discriminator), real, fake)
            total = total + losses["D_Gradient"]
        return total, losses

    def g_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        options = self.options
        judged = self.discriminator(self.augment(outputs["fake_B"]))
        terms = Terms()
        terms.gan("G_GAN", judged, True, options.gan_mode, for_generator=True)
        call = int(options.learned)
        if options.lambda_spatial > 0:
            spatial = self._spatial(batch.a, outputs["fake_B"], draws, call)
            terms.given(["G_s"], spatial[None], weight=options.lambda_spatial)
            call += 1
        if options.lambda_spatial_idt > 0:
            spatial = self._spatial(batch.b, outputs["idt_B"], draws, call)
            terms.given(["G_s_idt_B"], spatial[None], weight=options.lambda_spatial_idt)
        if options.lambda_identity > 0:
            terms.distance("idt_B", outputs["idt_B"], batch.b, weight=options.lambda_identity)
        total, losses = terms.total()
        return total, losses | {"G": total}

    def _spatial(self, source: Tensor, target: Tensor, draws: Draws, call: int) -> Tensor:
        """Compute the spatial loss between images and their translations, the mean over layers."""
        with torch.no_grad():
            maps = self.vgg(source, self.layers)
        ids = self._ids(maps, draws, call)
        with torch.no_grad():
            sources = self._similarities(maps, ids)
        targets = self._similarities(self.vgg(target, self.layers), ids)
        kind, norm = self.options.loss_mode, self.options.use_norm
        return torch.stack([spatial_loss(s, t, kind, norm) for s, t in zip(sources, targets, strict=True)]).mean()

    def _similarities(self, maps: list[Tensor], ids: list[Tensor]) -> list[Tensor]:
        maps = maps if self.convs is None else self.convs(maps)
        window, norm = self.options.patch_size, self.options.use_norm
        return [self_similarity(x, layer, window, norm) for x, layer in zip(maps, ids, strict=True)]

    def _ids(self, maps: list[Tensor], draws: Draws, call: int) -> list[Tensor]:
        """The locations of every layer, (patches,), drawn unless they are given."""
        if draws.patch_ids is not None:
            return draws.patch_ids[call]
        counts = [x.shape[2] * x.shape[3] for x in maps]
        return [sample_patch_ids(n, self.options.patches or n, device=maps[0].device) for n in counts]

    def translate(self, a: Tensor) -> Tensor:
        return self.generator(a)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"A": batch.a, "fake_B": self.generator(batch.a), "B": batch.b}
