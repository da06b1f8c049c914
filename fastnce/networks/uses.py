"""How the layers use their kernels: made-up maps of about the same shapes, and the kernels' error against float64.

The check at the first use measures made-up maps, `run.check_every` those of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.agreement import GRADIENT_GATES, Check, compared, exact_device, leaves, pattern, run_kernels, widened
from ..common.first_use import epoch, settled, trusted

try:
    from ..kernels.common import architecture, precision
    from . import fused, fused_last
except ImportError:  # no Triton for this platform
    fused = fused_last = None  # type: ignore[assignment]

LAYERS = ("instance_norm", "activate", "reflection_pad", "blur_down", "blur_up", "few_outputs_convolution")
"""The families of kernels, by their names in the modules `fused` and `fused_last`."""

MOST_ELEMENTS = 2**20
MOST_ELEMENTS_INTERPRETED = 2**12


def formula(name: str, tensors: Sequence[Tensor], options: Sequence[Any]) -> tuple[Tensor, ...]:
    """Compute a layer's outputs in plain PyTorch, in the dtype of its inputs.

    Args:
        name: of `LAYERS`.
        tensors: the map, then the residual of a norm, the bias of an activation, or weight and bias of a convolution,
            if there are any.
        options: (eps, slope, margin, blur, inner) of a norm, (slope, blur) of an activation, (margin,) of a pad, () of
            a blur, (padding,) of a convolution. A norm with `inner` has two outputs: with its pad, and without it.
    """
    x, rest = tensors[0], tensors[1:]
    if name == "instance_norm":
        eps, slope, margin, blur, inner = options
        apart = x - x.mean(dim=(2, 3), keepdim=True)
        y = apart * torch.rsqrt(apart.square().mean(dim=(2, 3), keepdim=True) + eps)
        y = y if slope == 1.0 else F.leaky_relu(y, slope)
        y = y + rest[0] if rest else y
        out = F.pad(y, (margin,) * 4, mode="reflect") if margin else _blurred(y, blur)
        return (out, y) if inner else (out,)
    if name == "activate":
        slope, blur = options
        y = F.leaky_relu(x + rest[0][:, None, None] if rest else x, slope)
        return (_blurred(y, blur),)
    if name == "reflection_pad":
        return (F.pad(x, (options[0],) * 4, mode="reflect"),)
    if name in ("blur_down", "blur_up"):
        return (_blurred(x, 1 if name == "blur_down" else 2),)
    return (F.conv2d(x, rest[0], rest[1] if len(rest) > 1 else None, padding=options[0]),)


def _blurred(x: Tensor, blur: int) -> Tensor:
    """x itself (0), halved (1) or doubled (2)."""
    if blur == 1:
        row = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
        taps = (row[:, None] * row[None, :]).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), taps, stride=2, groups=x.shape[1])
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if blur == 2 else x


def by_kernels(name: str, tensors: Sequence[Tensor], options: Sequence[Any]) -> tuple[Tensor, ...]:
    """Compute a layer by its kernels; the arguments are those of `formula`."""
    x, more = tensors[0], [*tensors[1:], None, None]
    if name == "instance_norm":
        eps, slope, margin, blur, inner = options
        if inner:
            return fused.instance_norm_and_inner(x, eps, slope, margin, more[0])
        return (fused.instance_norm(x, eps, slope, margin, more[0], blur),)
    if name == "activate":
        return (fused.activate(x, more[0], *options),)
    if name == "few_outputs_convolution":
        return (fused_last.few_outputs_convolution(x, tensors[1], more[1], *options),)
    function: Callable[..., Tensor] = getattr(fused, name)
    return (function(x, *options),)


def in_float32(name: str, tensors: Sequence[Tensor], options: Sequence[Any]) -> tuple[Tensor, ...]:
    """Compute a layer by `formula` in float32, with results of the kernels' dtype."""
    ys = formula(name, [t.float() for t in tensors], options)
    return ys if name == "few_outputs_convolution" else tuple(y.to(tensors[0].dtype) for y in ys)


def measure_layer(name: str, tensors: Sequence[Tensor], options: Sequence[Any], plain: bool = False) -> Iterator[Check]:
    """Measure the outputs of a layer's kernels, and the gradients of all its tensors.

    Args:
        name, tensors, options: as `formula` takes them.
        plain: measure the formula in float32 instead of the kernels.
    """
    x = tensors[0]
    wide = exact_device(x.device)
    gate = GRADIENT_GATES[x.dtype]
    if name == "few_outputs_convolution" and precision(architecture(x.device), x.dtype, True) == "tf32":
        gate = GRADIENT_GATES[torch.float16]  # TF32 keeps as many digits of a factor

    def run(function, given: Sequence[Tensor], upstream: Sequence[Tensor] | None) -> list[Tensor]:
        own = leaves(given)
        ys = function(name, own, options)
        arriving = [upstream_of(y) for y in ys] if upstream is None else [g.to(ys[0]) for g in upstream]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, own, arriving)]

    function = in_float32 if plain else by_kernels
    measured = run_kernels(lambda: run(function, tensors, None), x.device)
    outputs = len(measured) - len(tensors)
    exact = run(formula, widened(tensors, wide), [upstream_of(y).to(wide) for y in measured[:outputs]])
    names = ["the output", "the output without its pad"][:outputs]
    names += [f"the gradient of {what}" for what in _names(name, len(tensors))]
    yield from compared(names, measured, exact, [gate] * len(exact))


def upstream_of(y: Tensor) -> Tensor:
    """Return a gradient for an output, in its dtype and layout."""
    return torch.empty_like(y).copy_(pattern(y))


def _names(name: str, count: int) -> list[str]:
    more = {"instance_norm": ["residual"], "activate": ["bias"]}.get(name, ["weight", "bias"])
    return ["the map", *more][:count]


class LayerUse(NamedTuple):
    """A call of a layer's kernels."""

    name: str
    shape: tuple[int, ...]  # of the map
    channels_last: bool
    options: tuple[Any, ...]
    more: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    """Shape and dtype of the residual, or of weight and bias."""

    @property
    def family(self) -> str:
        return self.name

    def form(self) -> Hashable:
        channels = min(64, 1 << (self.shape[1] - 1).bit_length()), self.shape[1] % 16
        more = [dtype if self._adds else (shape, dtype) for shape, dtype in self.more]
        return *channels, self.channels_last, *self.options, *more

    @property
    def _adds(self) -> bool:
        return self.name == "instance_norm"

    def measure(self, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
        generator = torch.Generator().manual_seed(8)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format

        def draw(*shape: int, to: torch.dtype) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
            return values.half().to(device, to)  # TF32 keeps these values too

        shape = self._fitted(MOST_ELEMENTS_INTERPRETED if device.type == "cpu" else MOST_ELEMENTS)
        x = draw(*shape, to=dtype) * 2
        if self.name == "instance_norm":
            x = away_from_the_corner(x + 1)
        tensors = [x.contiguous(memory_format=layout)]
        for size, to in self.more:
            values = draw(*(shape if self._adds else size), to=to) / 16
            tensors.append(values.contiguous(memory_format=layout) if len(size) == 4 else values)
        if self.name == "activate":
            tensors[0] = away_from_the_bias(*tensors)
        yield from measure_layer(self.name, tensors, self.options)

    def _fitted(self, most: int) -> tuple[int, int, int, int]:
        """Return a shape of typical size. Sides change by multiples of 16, so that they stay as divisible as they are.

        A first call may be tiny, and its verdict is for all calls of its form.
        """
        images, channels, height, width = self.shape
        images, height, width = min(images, 2), height + 16 * (height < 16), width + 16 * (width < 16)
        while images * channels * height * width > most:
            if max(height, width) > 32:
                height, width = (height - 16, width) if height >= width else (height, width - 16)
            elif images > 1:
                images = 1
            elif channels > 128 and not self.more:
                channels -= 64
            else:
                break
        return images, channels, height, width


def away_from_the_corner(x: Tensor) -> Tensor:
    """Move values within rounding of their plane's mean, which may fall on either side of the activation's corner."""
    wide = x.float()
    apart = wide - wide.mean((2, 3), keepdim=True)
    deviation = apart.square().mean((2, 3), keepdim=True).sqrt()
    return torch.where(apart.abs() < 1e-3 * deviation, wide + 0.05 * deviation, wide).to(x.dtype)


def away_from_the_bias(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Move values whose sum with the bias may fall on either side of the activation's corner by rounding."""
    wide = x.float()
    biased = wide if bias is None else wide + bias.float()[:, None, None]
    return torch.where(biased.abs() < 2e-2, wide + 0.1, wide).to(x.dtype)


_known: dict[Any, bool] = {}
_known_at = -1
"""The epoch of the verdicts that `_known` follows from."""


def is_trusted(name: str, x: Tensor, options: tuple[Any, ...], *more: Tensor | None) -> bool:
    """Whether a layer's kernels compute a call: see `first_use.trusted`, whose result is kept for equal calls."""
    global _known_at
    key = name, x.shape, x.stride(), x.dtype, x.device, options, *((t.shape, t.dtype) for t in more if t is not None)
    found = _known.get(key)
    if found is not None and _known_at == epoch():
        return found
    choice = trusted(layer_use(name, x, options, *more), x.device, x.dtype)
    if _known_at != epoch() or len(_known) > 4096:
        _known.clear()
        _known_at = epoch()
    if settled(choice):
        _known[key] = choice.triton
    return choice.triton


def layer_use(name: str, x: Tensor, options: tuple[Any, ...], *more: Tensor | None) -> LayerUse:
    """Describe a call by its tensors."""
    last = x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()
    others = tuple((tuple(t.shape), t.dtype) for t in more if t is not None)
    return LayerUse(name, tuple(x.shape), last, options, others)
