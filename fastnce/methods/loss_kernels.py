"""The terms of a loss by their kernels, as one function with a gradient, and its check against float64."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.agreement import GRADIENT_GATES, LOSS_GATES, Check, compared, exact_device, run_kernels

try:
    from ..kernels import loss_terms
except ImportError:  # no Triton for this platform
    loss_terms = None  # type: ignore[assignment]

KINDS = ("square", "softplus", "linear", "hinge", "distance", "spectrum")
"""The kinds of terms, in the order of the numbers in `kernels/loss_terms.py`."""
MOST_TERMS = 0 if loss_terms is None else loss_terms.MOST_TERMS


class Entry(NamedTuple):
    """A term: scale times the mean of a function of x and y."""

    kind: str
    number: float
    """Of the kind: see `kernels/loss_terms.py`."""
    scale: float
    x: Tensor
    y: Tensor | None = None
    rows: tuple[int, int] | None = None
    """The part of x along its first dimension; None: all."""
    share: float = 1.0
    place: int = 0


def kinds(mode: str, real: bool, for_generator: bool) -> tuple[str, float]:
    """Return the kind and the number of a GAN objective: see `losses.gan_loss`."""
    towards = -1.0 if real else 1.0
    if mode == "lsgan":
        return "square", float(real)
    if mode in ("vanilla", "nonsaturating"):
        return "softplus", towards
    if mode == "hinge" and for_generator:
        return "linear", -1.0
    return ("hinge" if mode == "hinge" else "linear"), towards


def total_and_values(entries: Sequence[Entry]) -> tuple[Tensor, Tensor]:
    """Return the sum of share * value over all entries, (), and the values of the places, (places,), by kernels.

    Only the total has a gradient, with respect to every x.
    """
    xs: list[Tensor] = []
    where: list[int] = []
    for entry in entries:
        # rows of one tensor share its gradient; whole tensors have one each, and autograd adds them
        found = next((i for i, x in enumerate(xs) if x is entry.x and entry.rows is not None), len(xs))
        xs += [entry.x] * (found == len(xs))
        where.append(found)
    return _Total.apply([entry._replace(x=None) for entry in entries], where, *xs)  # type: ignore[arg-type]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entries: Sequence[Entry], where: Sequence[int], *given: Tensor) -> tuple[Tensor, Tensor]:
        tensors = [_dense(x) for x in given]
        ctx.count, ctx.sides = len(tensors), {}
        parts: list[Any] = [None] * len(entries)
        for n, (entry, i) in enumerate(zip(entries, where, strict=True)):
            if entry.kind == "spectrum":
                continue
            y = i
            if entry.y is not None:
                y = len(tensors)
                tensors.append(_like(entry.y, tensors[i]))
            elements = tensors[i].numel() if entry.rows is None else tensors[i][slice(*entry.rows)].numel()
            kind, factor = KINDS.index(entry.kind), entry.scale / elements
            parts[n] = loss_terms.Part(kind, entry.number, factor, entry.share, entry.place, i, y, entry.rows)
        for n, part in _spectra(entries, where, tensors):
            parts[n] = part
            ctx.sides[n] = where[n], given[where[n]].shape[2:]
        values, total = loss_terms.loss_values(tensors, *parts)
        ctx.parts = parts
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any):
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        gradients: list[Tensor | None] = [None] * ctx.count
        spectra: dict[int, Tensor] = {}
        parts, into = [], []
        for n, part in enumerate(ctx.parts):
            if not wanted[ctx.sides[n][0] if n in ctx.sides else part.x]:
                continue
            if n in ctx.sides:
                slopes = spectra.get(part.x)
                if slopes is None:
                    own = max(p.rows[1] for p in ctx.parts if p.x == part.x)
                    slopes = spectra[part.x] = torch.empty_like(tensors[part.x][:own])
                parts.append(part)
                into.append(slopes)
                continue
            if gradients[part.x] is None:
                shares = [p.rows for p in ctx.parts if p.x == part.x]
                filled = None in shares or sum(b - a for a, b in shares) == len(tensors[part.x])
                gradients[part.x] = (torch.empty_like if filled else torch.zeros_like)(tensors[part.x])
            parts.append(part)
            into.append(gradients[part.x])
        if parts:
            loss_terms.loss_slopes(upstream, list(tensors), into, *parts)
        for place, slopes in spectra.items():
            sides = next(size for n, (_, size) in ctx.sides.items() if ctx.parts[n].x == place)
            made = torch.fft.irfft2(torch.view_as_complex(slopes), s=sides, norm="forward")
            for n, (i, _) in ctx.sides.items():
                if ctx.parts[n].x == place and wanted[i]:
                    gradients[i] = made[slice(*ctx.parts[n].rows)].to(tensors[i].dtype)
        return None, None, *gradients


def _dense(x: Tensor) -> Tensor:
    """The same values; dense in memory, with images apart from each other."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y in the layout of x."""
    return y if y.stride() == x.stride() else torch.empty_like(x, dtype=y.dtype).copy_(y)


def _spectra(entries: Sequence[Entry], where: Sequence[int], tensors: list[Tensor]) -> Iterator[tuple[int, Any]]:
    """Append half spectra to the tensors, and yield the parts of the entries that compare them.

    Spectra are float32 (images, channels, height, columns, 2) and unscaled. Images of one shape are transformed
    together: first every x, then every y.
    """
    indices = [n for n, entry in enumerate(entries) if entry.kind == "spectrum"]
    for shape in dict.fromkeys(tensors[where[n]].shape for n in indices):
        own = [n for n in indices if tensors[where[n]].shape == shape]
        images = [tensors[where[n]] for n in own] + [entries[n].y for n in own]
        found = torch.fft.rfft2(torch.cat([image.float() for image in images if image is not None]))
        tensors.append(torch.view_as_real(found).contiguous())
        count, (height, width) = shape[0], shape[2:]
        # a mean over the whole spectrum, of transforms that are scaled to be unitary
        factor = 1.0 / (shape.numel() * (height * width) ** 0.5)
        for k, n in enumerate(own):
            entry, place = entries[n], len(tensors) - 1
            first, second = ((j * count, (j + 1) * count) for j in (k, k + len(own)))
            yield (
                n,
                loss_terms.Part(
                    KINDS.index("spectrum"), 0.0, entry.scale * factor, entry.share, entry.place, place, place, first,
                    second, width // 2 + 1, width // 2 if width % 2 == 0 else 0,
                ),
            )  # fmt: skip


def formula(kind: str, number: float, x: Tensor, y: Tensor) -> Tensor:
    """Compute the mean of a term in plain PyTorch, in the dtype of its inputs."""
    if kind == "square":
        return (x - number).square().mean()
    if kind == "softplus":
        return F.softplus(number * x).mean()
    if kind == "hinge":
        return F.relu(1.0 + number * x).mean()
    if kind == "distance":
        return (x - y).abs().mean()
    if kind == "spectrum":
        a, b = (torch.fft.fft2(p, norm="ortho") for p in (x, y))
        return ((a.abs() - b.abs()).abs() + (a - b).abs()).mean()
    return number * x.mean()


class TermUse(NamedTuple):
    """Kinds of terms, with the dtypes of their tensors: they are compiled together."""

    terms: tuple[tuple[str, torch.dtype], ...]
    family: str = "loss_terms"

    def form(self) -> Hashable:
        return self.terms

    def measure(self, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
        generator = torch.Generator().manual_seed(9)

        def draw(to: torch.dtype) -> Tensor:
            return torch.randn(2, 3, 12, 14, generator=generator, device="cpu").to(device, to)

        entries, exact = [], []
        wide = exact_device(device)
        for place, (kind, own) in enumerate(self.terms):
            x, y, number = draw(own).requires_grad_(), draw(own), -1.0 if place % 2 else 1.0
            other = y if kind in ("distance", "spectrum") else None
            entries.append(Entry(kind, number, 0.5, x, other, None, 2.0, place))
            exact.append((kind, number, x.detach().to(wide, torch.float64).requires_grad_(), y.to(wide, torch.float64)))

        def run() -> list[Tensor]:
            total, values = total_and_values(entries)
            return [values, *torch.autograd.grad(total, [entry.x for entry in entries])]

        measured = run_kernels(run, device)
        values = torch.stack([0.5 * formula(*one) for one in exact])
        slopes = torch.autograd.grad(2.0 * values.sum(), [x for _, _, x, _ in exact])
        names = ["the values", *[f"the gradient of the {kind}" for kind, _ in self.terms]]
        gates = [LOSS_GATES[torch.float32] * 4, *[GRADIENT_GATES[own] for _, own in self.terms]]
        yield from compared(names, measured, [values, *slopes], gates)
