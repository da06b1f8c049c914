"""SinCUT: CUT on one image per domain (Park et al., ECCV 2020, section 4.4 and its code)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..common.options import option
from ..nce.api import Negatives
from ..networks.layers import FusedLayer
from .base import MOST_PATCHES, WEIGHT, Batch, Draws, Losses, NetworkOptions, Outputs, check_ranges
from .cut import CUT, CUTOptions
from .losses import GANMode, gradient_penalty, leave_uncompiled, r1_penalty
from .terms import Terms


@dataclass
class SinCUTOptions(CUTOptions):
    """SinCUT's terms; the defaults are the published ones."""

    lambda_nce: float = option(4.0, "weight of PatchNCE: higher keeps more of the input's content", **WEIGHT)
    nce_layers: list[int] = option([0, 2, 4], "generator layers whose features are contrasted", low=0, ascending=True)
    patches: int = option(
        1,
        "locations drawn per crop and layer; with 1, all negatives are from other crops; 0: every location",
        low=0,
        high=MOST_PATCHES,
    )
    negatives: Negatives = option("batch", '"batch": patches of all crops of the image; "image": of the same crop')
    gan_mode: GANMode = option("nonsaturating", "lsgan, vanilla, wgangp, nonsaturating or hinge")
    lambda_r1: float = option(1.0, "weight of the R1 gradient penalty: keeps D from memorising the image", **WEIGHT)
    lambda_identity: float = option(1.0, "weight of the L1 distance between y and G(y); needs nce_idt", **WEIGHT)


class SinCUT(CUT):
    """CUT with a gradient penalty on the discriminator and an L1 identity loss."""

    Options = SinCUTOptions

    options: SinCUTOptions

    def __init__(self, options: SinCUTOptions, network: NetworkOptions):
        check_ranges(options, network)
        if options.lambda_identity > 0 and not (options.nce_idt and options.lambda_nce > 0):
            raise ValueError(
                f"loss.lambda_identity={options.lambda_identity} compares y with G(y), which nce_idt computes: set "
                f"loss.nce_idt=true and loss.lambda_nce above 0, or loss.lambda_identity=0"
            )
        super().__init__(options, network)
        self.discriminator_has_kernels = any(isinstance(module, FusedLayer) for module in self.discriminator.modules())

    def identity_losses(self) -> tuple[str, ...]:
        return (*super().identity_losses(), "idt")

    def d_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        options = self.options
        if options.lambda_r1 == 0:
            return super().d_loss(batch, outputs, draws)
        if self.discriminator_has_kernels:
            leave_uncompiled()
        # In two passes: in a joint pass, the two backward passes of the penalty would include the fakes.
        real, fake = batch.b.detach().requires_grad_(), self.pool(outputs["fake_B"])
        judge = self.augment.before(self.discriminator)
        judged_fake, judged_real = judge(fake), judge(real)
        terms = Terms()
        terms.gan("D_real", judged_real, True, options.gan_mode, share=0.5)
        terms.gan("D_fake", judged_fake, False, options.gan_mode, share=0.5)
        total, losses = terms.total()
        losses["D_R1"] = 0.5 * options.lambda_r1 * r1_penalty(judged_real, real)
        total = total + losses["D_R1"]
        if self.gp > 0:
            losses["D_GP"] = 0.5 * self.gp * gradient_penalty(judge, batch.b, fake)
            total = total + losses["D_GP"]
        return total, losses

    def g_loss(self, batch: Batch, outputs: Outputs, draws: Draws) -> tuple[Tensor, Losses]:
        terms = self.g_terms(outputs, draws)
        if self.options.lambda_identity > 0:
            terms.distance("idt", outputs["idt_B"], batch.b, weight=self.options.lambda_identity)
        total, losses = terms.total()
        return total, losses | {"G": total}
