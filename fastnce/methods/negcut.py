"""NEGCUT: Wang et al., Instance-wise Hard Negative Example Generation for Contrastive Learning (ICCV 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.options import option
from ..nce import PatchSampleF
from ..nce.api import project_patches
from ..nce.negatives import NegativeGenerator, contrast_with, diversity
from ..nce.selection import dense_patch_ids
from ..networks import init_weights
from .base import MOST_CHANNELS, MOST_PATCHES, WEIGHT, Batch, Draws, Group, Losses, NetworkOptions, Outputs, Phase
from .checks import refuse_changed
from .cut import CUT, CUTOptions


@dataclass
class NEGCUTOptions(CUTOptions):
    """NEGCUT's terms; the defaults are those of the released option files."""

    patches: int = option(
        256,
        "locations drawn per image and layer (all if a map has fewer), and negatives made per image and layer",
        low=2,
        high=MOST_PATCHES,
    )
    lambda_diversity: float = option(
        1.0, "weight of the differences between negatives, for N (published lambda_MS_neg)", **WEIGHT
    )
    noise: int = option(64, "noise values that N gets for each negative", low=1, high=MOST_CHANNELS)
    momentum: float = option(0.9, "share of F_ that stays in each step; the rest is F's", low=0, high=1)


class NEGCUT(CUT):
    """CUT whose negatives come from a network N, which learns to make PatchNCE large.

    N gets noise and the mean code of the real image under F_, a running average of F. D is updated first, then N, then
    G and F together, then F_. As in the released code, G's gradient also passes through N and F_ to the features of the
    real images, and the diversity term sees the negatives of y (of x without nce_idt).
    """

    Options = NEGCUTOptions

    options: NEGCUTOptions
    keys_learn = True
    taps_keys = False  # F_ reads every location

    def __init__(self, options: NEGCUTOptions, network: NetworkOptions):
        super().__init__(options, network)
        fixed = ("weighting", "symmetric", "selection", "gather_negatives", "projector")
        refuse_changed(options, NEGCUTOptions(), fixed, "negcut")
        if options.lambda_nce == 0:
            raise ValueError("negcut learns negatives for PatchNCE: loss.lambda_nce must be above 0")
        self.average = PatchSampleF(
            True, network.init_type, network.init_gain, options.projection,
            in_channels=self.generator.feature_channels(self.layers),
        ).requires_grad_(False)  # fmt: skip
        self.negative = NegativeGenerator(len(self.layers), options.projection, options.noise)
        init_weights(self.negative, network.init_type, network.init_gain)

    def projectors(self):
        return {**super().projectors(), "N": self.negative, "F_": self.average}

    def groups(self):
        return {**super().groups(), "N": Group((self.negative,))}

    def phases(self):
        d, g = super().phases()
        return d, Phase(self.n_loss, ("N",)), g

    @torch.no_grad()
    def finish(self, bad: Tensor) -> None:
        """Move F_ towards F. A learned temperature is F's alone."""
        weights = dict(self.head.named_parameters())
        means = dict(self.average.named_parameters())
        towards = torch._foreach_sub([weights[name] for name in means], list(means.values()))
        torch._foreach_mul_(towards, bad.logical_not().to(towards[0].dtype) * (1.0 - self.options.momentum))
        torch._foreach_add_(list(means.values()), towards)

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        outputs = super().generate(batch, draws)
        outputs["maps"] = super().maps(outputs, draws)  # for both losses: nothing updates G in between
        return outputs

    def maps(self, outputs: Outputs, draws: Draws) -> tuple[list[Tensor], list[Tensor], int]:
        return outputs["maps"]

    def n_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        """N's loss: minus PatchNCE, minus how much the negatives differ."""
        queries, keys, directions = self.maps(outputs, draws)
        constant = {**outputs, "maps": ([q.detach() for q in queries], [k.detach() for k in keys], directions)}
        nce, negatives = self._learned(constant, draws, of_negatives=True)
        loss = -self.options.lambda_nce * nce.mean()
        last = len(negatives[0]) // directions
        differences = torch.stack([diversity(made[-last:]) for made in negatives]).mean()
        loss = loss - self.options.lambda_diversity * differences
        return loss, {"N": loss}

    def _contrast(self, outputs: Outputs, draws: Draws) -> Tensor:
        return self._learned(outputs, draws, of_negatives=False)[0]

    def _learned(self, outputs: Outputs, draws: Draws, of_negatives: bool) -> tuple[Tensor, list[Tensor]]:
        """Compute PatchNCE, (directions,), and the negatives, (images, patches, dim) per layer.

        Args:
            of_negatives: only the negatives get a gradient.
        """
        query_maps, key_maps, directions = self.maps(outputs, draws)
        layers, images = len(self.layers), len(query_maps[0])
        mlps = self.head.mlps(layers)
        ids, drawn = self._ids(key_maps, directions, draws, first=of_negatives), draws.patch_ids is None
        with torch.no_grad():
            keys = project_patches(key_maps, ids, mlps, distinct_ids=drawn)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not of_negatives):
            queries = project_patches(query_maps, ids, mlps, distinct_ids=drawn)
            every = project_patches(key_maps, dense_patch_ids(key_maps), self.average.mlps(layers), distinct_ids=True)
            means = [rows.unflatten(0, (images, -1)).mean(1) for rows in every]
        negatives = self.negative(means, self.options.patches)
        groups = images if self.options.negatives == "image" else directions
        temperatures = self.head.current_temperatures()
        losses = [
            contrast_with(q, k, made.reshape(groups, -1, made.shape[2]), temperature)
            .unflatten(0, (directions, -1))
            .mean(1)
            for q, k, made, temperature in zip(queries, keys, negatives, temperatures, strict=True)
        ]
        return torch.stack(losses).mean(0), negatives

    def _ids(self, maps: list[Tensor], directions: int, draws: Draws, first: bool) -> list[Tensor]:
        """The locations of every layer, (patches,) or (directions, patches); given ones are N's, then G's."""
        if draws.patch_ids is None:
            return self.head.draw_ids(maps, directions)
        given = draws.patch_ids[:directions] if first else draws.patch_ids[directions:]
        return [torch.stack(layer) for layer in zip(*given, strict=True)]
