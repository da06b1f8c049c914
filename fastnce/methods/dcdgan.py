"""DCD-GAN: Chen et al., Unpaired Deep Image Deraining Using Dual Contrastive Learning (CVPR 2022).

Domain A is rainy, B is clean; G_A removes the rain. The authors' code differs from the paper: it optimises DCLGAN's
loss. The preset "dcdgan-released" is therefore DCLGAN with DCD-GAN's training options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..common.beside import beside
from ..common.options import option
from ..data.rain import parse_kinds, render_rain
from ..nce.api import Negatives
from .base import WEIGHT, Batch, Draws, Group, NetworkOptions, Outputs, Phase, tapping
from .dclgan import DCLGAN, DCLGANOptions
from .losses import SATURATING_HELP
from .terms import Terms

HEAVY_RAIN = "density=0.3:0.7,opacity=0.4:0.9,haze=0,angle=-40:40"
"""Rain about as heavy as in Rain800."""


@dataclass
class DCDGANOptions(DCLGANOptions):
    """The paper's terms. It gives no weights for the two cycle terms: we use 1 and 1."""

    negatives: Negatives = option("image", '"image": other patches of the same image; "batch": patches of all images')
    external: Literal["none", "branch", "bank"] = option(
        "branch",
        'more negatives: "branch": as many again, from the other branch\'s image; "bank": from past images; "none"',
    )
    saturating: bool = option(False, SATURATING_HELP)
    projector_adam: Literal["library", "generator"] = option(
        "generator",
        'Adam of F1 and F2: "generator": as G; "library": lr 1e-3, betas 0.9 and 0.999 as the released code',
    )
    lambda_color: float = option(1.0, "weight of the cycle loss of each colour channel: keeps colours clean", **WEIGHT)
    lambda_frequency: float = option(
        1.0, "weight of the cycle loss of spectra: keeps texture under the streaks", **WEIGHT
    )
    lambda_rendered: float = option(
        0.0,
        "ours: weight of the L1 distance between G_A(B with rendered rain) and B; 0: off",
        **WEIGHT,
    )
    rendered_rain: str = option(
        "",
        "rain for lambda_rendered, e.g. density=0.1:0.3,angle=-40:40, or several kinds with ; between them; empty: the "
        "defaults of fastnce rain",
        anything=True,
    )
    rendered_side: int = option(
        0,
        "shorter side in pixels of the whole images, which scales the streaks; 0: that of the crop",
        low=0,
        high=65_536,
    )

    @classmethod
    def plus(cls) -> DCDGANOptions:
        """Return the options that performed best in `experiments/derain.py`."""
        return cls(
            lambda_gan=3.0,
            lambda_nce=0.25,
            lambda_idt=0.5,
            lambda_rendered=50.0,
            rendered_rain=HEAVY_RAIN,
            rendered_side=384,
        )


class DCDGAN(DCLGAN):
    """DCLGAN plus a colour and a frequency loss on both cycles, A to B to A and B to A to B.

    If `lambda_rendered` is the only weight above 0, G_A is the only network, and a step is one pass through it.
    """

    Options = DCDGANOptions

    options: DCDGANOptions
    weights = (*DCLGAN.weights, "lambda_color", "lambda_frequency", "lambda_rendered")

    def __init__(self, options: DCDGANOptions, network: NetworkOptions):
        if options.lambda_rendered > 0 and network.in_channels != network.out_channels:
            raise ValueError(
                f"rendered rain feeds B to G_A: network.in_channels={network.in_channels} and "
                f"out_channels={network.out_channels} must be equal, or loss.lambda_rendered=0"
            )
        super().__init__(options, network)
        self.rain = parse_kinds("loss.rendered_rain", options.rendered_rain)

    @property
    def rendered_alone(self) -> bool:
        """Whether the rendered pairs are all that trains."""
        return not any(getattr(self.options, name) > 0 for name in self.weights if name != "lambda_rendered")

    def generators(self) -> dict[str, nn.Module]:
        return {"G_A": self.generator_a} if self.rendered_alone else super().generators()

    def discriminators(self) -> dict[str, nn.Module]:
        return {} if self.rendered_alone else super().discriminators()

    def projectors(self) -> dict[str, nn.Module]:
        return {} if self.rendered_alone else super().projectors()

    def groups(self) -> dict[str, Group]:
        return {"G": Group((self.generator_a,))} if self.rendered_alone else super().groups()

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self.g_loss, ("G",)),) if self.rendered_alone else super().phases()

    def identity_losses(self) -> tuple[str, ...]:
        return (*super().identity_losses(), "rendered")

    def generate(self, batch: Batch, draws: Draws) -> Outputs:
        if self.rendered_alone:
            return {}
        outputs = super().generate(batch, draws)

        def close(domain: str, generator: nn.Module, fake: str) -> Outputs:
            image = outputs[f"fake_{fake}"]
            found: Outputs = {}
            if self.shares_passes:  # the pass that closes the cycle also returns the queries
                taps = tapping(generator, self.projects_rows)
                found[f"rec_{domain}"], found[f"queries_{fake}"] = generator(image, self.layers, **taps)
            else:
                found[f"rec_{domain}"] = generator(image)
            if draws.flip:  # the cycle ends at the mirrored image
                found[f"rec_{domain}"] = found[f"rec_{domain}"].flip(3)
            return found

        first, second = beside(
            lambda: close("A", self.generator_b, "B"),
            lambda: close("B", self.generator_a, "A"),
        )
        return outputs | first | second

    def g_terms(self, batch: Batch, outputs: Outputs, draws: Draws) -> Terms:
        options = self.options
        terms = super().g_terms(batch, outputs, draws)
        if options.lambda_rendered > 0:
            rainy = render_rain(batch.b, self.rain, side=options.rendered_side or None)
            terms.distance("rendered", self.generator_a(rainy), batch.b, weight=options.lambda_rendered)
        for name, weight, distance in (
            ("color", options.lambda_color, terms.channels),
            ("freq", options.lambda_frequency, terms.spectrum),
        ):
            if weight > 0:
                distance(f"{name}_A", outputs["rec_A"], batch.a, weight=weight, share=0.5)
                distance(f"{name}_B", outputs["rec_B"], batch.b, weight=weight, share=0.5)
        return terms

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        if self.rendered_alone:
            return {"A": batch.a, "fake_B": self.generator_a(batch.a), "B": batch.b}
        clean, rainy = self.generator_a(batch.a), self.generator_b(batch.b)
        return {
            "A": batch.a,
            "fake_B": clean,
            "rec_A": self.generator_b(clean),
            "B": batch.b,
            "fake_A": rainy,
            "rec_B": self.generator_a(rainy),
        }
