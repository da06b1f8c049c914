"""The terms of a phase's loss, computed together: their values to log, and their weighted total to differentiate.

    terms = Terms()
    terms.gan("G_GAN", judged, True, weight=1.0)
    terms.distance("idt_B", made, picture, weight=10.0)
    total, losses = terms.total()

Where kernels can run, all terms are two launches, and their gradients one (`kernels/loss_terms.py`). Elsewhere, and
while a compiler traces, each term is computed by its own function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import KERNELS, choose
from ..common.first_use import trusted
from .base import Losses
from .loss_kernels import MOST_TERMS, Entry, TermUse, kinds, total_and_values
from .losses import GAN_MODES, GANMode, channel_cycle_loss, frequency_cycle_loss, gan_loss

Judged = tuple[Tensor, tuple[int, int] | None]
"""A discriminator's output, and the rows of it that belong to a batch; None: all."""


class _Term(NamedTuple):
    name: str
    weight: float
    share: float
    formula: Callable[[], Tensor]
    """The value without its weight, in plain PyTorch."""
    entry: Entry | None
    """For the kernels; None if they do not compute it."""


class Terms:
    """Collects the terms of one loss. Terms of one name are added to one value."""

    def __init__(self) -> None:
        self._terms: list[_Term] = []

    def gan(
        self,
        name: str,
        judged: Tensor | Judged,
        real: bool,
        mode: GANMode = "lsgan",
        *,
        for_generator: bool = False,
        weight: float = 1.0,
        share: float = 1.0,
    ) -> None:
        """Add `weight` times `gan_loss` of a discriminator's output.

        Args:
            judged: the output; or an output, and the rows of it that are meant, from the first up to the second number.
            real, mode, for_generator: see `gan_loss`.
            weight: of the logged value.
            share: of the value in the total.
        """
        output, rows = judged if isinstance(judged, tuple) else (judged, None)

        def formula() -> Tensor:
            own = output if rows is None else output[slice(*rows)]
            return gan_loss(own, real, mode, for_generator=for_generator)

        known = mode in GAN_MODES and isinstance(real, bool)  # else `gan_loss` explains what is wrong
        entry = Entry(*kinds(mode, real, for_generator), 1.0, output, None, rows) if known else None
        self._terms.append(_Term(name, weight, share, formula, entry))

    def distance(self, name: str, x: Tensor, y: Tensor, *, weight: float = 1.0, share: float = 1.0) -> None:
        """Add `weight` times the mean absolute difference of x and y, a constant of x's shape."""
        entry = _compared("distance", 1.0, x, y)
        self._terms.append(_Term(name, weight, share, lambda: F.l1_loss(x, y), entry))

    def channels(self, name: str, x: Tensor, y: Tensor, *, weight: float = 1.0, share: float = 1.0) -> None:
        """Add `weight` times `channel_cycle_loss`; y is a constant."""
        entry = _compared("distance", float(x.shape[1]), x, y) if x.dim() == 4 else None
        self._terms.append(_Term(name, weight, share, lambda: channel_cycle_loss(x, y), entry))

    def spectrum(self, name: str, x: Tensor, y: Tensor, *, weight: float = 1.0, share: float = 1.0) -> None:
        """Add `weight` times `frequency_cycle_loss`; y is a constant."""
        entry = _compared("spectrum", 1.0, x, y) if x.dim() == 4 else None
        self._terms.append(_Term(name, weight, share, lambda: frequency_cycle_loss(x, y), entry))

    def given(self, names: Sequence[str], values: Tensor, *, weight: float = 1.0, share: float = 1.0) -> None:
        """Add `weight` times computed values, (names,), each under its name."""
        for i, name in enumerate(names):
            entry = Entry("linear", 1.0, 1.0, values, None, (i, i + 1))
            self._terms.append(_Term(name, weight, share, partial(values.__getitem__, i), entry))

    def total(self) -> tuple[Tensor, Losses]:
        """Return the sum of share * value over all terms, (), and the values by their names.

        Only the total can be differentiated where kernels compute it.
        """
        names = self._names()
        if self._by_kernels():
            entries = [
                term.entry._replace(
                    scale=term.entry.scale * term.weight, share=term.share, place=names.index(term.name)
                )
                for term in self._terms
                if term.entry is not None
            ]
            total, values = total_and_values(entries)
            return total, dict(zip(names, values.unbind(), strict=True))
        losses: Losses = {}
        shares: list[Tensor] = []
        for term in self._terms:
            value = term.formula() if term.weight == 1.0 else term.weight * term.formula()
            losses[term.name] = losses[term.name] + value if term.name in losses else value
            shares.append(value if term.share == 1.0 else term.share * value)
        return (shares[0] if len(shares) == 1 else torch.stack(shares).sum()), losses

    def _names(self) -> list[str]:
        return list(dict.fromkeys(term.name for term in self._terms))

    def _by_kernels(self) -> bool:
        """Whether the kernels compute all terms."""
        if torch.compiler.is_compiling() or not 0 < len(self._terms) <= MOST_TERMS or not torch.is_grad_enabled():
            return False
        entries = [term.entry for term in self._terms]
        tensors = [t for entry in entries if entry is not None for t in (entry.x, entry.y) if t is not None]
        if any(entry is not None and entry.y is not None and entry.y.requires_grad for entry in entries):
            return False
        places = [self._names().index(term.name) for term in self._terms]
        if (
            None in entries
            or places != sorted(places)
            or not _are_apart(entries)
            or torch._C._are_functorch_transforms_active()
        ):
            return False
        if not all(type(t) is Tensor and t.numel() and t.device == tensors[0].device for t in tensors):
            return False
        if any(choose(None, t.device, t.dtype) is not KERNELS for t in tensors):
            return False
        use = TermUse(tuple(sorted({(entry.kind, entry.x.dtype) for entry in entries if entry is not None}, key=str)))
        return trusted(use, tensors[0].device, tensors[0].dtype).triton


def _compared(kind: str, scale: float, x: Tensor, y: Tensor) -> Entry | None:
    """The entry of a term that compares x with y; None if they differ in shape, which the kernels do not know."""
    return Entry(kind, 0.0, scale, x, y) if x.shape == y.shape else None


def _are_apart(entries: Sequence[Entry | None]) -> bool:
    """Whether no element of a tensor is in two terms that name rows of it: each writes the gradient of its rows."""
    rows: dict[int, list[tuple[int, int]]] = {}
    for entry in entries:
        if entry is not None and entry.rows is not None:
            rows.setdefault(id(entry.x), []).append(entry.rows)
    if any(entry is not None and entry.rows is None and id(entry.x) in rows for entry in entries):
        return False
    borders = [[0, *itertools.chain(*sorted(own))] for own in rows.values()]
    return all(ends == sorted(ends) for ends in borders) and all(
        entry is None or entry.rows is None or entry.rows[0] < entry.rows[1] <= len(entry.x) for entry in entries
    )


def judge(discriminator: Callable[[Tensor], Tensor], batches: Sequence[Tensor], independent: bool) -> list[Judged]:
    """Judge batches of images, in one pass if they have one size and do not influence each other.

    Args:
        independent: the discriminator judges each image on its own (no batch norm).

    Returns:
        for each batch what `Terms.gan` takes: an output, and the rows of it that belong to the batch.
    """
    if not independent or any(images.shape[1:] != batches[0].shape[1:] for images in batches):
        return [(discriminator(images), None) for images in batches]
    judged = discriminator(torch.cat(list(batches)))
    ends = list(itertools.accumulate(map(len, batches), initial=0))
    return [(judged, rows) for rows in itertools.pairwise(ends)]
