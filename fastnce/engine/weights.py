"""Convert the weights of a step to 16 bits, one network at a time.

Autocast converts each weight and each gradient on its own: two of ten launches of CUT's step in bf16. Here, all weights
of a network are converted in one call, which CUDA splits into few launches, and all gradients of a weight that a step
uses more than once are added in few launches too. The results are the same bits, except under a gradient penalty, whose
16-bit gradients are added in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..common.dispatch import choose
from ..common.narrowed import narrowed
from ..nce import PatchSampleF
from ..networks.convolution import Collector, Slot, collect
from ..networks.layers import keeps_float32

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""Layers whose weights autocast converts unchanged. (Subclasses may modify them first.)"""


class _Convert(torch.autograd.Function):
    """Converts tensors to another dtype, and their collected gradients back."""

    @staticmethod
    def forward(ctx, collector: Collector, dtype: torch.dtype, beside: list[Tensor], *tensors: Tensor):
        """`beside` are converted in the same launches and replaced in the list by the results, without gradients."""
        ctx.set_materialize_grads(False)
        ctx.collector, ctx.dtype = collector, tensors[0].dtype
        copies = _converted([*tensors, *beside], dtype)
        beside[:] = copies[len(tensors) :]
        return tuple(copies[: len(tensors)])

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        sums: dict[int, Tensor] = {}  # the decoder's weights have no gradient after an encoder's pass
        for part in ctx.collector.take():
            wide = dict(zip(part, _converted(list(part.values()), ctx.dtype), strict=True))
            if twice := [i for i in wide if i in sums]:
                torch._foreach_add_([sums[i] for i in twice], [wide[i] for i in twice])
            sums = wide | sums
        return None, None, None, *map(sums.get, range(len(gradients)))


class _Use(torch.autograd.Function):
    """The same tensors for one part of the step. Gradients that autograd has summed are collected here."""

    @staticmethod
    def forward(ctx, collector: Collector, part: int, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        ctx.collector, ctx.part = collector, part
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                ctx.collector.add(ctx.part, i, gradient)
        return None, None, *(None for _ in gradients)


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


class ConvertedWeights:
    """Copies of the float32 weights of the convolutions and linear layers of `networks` in `dtype`.

    Gradients are computed for the weights themselves, and equal those under autocast. Layers that `keep_float32` has
    marked are left out. The kernels find copies of the weights of `projectors` (see `common.narrowed`).
    """

    def __init__(self, networks: Sequence[nn.Module], dtype: torch.dtype, projectors: Sequence[nn.Module] = ()):
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        for network in networks:
            for layer in network.modules():
                if type(layer) in LAYERS and not keeps_float32(layer):
                    held += [(layer, name, p) for name, p in layer._parameters.items() if p is not None]
        held = [entry for entry in held if entry[2].dtype == torch.float32]
        # frozen weights separately: all results of a function require a gradient if one argument does
        self._trained = [entry for entry in held if entry[2].requires_grad]
        self._frozen = [entry for entry in held if not entry[2].requires_grad]
        self._collector = Collector()
        self._parts = 0
        self._projected = _weights_of(projectors, dtype)
        self._projected_copies = list(self._projected)
        beside = [self._projected_copies, []] if self._trained else [[], self._projected_copies]
        self._copies, self._frozen_copies = (
            _Convert.apply(self._collector, dtype, more, *(p for _, _, p in entries)) if entries else ()
            for entries, more in zip((self._trained, self._frozen), beside, strict=True)
        )
        self._sources = [(p, p.requires_grad, p._version) for _, _, p in held]
        self._differentiable = torch.is_grad_enabled()

    @property
    def current(self) -> bool:
        """Whether the copies made now would be the same: no weight has changed, or been frozen or unfrozen, since."""
        known = all(p.requires_grad == trains and p._version == version for p, trains, version in self._sources)
        return known and self._differentiable == torch.is_grad_enabled()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within: the layers compute with the copies. Each use is another part of the step for the gradients' sums."""
        self._parts += 1
        copies = self._copies
        if copies and torch.is_grad_enabled() and self._differentiable:
            owner = copies[0].grad_fn
            copies = _Use.apply(self._collector, self._parts, *copies)
            for i, copy in enumerate(copies):
                collect(copy, Slot(self._collector, self._parts, i, owner))
        held = [*self._trained, *self._frozen]
        try:
            for (layer, name, _), copy in zip(held, (*copies, *self._frozen_copies), strict=True):
                layer._parameters[name] = copy
            with narrowed(self._projected, self._projected_copies) if held else nullcontext():
                yield
        finally:
            for layer, name, parameter in held:
                layer._parameters[name] = parameter


def _weights_of(projectors: Sequence[nn.Module], dtype: torch.dtype) -> list[Tensor]:
    """The float32 weights by which the MLPs of our own projectors multiply in kernels."""
    found: list[Tensor] = []
    for projector in projectors:
        if isinstance(projector, PatchSampleF):
            weights = [layer._parameters.get("weight") for layer in projector.modules() if type(layer) is nn.Linear]
            known = [w for w in weights if w is not None and w.dtype == torch.float32]
            found += [w for w in known if choose(projector.implementation, w.device, dtype).triton]
    return found


@contextmanager
def converted_weights(
    networks: Sequence[nn.Module], dtype: torch.dtype, projectors: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Within: layers compute with copies of their weights in `dtype`; for the arguments see `ConvertedWeights`."""
    with ConvertedWeights(networks, dtype, projectors).used():
        yield


class SharedCopies:
    """The copies of some networks' weights that the parts of a step share. Within the context of the object.

    A part that needs them gets those of the part before, unless a weight has changed since.
    """

    def __init__(self, networks: Sequence[nn.Module], dtype: torch.dtype):
        self.networks, self.dtype = networks, dtype
        self._made: ConvertedWeights | None = None

    def used(self, anew: bool = False) -> AbstractContextManager[None]:
        """Within: the layers compute with the copies. `anew` makes them in any case."""
        if anew or self._made is None or not self._made.current:
            self._made = ConvertedWeights(self.networks, self.dtype)
        return self._made.used()

    def __enter__(self) -> None:
        self._made = None

    def __exit__(self, *_: object) -> None:
        self._made = None
