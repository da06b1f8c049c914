"""DCD-GAN: Chen et al., Unpaired Deep Image Deraining Using Dual Contrastive Learning (CVPR 2022).

Domain A is rainy, B is clean; G_A takes the rain away. What the authors' code optimises differs from the paper: it is
DCLGAN's loss, so the preset "dcdgan-released" is DCLGAN with DCD-GAN's training options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.options import option
from ..data.rain import RainOptions, parse_ranges, render_rain
from ..nce.api import Negatives
from .base import WEIGHT, Batch, Draws, Losses, NetworkOptions, Outputs
from .dclgan import DCLGAN, DCLGANOptions
from .losses import channel_cycle_loss, frequency_cycle_loss

HEAVY_RAIN = "density=0.3:0.7,opacity=0.4:0.9,haze=0,angle=-40:40"
"""About that of Rain800."""


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
    lambda_color: float = option(
        1.0, "weight of the cycle distance of each colour channel: keeps colours clean", **WEIGHT
    )
    lambda_frequency: float = option(
        1.0, "weight of the cycle distance of spectra: keeps texture under the streaks", **WEIGHT
    )
    lambda_rendered: float = option(
        0.0,
        "ours: weight of the L1 distance of G_A(rain rendered on B) to B, pairs that clean pictures give; 0 off",
        **WEIGHT,
    )
    rendered_rain: str = option(
        "", "that rain, e.g. density=0.1:0.3,angle=-40:40; empty: the ranges of fastnce rain", anything=True
    )
    rendered_side: int = option(
        0, "shorter side in pixels of the photographs that crops are cut from; 0: the crop's", low=0, high=65_536
    )

    @classmethod
    def plus(cls) -> DCDGANOptions:
        """What did best in `experiments/derain.py`."""
        return cls(
            lambda_gan=3.0,
            lambda_nce=0.25,
            lambda_idt=0.5,
            lambda_rendered=50.0,
            rendered_rain=HEAVY_RAIN,
            rendered_side=384,
        )


class DCDGAN(DCLGAN):
    """Contrast, adversaries, identity, and two distances on both cycles: A, B, A and B, A, B."""

    Options = DCDGANOptions

    options: DCDGANOptions

    def __init__(self, options: DCDGANOptions, network: NetworkOptions):
        super().__init__(options, network)
        self.rain = RainOptions(**parse_ranges("loss.rendered_rain", options.rendered_rain))

    def identity_losses(self) -> tuple[str, ...]:
        return (*super().identity_losses(), "rendered")

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
        if options.lambda_rendered > 0:
            rainy = render_rain(batch.b, self.rain, side=options.rendered_side or None)
            losses["rendered"] = options.lambda_rendered * F.l1_loss(self.generator_a(rainy), batch.b)
            total = total + losses["rendered"]
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
