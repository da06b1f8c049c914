"""The generator's last convolution as a PyTorch operator with gradients: few output channels, in float32.

Second derivatives are computed by plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autograd import apply, with_fast_path
from ..common.operators import operator
from ..kernels import few_outputs, few_outputs_backward

_TAGS = [torch.Tag.needs_exact_strides]  # the layout of the results follows the layout of the arguments

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
