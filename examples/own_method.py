"""Your own method: a GAN whose output keeps the coarse colours of its input.

fastnce train examples/own_method.py:CoarseGAN --data DIR --out RUN loss.lambda_coarse=5
python examples/own_method.py                          # the same on small images, for three steps
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from pictures import train_small

from fastnce.methods import Group, Method, Phase, option
from fastnce.methods.losses import gan_loss


@dataclass
class CoarseOptions:
    lambda_gan: float = option(1.0, "weight of the GAN loss", low=0)
    lambda_coarse: float = option(10.0, "weight of the L1 distance of 8x8 means: keeps coarse colours", low=0)


class CoarseGAN(Method):
    """A GAN with an L1 distance between the 8x8 means of input and output."""

    Options = CoarseOptions
    sections = {"optim": {"n_epochs": 50, "n_epochs_decay": 50}}  # noqa: RUF012

    def __init__(self, options, network):
        super().__init__()
        self.options = options
        self.generator = network.build_generator()
        self.discriminator = network.build_discriminator(network.out_channels)

    def generators(self):
        return {"G": self.generator}

    def discriminators(self):
        return {"D": self.discriminator}

    def groups(self):  # what each optimiser updates
        return {"D": Group((self.discriminator,)), "G": Group((self.generator,))}

    def phases(self):  # losses in order, with the groups that they update
        return Phase(self.d_loss, ("D",)), Phase(self.g_loss, ("G",))

    def generate(self, batch, draws):  # once per step; every phase receives the result
        return {"fake_B": self.generator(batch.a)}

    def d_loss(self, batch, outputs, draws):
        fake, real = self.discriminator(outputs["fake_B"].detach()), self.discriminator(batch.b)
        losses = {"D_fake": gan_loss(fake, False, "lsgan"), "D_real": gan_loss(real, True, "lsgan")}
        return 0.5 * (losses["D_fake"] + losses["D_real"]), losses

    def g_loss(self, batch, outputs, draws):
        adversarial = gan_loss(self.discriminator(outputs["fake_B"]), True, "lsgan", for_generator=True)
        coarse = F.l1_loss(F.avg_pool2d(outputs["fake_B"], 8), F.avg_pool2d(batch.a, 8))
        losses = {"G_GAN": self.options.lambda_gan * adversarial, "coarse": self.options.lambda_coarse * coarse}
        return losses["G_GAN"] + losses["coarse"], losses

    def translate(self, a):
        return self.generator(a)


def main() -> int:
    return train_small(f"{__file__}:CoarseGAN", "loss.lambda_coarse=5")


if __name__ == "__main__":
    main()
