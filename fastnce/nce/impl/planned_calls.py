"""Calls that start from maps, outside of tracers: a call like an earlier one repeats its plans without its checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.autograd import fast_apply
from ...common.first_use import epoch
from ...common.narrowed import copies_of
from ...common.operators import PLAIN, untraced
from ...common.taps import Untapped
from ...kernels.common import fp32_precision
from ...kernels.plan import INTERPRETED
from ...kernels.planned import PlanCache, plan_of
from .planned_maps import Entry, LossFunction, RowsFunction, loss_forward, rows_forward

_LOSS, _ROWS = fast_apply(LossFunction), fast_apply(RowsFunction)
_ENTRIES = PlanCache()


def usable(maps: Sequence[Tensor]) -> bool:
    """Whether calls with these maps can be planned: a list of maps on a device with kernels, and nothing traces."""
    if type(maps) not in (list, tuple) or not maps:
        return False
    first = maps[0]
    return untraced(first) and (first.is_cuda or INTERPRETED)


def _key(
    settings: tuple[Any, ...],
    leaves: Sequence[Sequence[Tensor]],
    constants: Sequence[Sequence[Tensor]],
    key_mlp: Sequence[Tensor] = (),
) -> tuple[tuple[Any, ...] | None, bool]:
    """Return all that the checks and plans of a call depend on, and whether autograd records it.

    The key is None for wrong arguments and for tensors with classes of their own.

    Args:
        leaves: maps, MLPs and tokens of taps, which may get a gradient; there is at least one map.
        constants: lists of other tensors.
        key_mlp: an MLP among the constants, if it is another one.
    """
    enabled, gradient = torch.is_grad_enabled(), False
    kind = leaves[0][0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    narrow = copies_of(leaves[1], autocast) is not None, copies_of(key_mlp, autocast) is not None
    key = [settings, enabled, epoch(), fp32_precision("cuda", "matmul"), autocast, narrow]
    try:
        hash(settings)
    except TypeError:
        return None, False
    for tensors in (*leaves, *constants):
        if type(tensors) not in (list, tuple):
            return None, False
        key.append(len(tensors))
        for t in tensors:
            if type(t) not in PLAIN or t.is_meta:
                return None, False
            key += (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() & 15 == 0)
    if enabled:
        gradient = any(t.requires_grad for tensors in leaves for t in tensors)
    return (*key, gradient), gradient


def given_ids(patch_ids: Any) -> list[Tensor] | None:
    """Ids as (sets, patches); empty for None, which draws them; None for anything but a list of int64 tensors."""
    if patch_ids is None:
        return []
    if type(patch_ids) not in (list, tuple):
        return None
    if not all(isinstance(i, Tensor) and i.dtype is torch.int64 for i in patch_ids):
        return None
    return [i[None] if i.dim() == 1 else i for i in patch_ids]


def _seeds(maps: Sequence[Tensor], sets: int) -> Tensor:
    return torch.randint(2**62, (len(maps), sets), device=maps[0].device)


def _place_of_seeds(maps: Sequence[Tensor], sets: int) -> Tensor:
    """A tensor like `_seeds`, for a plan: it draws no random numbers."""
    return torch.empty(len(maps), sets, dtype=torch.int64, device=maps[0].device)


def _given(biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [bias for bias in biases if bias is not None]


class LossCall(NamedTuple):
    """The tensors of one call of `PatchNCEHead`: maps, all weights in turn, and ids (none if they are drawn)."""

    queries: Untapped
    keys: Untapped
    query_mlp: Sequence[Tensor]
    key_mlp: Sequence[Tensor]
    ids: Sequence[Tensor]
    """(sets, patches) per layer."""
    settings: tuple[Any, ...]
    """What else the result depends on, as hashable values."""

    def key(self) -> tuple[tuple[Any, ...] | None, bool]:
        key_mlp: Sequence[Tensor] = () if self.key_mlp is self.query_mlp else self.key_mlp
        queries, keys = self.queries, self.keys
        leaves, constants = (queries.maps, self.query_mlp), (keys.maps, key_mlp, self.ids)
        if not (queries.taps or keys.taps):
            return _key(self.settings, leaves, constants, key_mlp)
        settings = *self.settings, queries.kinds(), keys.kinds()
        return _key(
            settings, (*leaves, queries.tokens()), (*constants, _given(queries.biases()), _given(keys.biases())),
            key_mlp,
        )  # fmt: skip

    def repeat(self) -> Tensor | None:
        """Return the loss (directions,) if a call with the same key has been planned; else None.

        Checks and choices of a call depend only on types, shapes, dtypes and devices. They cost more CPU time than the
        launches, and are not made again.
        """
        if not usable(self.queries.maps) or (self.ids and not self.ids[0].is_cuda):  # ids on a CPU are always checked
            return None
        key, gradient = self.key()
        entry = _ENTRIES.get(key)
        return None if entry is None else self._run(entry, gradient)

    def plan(
        self, *, sets: int, patches: int, temperatures: Sequence[float], groups: int, directions: int,
        dtype: torch.dtype, keep: bool, distinct: bool | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Plan a call that has passed its checks and return its loss; None if it cannot be planned.

        `keep`: the kernels are known to be right here, so that later calls may repeat this one. `distinct`: no location
        is given twice for an image; by default, those that are drawn here.
        """
        if not usable(self.queries.maps) or not all(w.is_contiguous() for w in (*self.query_mlp, *self.key_mlp)):
            return None
        (key, gradient), drawn = self.key(), not self.ids
        if key is None:
            return None
        query_mlp, key_mlp = copies_of(self.query_mlp, dtype), copies_of(self.key_mlp, dtype)
        narrow = dtype if query_mlp and key_mlp else None
        if not query_mlp or not key_mlp:
            query_mlp, key_mlp = list(self.query_mlp), list(self.key_mlp)
        forward = plan_of(
            loss_forward, self.queries.maps, self.keys.maps, self.queries.biases(), self.keys.biases(),
            query_mlp, key_mlp, self.ids, _place_of_seeds(self.queries.maps, sets) if drawn else None,
            patches=patches, temperatures=tuple(temperatures), groups=groups, directions=directions, dtype=dtype,
            gradient=gradient,
        )  # fmt: skip
        if forward is None:
            return None
        distinct = drawn if distinct is None else distinct
        entry = Entry(forward, self.queries, self.ids or patches, directions, distinct, sets if drawn else 0, narrow)
        if keep:
            _ENTRIES[key] = entry
        return self._run(entry, gradient)

    def _run(self, entry: Entry, gradient: bool) -> Tensor:
        queries, keys = self.queries, self.keys
        biases = _given([*queries.biases(), *keys.biases()])
        chosen = self.ids if not entry.sets else [_seeds(queries.maps, entry.sets)]
        if gradient:
            constants = queries, keys.maps, biases, self.key_mlp, chosen
            return _LOSS(entry, constants, len(queries.maps), *queries.leaves(), *self.query_mlp)
        query_mlp, key_mlp = entry.read(self.query_mlp), entry.read(self.key_mlp)
        return entry.forward.replay([*queries.maps, *keys.maps, *biases, *query_mlp, *key_mlp, *chosen])[0]


class RowsCall(NamedTuple):
    """The tensors of one call of `project_patches`: maps, all weights in turn, and ids (none if they are drawn)."""

    sources: Untapped
    mlp: Sequence[Tensor]
    ids: Sequence[Tensor]
    """(sets, patches) per layer."""
    settings: tuple[Any, ...]

    def key(self) -> tuple[tuple[Any, ...] | None, bool]:
        sources = self.sources
        if not sources.taps:
            return _key(self.settings, (sources.maps, self.mlp), (self.ids,))
        settings = *self.settings, sources.kinds()
        return _key(settings, (sources.maps, self.mlp, sources.tokens()), (self.ids, _given(sources.biases())))

    def repeat(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """As `LossCall.repeat`: the unit rows of each layer, and the drawn ids (patches,)."""
        if not usable(self.sources.maps) or (self.ids and not self.ids[0].is_cuda):
            return None
        key, gradient = self.key()
        entry = _ENTRIES.get(key)
        return None if entry is None else self._run(entry, gradient)

    def plan(
        self, *, dtype: torch.dtype, distinct: bool, keep: bool, patches: int = 0
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Plan a call that has passed its checks and return its results; None if it cannot be planned.

        `patches`: locations to draw, one set for all images. `keep`: as in `LossCall.plan`.
        """
        if not usable(self.sources.maps) or not all(w.is_contiguous() for w in self.mlp):
            return None
        key, gradient = self.key()
        if key is None:
            return None
        maps, biases = self.sources.maps, self.sources.biases()
        seeds = None if self.ids else _place_of_seeds(maps, 1)
        copies = copies_of(self.mlp, dtype)
        mlp = self.mlp if copies is None else copies
        forward = plan_of(
            rows_forward, maps, biases, mlp, self.ids, seeds, patches=patches, dtype=dtype, gradient=gradient
        )
        if forward is None:
            return None
        narrow = None if copies is None else dtype
        sets = 0 if self.ids else 1
        entry = Entry(forward, self.sources, self.ids or patches, 1, distinct or not self.ids, sets, narrow)
        if keep:
            _ENTRIES[key] = entry
        return self._run(entry, gradient)

    def _run(self, entry: Entry, gradient: bool) -> tuple[list[Tensor], list[Tensor]]:
        sources = self.sources
        biases, chosen = _given(sources.biases()), [_seeds(sources.maps, 1)] if entry.sets else [*self.ids]
        if not gradient:
            rows, drawn, _ = entry.forward.replay([*sources.maps, *biases, *entry.read(self.mlp), *chosen])
            return rows, [] if drawn is None else list(drawn.split(entry.patches))
        constants = sources, biases, chosen
        rows = list(_ROWS(entry, constants, len(sources.maps), *sources.leaves(), *self.mlp))
        return rows, chosen if entry.sets else []
