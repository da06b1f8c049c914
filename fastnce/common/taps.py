"""Feature maps of which only sampled rows are read: handed from a generator to the projection without dense gradients.

A tapped convolution feeds an instance norm, which cancels its bias. So the generator leaves the bias out, and hands out
a `Tap`: the map without bias, and the bias. The projection adds the bias to the few rows that it reads. Its backward
returns no gradient of the map. It leaves those of the rows in the `Slot` that the tap shares with the norm. Autograd
computes the backward of the norm after it, because the tap's `token` is an output of the norm. There, the rows are
added to the gradient that the norm computes anyway, and their sum is the gradient of the bias.

`Tap.dense` is the map with its bias, as without taps. Everything that does not sample distinct rows by kernels uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import FirstOrderOnly

try:
    from ..kernels import add_rows as kernel
    from .operators import obstacle, untraced
except ImportError:  # no Triton for this platform
    kernel = None  # type: ignore[assignment]

MOST_ROWS = 2**14
"""The most rows of one map that are left in a slot. More rows are about as many as a dense gradient has."""


class Rows(NamedTuple):
    """Gradients of rows of some images of a map."""

    task: int
    """Autograd's number of the backward pass that computed them."""
    first: int
    """The first of the images."""
    rows: Tensor
    """float32 (images, channels, patches, 1); in memory, the channels of a row are adjacent."""
    ids: Tensor
    """int64 (sets, patches)."""
    stream: Any
    """The stream that computed them; None on a CPU."""


class Slot:
    """Where projections leave the gradients of rows until the backward of the norm takes them."""

    def __init__(self) -> None:
        self._left: list[Rows] = []

    def leave(self, rows: Tensor, ids: Tensor, first: int) -> None:
        """Leave the gradients of rows, as `Rows` describes them, for the norm's part of this backward pass."""
        stream = torch.cuda.current_stream(rows.device) if rows.is_cuda else None
        self._left.append(Rows(_task(), first, rows, ids, stream))

    def take(self) -> list[Rows]:
        """Return what this backward pass has left. What an earlier pass left and nobody took is discarded."""
        left, self._left = self._left, []
        return [rows for rows in left if rows.task == _task()]


_task = torch._C._current_graph_task_id


def add_rows(target: Tensor, left: Sequence[Rows], dtype: torch.dtype) -> Tensor:
    """Add rows to the gradient of their map in place; return their sum over all rows, (channels,) in `dtype`."""
    images, channels = target.shape[:2]
    total = torch.empty(channels, dtype=dtype, device=target.device)
    for number, (_, first, rows, ids, stream) in enumerate(left):
        if stream is not None and stream != (here := torch.cuda.current_stream(target.device)):
            here.wait_stream(stream)
            rows.record_stream(here)
            ids.record_stream(here)
        part = target if len(rows) == images else target[first : first + len(rows)]
        kernel.add_rows(part, rows.permute(0, 2, 3, 1).view(-1, channels), ids, total, more=number > 0)
    return total


def with_rows(d_x: Tensor, left: Sequence[Rows], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient of a map with that of its rows, and the gradient of its bias in `dtype`.

    It is added in place, except if second derivatives are wanted (`create_graph`): those of the rows are an error.
    """
    if not torch.is_grad_enabled():
        return d_x, add_rows(d_x, left, dtype)
    with torch.no_grad():
        apart = torch.zeros_like(x)
        total = add_rows(apart, left, dtype)
    return d_x + FirstOrderOnly.apply(apart, x), FirstOrderOnly.apply(total, x)


class Tap:
    """A map of a generator without its bias; see the top of the file."""

    __slots__ = ("bias", "first", "map", "slot", "token")

    def __init__(self, map: Tensor, bias: Tensor | None, slot: Slot, token: Tensor | None = None, first: int = 0):
        self.map = map
        """(images, channels, height, width), connected to autograd's graph."""
        self.bias = bias
        """(channels,), or None."""
        self.slot = slot
        self.token = token
        """Empty; an output of the norm. None until the norm has been computed by kernels."""
        self.first = first
        """The number of the first image within the map of the norm."""

    @property
    def shape(self) -> torch.Size:
        return self.map.shape

    @property
    def device(self) -> torch.device:
        return self.map.device

    @property
    def dtype(self) -> torch.dtype:
        return self.map.dtype

    @property
    def requires_grad(self) -> bool:
        return self.token is not None and self.token.requires_grad

    def __len__(self) -> int:
        return len(self.map)

    def record_stream(self, stream: Any) -> None:
        """As of a tensor."""
        for tensor in (self.map, self.token):
            if tensor is not None:
                tensor.record_stream(stream)

    def detach(self) -> Tap:
        """The same as a constant."""
        bias, token = (None if t is None else t.detach() for t in (self.bias, self.token))
        return Tap(self.map.detach(), bias, self.slot, token, self.first)

    def split(self, sizes: Sequence[int]) -> list[Tap]:
        """One tap per group of consecutive images; all share the slot."""
        starts = [self.first + sum(sizes[:i]) for i in range(len(sizes))]
        parts = self.map.split(list(sizes))
        return [Tap(m, self.bias, self.slot, self.token, first) for m, first in zip(parts, starts, strict=True)]

    def dense(self) -> Tensor:
        """The map with its bias, by plain autograd."""
        return self.map if self.bias is None else self.map + self.bias.to(self.map.dtype)[:, None, None]

    def flip(self, *dims: int) -> Tensor:
        """The dense map, mirrored."""
        return self.dense().flip(*dims)


def given_tokens(maps: Sequence[Tensor | Tap]) -> list[Tensor | Tap]:
    """The maps, with tensors in place of taps that no norm has given a token."""
    return [m.dense() if type(m) is Tap and m.token is None else m for m in maps]


def without_biases(maps: Any) -> Any:
    """Tensors of the shapes, dtypes and devices of a list of maps, taps among them."""
    return [m.map if type(m) is Tap else m for m in maps] if type(maps) in (list, tuple) else maps


def dense(maps: Any) -> Any:
    """A list of maps, taps among them, with their biases."""
    return [m.dense() if type(m) is Tap else m for m in maps] if type(maps) in (list, tuple) else maps


class Untapped(NamedTuple):
    """Maps of a call: those of taps lack their biases."""

    maps: Sequence[Tensor]
    taps: tuple[Tap | None, ...]
    """One per map; empty if there is no tap."""

    def biases(self) -> list[Tensor | None]:
        """One per map, or none at all."""
        return [None if tap is None else tap.bias for tap in self.taps]

    def kinds(self) -> tuple[int, ...]:
        """0 for a tensor, 1 for a tap, 2 for a tap with a bias; empty if there is no tap."""
        return tuple(0 if tap is None else 1 + (tap.bias is not None) for tap in self.taps)

    def tokens(self) -> list[Tensor]:
        """Those of the taps."""
        return [tap.token for tap in self.taps if tap is not None and tap.token is not None]

    def leaves(self) -> list[Tensor]:
        """What autograd sees in place of the maps."""
        if not self.taps:
            return list(self.maps)
        return [m if tap is None else tap.token for m, tap in zip(self.maps, self.taps, strict=True)]  # type: ignore[misc]

    def dense(self) -> Sequence[Tensor]:
        """The maps with their biases."""
        if not self.taps:
            return self.maps
        return [m if tap is None else tap.dense() for m, tap in zip(self.maps, self.taps, strict=True)]


def untapped(maps: Any, distinct: bool, patches: Any = 0) -> Untapped:
    """Separate the taps among the maps of a call.

    A tap becomes dense if a location may be read twice in an image (unless `distinct`), if there are too many rows, or
    if a tracer or a mode could not follow the slot.

    Args:
        patches: how many rows are read per image, or the locations of each map.
    """
    if type(maps) not in (list, tuple) or not any(type(m) is Tap for m in maps):
        return Untapped(maps, ())
    if not isinstance(patches, int):
        patches = max((i.shape[-1] for i in patches if isinstance(i, Tensor) and i.dim()), default=0)
    taps = [m if type(m) is Tap and _stays(m, distinct, patches) else None for m in maps]
    plain = [(m.map if tap else m.dense()) if type(m) is Tap else m for m, tap in zip(maps, taps, strict=True)]
    return Untapped(plain, tuple(taps) if any(taps) else ())


def _stays(tap: Tap, distinct: bool, patches: int) -> bool:
    if tap.token is None or not untraced(tap.map):
        return False
    return not tap.requires_grad or (distinct and patches * len(tap) <= MOST_ROWS)


def can_tap(x: Tensor) -> bool:
    """Whether maps like x can be handed out as taps: kernels can run, and nothing traces or transforms."""
    return (
        kernel is not None and not torch.compiler.is_compiling() and untraced(x) and obstacle(x.device, x.dtype) is None
    )


class _Opened(torch.autograd.Function):
    """The token of a map without a norm: its gradient is that of the rows alone."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, slot: Slot) -> Tensor:
        ctx.slot, ctx.like, ctx.dtype = slot, x, x.dtype if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        d_x = torch.zeros_like(ctx.like)
        left = ctx.slot.take()
        total = add_rows(d_x, left, ctx.dtype) if left else d_x.new_zeros(d_x.shape[1], dtype=ctx.dtype)
        return d_x, total if ctx.needs_input_grad[1] else None, None


def opened(x: Tensor, bias: Tensor | None) -> Tap:
    """Return a tap of a map that no norm follows, for checks of kernels."""
    slot = Slot()
    return Tap(x, bias, slot, _Opened.apply(x, bias, slot))
