"""Losses that the papers share. (The contrastive loss has its own package, `fastnce.nce`.)"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nce import checks

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
        prediction: any shape but an empty one, a floating dtype, no sigmoid applied.
        target_is_real: whether the output should say "real": True or False.
        mode: one of `GAN_MODES`.
        for_generator: matters for "hinge" only.

    Raises:
        ValueError: anything else.
    """
    checks.tensor("prediction", prediction)
    if prediction.numel() == 0:
        raise ValueError(f"prediction must not be empty: {tuple(prediction.shape)}")
    if not isinstance(target_is_real, bool):
        raise ValueError(f"target_is_real must be True or False, not {checks.shown(target_is_real)}")
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

    Raises:
        ValueError: tensors that carry no gradient, or are none.
    """
    for name, value in ("judged", judged), ("pictures", pictures):
        checks.tensor(name, value)
        # (a compiler knows the two only once it has traced the step)
        if not torch.compiler.is_compiling() and not (value.requires_grad and value.numel()):
            raise ValueError(f"{name} must require a gradient and hold something: judged is computed from pictures")
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
        ValueError: pictures that differ in shape or device, or a mix of another shape.
    """
    leave_uncompiled()
    checks.same_shape("real", real, "fake", fake, dims=4)
    if mix is not None:
        checks.same_shape("mix", mix, "the first pixel of each picture", real[:, 0, 0, 0])
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
        reconstruction, picture: (images, channels, height, width), of one shape, each of any floating dtype.

    Returns:
        a scalar.

    Raises:
        ValueError: pictures that differ in shape or device.
    """
    checks.same_shape("reconstruction", reconstruction, "picture", picture, dims=4)
    return (reconstruction - picture).abs().mean(dim=(0, 2, 3)).sum()


def frequency_cycle_loss(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """L1 distance of two pictures' spectra, of amplitudes and of complex values: mean(||X| - |Y||) + mean(|X - Y|).

    X and Y are unitary Fourier transforms of each channel, so that a frequency weighs as much as a pixel does; means
    run over all frequencies, images and channels. (A squared distance would, by Parseval, be the pixels' own.) The
    transform is computed in float32 at least.

    Args:
        reconstruction, picture: (images, channels, height, width), of one shape, each of any floating dtype.

    Returns:
        a scalar, float32 or float64.

    Raises:
        ValueError: pictures that differ in shape or device.
    """
    checks.same_shape("reconstruction", reconstruction, "picture", picture, dims=4)
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
