"""The cases that `aot` compiles: calls of the launchers on tensors without storage, for every form of every kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from fastnce.kernels import (
    add_rows,
    configs,
    cosine,
    loss_terms,
    nce,
    nce_keys,
    project,
    project_backward,
    sample,
)
from fastnce.kernels.map_layout import map_layout, rows_layout

from benchmarks.aot_layers import few_outputs_cases, in_tf32, layer_cases, tensor


def nce_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) for every width of the table, few and many rows, and every form with code of its own."""
    for width in (64, 128, 256, 512):
        few, many = tensor(1, 256, width), tensor(1, configs.MANY_ROWS, width)
        weight = tensor(1, configs.MANY_ROWS, configs.MANY_ROWS)
        uneven_few, uneven = tensor(1, 250, width), tensor(1, configs.MANY_ROWS + 10, width)
        yield f"nce D={width} few rows", lambda x=few: _forward([x], unit=True)
        yield f"nce D={width} many rows", lambda x=many: _forward([x], unit=True)
        yield f"nce D={width} many rows loss only", lambda x=many: _forward([x], unit=True, gradient=False)
        yield f"nce D={width} extra keys", lambda x=many: _forward([x], extra=[x], unit=True)
        # many rows in groups of few keys: one loop
        grouped = tensor(32, 256, width)
        yield f"nce D={width} many rows, few keys", lambda x=grouped: _forward([x], unit=True)
        yield (
            f"nce D={width} many rows, few keys, loss only",
            lambda x=grouped: _forward([x], unit=True, gradient=False),
        )
        # blocks of keys that are not full
        yield f"nce D={width} few rows, uneven", lambda x=uneven_few: _forward([x], unit=True)
        yield f"nce D={width} many rows, uneven", lambda x=uneven: _forward([x], unit=True)
        yield f"nce D={width} extra keys, uneven", lambda x=uneven: _forward([x], extra=[x], unit=True)
        yield f"nce D={width} any length few rows, uneven", lambda x=uneven_few: _forward([x])
        yield f"nce D={width} any length many rows, uneven", lambda x=uneven: _forward([x])
        yield f"nce D={width} any length, extra keys, uneven", lambda x=uneven: _forward([x], extra=[x])
        yield f"nce D={width} sharp few rows, uneven", lambda x=uneven_few: _forward([x], temperature=0.02)
        yield f"nce D={width} sharp many rows, uneven", lambda x=uneven: _forward([x], temperature=0.02)
        yield f"nce D={width} sharp, extra keys, uneven", lambda x=uneven: _forward([x], extra=[x], temperature=0.02)
        # no promise of unit rows: the bounded form, and the online form after a check
        yield f"nce D={width} any length few rows", lambda x=few: _forward([x])
        yield f"nce D={width} any length many rows", lambda x=many: _forward([x])
        yield f"nce D={width} any length loss only", lambda x=many: _forward([x], gradient=False)
        yield f"nce D={width} any length, extra keys", lambda x=many: _forward([x], extra=[x])
        # a low temperature allows no bound: the online form alone
        yield f"nce D={width} sharp few rows", lambda x=few: _forward([x], temperature=0.02)
        yield f"nce D={width} sharp many rows", lambda x=many: _forward([x], temperature=0.02)
        yield f"nce D={width} sharp, extra keys", lambda x=many: _forward([x], extra=[x], temperature=0.02)
        yield (
            f"nce D={width} everything",
            lambda x=many, w=weight: _forward([x], extra=[x], log_weight=[w], pair_weight=[w]),
        )
        yield f"nce D={width} keys", lambda x=many: _keys(x)
        yield f"nce D={width} keys, everything", lambda x=many, w=weight: _keys(x, [w])
        yield f"nce D={width} keys, extra", lambda x=many: _keys(x, extra=True)
        # a learned temperature is read from memory, and allows no bound either
        yield f"nce D={width} learned T few rows", lambda x=few: _forward([x], unit=True, learned=True)
        yield f"nce D={width} learned T many rows", lambda x=many: _forward([x], unit=True, learned=True)
        yield f"nce D={width} learned T few rows, uneven", lambda x=uneven_few: _forward([x], learned=True)
        yield f"nce D={width} learned T many rows, uneven", lambda x=uneven: _forward([x], learned=True)
        yield f"nce D={width} learned T, extra keys", lambda x=many: _forward([x], extra=[x], learned=True)
        yield (
            f"nce D={width} learned T, everything",
            lambda x=many, w=weight: _forward([x], extra=[x], log_weight=[w], pair_weight=[w], learned=True),
        )
        yield f"nce D={width} learned T, keys", lambda x=many: _keys(x, learned=True)
        yield f"nce D={width} learned T, keys, everything", lambda x=many, w=weight: _keys(x, [w], learned=True)
        half = tensor(1, configs.MANY_ROWS, width, dtype=torch.float16)
        yield f"nce D={width} float16", lambda x=half: _forward([x], unit=True)
        yield f"nce D={width} float16 keys", lambda x=half: _keys(x)
        half_few = tensor(1, 250, width, dtype=torch.float16)
        yield f"nce D={width} float16 learned T few rows, uneven", lambda x=half_few: _forward([x], learned=True)
        wide = tensor(1, 1024, width, dtype=torch.float32)
        yield f"nce D={width} float32", lambda x=wide: _forward([x], unit=True)
        yield f"nce D={width} float32 everything", lambda x=wide: _forward([x], extra=[x])
        yield f"nce D={width} float32 keys", lambda x=wide: _keys(x)
        yield f"nce D={width} float32 learned T", lambda x=wide: _forward([x], extra=[x], learned=True)
        yield f"nce D={width} float32 learned T, keys", lambda x=wide: _keys(x, learned=True)
        large = tensor(1, configs.MANY_ROWS, width, dtype=torch.float32)
        for size, rows in (("few", wide), ("many", large)):
            yield f"nce D={width} tf32 {size} rows", in_tf32(lambda x=rows: _forward([x], unit=True))
            yield f"nce D={width} tf32 {size} rows any length", in_tf32(lambda x=rows: _forward([x]))
            yield f"nce D={width} tf32 {size} rows extra keys", in_tf32(lambda x=rows: _forward([x], extra=[x]))
            yield f"nce D={width} tf32 {size} rows keys", in_tf32(lambda x=rows: _keys(x))
        yield (
            f"nce D={width} tf32 everything",
            in_tf32(lambda x=large, w=weight: _forward([x], extra=[x], log_weight=[w], pair_weight=[w])),
        )
        yield (
            f"nce D={width} tf32 learned T, everything",
            in_tf32(lambda x=large, w=weight: _forward([x], extra=[x], log_weight=[w], pair_weight=[w], learned=True)),
        )
    few, many = ([tensor(images, 256, 256) for _ in range(5)] for images in (1, 16))
    yield "nce five layers", lambda: _forward(few, unit=True)
    yield "nce five layers, learned T", lambda: _forward(few, unit=True, learned=True)
    yield "nce five layers, many rows, learned T", lambda: _forward(many, unit=True, learned=True)
    uneven_maps = [tensor(1, rows, 256) for rows in (256, 256, 256, 196, 49)]
    yield "nce five layers, uneven, learned T", lambda: _forward(uneven_maps, unit=True, learned=True)
    yield "nce five layers float32", lambda: _forward([layer.float() for layer in few], unit=True)
    yield "nce five layers tf32", in_tf32(lambda: _forward([layer.float() for layer in few], unit=True))
    yield "nce five layers, many rows", lambda: _forward(many, unit=True)
    dense = [tensor(1, configs.MANY_ROWS, 256) for _ in range(5)]
    yield "nce five layers, many keys", lambda: _forward(dense, unit=True)
    yield "nce five layers, many keys, loss only", lambda: _forward(dense, unit=True, gradient=False)
    yield "nce five layers, many rows, any length", lambda: _forward(many)
    differing, more = ([tensor(images, 256, dim) for dim in (3, 64, 128, 256, 256)] for images in (1, 16))
    yield "nce five maps", lambda: _forward(differing, unit=True)
    yield "nce five maps, many rows", lambda: _forward(more, unit=True)
    yield "nce five maps, many rows, any length", lambda: _forward(more)
    both, most = ([tensor(images, 256, 256) for _ in range(8)] for images in (1, 16))
    yield "nce eight problems, extra keys", lambda: _forward(both, extra=both, unit=True)
    yield "nce eight problems, any length, extra keys", lambda: _forward(both, extra=both)
    yield "nce eight problems, many rows, extra keys", lambda: _forward(most, extra=most, unit=True)
    yield "nce eight problems, many rows, any length, extra keys", lambda: _forward(most, extra=most)
    rows = [tensor(256, 256) for _ in range(8)]
    yield "rows: unit length", lambda: cosine.cosine(rows)
    for divided in (True, False):
        yield (
            f"rows: gradient, divided={divided}",
            lambda d=divided: cosine.row_gradients(rows, rows, _scales(), divided=d),
        )
    ragged = [tensor(3, 49, 101)[:, :, 1:]]  # no vector load can read these
    yield "nce ragged", lambda: _forward(ragged)


def _forward(x, extra=(), log_weight=(), pair_weight=(), temperature=0.07, learned=False, **options):
    scales = [_learned_scale() for _ in x] if learned else ()
    return nce.nce_forward(x, x, extra, log_weight, pair_weight, [temperature] * len(x), scales, **options)


def _learned_scale() -> torch.Tensor:
    return tensor(4, dtype=torch.float32)


def _scales() -> torch.Tensor:
    return tensor(2, dtype=torch.float32)


def _keys(x: torch.Tensor, weight: Sequence[torch.Tensor] = (), extra: bool = False, learned: bool = False):
    rows = tensor(x.shape[0] * x.shape[1], dtype=torch.float32)
    scales = [_learned_scale()] if learned else ()
    return nce_keys.nce_key_gradients([x], [x], weight, weight, [0.07], rows, rows, scales, extra=extra)


def sample_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Sampling and projection of the published networks, of wider networks, and without a projection."""
    published, wide = (3, 128, 256), (64, 512)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for dim, channels in ((256, published), (512, wide)):
            yield f"sample D={dim} {name}", lambda t=dtype, d=dim, c=channels: _sample(d, c, dtype=t)
            yield (
                f"sample D={dim} {name} repeated ids",
                lambda t=dtype, d=dim, c=channels: _sample(d, c, dtype=t, distinct=False),
            )
    for dim, channels in ((256, published), (512, wide)):  # repeated ids are summed exactly, by the kernel for float32
        yield f"sample D={dim} tf32", in_tf32(lambda d=dim, c=channels: _sample(d, c, dtype=torch.float32))
        yield (
            f"sample D={dim} 16-bit weights",
            lambda d=dim, c=channels: _sample(d, c, weights=torch.bfloat16),
        )
    yield (
        "sample D=256 float16, 16-bit weights",
        lambda: _sample(256, published, dtype=torch.float16, weights=torch.float16),
    )
    yield "sample D=256 images=64, 16-bit weights", lambda: _sample(256, published, images=64, weights=torch.bfloat16)
    yield "sample D=256 images=64", lambda: _sample(256, published, images=64)
    yield "sample D=256 a set an image, directions", lambda: _sample(256, published, images=2, sets=2, directions=2)
    for dtype, weights in (
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, None),
        (torch.float32, None),
    ):
        name = f"{str(dtype).removeprefix('torch.')}{', 16-bit weights' if weights else ''}"
        yield (
            f"sample D=256 taps {name}",
            lambda t=dtype, w=weights: _sample(256, published, dtype=t, weights=w or torch.float32, taps=True),
        )
    yield "sample D=256 taps tf32", in_tf32(lambda: _sample(256, published, dtype=torch.float32, taps=True))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout in ("nchw", "channels_last"):
            yield f"add rows {layout} {str(dtype).removeprefix('torch.')}", lambda t=dtype, o=layout: _add_rows(t, o)
    yield "sample without MLP", lambda: _sample(0, published)
    yield "draw", lambda: sample.draw_ids(tensor(5, 2, dtype=torch.int64), [68644, 65536, 16384], 256)
    yield "mean", lambda: nce.mean_by_direction(tensor(1280, dtype=torch.float32), [256] * 5, 1)


def loss_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """The losses of generators and discriminators, of every kind and dtype."""
    kinds = [kind.value for kind in (loss_terms.SQUARE, loss_terms.SOFTPLUS, loss_terms.LINEAR, loss_terms.HINGE)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for kind, objective in zip(kinds, ("squares", "softplus", "means", "hinge"), strict=True):
            yield f"loss: {objective} {name}", lambda k=kind, t=dtype: _loss(k, t)
    yield "loss: distances and spectra", lambda: _loss(loss_terms.HINGE.value, torch.bfloat16, cycles=True)


def _loss(kind: int, dtype: torch.dtype, cycles: bool = False) -> None:
    judged, given = tensor(2, 1, 30, 30, dtype=dtype), tensor(2, dtype=torch.float32)
    linear, distance, spectrum = (k.value for k in (loss_terms.LINEAR, loss_terms.DISTANCE, loss_terms.SPECTRUM))
    tensors = [judged, given]
    parts = [loss_terms.Part(kind, 1.0, 0.5, 1.0, 0, 0, 0, (i, i + 1)) for i in range(2)]
    parts += [loss_terms.Part(linear, 1.0, 1.0, 0.5, 1 + i, 1, 1, (i, i + 1)) for i in range(2)]
    if cycles:
        tensors += [tensor(1, 3, 256, 256, dtype=torch.float32) for _ in range(2)]
        tensors.append(tensor(2, 3, 256, 129, 2, dtype=torch.float32))
        parts.append(loss_terms.Part(distance, 0.0, 0.5, 1.0, 3, 2, 3))
        parts.append(loss_terms.Part(spectrum, 0.0, 0.5, 1.0, 4, 4, 4, (0, 1), (1, 2), 129, 128))
    loss_terms.loss_values(tensors, *parts)
    loss_terms.loss_slopes(tensor(dtype=torch.float32), tensors, [tensors[part.x] for part in parts], *parts)


def _sample(
    dim: int,
    channels: tuple[int, ...],
    *,
    images: int = 1,
    sets: int = 1,
    directions: int = 0,
    distinct: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    weights: torch.dtype = torch.float32,
    taps: bool = False,
) -> None:
    maps = [tensor(images, c, 32, 32, dtype=dtype).to(memory_format=torch.channels_last) for c in channels]
    maps[0] = tensor(images, channels[0], 32, 32, dtype=torch.float32)  # an image beside 16-bit features
    ids = [tensor(sets, 256, dtype=torch.int64) for _ in maps]
    shapes = [s for c in channels for s in ((dim, c), (dim,), (dim, dim), (dim,))] if dim else []
    mlp = [tensor(*shape, dtype=weights if len(shape) == 2 else torch.float32) for shape in shapes]
    biases = [None, *(tensor(c, dtype=torch.float32) for c in channels[1:])] if taps else []
    units, *saved = project.project(maps, ids, mlp, dtype, len(maps), biases)
    layouts = [rows_layout(m, 256) if taps and i else map_layout(m) for i, m in enumerate(maps)]
    upstream = tensor(directions, dtype=torch.float32) if directions else None
    project_backward.project_backward(
        units, upstream, directions or 1, layouts, ids, mlp, units, *saved,
        distinct=distinct, wanted=[True] * len(maps), weights_wanted=True,
    )  # fmt: skip


def _add_rows(dtype: torch.dtype, layout: str) -> None:
    target = tensor(2, 128, 32, 32, dtype=dtype)
    target = target.to(memory_format=torch.channels_last) if layout == "channels_last" else target
    rows, ids = tensor(2 * 256, 128, dtype=torch.float32), tensor(2, 256, dtype=torch.int64)
    for more in (False, True):
        add_rows.add_rows(target, rows, ids, tensor(128, dtype=torch.float32), more=more)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of every case."""
    yield from nce_cases()
    yield from sample_cases()
    yield from loss_cases()
    yield from layer_cases()
    yield from few_outputs_cases()


QUICK = re.compile(
    r"nce D=\d+ (few rows|many rows)|nce D=(256|512) (everything|keys, everything)"
    r"|nce D=256 (any length (few|many) rows|float16|float32 everything)"
    r"|nce D=256 learned T (few|many) rows|nce D=512 learned T, (everything|keys, everything)"
    r"|nce five layers, learned T|nce five layers, uneven, learned T"
    r"|nce (five layers|five layers tf32|eight problems, extra keys)|rows: .*"
    r"|sample D=256 (bfloat16|bfloat16 repeated ids|float32|tf32|images=64|a set an image, directions)"
    r"|sample D=256 (16-bit weights|images=64, 16-bit weights)"
    r"|sample without MLP|draw|mean|loss: (squares bfloat16|distances and spectra)"
    r"|layer: (norm, ReLU, pad 1|norm, residual(, pad 1|, blur up)?|norm, one pixel) torch.bfloat16"
    r"|layer: (norm, ReLU, blur down|bias, leaky ReLU, blur down C=64|pad 1 C=256|blur C=128) torch.bfloat16"
    r"|few outputs: 64 to 3, 7x7 (bfloat16|float16|float32|tf32)|few outputs: 256 to 16, 5x5 bfloat16"
)
"""The forms of the published training steps, and the most demanding form of each kernel. They take one or two minutes
on an idle machine; all cases take ten."""
