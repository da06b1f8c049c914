"""How calls use the contrastive kernels, and made-up data of about the same shapes, for the check at the first use.

Sizes are capped, and keep what decides which kernel is compiled: the padded width, and remainders of powers of two. The
rows are random in one half. In the other half, the probability of the positive is from 1/2 to 0.9999.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.agreement import TEMPERATURE, Check, confident_queries, pattern, unit_rows
from ...common.narrowed import have_copies
from .rows import near_the_corner

try:
    from . import measure
except ImportError:  # no Triton for this platform
    measure = None  # type: ignore[assignment]

MOST_ROWS = 1024
"""Rows of a check. Launches of `MANY_ROWS` and more have other tiles, so they are checked with that many."""
MANY_ROWS = 8192
"""As `fastnce.kernels.configs.MANY_ROWS`."""
MOST_ROWS_INTERPRETED = 192
FEWEST_ROWS = 32
LOWEST_BOUNDED = 0.023
"""As `fastnce.kernels.nce.UNIT_TEMPERATURE`: below it, another form of the kernel runs."""
LOW_TEMPERATURE = 0.02
PROBABILITIES = (0.5, 0.9, 0.99, 0.999, 0.9999)


def fitted(count: int, least: int, most: int, step: int = 16) -> int:
    """Return a number from about `least` to `most` that differs from `count` by a multiple of `step`.

    A first call may be tiny, and its verdict is for all calls of its form, so that few rows are made more.
    """
    if count < least:
        count += -(-(least - count) // step) * step
    if count > most:
        count -= -(-(count - most) // step) * step
    return count


def wide_enough(width: int) -> int:
    """Return a width of the same form with at least 32 dims: in a few dims no row has far negatives."""
    return fitted(width, 32, max(width, 48))


def padded(width: int) -> int:
    """Return the power of two that a tile is wide, at least 64; odd widths have kernels of their own."""
    return max(64, 1 << (width - 1).bit_length()) + (1 if width % 16 else 0)


def typical(temperature: float) -> float:
    """Return the temperature to check with: either form of the kernel has one."""
    return TEMPERATURE if temperature > LOWEST_BOUNDED else LOW_TEMPERATURE


def with_learned(learned: bool) -> tuple[str, ...]:
    """Return what a learned temperature adds to a form: other kernels are compiled for it."""
    return ("learned",) if learned else ()


def as_given(temperature: float, learned: bool, device: torch.device) -> Any:
    """Return the temperature of a check as the call gave its own: a number, or a tensor."""
    return torch.tensor(temperature, dtype=torch.float32, device=device) if learned else temperature


def most_rows(device: torch.device, total: int, lists: int = 1) -> tuple[int, int]:
    """Return the most rows of each of `lists` tensors, and the step in which rows may be left out.

    Args:
        total: rows of the call; launches of many rows have other tiles.
    """
    if device.type == "cpu":
        return max(48, MOST_ROWS_INTERPRETED // lists), 16
    return max(MOST_ROWS // min(lists, 2), MANY_ROWS // lists if total >= MANY_ROWS else 0), 128


def keys_and_queries(rows: int, dim: int, device: torch.device, temperature: float) -> tuple[Tensor, Tensor]:
    """Return float64 unit rows: keys, and queries of which the second half is confident."""
    keys = unit_rows((rows, dim), device, seed=0)
    shares = torch.tensor(PROBABILITIES, dtype=torch.float64, device=device).repeat(-(-rows // len(PROBABILITIES)))
    queries = confident_queries(keys, shares[:rows, None], temperature)
    queries[: rows // 2] = unit_rows((rows // 2, dim), device, seed=3)
    return keys, queries


def stored(rows: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return rows in `dtype`; values that TF32 keeps if it will multiply them."""
    return rows.to(measure.gates_of(dtype, device)).to(dtype)


class RowsUse(NamedTuple):
    """A call of `patch_nce`."""

    width: int
    rows: int  # per group
    groups: int = 1
    extras: int = 0
    log_weight: bool = False
    pair_weight: bool = False
    decoupled: bool = False
    unit: bool = False
    temperature: float = TEMPERATURE
    wanted: tuple[bool, bool, bool] = (True, False, False)
    """Whether queries, keys and extra keys get a gradient."""
    learned: bool = False
    """Whether the temperature is a tensor, which the kernels read themselves."""

    @property
    def family(self) -> str:
        return "patch_nce"

    def form(self) -> Hashable:
        return (
            padded(self.width), self.rows * self.groups >= MANY_ROWS, self.temperature > LOWEST_BOUNDED,
            self.extras > 0, *self[4:8], *self.wanted, *with_learned(self.learned),
        )  # fmt: skip

    def measure(self, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
        most, step = most_rows(device, self.rows * self.groups)
        rows, width = fitted(self.rows, FEWEST_ROWS, most, step), wide_enough(self.width)
        groups = max(1, min(self.groups, most // rows))
        temperature = typical(self.temperature)
        keys, queries = keys_and_queries(groups * rows, width, device, temperature)
        generator = torch.Generator().manual_seed(6)
        pairs = torch.rand(2, groups, rows, rows, generator=generator, dtype=torch.float32, device="cpu").to(device)
        extras = (groups, fitted(self.extras, FEWEST_ROWS, most, step), width)
        extra = unit_rows(extras, device, seed=1) if self.extras else None
        half = groups * rows // 2
        yield from measure.measure_rows(
            stored(queries, dtype, device),
            stored(keys, dtype, device),
            None if extra is None else stored(extra, dtype, device),
            pairs[0] - 0.5 if self.log_weight else None,
            pairs[1] + 0.5 if self.pair_weight else None,
            groups=groups,
            temperature=as_given(temperature, self.learned, device),
            decoupled=self.decoupled,
            unit=self.unit,
            wanted=self.wanted,
            kinds={"random": slice(0, half), "confident": slice(half, None)} if half else None,
        )


class LayersUse(NamedTuple):
    """A call of `patch_nce_layers`: flat lists, in which the directions of a layer are adjacent."""

    widths: tuple[int, ...]
    rows: tuple[int, ...]  # of all groups
    groups: int
    directions: int
    extras: int
    other: bool
    divide: bool
    unit: bool
    temperature: float  # the lowest
    learned: bool = False

    @property
    def family(self) -> str:
        return "patch_nce_layers"

    def form(self) -> Hashable:
        odd = any(width % 16 for width in self.widths)
        many = sum(self.rows) >= MANY_ROWS
        bounded = self.temperature > LOWEST_BOUNDED
        return (
            padded(max(self.widths)),
            odd,
            len(self.rows),
            self.directions,
            many,
            bounded,
            self.extras > 0,
            *self[5:8],
            *with_learned(self.learned),
        )

    def measure(self, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
        most, step = most_rows(device, sum(self.rows), len(self.rows))
        sizes = [fitted(max(1, count // self.groups), FEWEST_ROWS, most, step) for count in self.rows]
        widths = [wide_enough(width) for width in self.widths]
        groups = max(1, min(self.groups, most // max(sizes)))
        temperature = typical(self.temperature)
        queries, keys, extra = [], [], []
        for i, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            k, q = keys_and_queries(groups * size, width, device, temperature)
            length = 1.0 + pattern(k[:, :1]).double() / 2 if self.divide else 1.0
            queries.append(stored(q.roll(i, 0) * length, dtype, device))
            keys.append(stored(k.roll(i, 0) * length, dtype, device))
            if self.extras:
                given = unit_rows((groups, fitted(self.extras, FEWEST_ROWS, most, step), width), device, seed=1)
                extra.append(stored(given, dtype, device))
        yield from measure.measure_layers(
            queries, keys, extra, temperatures=[as_given(temperature, self.learned, device)] * len(sizes),
            groups=groups, directions=self.directions, other=self.other, divide=self.divide, unit=self.unit,
        )  # fmt: skip


class IdsUse(NamedTuple):
    """A call of `triton_maps.draw_ids`."""

    locations: tuple[int, ...]
    patches: int
    sets: int

    @property
    def family(self) -> str:
        return "draw_ids"

    def form(self) -> Hashable:
        return len(self.locations)

    def measure(self, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
        generator = torch.Generator().manual_seed(7)
        shape = len(self.locations), min(self.sets, 8)
        seeds = torch.randint(2**62, shape, generator=generator, dtype=torch.int64, device="cpu").to(device)
        yield from measure.measure_ids(seeds, self.locations, min(self.patches, 2**14))


class MapsUse(NamedTuple):
    """A call that samples maps: `project_patches`, or `PatchNCEHead` with its loss."""

    name: str
    channels: tuple[int, ...]
    channels_last: tuple[bool, ...]
    dtypes: tuple[torch.dtype, ...]  # of the maps
    images: int
    patches: int
    dim: int  # of the MLPs; 0 without
    weight_dtype: torch.dtype | None
    negatives_of_batch: bool = False
    directions: int = 1
    temperature: float = TEMPERATURE
    distinct: bool = True
    narrow: bool = False
    """Whether the kernels read 16-bit copies of the weights (see `common.narrowed`)."""
    taps: tuple[int, ...] = ()
    """As `Untapped.kinds`."""

    @property
    def family(self) -> str:
        return self.name

    def form(self) -> Hashable:
        bounded = self.temperature > LOWEST_BOUNDED
        many = self.images * self.patches * len(self.channels) >= MANY_ROWS
        return (
            self.channels,
            self.dim,
            self.dtypes,
            self.weight_dtype,
            self.channels_last,
            self.directions,
            many,
            bounded,
            self.distinct,
            self.narrow,
            *self.taps,
        )

    def measure(self, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
        layers = len(self.channels)
        most, step = most_rows(device, self.images * self.patches * layers, layers)
        images = 2 * self.directions if self.images > self.directions else self.directions
        patches = fitted(self.patches, FEWEST_ROWS, max(48 if step == 16 else 256, most // images), step)
        dim = wide_enough(self.dim) if self.dim else 0
        side = (int((2 * patches) ** 0.5) // 16 + 1) * 16
        generator = torch.Generator().manual_seed(4)
        kind = measure.gates_of(dtype, device)

        def draw(*shape: int, to: torch.dtype) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
            return values.to(kind if to == dtype else to).to(device, to)

        keys = [draw(images, c, side, side, to=to) for c, to in zip(self.channels, self.dtypes, strict=True)]
        queries = []
        for key in keys:  # locations in the upper half are confident
            far = torch.full((side, 1), 2.0, dtype=torch.float32, device=device)
            far[: side // 2] = 0.2
            queries.append((key + far * draw(*key.shape, to=key.dtype)).to(key.dtype))
        weights: list[Tensor] = []
        if dim and self.weight_dtype is not None:
            for c in self.channels:
                for shape, scale in (((dim, c), c**-0.5), ((dim,), 0.1), ((dim,) * 2, dim**-0.5)):
                    weights.append(draw(*shape, to=self.weight_dtype) * scale)
                weights.append(draw(dim, to=self.weight_dtype) * 0.1)
        if self.narrow:
            weights = [w.to(dtype) if w.dim() > 1 else w for w in weights]
        biases = [
            draw(c, to=dtype).float() if kind == 2 else None for c, kind in zip(self.channels, self.taps, strict=False)
        ]
        ids = []
        for i, query in enumerate(queries):
            if biases and (bias := biases[i]) is not None:
                query = query + bias.to(query.dtype)[:, None, None]
            order = torch.randperm(side * side, generator=generator, device="cpu")
            first = [w.to(dtype) if w.dim() > 1 else w for w in weights[4 * i : 4 * i + 2]]
            far = order[~near_the_corner(query.to(dtype), *first).cpu()[order]]
            one_set = (far if len(far) >= patches else order)[None, :patches].to(device)
            ids.append(one_set.repeat(self.directions, 1))
        layouts = [torch.channels_last if last else torch.contiguous_format for last in self.channels_last]
        keys, queries = (
            [m.contiguous(memory_format=layout) for m, layout in zip(maps, layouts, strict=True)]
            for maps in (keys, queries)
        )
        tapped: Any = {"biases": biases, "taps": self.taps}
        if self.name == "project_patches":
            yield from measure.measure_projection(queries, ids, weights, dtype, distinct=self.distinct, **tapped)
        else:
            groups = self.directions if self.negatives_of_batch else images
            yield from measure.measure_head(
                queries, keys, ids, weights, weights, temperatures=[typical(self.temperature)] * len(keys),
                groups=groups, directions=self.directions, dtype=dtype, distinct=self.distinct, **tapped,
            )  # fmt: skip


def maps_use(
    name: str,
    maps: Sequence[Tensor],
    mlps: Sequence[Sequence[Tensor]] | None,
    patches: int,
    *,
    negatives_of_batch: bool = False,
    directions: int = 1,
    temperature: float = TEMPERATURE,
    distinct: bool = True,
    taps: tuple[int, ...] = (),
) -> MapsUse:
    """Describe a call by its maps and MLPs."""
    last = tuple(m.stride(1) == 1 and not m.is_contiguous() for m in maps)
    return MapsUse(
        name, tuple(m.shape[1] for m in maps), last, tuple(m.dtype for m in maps), maps[0].shape[0], patches,
        0 if mlps is None else mlps[0][2].shape[0], None if mlps is None else mlps[0][0].dtype,
        negatives_of_batch, directions, temperature, distinct, mlps is not None and have_copies([*chain(*mlps)]), taps,
    )  # fmt: skip
