"""DCD-GAN: Chen et al., Unpaired Deep Image Deraining Using Dual Contrastive Learning (CVPR 2022).

Domain A is rainy, B is clean; G_A takes the rain away. What the authors' code optimises differs from the paper: it is
DCLGAN's loss, so the preset "dcdgan-released" is DCLGAN with DCD-GAN's training options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..losses import channel_cycle_loss, frequency_cycle_loss
from ..nce.api import Negatives
from ..options import option
from .base import Batch, Draws, Losses, Outputs
from .dclgan import DCLGAN, DCLGANOptions


@dataclass
class DCDGANOptions(DCLGANOptions):
    """The paper's terms. The weights of the two cycle terms are not published: 1 and 1 are ours."""

    negatives: Negatives = option("image", '"image": other patches of the same picture; "batch": of all pictures')
    external: Literal["none", "branch", "bank"] = option(
        "branch",
        '"branch": as many negatives again, from the other branch\'s picture; "bank": from past pictures; "none"',
    )
    saturating: bool = option(False, "hinge for the generators flat beyond the margin, as released; false: -mean(D)")
    projector_adam: Literal["library", "generator"] = option(
        "generator", '"generator": as G; "library": lr 1e-3, betas 0.9 and 0.999 as the released code'
    )
    lambda_color: float = option(1.0, "weight of the cycle distance of each colour channel: keeps colours clean")
    lambda_frequency: float = option(1.0, "weight of the cycle distance of spectra: keeps texture under the streaks")


class DCDGAN(DCLGAN):
    """Contrast, adversaries, identity, and two distances on both cycles: A, B, A and B, A, B."""

    options: DCDGANOptions

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        outputs = super().generate(batch, draws)
        for domain, generator, fake in (("A", self.generator_b, "B"), ("B", self.generator_a, "A")):
            picture = outputs[f"fake_{fake}"]
            if f"keys_{domain}" in outputs:  # the pass that closes the cycle encodes the query on its way
                outputs[f"rec_{domain}"], outputs[f"queries_{fake}"] = generator(picture, self.layers)
            else:
                outputs[f"rec_{domain}"] = generator(picture)
        return outputs

    def g_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        options = self.options
        total, losses = super().g_loss(batch, outputs, draws)
        cycles: Losses = {}
        for name, weight, distance in (
            ("color", options.lambda_color, channel_cycle_loss),
            ("freq", options.lambda_frequency, frequency_cycle_loss),
        ):
            if weight > 0:
                cycles[f"{name}_A"] = weight * distance(outputs["rec_A"], batch.a)
                cycles[f"{name}_B"] = weight * distance(outputs["rec_B"], batch.b)
        if cycles:
            total = total + 0.5 * torch.stack(list(cycles.values())).sum()
        return total, losses | cycles | {"G": total}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        clean, rainy = self.generator_a(batch.a), self.generator_b(batch.b)
        return {
            "A": batch.a,
            "fake_B": clean,
            "rec_A": self.generator_b(clean),
            "B": batch.b,
            "fake_A": rainy,
            "rec_B": self.generator_a(rainy),
        }
