"""The layer kernels as PyTorch operators with gradients: norms and activations with their pads and blurs.

The operators (`torch.ops.fastnce.*`) have fakes, so `torch.compile` traces through them without a graph break. Pads and
blurs are linear, and each is the gradient of its transpose, so they can be differentiated any number of times. Second
derivatives of norms and activations (R1 and WGAN-GP penalties) are computed by plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autograd import apply, with_fast_path
from ..common.operators import obstacle, operator
from ..common.taps import Tap, with_rows
from ..kernels import activate as activation
from ..kernels import blur, reflect_pad
from ..kernels import instance_norm as norm
from ..kernels import instance_norm_backward as norm_backward
from ..kernels.norm_parts import out_size
from ..kernels.planes import empty_like

_TAGS = [torch.Tag.needs_exact_strides]  # the layout of the results follows the layout of the arguments


# Pads and blurs: linear maps of a plane onto one of another size, and their transposes


def _plane_operator(name: str, run) -> Any:
    def fake(x, height, width):
        return empty_like(x, height, width)

    return operator(f"{name}(Tensor x, SymInt height, SymInt width) -> Tensor", run, fake, _TAGS)


_PLANE = {
    "blur_down": _plane_operator("blur_down", blur.blur_down),
    "blur_down_backward": _plane_operator("blur_down_backward", blur.blur_down_backward),
    "blur_up": _plane_operator("blur_up", blur.blur_up),
    "blur_up_backward": _plane_operator("blur_up_backward", blur.blur_up_backward),
    "reflect_pad": _plane_operator("reflect_pad", reflect_pad.reflect_pad),
    "reflect_pad_backward": _plane_operator("reflect_pad_backward", reflect_pad.reflect_pad_backward),
}


def _transposed(name: str) -> str:
    return name.removesuffix("_backward") if name.endswith("_backward") else f"{name}_backward"


@with_fast_path
class _Plane(torch.autograd.Function):
    @staticmethod
    def forward(x, name, height, width):
        return _PLANE[name](x, height, width)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.name, _, _ = inputs
        ctx.height, ctx.width = x.shape[2:]

    @staticmethod
    def backward(ctx, gradient):
        return apply(_Plane, gradient, _transposed(ctx.name), ctx.height, ctx.width), None, None, None


def reflection_pad(x: Tensor, margin: int) -> Tensor:
    """`F.pad(x, (margin,) * 4, mode="reflect")`, with a gradient that is a gather and deterministic to the bit."""
    _check_margin(x, margin)
    return apply(_Plane, x, "reflect_pad", x.shape[2] + 2 * margin, x.shape[3] + 2 * margin)


def blur_down(x: Tensor) -> Tensor:
    """The filter [1, 2, 1] / 4 along both axes at every other position, reflected at the border; see `BlurDown`."""
    _check_margin(x, 1)
    return apply(_Plane, x, "blur_down", (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)


def blur_up(x: Tensor) -> Tensor:
    """`F.interpolate(x, scale_factor=2, mode="bilinear")`; see `BlurUp`."""
    return apply(_Plane, x, "blur_up", 2 * x.shape[2], 2 * x.shape[3])


def _check_margin(x: Tensor, margin: int) -> None:
    if margin >= min(x.shape[2], x.shape[3]):
        raise ValueError(
            f"an image of {x.shape[2]}x{x.shape[3]} is too small for a reflection of {margin} pixels: both sides must "
            f"be longer than that"
        )


# Instance norm, with what surrounds it

_norm_forward = operator(
    "instance_norm(Tensor x, Tensor? residual, float eps, float slope, int margin, int blur) -> (Tensor, Tensor)",
    norm.instance_norm,
    lambda x, residual, eps, slope, margin, blur: (
        empty_like(x, *out_size(x.shape[2], x.shape[3], margin, blur)),
        x.new_empty(x.shape[0], 2, x.shape[1], dtype=torch.float32),
    ),
    _TAGS,
)
_norm_backward = operator(
    "instance_norm_backward(Tensor gradient, Tensor? inner, Tensor x, Tensor statistics, float slope, int margin, "
    "int blur, bool total) -> (Tensor, Tensor)",
    norm_backward.instance_norm_backward,
    lambda gradient, inner, x, statistics, slope, margin, blur, total: (
        empty_like(x, x.shape[2], x.shape[3]),
        empty_like(x, x.shape[2], x.shape[3]) if total else x.new_empty(0),
    ),
    _TAGS,
)


def instance_norm_formula(x: Tensor, eps: float, slope: float, margin: int, blur: int = 0) -> Tensor:
    """The formula of the kernels in plain PyTorch, in float32 or float64; differentiable any number of times."""
    wide = x if x.dtype == torch.float64 else x.float()
    apart = wide - wide.mean(dim=(2, 3), keepdim=True)
    y = apart * torch.rsqrt(apart.square().mean(dim=(2, 3), keepdim=True) + eps)
    y = y if slope == 1.0 else F.leaky_relu(y, slope)
    if margin > 0 and obstacle(y.device, y.dtype) is not None:
        return F.pad(y, (margin,) * 4, mode="reflect").to(x.dtype)
    return _followed(y, margin, blur).to(x.dtype)  # deterministic, unlike `F.pad`


def _followed(y: Tensor, margin: int, blur: int) -> Tensor:
    """Apply the pad or the blur at a layer's end."""
    if margin:
        return reflection_pad(y, margin)
    return y if blur == 0 else (blur_down, blur_up)[blur - 1](y)


def _followed_backward(gradient: Tensor, x: Tensor, margin: int, blur: int) -> Tensor:
    """The transpose of `_followed`, for a map of x's size; differentiable any number of times."""
    name = "reflect_pad" if margin else (None, "blur_down", "blur_up")[blur]
    return gradient if name is None else apply(_Plane, gradient, f"{name}_backward", x.shape[2], x.shape[3])


@with_fast_path
class _InstanceNorm(torch.autograd.Function):
    """Returns the output and the statistics; with `inner`, also the output without its pad, as a view.

    A residual block writes its output padded for the next block, which also adds the output without the pad. Both
    gradients arrive here, and the kernels read both. With a `slot` (and no `inner`), the third result is the token of
    x's tap, and `bias` is the bias that x lacks.
    """

    @staticmethod
    def forward(x, residual, eps, slope, margin, blur, inner, bias, slot):
        out, statistics = _norm_forward(x, residual, eps, slope, margin, blur)
        if slot is not None:
            return out, statistics, x.new_empty(0)
        return (out, statistics, out[:, :, margin:-margin, margin:-margin]) if inner else (out, statistics)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, ctx.eps, ctx.slope, ctx.margin, ctx.blur, _, bias, ctx.slot = inputs
        ctx.bias_dtype = torch.float32 if bias is None else bias.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1])

    @staticmethod
    def backward(ctx, gradient, _, inner=None):
        left = [] if ctx.slot is None else ctx.slot.take()
        d_x, d_residual = _norm_gradients(ctx, gradient, inner)
        d_bias = None
        if left:
            (x, _) = ctx.saved_tensors
            d_x, d_bias = with_rows(torch.zeros_like(x) if d_x is None else d_x, left, x, ctx.bias_dtype)
        of_x, of_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
        return (
            d_x if of_x else None, d_residual, None, None, None, None, None, d_bias if of_bias else None, None
        )  # fmt: skip


def _norm_gradients(ctx, gradient: Tensor | None, inner: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the residual from those of the outputs."""
    margin, blur = ctx.margin, ctx.blur
    if gradient is None:  # the pad is not used
        gradient, inner, margin = inner, None, 0
    if gradient is None:
        return None, None
    x, statistics = ctx.saved_tensors
    of_x, of_residual = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        total = _followed_backward(gradient, x, margin, blur)
        total = total if inner is None else total + inner
        d_x = None
        if of_x:
            y = instance_norm_formula(x, ctx.eps, ctx.slope, 0)
            (d_x,) = torch.autograd.grad(y, x, total, create_graph=True)
        return d_x, total if of_residual else None
    apart = of_residual and (margin > 0 or blur > 0 or inner is not None)  # else it is the output's gradient
    d_x, total = _norm_backward(gradient, inner, x, statistics, ctx.slope, margin, blur, apart)
    d_residual = total if apart else gradient
    return d_x, d_residual if of_residual else None


def instance_norm(
    x: Tensor,
    eps: float = 1e-5,
    slope: float = 1.0,
    margin: int = 0,
    residual: Tensor | None = None,
    blur: int = 0,
    tap: Tap | None = None,
) -> Tensor:
    """Normalise each channel of each image to mean 0 and variance 1, activate, add, and pad or blur, in one operator.

    Args:
        x: (images, channels, height, width), bfloat16, float16 or float32, any strides.
        slope: of the activation for negative values: 1 for none, 0 for ReLU, 0.2 for the published leaky ReLU.
        margin: of the reflection pad at the end.
        residual: added before the pad or blur, of x's shape and dtype.
        blur: at the end, without a margin: 0 for none, 1 for `blur_down`, 2 for `blur_up`.
        tap: of x; it gets its token.

    Returns:
        (images, channels, height + 2 * margin, width + 2 * margin) in x's dtype and layout, or half or twice the size.

    Raises:
        ValueError: the map is too small for its pad or blur, there are both, or the residual does not fit.
    """
    _check_norm(x, margin, blur, residual)
    if tap is None:
        return apply(_InstanceNorm, x, residual, eps, slope, margin, blur, False, None, None)[0]
    y, _, tap.token = apply(_InstanceNorm, x, residual, eps, slope, margin, blur, False, tap.bias, tap.slot)
    return y


def instance_norm_and_inner(
    x: Tensor, eps: float, slope: float, margin: int, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`instance_norm` with a pad, and its output without the pad: a view of the padded map, with its own gradient."""
    _check_norm(x, margin, 0, residual)
    out, _, inner = apply(_InstanceNorm, x, residual, eps, slope, margin, 0, True, None, None)
    return out, inner


def _check_norm(x: Tensor, margin: int, blur: int, residual: Tensor | None) -> None:
    if margin and blur:
        raise ValueError(f"a norm ends with a pad or a blur, not both: margin {margin}, blur {blur}")
    if margin or blur == 1:
        _check_margin(x, margin or 1)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"a residual must have the map's shape and dtype: {tuple(residual.shape)} {residual.dtype} for "
            f"{tuple(x.shape)} {x.dtype}"
        )


# A bias, an activation and a blur, where a layer has no norm

_activate_forward = operator(
    "activate(Tensor x, Tensor? bias, float slope, int blur) -> Tensor",
    activation.activate,
    lambda x, bias, slope, blur: empty_like(x, *out_size(x.shape[2], x.shape[3], 0, blur)),
    _TAGS,
)
_activate_backward = operator(
    "activate_backward(Tensor gradient, Tensor x, Tensor? bias, float slope, int blur) -> (Tensor, Tensor)",
    activation.activate_backward,
    lambda gradient, x, bias, slope, blur: (
        empty_like(x, x.shape[2], x.shape[3]),
        x.new_empty(0 if bias is None else x.shape[1], dtype=torch.float32),
    ),
    _TAGS,
)


@with_fast_path
class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(x, bias, slope, blur):
        return _activate_forward(x, bias, slope, blur)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, bias, ctx.slope, ctx.blur = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, bias)

    @staticmethod
    def backward(ctx, gradient):
        if gradient is None:
            return (None,) * 4
        x, bias = ctx.saved_tensors
        of_x, of_bias = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            total = _followed_backward(gradient, x, 0, ctx.blur)
            z = x if bias is None else x + bias[None, :, None, None].to(x.dtype)
            total = torch.where(z > 0, total, ctx.slope * total)
            d_bias = total.sum((0, 2, 3), dtype=torch.float32)
        else:
            total, d_bias = _activate_backward(gradient, x, bias, ctx.slope, ctx.blur)
        return total if of_x else None, d_bias.to(bias.dtype) if of_bias else None, None, None


def activate(x: Tensor, bias: Tensor | None, slope: float, blur: int = 0) -> Tensor:
    """Add a bias to each channel, activate and blur, in one operator.

    Args:
        x: (images, channels, height, width), bfloat16, float16 or float32, any strides.
        bias: (channels,), float32 or 16 bits, or None.
        slope: of the activation for negative values: 0 for ReLU, 0.2 for the published leaky ReLU.
        blur: 0 for none, 1 for `blur_down`, 2 for `blur_up`.
    """
    if blur == 1:
        _check_margin(x, 1)
    return apply(_Activate, x, bias, slope, blur)
