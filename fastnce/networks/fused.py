"""The layer kernels as PyTorch operators with gradients: fused norms, pads, blurs and last convolutions.

The operators (`torch.ops.fastnce.*`) have fakes, so `torch.compile` traces through them without a graph break. Pads and
blurs are linear, and each is the gradient of its transpose, so they can be differentiated any number of times. Second
derivatives of norms and convolutions (R1 and WGAN-GP penalties) are computed by plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autograd import apply, with_fast_path
from ..common.operators import obstacle, operator
from ..common.taps import Tap, with_rows
from ..kernels import blur, few_outputs, few_outputs_backward, reflect_pad
from ..kernels import instance_norm as norm
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


# Instance norm

_norm_forward = operator(
    "instance_norm(Tensor x, Tensor? residual, float eps, float slope, int margin) -> (Tensor, Tensor)",
    norm.instance_norm,
    lambda x, residual, eps, slope, margin: (
        empty_like(x, x.shape[2] + 2 * margin, x.shape[3] + 2 * margin),
        x.new_empty(x.shape[0], 2, x.shape[1], dtype=torch.float32),
    ),
    _TAGS,
)
_norm_backward = operator(
    "instance_norm_backward(Tensor gradient, Tensor x, Tensor statistics, float slope, int margin) -> Tensor",
    norm.instance_norm_backward,
    lambda gradient, x, statistics, slope, margin: empty_like(x, x.shape[2], x.shape[3]),
    _TAGS,
)


def instance_norm_formula(x: Tensor, eps: float, slope: float, margin: int) -> Tensor:
    """The formula of the kernels in plain PyTorch, in float32 or float64; differentiable any number of times."""
    wide = x if x.dtype == torch.float64 else x.float()
    apart = wide - wide.mean(dim=(2, 3), keepdim=True)
    y = apart * torch.rsqrt(apart.square().mean(dim=(2, 3), keepdim=True) + eps)
    y = y if slope == 1.0 else F.leaky_relu(y, slope)
    if margin > 0 and obstacle(y.device, y.dtype) is None:
        y = reflection_pad(y, margin)  # deterministic, unlike `F.pad`
    elif margin > 0:
        y = F.pad(y, (margin,) * 4, mode="reflect")
    return y.to(x.dtype)


@with_fast_path
class _InstanceNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, residual, eps, slope, margin, bias=None, slot=None):
        results = _norm_forward(x, residual, eps, slope, margin)
        return results if slot is None else (*results, x.new_empty(0))  # the token of a tap

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, ctx.eps, ctx.slope, ctx.margin, bias, ctx.slot = inputs
        ctx.bias_dtype = torch.float32 if bias is None else bias.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1])

    @staticmethod
    def backward(ctx, gradient, *_):
        left = [] if ctx.slot is None else ctx.slot.take()
        if gradient is None and not left:
            return (None,) * 7
        x, statistics = ctx.saved_tensors
        d_x = None
        if gradient is None:
            d_x = torch.zeros_like(x)
        elif ctx.needs_input_grad[0]:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
                y = instance_norm_formula(x, ctx.eps, ctx.slope, ctx.margin)
                (d_x,) = torch.autograd.grad(y, x, gradient, create_graph=True)
            else:
                d_x = _norm_backward(gradient, x, statistics, ctx.slope, ctx.margin)
        d_bias = None
        if left:
            d_x, d_bias = with_rows(torch.empty_like(x) if d_x is None else d_x, left, x, ctx.bias_dtype)
        of_x, of_residual, *_, of_bias, _ = ctx.needs_input_grad
        d_x, d_residual = d_x if of_x else None, gradient if of_residual else None
        return d_x, d_residual, None, None, None, d_bias if of_bias else None, None


def instance_norm(
    x: Tensor,
    eps: float = 1e-5,
    slope: float = 1.0,
    margin: int = 0,
    residual: Tensor | None = None,
    tap: Tap | None = None,
) -> Tensor:
    """Normalise each channel of each image to mean 0 and variance 1, then activate, pad or add, in one operator.

    Args:
        x: (images, channels, height, width), bfloat16, float16 or float32, any strides.
        slope: of the activation for negative values: 1 for none, 0 for ReLU, 0.2 for the published leaky ReLU.
        margin: of the reflection pad at the end.
        residual: added at the end, of x's shape and dtype; cannot be combined with a margin.
        tap: of x; it gets its token.

    Returns:
        (images, channels, height + 2 * margin, width + 2 * margin) in x's dtype and layout.
    """
    if margin:
        _check_margin(x, margin)
    if residual is not None and (margin or residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"a residual must have the map's shape and dtype, and the margin must be 0: {tuple(residual.shape)} "
            f"{residual.dtype} for {tuple(x.shape)} {x.dtype}, margin {margin}"
        )
    if tap is None:
        return apply(_InstanceNorm, x, residual, eps, slope, margin, None, None)[0]
    y, _, tap.token = apply(_InstanceNorm, x, residual, eps, slope, margin, tap.bias, tap.slot)
    return y


# Convolutions with few output channels

_few_outputs_forward = operator(
    "few_outputs(Tensor x, Tensor weight, Tensor? bias, int padding) -> Tensor",
    few_outputs.few_outputs,
    lambda x, weight, bias, padding: few_outputs.empty_output(x, few_outputs.geometry(x, weight, padding)),
    _TAGS,
)


def _few_outputs_gradients(gradient, x, weight, padding, of_x, of_weight, of_bias):
    return few_outputs_backward.empty_gradients(x, weight, of_x, of_weight, of_bias)


_few_outputs_backward = operator(
    "few_outputs_backward(Tensor gradient, Tensor x, Tensor weight, int padding, bool of_x, bool of_weight, "
    "bool of_bias) -> (Tensor, Tensor, Tensor)",
    few_outputs_backward.few_outputs_backward,
    _few_outputs_gradients,
    _TAGS,
)


@with_fast_path
class _FewOutputs(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, padding):
        return _few_outputs_forward(x, weight, bias, padding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.padding = inputs
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        if gradient is None:
            return (None,) * 4
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            with torch.autocast(x.device.type, enabled=False):
                y = F.conv2d(x.float(), weight.float(), padding=ctx.padding)
            sources = [t for t, of in zip((x, weight), wanted, strict=False) if of]
            found = iter(torch.autograd.grad(y, sources, gradient, create_graph=True) if sources else ())
            d_x, d_weight = (next(found) if of else None for of in wanted[:2])
            return d_x, d_weight, gradient.sum((0, 2, 3)).to(ctx.dtypes[1]) if wanted[2] else None, None
        d_x, d_weight, d_bias = _few_outputs_backward(gradient, x, weight, ctx.padding, *wanted)
        return (
            d_x if wanted[0] else None,
            d_weight.to(ctx.dtypes[0]) if wanted[1] else None,
            d_bias.to(ctx.dtypes[1]) if wanted[2] else None,
            None,
        )


def few_outputs_obstacle(outputs: int, channels: int, kernel: int) -> str | None:
    """Why `few_outputs_convolution` does not support weights of this shape, or None if it does."""
    return few_outputs.obstacle(outputs, channels, kernel, kernel)


def few_outputs_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    """`F.conv2d(x.float(), weight, bias, padding=padding)` for few output channels, without a float32 copy of x.

    Args:
        x: (images, channels, height, width), bfloat16, float16 or float32, any strides.
        weight: (outputs, channels, kernel, kernel), see `few_outputs_obstacle`; float32 or 16 bits.
        bias: (outputs,), or None.
        padding: zeros on each side.

    Returns:
        float32 (images, outputs, height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1), channels-last if
        x is.
    """
    few_outputs.geometry(x, weight, padding)
    return apply(_FewOutputs, x, weight, bias, padding)
