"""The cases of `aot` for the kernels of layers: norms, activations, pads, blurs and last convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastnce.kernels import (
    activate,
    blur,
    few_outputs,
    few_outputs_backward,
    instance_norm,
    instance_norm_backward,
    reflect_pad,
)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layer_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """The layers at the published widths, in the forms of the networks, and in some that allow no vector loads."""
    forms = {
        "norm, ReLU, pad 1": (256, 64, 0.0, 1, 0, False),
        "norm, ReLU, pad 3": (64, 256, 0.0, 3, 0, False),
        "norm, ReLU": (128, 256, 0.0, 0, 0, False),
        "norm, residual": (256, 64, 1.0, 0, 0, True),
        "norm, residual, pad 1": (256, 64, 1.0, 1, 0, True),
        "norm, residual, blur up": (256, 64, 1.0, 0, 2, True),
        "norm, ReLU, blur up": (128, 128, 0.0, 0, 2, False),
        "norm, ReLU, blur down": (128, 256, 0.0, 0, 1, False),
        "norm, leaky ReLU, blur down": (256, 63, 0.2, 0, 1, False),
        "norm, large, residual, pad 1": (256, 128, 1.0, 1, 0, True),
        "norm, leaky ReLU, 31x31": (512, 31, 0.2, 0, 0, False),
        "norm, leaky ReLU, few pixels": (512, 8, 0.2, 0, 0, False),
        "norm, ragged": (130, 31, 0.0, 1, 0, False),
        "norm, large, ragged": (130, 127, 0.2, 0, 1, False),
        "norm, one pixel": (64, 1, 0.0, 0, 0, False),
    }
    for dtype in (torch.bfloat16, torch.float32):
        for name, (channels, side, *form) in forms.items():
            x = _map(channels, side, dtype)
            yield f"layer: {name} {dtype}", partial(_norm, x, *form)
        for channels, margin in ((256, 1), (64, 3), (3, 3)):
            x = _map(channels, 64, dtype)
            yield f"layer: pad {margin} C={channels} {dtype}", lambda x=x, m=margin: _pad(x, m)
        for channels in (128, 3):
            x = _map(channels, 64, dtype)
            yield f"layer: blur C={channels} {dtype}", lambda x=x: _blurs(x)
        for channels in (64, 3):
            x = _map(channels, 255, dtype)
            yield f"layer: bias, leaky ReLU, blur down C={channels} {dtype}", partial(_activate, x, 1)
    plain, large = tensor(2, 64, 32, 32), tensor(2, 64, 256, 256)
    yield "layer: norm, plain", lambda: _norm(plain, 0.0, 1, 0, False)
    yield "layer: norm, large, plain", lambda: _norm(large, 0.0, 1, 0, False)
    yield "layer: norm, large, blur down, plain", lambda: _norm(large, 0.2, 0, 1, False)
    yield "layer: bias, leaky ReLU, plain", partial(_activate, plain, 0)
    yield "layer: pad and blur, plain", lambda: (_pad(plain, 1), _blurs(plain))


def _map(channels: int, side: int, dtype: torch.dtype) -> torch.Tensor:
    return tensor(2, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)


def _norm(x: torch.Tensor, slope: float, margin: int, blurred: int, residual: bool) -> None:
    """With a residual, its gradient is wanted, and y has another gradient: that of the next block's residual."""
    more = x if residual else None
    y, statistics = instance_norm.instance_norm(x, more, 1e-5, slope, margin, blurred)
    instance_norm_backward.instance_norm_backward(y, more, x, statistics, slope, margin, blurred, residual)


def _activate(x: torch.Tensor, blurred: int) -> None:
    bias = tensor(x.shape[1], dtype=torch.float32)
    activate.activate_backward(activate.activate(x, bias, 0.2, blurred), x, bias, 0.2, blurred)


def _pad(x: torch.Tensor, margin: int) -> None:
    padded = reflect_pad.reflect_pad(x, x.shape[2] + 2 * margin, x.shape[3] + 2 * margin)
    reflect_pad.reflect_pad_backward(padded, x.shape[2], x.shape[3])


def _blurs(x: torch.Tensor) -> None:
    height, width = x.shape[2:]
    blur.blur_down_backward(blur.blur_down(x, (height + 1) // 2, (width + 1) // 2), height, width)
    blur.blur_up_backward(blur.blur_up(x, 2 * height, 2 * width), height, width)


def few_outputs_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Last convolutions of generators: of the ResNet, of the restorer, and others that the kernels support."""
    forms = {
        "64 to 3, 7x7": (64, 256, 3, 7, 0),
        "32 to 3, 3x3, padded": (32, 256, 3, 3, 1),
        "256 to 16, 5x5": (256, 64, 16, 5, 0),
        "65 to 1, 1x1": (65, 31, 1, 1, 0),
    }
    for name, (channels, side, outputs, kernel, padding) in forms.items():
        weight = tensor(outputs, channels, kernel, kernel, dtype=torch.float32)
        weight = weight.to(memory_format=torch.channels_last)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = _map(channels, side + kernel - 1 - 2 * padding, dtype)
            call = partial(_in_precision, "ieee", partial(_few_outputs, x, weight, padding))
            yield f"few outputs: {name} {str(dtype).removeprefix('torch.')}", call
            if dtype == torch.float32:
                yield f"few outputs: {name} tf32", in_tf32(partial(_few_outputs, x, weight, padding))


def _few_outputs(x: torch.Tensor, weight: torch.Tensor, padding: int) -> None:
    bias = tensor(weight.shape[0], dtype=torch.float32)
    y = few_outputs.few_outputs(x, weight, bias, padding)
    few_outputs_backward.few_outputs_backward(y, x, weight, padding, True, True, True)


def in_tf32(call: Callable[[], object]) -> Callable[[], object]:
    """The same call with TF32 allowed in float32 products."""
    return partial(_in_precision, "tf32", call)


def _in_precision(precision: str, call: Callable[[], object]) -> None:
    libraries = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    kept = [library.fp32_precision for library in libraries]
    try:
        for library in libraries:
            library.fp32_precision = precision
        call()
    finally:
        for library, before in zip(libraries, kept, strict=True):
            library.fp32_precision = before
