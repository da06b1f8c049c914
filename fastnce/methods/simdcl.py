"""SimDCL: Han et al., Dual Contrastive Learning for Unsupervised Image-to-Image Translation (CVPRW 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.options import option
from ..nce.impl.rows import normalize_rows
from ..networks import init_weights
from .base import (
    MOST_CHANNELS,
    MOST_PATCHES,
    WEIGHT,
    Batch,
    Draws,
    Losses,
    NetworkOptions,
    Outputs,
    Sizes,
)
from .checks import drawn_rows
from .dclgan import DCLGAN, DCLGANOptions


@dataclass
class SimDCLOptions(DCLGANOptions):
    """SimDCL's terms; the defaults are those of the released code."""

    lambda_nce: float = option(1.0, "weight of PatchNCE (the released code defines 2 but does not apply it)", **WEIGHT)
    lambda_sim: float = option(10.0, "weight of the similarity loss: keeps the codes of both domains similar", **WEIGHT)
    patches: int = option(
        256,
        "locations drawn per image and layer; 3x3 filters run over (patches, projection)",
        low=3,
        high=MOST_PATCHES,
    )
    projection: int = option(256, "width of the projectors F1 and F2 (published netF_nc)", low=3, high=MOST_CHANNELS)
    projector_adam: Literal["library", "generator"] = option(
        "generator",
        'Adam of F1 to F6: "generator": as G, as the released code; "library": lr 1e-3, betas 0.9 and 0.999',
    )


class StackMapping(nn.Module):
    """Map a stack of codes (layers, patches, dim) to one unit vector (1, 64) (published `MappingF`)."""

    def __init__(self, layers: int, width: int = 64):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(layers, width, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )

    def forward(self, stack: Tensor) -> Tensor:
        vector = self.model(stack[None])
        return normalize_rows(vector if vector.dtype == torch.float64 else vector.float())


class SimDCL(DCLGAN):
    """DCLGAN plus an L1 distance between mapped stacks of codes of the real and the generated image of each domain.

    It uses one image per domain and `patches` locations of every layer. Each stack has its own mapping: F3 for A, F4
    for fake_B, F5 for B, F6 for fake_A.
    """

    Options = SimDCLOptions

    options: SimDCLOptions

    def __init__(self, options: SimDCLOptions, network: NetworkOptions):
        super().__init__(options, network)
        self.mappings = nn.ModuleList(StackMapping(len(self.layers)) for _ in range(4))
        init_weights(self.mappings, network.init_type, network.init_gain)

    def projectors(self):
        return super().projectors() | {f"F{i}": mapping for i, mapping in enumerate(self.mappings, start=3)}

    def check_options(self, batch_size: int) -> None:
        super().check_options(batch_size)
        if self.options.projector != "mlp_sample":
            raise ValueError("SimDCL stacks the codes of all layers, of one width: it needs loss.projector=mlp_sample")
        if batch_size != 1:
            raise ValueError(f"SimDCL compares the codes of single images: data.batch must be 1, not {batch_size}")

    def check_sizes(self, batch_size: int, a: Sizes, b: Sizes, remedy: str) -> None:
        super().check_sizes(batch_size, a, b, remedy)
        patches = self.options.patches
        for what, rows in drawn_rows(self.generator_a, self.layers, patches, {**a, **b}).items():
            locations, layer = min(zip(rows, self.layers, strict=True))
            if locations < patches:
                raise ValueError(
                    f"SimDCL stacks loss.patches={patches} codes of every layer, and {what} have only {locations} "
                    f"locations at layer {layer}: use fewer patches, or {remedy}"
                )

    def contrast(self, batch: Batch, outputs: Outputs, draws: Draws) -> Tensor:
        options = self.options
        keys_a, keys_b, queries_b, queries_a = self.features(batch, outputs, draws)
        draw_a, draw_b = self.projector_a.draw_ids, self.projector_b.draw_ids
        # Drawn in the published order. The stacks of generated images have their own locations.
        ids1, ids_fake_b, ids2, ids_fake_a = draws.patch_ids or (
            draw_a(keys_a),
            draw_b(queries_b),
            draw_b(keys_b),
            draw_a(queries_a),
        )
        drawn = draws.patch_ids is None
        sides = [
            (self.projector_a, keys_a, ids1),
            (self.projector_b, keys_b, ids2),
            (self.projector_b, queries_b, ids1),
            (self.projector_a, queries_a, ids2),
        ]
        if options.lambda_sim > 0:
            sides += [(self.projector_b, queries_b, ids_fake_b), (self.projector_a, queries_a, ids_fake_a)]
        k1, k2, q1, q2, *fakes = self.rows(*sides, distinct=drawn)
        nce = self.nce(q1, k1, q2, k2, 1)
        if options.lambda_sim > 0:
            fake_b, fake_a = fakes
            outputs["codes"] = [
                mapping(torch.stack(codes))
                for mapping, codes in zip(self.mappings, (k1, fake_b, k2, fake_a), strict=True)
            ]
        return nce

    def g_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        total, losses = super().g_loss(batch, outputs, draws)
        if "codes" in outputs:
            a, fake_b, b, fake_a = outputs["codes"]
            losses["Sim"] = self.options.lambda_sim * (F.l1_loss(a, fake_a) + F.l1_loss(fake_b, b))
            losses["G"] = total = total + losses["Sim"]
        return total, losses
