"""Losses that several methods use. The contrastive loss has its own package, `fastnce.nce`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.messages import nearest, shown
from ..nce import checks

GANMode = Literal["lsgan", "vanilla", "wgangp", "nonsaturating", "hinge"]
GAN_MODES: tuple[str, ...] = get_args(GANMode)
SATURATING_HELP = "hinge loss of the generators as in DCLGAN's code, flat beyond the margin; false: -mean(D)"


def gan_loss(
    prediction: Tensor, target_is_real: bool, mode: GANMode = "lsgan", *, for_generator: bool = False
) -> Tensor:
    """The GAN objective on a discriminator's raw output, as a scalar.

    - "lsgan": squared distance to 1 or 0 (Mao et al., ICCV 2017).
    - "vanilla": binary cross-entropy with logits (Goodfellow et al., NeurIPS 2014).
    - "wgangp": minus the mean for real, the mean for fake (Gulrajani et al., NeurIPS 2017); add `gradient_penalty`.
    - "nonsaturating": softplus (StyleGAN2).
    - "hinge": relu(1 -+ prediction) for the discriminator; minus the mean with `for_generator` (Lim and Ye, 2017).
      DCLGAN's code uses the discriminator's form for the generator too, which is `for_generator=False`.

    Args:
        prediction: not empty, of any shape and floating dtype, before any sigmoid.
        target_is_real: True if the discriminator should judge "real", False for "fake".
        mode: one of `GAN_MODES`.
        for_generator: the loss is the generator's; it matters for "hinge" only.

    Raises:
        ValueError: an argument of another kind.
    """
    checks.tensor("prediction", prediction)
    if prediction.numel() == 0:
        raise ValueError(f"prediction must not be empty: {tuple(prediction.shape)}")
    if not isinstance(target_is_real, bool):
        raise ValueError(f"target_is_real must be True or False, not {shown(target_is_real)}")
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
    raise ValueError(f"gan_mode must be one of {', '.join(GAN_MODES)}, not {mode!r}{nearest(mode, GAN_MODES)}")


def r1_penalty(judged: Tensor, pictures: Tensor) -> Tensor:
    """The mean over images of the squared norm of d sum(judged) / d pictures (Mescheder et al., ICML 2018), unweighted.

    Args:
        judged: a discriminator's output for `pictures`, of any shape.
        pictures: (images, ...), the discriminator's input, which requires a gradient.

    Returns:
        a scalar that is differentiable with respect to the discriminator.

    Raises:
        ValueError: an argument is no tensor, is empty or requires no gradient.
    """
    for name, value in ("judged", judged), ("pictures", pictures):
        checks.tensor(name, value)
        # (a compiler does not know them while it traces)
        if not torch.compiler.is_compiling() and not (value.requires_grad and value.numel()):
            raise ValueError(f"{name} must require a gradient and hold something: judged is computed from pictures")
    (slope,) = torch.autograd.grad(judged.sum(), pictures, create_graph=True)
    return slope.square().flatten(1).sum(1).mean()


def leave_uncompiled() -> None:
    """While a compiler traces: break the graph, so that the calling function runs uncompiled.

    Needed for second derivatives through the layers' kernels. A compiler takes the operator of a first derivative for a
    constant, and would silently omit the second derivative.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg="a penalty differentiates the discriminator twice")


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor | None = None
) -> Tensor:
    """WGAN-GP's penalty: (gradient norm - 1)^2 between real and fake (Gulrajani et al., NeurIPS 2017), unweighted.

    Args:
        discriminator: takes (images, channels, height, width).
        real, fake: images of one shape; treated as constants.
        mix: (images,) in [0, 1], the share of `real` in each image; drawn on their device if None.

    Returns:
        a scalar that is differentiable with respect to the discriminator.

    Raises:
        ValueError: images that differ in shape or device, or a mix of another shape.
    """
    leave_uncompiled()
    checks.same_shape("real", real, "fake", fake, dims=4)
    if mix is not None:
        checks.same_shape("mix", mix, "the first pixel of each picture", real[:, 0, 0, 0])
    if mix is None:
        mix = torch.rand(len(real), device=real.device, dtype=real.dtype)
    pictures = torch.lerp(fake.detach(), real.detach(), mix.view(-1, 1, 1, 1)).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(pictures).sum(), pictures, create_graph=True)
    # as published: the small number keeps the root differentiable at 0
    return ((slope.flatten(1) + 1e-16).norm(dim=1) - 1).square().mean()


def channel_cycle_loss(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """The L1 distance of each colour channel, summed over channels (DCD-GAN; GestureGAN, Tang et al., 2018).

    The gradient of a channel does not depend on the errors of the others, as it does in a distance between colours such
    as sqrt(dr^2 + dg^2 + db^2). The result is the number of channels times the mean absolute difference.

    Args:
        reconstruction, picture: (images, channels, height, width), of one shape and any floating dtypes.

    Returns:
        a scalar.

    Raises:
        ValueError: images that differ in shape or device.
    """
    checks.same_shape("reconstruction", reconstruction, "picture", picture, dims=4)
    return (reconstruction - picture).abs().mean(dim=(0, 2, 3)).sum()


def frequency_cycle_loss(reconstruction: Tensor, picture: Tensor) -> Tensor:
    """The L1 distance of two images' spectra, of amplitudes and of complex values: mean(||X| - |Y||) + mean(|X - Y|).

    X and Y are unitary Fourier transforms of each channel, so a frequency has the weight of a pixel. The means run over
    all frequencies, images and channels. (By Parseval's theorem, a squared distance would equal that of the pixels.)
    The transform is computed in float32 or float64.

    Args:
        reconstruction, picture: (images, channels, height, width), of one shape and any floating dtypes.

    Returns:
        a scalar, float32 or float64.

    Raises:
        ValueError: images that differ in shape or device.
    """
    checks.same_shape("reconstruction", reconstruction, "picture", picture, dims=4)
    width = picture.shape[3]
    dtype = torch.float64 if reconstruction.dtype == torch.float64 else torch.float32
    x, y = (torch.fft.rfft2(p.to(dtype), norm="ortho") for p in (reconstruction, picture))
    # half of the spectrum is stored: every column counts twice, except the first and, for even widths, the last
    twice = x.real.new_full((x.shape[3],), 2.0)
    twice[0].fill_(1.0)  # fill_, because an assignment may copy the number from the host
    if width % 2 == 0:
        twice[-1].fill_(1.0)
    distance = (x.abs() - y.abs()).abs() + (x - y).abs()
    return (distance.mean(dim=(0, 1, 2)) * twice).sum() / width
