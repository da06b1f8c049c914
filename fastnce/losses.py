"""Losses that the papers share. (The contrastive loss has its own package, `fastnce.nce`.)"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GANMode = Literal["lsgan", "vanilla", "wgangp", "nonsaturating", "hinge"]
GAN_MODES: tuple[str, ...] = get_args(GANMode)


def gan_loss(
    prediction: Tensor, target_is_real: bool, mode: GANMode = "lsgan", *, for_generator: bool = False
) -> Tensor:
    """The GAN objective on a discriminator's raw output, as a scalar.

    - "lsgan": squared distance to 1 or 0 (Mao et al., ICCV 2017).
    - "vanilla": binary cross-entropy with logits (Goodfellow et al., NeurIPS 2014).
    - "wgangp": minus the mean for real, the mean for fake (Gulrajani et al., NeurIPS 2017); `gradient_penalty` besides.
    - "nonsaturating": softplus (StyleGAN2).
    - "hinge": relu(1 -+ prediction) for the discriminator; with `for_generator` minus the mean (Lim and Ye, 2017).
      The code of DCLGAN uses the discriminator's form for the generator too: that is `for_generator=False`.

    Args:
        prediction: any shape, no sigmoid applied.
        target_is_real: whether the output should say "real".
        mode: one of `GAN_MODES`.
        for_generator: matters for "hinge" only.
    """
    if prediction.dtype in (torch.bfloat16, torch.float16):
        prediction = prediction.float()
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


def r1_penalty(judged: Tensor, pictures: Tensor) -> Tensor:
    """Mean over pictures of the squared length of d sum(judged) / d pictures (Mescheder et al., ICML 2018), unweighted.

    Args:
        judged: a discriminator's output for `pictures`, any shape.
        pictures: (images, ...) that `judged` was computed from, requiring a gradient.

    Returns:
        a scalar that is differentiable with respect to the discriminator.
    """
    (slope,) = torch.autograd.grad(judged.sum(), pictures, create_graph=True)
    return slope.square().flatten(1).sum(1).mean()


def leave_uncompiled() -> None:
    """In a function that is compiled: stop, so that it runs as it is.

    For second derivatives through the layers' kernels: a compiler takes the operator of a first derivative for a
    constant, and would leave the second one out without a word.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg="a penalty differentiates the discriminator twice")


def gradient_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, mix: Tensor | None = None) -> Tensor:
    """WGAN-GP's penalty: (slope length - 1)^2 between real and fake (Gulrajani et al., NeurIPS 2017), unweighted.

    Args:
        discriminator: on (images, channels, height, width).
        real, fake: of one shape; constants.
        mix: (images,) in [0, 1], how much of each is real; drawn on their device unless given.

    Returns:
        a scalar that is differentiable with respect to the discriminator.

    Raises:
        ValueError: real and fake pictures of different sizes, between which there is nothing.
    """
    leave_uncompiled()
    if real.shape != fake.shape:
        raise ValueError(
            f"gan_mode=wgangp mixes real pictures {tuple(real.shape)} and fake ones {tuple(fake.shape)} for its "
            f"penalty: crop both to one size (data.crop_size), or set loss.lambda_gp=0"
        )
    if mix is None:
        mix = torch.rand(len(real), device=real.device, dtype=real.dtype)
    pictures = torch.lerp(fake.detach(), real.detach(), mix.view(-1, 1, 1, 1)).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(pictures).sum(), pictures, create_graph=True)
    # as published: a small number keeps the root differentiable at 0
    return ((slope.flatten(1) + 1e-16).norm(dim=1) - 1).square().mean()


def channel_cycle_loss(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """L1 distance of each colour channel on its own, summed over channels (DCD-GAN; GestureGAN, Tang et al., 2018).

    No channel's error is weighed by another's, as it would be in a distance between colours, such as
    sqrt(dr^2 + dg^2 + db^2). With equal weights it is the number of channels times the mean absolute difference.

    Args:
        reconstruction, picture: (images, channels, height, width).

    Returns:
        a scalar.
    """
    return (reconstruction - picture).abs().mean(dim=(0, 2, 3)).sum()


def frequency_cycle_loss(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """L1 distance of two pictures' spectra, of amplitudes and of complex values: mean(||X| - |Y||) + mean(|X - Y|).

    X and Y are unitary Fourier transforms of each channel, so that a frequency weighs as much as a pixel does; means
    run over all frequencies, images and channels. (A squared distance would, by Parseval, be the pixels' own.) The
    transform is computed in float32 at least.

    Args:
        reconstruction, picture: (images, channels, height, width).

    Returns:
        a scalar, float32 or float64.
    """
    width = picture.shape[3]
    dtype = torch.float64 if reconstruction.dtype == torch.float64 else torch.float32
    x, y = (torch.fft.rfft2(p.to(dtype), norm="ortho") for p in (reconstruction, picture))
    # Half of the spectrum is stored; every column but the first and, for even widths, the last stands for two.
    twice = x.real.new_full((x.shape[3],), 2.0)
    twice[0].fill_(1.0)  # on the device: an assignment may bring the number from the host
    if width % 2 == 0:
        twice[-1].fill_(1.0)
    distance = (x.abs() - y.abs()).abs() + (x - y).abs()
    return (distance.mean(dim=(0, 1, 2)) * twice).sum() / width
