"""DCLGAN: Han et al., Dual Contrastive Learning for Unsupervised Image-to-Image Translation (CVPRW 2021)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..common.beside import beside
from ..common.options import option
from ..nce import NegativeBank, PatchNCEHead, patch_nce_layers, project_patches
from ..nce.api import Negatives
from ..nce.multilayer import cosine_rows
from ..nce.selection import dense_patch_ids, pooled_maps
from .augment import AUGMENT_HELP
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
    NetworkOptions,
    Outputs,
    Phase,
    Sizes,
    check_ranges,
    tapping,
)
from .checks import check_contrast, check_learned_temperature, drawn_rows
from .cyclegan import TwoWay
from .losses import SATURATING_HELP, GANMode
from .pool import MOST_POOLED, POOL_HELP
from .terms import Terms
from .weighting import OPTIONS_HELP, WEIGHTING_HELP, WEIGHTING_NAMES, find_weighting


@dataclass
class DCLGANOptions:
    """DCLGAN's terms; the defaults are those of the released code, and `paper()` has those of the paper."""

    lambda_gan: float = option(1.0, "weight of the GAN loss", **WEIGHT)
    lambda_nce: float = option(2.0, "weight of PatchNCE: higher keeps more of the input's content", **WEIGHT)
    lambda_idt: float = option(
        1.0, "weight of the L1 identity loss: keeps colours; 0 saves two images per step", **WEIGHT
    )
    nce_layers: list[int] = option(
        [4, 8, 12, 16], "generator layers whose features are contrasted", low=0, ascending=True
    )
    temperature: float = option(
        0.07, "PatchNCE temperature: lower concentrates on the hardest negatives", **TEMPERATURE
    )
    learn_temperature: bool = option(False, LEARN_HELP)
    patches: int = option(256, "locations drawn per image and layer (all if a map has fewer)", low=1, high=MOST_PATCHES)
    projector: Literal["mlp_sample", "sample", "reshape"] = option("mlp_sample", PROJECTOR_HELP)
    projection: int = option(256, "width of the projectors F1 and F2 (published netF_nc)", low=1, high=MOST_CHANNELS)
    negatives: Negatives = option("batch", '"image": other patches of the same image; "batch": patches of all images')
    external: Literal["none", "branch", "bank"] = option(
        "none",
        'more negatives: "branch": as many again, from the other branch\'s image; "bank": from past images; "none"',
    )
    bank_size: int = option(
        256, "codes of past images kept per domain and layer, for external=bank", low=1, high=MOST_PATCHES
    )
    gather_negatives: bool = option(
        False, "with several ranks, negatives=batch uses the images of all ranks, as one process would"
    )
    weighting: str = option("none", WEIGHTING_HELP, choices=WEIGHTING_NAMES, imports=True)
    weighting_options: str = option("", OPTIONS_HELP, anything=True)
    cosine: bool = option(
        True, "divide rows by their exact length, as the released code; false: CUT's x / (|x| + 1e-7)"
    )
    gan_mode: GANMode = option("hinge", "lsgan, vanilla, wgangp, nonsaturating or hinge")
    lambda_gp: float = option(10.0, GP_HELP, **WEIGHT)
    saturating: bool = option(True, SATURATING_HELP)
    pool_size: int = option(0, POOL_HELP, low=0, high=MOST_POOLED)
    augment: str = option("", AUGMENT_HELP, anything=True)
    flip_equivariance: bool = option(
        False, "mirror the images that are translated in half of the steps, and the features of the fakes back"
    )
    projector_adam: Literal["library", "generator"] = option(
        "library", 'Adam of F1 and F2: "library": lr 1e-3, betas 0.9 and 0.999 as the released code; "generator": as G'
    )
    reuse_key_features: bool = option(
        True, "use the features of the pass that computes G(x) as keys; false encodes x again"
    )

    @classmethod
    def paper(cls) -> DCLGANOptions:
        return cls(pool_size=50, projector_adam="generator", saturating=False)


class DCLGAN(TwoWay):
    """PatchNCE in both directions: queries of a fake come from the encoder and projector of the *other* generator.

    F1 projects features of domain A (G_A's encoder), F2 those of domain B.
    """

    Options = DCLGANOptions

    weights: tuple[str, ...] = ("lambda_gan", "lambda_nce", "lambda_idt")
    """The options that weigh a term which can train alone."""

    def __init__(self, options: DCLGANOptions, network: NetworkOptions):
        check_ranges(options, network)
        if network.in_channels != network.out_channels and options.lambda_idt > 0:
            raise ValueError(
                f"the identity loss feeds B to G_A: network.in_channels={network.in_channels} and "
                f"out_channels={network.out_channels} must be equal, or loss.lambda_idt=0"
            )
        if not any(getattr(options, name) > 0 for name in self.weights):
            *names, last = (f"loss.{name}" for name in self.weights)
            raise ValueError(f"every term has weight 0: set {', '.join(names)} or {last} above 0")
        check_learned_temperature(options.learn_temperature, options.lambda_nce)
        if options.gather_negatives and (options.negatives, options.weighting) != ("batch", "none"):
            raise ValueError(
                "loss.gather_negatives=true makes one batch of all ranks' pictures: it needs loss.negatives=batch and "
                "loss.weighting=none"
            )
        if options.gather_negatives and options.external == "bank":
            raise ValueError(
                "loss.gather_negatives=true cannot be combined with loss.external=bank, which each rank fills with its "
                "own images: leave one of them out"
            )
        super().__init__(network, options.gan_mode, options.lambda_gp, options.pool_size, options.augment)
        self.options = options
        self.layers = list(options.nce_layers)
        self.projects_rows = options.projector != "reshape"  # as in CUT
        self.others: Callable[[Tensor], Tensor] | None = None
        """Gathers a constant of the other ranks, (...) -> (ranks - 1, ...), for more negatives."""
        self.weighting = find_weighting(options.weighting, options.weighting_options)
        self.projector_a, self.projector_b = (
            PatchNCEHead(
                generator.feature_channels(self.layers),
                options.projection,
                options.patches,
                options.temperature,
                negatives=options.negatives,
                use_mlp=options.projector == "mlp_sample",
                learn_temperature=options.learn_temperature and generator is self.generator_a,  # one T for both
                init_type=network.init_type,
                init_gain=network.init_gain,
            )
            for generator in (self.generator_a, self.generator_b)
        )
        widths = [options.projection] * len(self.layers)
        if options.projector != "mlp_sample":
            widths, others = (g.feature_channels(self.layers) for g in (self.generator_a, self.generator_b))
            if widths != others:
                raise ValueError(
                    f"loss.projector={options.projector} compares features of both generators, which must have the "
                    f"same channels, not {widths} and {others}: use loss.projector=mlp_sample, or other loss.nce_layers"
                )
        self.bank_a, self.bank_b = (
            NegativeBank(options.bank_size, widths) if options.external == "bank" else None for _ in range(2)
        )

    def projectors(self) -> dict[str, nn.Module]:
        return {"F1": self.projector_a, "F2": self.projector_b}

    def extra_state_modules(self) -> dict[str, nn.Module]:
        banks = {"bank_A": self.bank_a, "bank_B": self.bank_b}
        return super().extra_state_modules() | {name: bank for name, bank in banks.items() if bank is not None}

    def share_keys(self, others: Callable[[Tensor], Tensor]) -> None:
        if self.options.gather_negatives:
            self.others = others

    def check_options(self, batch_size: int) -> None:
        super().check_options(batch_size)
        options = self.options
        alone = options.patches == 1 and options.projector != "reshape"
        if options.lambda_nce > 0 and alone and self._own_image_only(batch_size):
            raise ValueError(
                f"there is nothing to contrast with loss.patches=1, loss.negatives={options.negatives} and "
                f"data.batch={batch_size}: draw more patches, or use external negatives"
            )

    def check_sizes(self, batch_size: int, a: Sizes, b: Sizes, remedy: str) -> None:
        super().check_sizes(batch_size, a, b, remedy)
        if self.options.lambda_nce > 0:
            pooled = self.options.projector == "reshape"  # to 16 locations, whatever the size
            rows = drawn_rows(self.generator_a, self.layers, 0 if pooled else self.options.patches, {**a, **b})
            alike = "" if pooled else "both directions contrast as many"
            check_contrast(rows, self.layers, self._own_image_only(batch_size), alike, remedy)

    def _own_image_only(self, batch_size: int) -> bool:
        """Whether all negatives of a location come from its own image."""
        return self.options.external == "none" and (self.options.negatives == "image" or batch_size == 1)

    def groups(self):
        groups = super().groups()
        if self.trains_projector:
            modules = tuple(self.projectors().values())
            library = self.options.projector_adam == "library"
            groups["F"] = Group(modules, lr=1e-3, betas=(0.9, 0.999)) if library else Group(modules)
        return groups

    @property
    def trains_projector(self) -> bool:
        """Whether the projectors have parameters that PatchNCE trains."""
        return self.options.lambda_nce > 0 and any(
            any(True for _ in f.parameters()) for f in self.projectors().values()
        )

    def phases(self):
        return Phase(self.d_loss, ("D",)), Phase(self.g_loss, ("G", "F") if self.trains_projector else ("G",))

    def draw(self, rng: random.Random) -> Draws:
        return Draws(flip=self.options.flip_equivariance and rng.random() < 0.5)

    @property
    def shares_passes(self) -> bool:
        """Whether a pass that makes an image also returns the features that the contrast needs."""
        return self.options.reuse_key_features and self.options.lambda_nce > 0 and self.generator_a.features_repeat

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        # the features of a mirrored image are not the mirrored features, so the keys are then encoded separately
        layers = self.layers if self.shares_passes and not draws.flip else ()
        return self.translate_both(batch, self.options.lambda_idt > 0, layers, draws.flip, self.projects_rows)

    def g_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        total, losses = self.g_terms(batch, outputs, draws).total()
        return total, losses | {"G": total}

    def g_terms(self, batch: Batch, outputs: Outputs, draws: Draws) -> Terms:
        """Return the terms of the loss of the generators and projectors."""
        options = self.options
        terms = Terms()
        if options.lambda_gan > 0:
            self.adversarial(terms, outputs, saturating=options.saturating, weight=options.lambda_gan, share=0.5)
        if options.lambda_nce > 0:
            nce = self.contrast(batch, outputs, draws)
            terms.given(["NCE1", "NCE2"], nce, weight=options.lambda_nce, share=0.5)
        if options.lambda_idt > 0:
            terms.distance("idt_A", outputs["idt_A"], batch.b, weight=options.lambda_idt, share=0.5)
            terms.distance("idt_B", outputs["idt_B"], batch.a, weight=options.lambda_idt, share=0.5)
        return terms

    def contrast(self, batch: Batch, outputs: Outputs, draws: Draws) -> Tensor:
        """Compute PatchNCE, (2,): of fake_B against A, and of fake_A against B."""
        keys_a, keys_b, queries_b, queries_a = self.features(batch, outputs, draws)
        if self.options.projector == "reshape":
            keys_a, keys_b, queries_b, queries_a = map(pooled_maps, (keys_a, keys_b, queries_b, queries_a))
            ids1, ids2 = dense_patch_ids(keys_a), dense_patch_ids(keys_b)
        else:
            ids1, ids2 = draws.patch_ids or (self.projector_a.draw_ids(keys_a), self.projector_b.draw_ids(keys_b))
        drawn = draws.patch_ids is None
        with torch.no_grad():
            k1, k2 = self.rows((self.projector_a, keys_a, ids1), (self.projector_b, keys_b, ids2), distinct=drawn)
        q1, q2 = self.rows((self.projector_b, queries_b, ids1), (self.projector_a, queries_a, ids2), distinct=drawn)
        return self.nce(q1, k1, q2, k2, len(batch.a))

    def features(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[list[Tensor], ...]:
        """Return the maps at `layers` of (A, B, fake_B, fake_A): G_A encodes A and fake_A, G_B encodes B and fake_B.

        The maps of fakes of mirrored images are mirrored back.
        """

        def kept(name: str, generator: nn.Module, images: Tensor) -> list[Tensor]:
            taps = tapping(generator, self.projects_rows)
            return outputs[name] if name in outputs else generator(images, self.layers, encode_only=True, **taps)

        keys_a, keys_b = beside(
            lambda: kept("keys_A", self.generator_a, batch.a), lambda: kept("keys_B", self.generator_b, batch.b)
        )
        queries_b, queries_a = beside(
            lambda: kept("queries_B", self.generator_b, outputs["fake_B"]),
            lambda: kept("queries_A", self.generator_a, outputs["fake_A"]),
        )
        if draws.flip:
            queries_b, queries_a = ([feature.flip(3) for feature in queries] for queries in (queries_b, queries_a))
        return keys_a, keys_b, queries_b, queries_a

    def rows(self, *sides: tuple[PatchNCEHead, list[Tensor], list[Tensor]], distinct: bool) -> list[list[Tensor]]:
        """Return the codes (images * patches, dim) per layer of each (projector, maps, ids): few launches.

        `distinct`: promise that no id appears twice in a set.
        """
        maps = [m for _, layers, _ in sides for m in layers]
        ids = [i for _, _, chosen in sides for i in chosen]
        mlps = [mlp for projector, layers, _ in sides for mlp in projector.mlps(len(layers)) or []]
        rows = project_patches(maps, ids, mlps or None, distinct_ids=distinct)
        count = len(self.layers)
        return [rows[i : i + count] for i in range(0, len(rows), count)]

    def nce(self, q1: list[Tensor], k1: list[Tensor], q2: list[Tensor], k2: list[Tensor], images: int) -> Tensor:
        """Compute both directions of every layer in one call: (2,), the mean over rows and layers."""
        options = self.options
        loss = patch_nce_layers(
            [q1, q2],
            [k1, k2],
            images=images,
            negatives=options.negatives,
            temperature=self.projector_a.current_temperatures(),
            extra_keys=self.external() if self.others is None else self._others_rows([q1, q2], [k1, k2]),
            cosine=options.cosine,
            weighting=self.weighting,
            unit_rows=True,
        )
        for bank, rows in ((self.bank_a, k1), (self.bank_b, k2)):
            if bank is not None:
                bank.enqueue([row.detach().nan_to_num(0.0, 0.0, 0.0) for row in rows])
        return loss

    def external(self) -> list[list[Tensor]] | Literal["other"] | None:
        """Return more negatives per direction, from the domain of its keys."""
        if self.options.external == "branch":
            # NCE1's keys are codes of A, and NCE2's queries codes of fake_A, both by G_A and F1; likewise for B.
            return "other"
        if self.bank_a is not None and self.bank_b is not None:
            return [self.bank_a.keys(), self.bank_b.keys()]
        return None

    @torch.no_grad()
    def _others_rows(self, queries: list[list[Tensor]], keys: list[list[Tensor]]) -> list[list[Tensor]]:
        """Return the negatives from other ranks, and with external=branch all of that branch, per direction and layer.

        The codes are exchanged in one call.
        """
        assert self.others is not None
        branch = self.options.external == "branch"
        sides = [*keys, *queries[::-1]] if branch else keys  # direction 0 takes the queries of direction 1
        codes = [cosine_rows(rows) if self.options.cosine else rows.detach() for side in sides for rows in side]
        flat = torch.cat([rows.flatten() for rows in codes])  # layers may differ in width
        every = self.others(flat).split([rows.numel() for rows in codes], dim=1)  # (ranks - 1, rows * dim) each
        theirs = [found.reshape(-1, rows.shape[1]) for found, rows in zip(every, codes, strict=True)]
        count = len(self.layers)
        extra = [theirs[:count], theirs[count : 2 * count]]
        if branch:
            mine, more = codes[2 * count :], theirs[2 * count :]
            extra = [
                [torch.cat([extra[d][i], mine[d * count + i], more[d * count + i]]) for i in range(count)]
                for d in range(2)
            ]
        return extra

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        pictures = {"A": batch.a, "fake_B": self.generator_a(batch.a)}
        pictures |= {"B": batch.b, "fake_A": self.generator_b(batch.b)}
        if self.options.lambda_idt > 0:
            pictures |= {"idt_B": self.generator_b(batch.a), "idt_A": self.generator_a(batch.b)}
        return pictures
