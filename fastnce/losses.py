"""Losses that the papers share: the GAN objectives. (The contrastive loss has its own package, `fastnce.nce`.)"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

GANMode = Literal["lsgan", "vanilla", "wgangp", "nonsaturating", "hinge"]
GAN_MODES: tuple[str, ...] = get_args(GANMode)


def gan_loss(
    prediction: Tensor, target_is_real: bool, mode: GANMode = "lsgan", *, for_generator: bool = False
) -> Tensor:
    """The GAN objective on a discriminator's raw output, as a scalar.

    - "lsgan": squared distance to 1 or 0 (Mao et al., ICCV 2017).
    - "vanilla": binary cross-entropy with logits (Goodfellow et al., NeurIPS 2014).
    - "wgangp": minus the mean for real, the mean for fake (Gulrajani et al., NeurIPS 2017; its penalty is separate).
    - "nonsaturating": softplus (StyleGAN2).
    - "hinge": relu(1 -+ prediction) for the discriminator; with `for_generator` minus the mean (Lim and Ye, 2017).
      The code of DCLGAN uses the discriminator's form for the generator too: that is `for_generator=False`.

    Args:
        prediction: any shape, no sigmoid applied.
        target_is_real: whether the output should say "real".
        mode: one of `GAN_MODES`.
        for_generator: matters for "hinge" only.
    """
    if mode == "lsgan":
        return F.mse_loss(prediction, prediction.new_full((), float(target_is_real)).expand_as(prediction))
    if mode in ("vanilla", "nonsaturating"):
        return F.softplus(-prediction if target_is_real else prediction).mean()
    if mode == "wgangp":
        return -prediction.mean() if target_is_real else prediction.mean()
    if mode == "hinge":
        if for_generator:
            return -prediction.mean()
        return F.relu(1.0 - prediction if target_is_real else 1.0 + prediction).mean()
    raise ValueError(f"gan_mode must be one of {', '.join(GAN_MODES)}, not {mode!r}")
