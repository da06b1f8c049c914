"""The cases that `aot` compiles: calls of the launchers on tensors without storage, for every form of every kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from fastnce.kernels import (
    activate,
    add_rows,
    blur,
    configs,
    cosine,
    few_outputs,
    few_outputs_backward,
    instance_norm,
    instance_norm_backward,
    loss_terms,
    nce,
    nce_keys,
    project,
    project_backward,
    reflect_pad,
    sample,
)
from fastnce.kernels.map_layout import map_layout, rows_layout


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def nce_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) for every width of the table, few and many rows, and every form with code of its own."""
    for width in (64, 128, 256, 512):
        few, many = _tensor(1, 256, width), _tensor(1, configs.MANY_ROWS, width)
        weight = _tensor(1, configs.MANY_ROWS, configs.MANY_ROWS)
        uneven_few, uneven = _tensor(1, 250, width), _tensor(1, configs.MANY_ROWS + 10, width)
        yield f"nce D={width} few rows", lambda x=few: _forward([x], unit=True)
        yield f"nce D={width} many rows", lambda x=many: _forward([x], unit=True)
        yield f"nce D={width} many rows loss only", lambda x=many: _forward([x], unit=True, gradient=False)
        yield f"nce D={width} extra keys", lambda x=many: _forward([x], extra=[x], unit=True)
        # many rows in groups of few keys: one loop
        grouped = _tensor(32, 256, width)
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
        half = _tensor(1, configs.MANY_ROWS, width, dtype=torch.float16)
        yield f"nce D={width} float16", lambda x=half: _forward([x], unit=True)
        yield f"nce D={width} float16 keys", lambda x=half: _keys(x)
        half_few = _tensor(1, 250, width, dtype=torch.float16)
        yield f"nce D={width} float16 learned T few rows, uneven", lambda x=half_few: _forward([x], learned=True)
        wide = _tensor(1, 1024, width, dtype=torch.float32)
        yield f"nce D={width} float32", lambda x=wide: _forward([x], unit=True)
        yield f"nce D={width} float32 everything", lambda x=wide: _forward([x], extra=[x])
        yield f"nce D={width} float32 keys", lambda x=wide: _keys(x)
        yield f"nce D={width} float32 learned T", lambda x=wide: _forward([x], extra=[x], learned=True)
        yield f"nce D={width} float32 learned T, keys", lambda x=wide: _keys(x, learned=True)
        large = _tensor(1, configs.MANY_ROWS, width, dtype=torch.float32)
        for size, rows in (("few", wide), ("many", large)):
            yield f"nce D={width} tf32 {size} rows", _in_tf32(lambda x=rows: _forward([x], unit=True))
            yield f"nce D={width} tf32 {size} rows any length", _in_tf32(lambda x=rows: _forward([x]))
            yield f"nce D={width} tf32 {size} rows extra keys", _in_tf32(lambda x=rows: _forward([x], extra=[x]))
            yield f"nce D={width} tf32 {size} rows keys", _in_tf32(lambda x=rows: _keys(x))
        yield (
            f"nce D={width} tf32 everything",
            _in_tf32(lambda x=large, w=weight: _forward([x], extra=[x], log_weight=[w], pair_weight=[w])),
        )
        yield (
            f"nce D={width} tf32 learned T, everything",
            _in_tf32(lambda x=large, w=weight: _forward([x], extra=[x], log_weight=[w], pair_weight=[w], learned=True)),
        )
    few, many = ([_tensor(images, 256, 256) for _ in range(5)] for images in (1, 16))
    yield "nce five layers", lambda: _forward(few, unit=True)
    yield "nce five layers, learned T", lambda: _forward(few, unit=True, learned=True)
    yield "nce five layers, many rows, learned T", lambda: _forward(many, unit=True, learned=True)
    uneven_maps = [_tensor(1, rows, 256) for rows in (256, 256, 256, 196, 49)]
    yield "nce five layers, uneven, learned T", lambda: _forward(uneven_maps, unit=True, learned=True)
    yield "nce five layers float32", lambda: _forward([layer.float() for layer in few], unit=True)
    yield "nce five layers tf32", _in_tf32(lambda: _forward([layer.float() for layer in few], unit=True))
    yield "nce five layers, many rows", lambda: _forward(many, unit=True)
    dense = [_tensor(1, configs.MANY_ROWS, 256) for _ in range(5)]
    yield "nce five layers, many keys", lambda: _forward(dense, unit=True)
    yield "nce five layers, many keys, loss only", lambda: _forward(dense, unit=True, gradient=False)
    yield "nce five layers, many rows, any length", lambda: _forward(many)
    differing, more = ([_tensor(images, 256, dim) for dim in (3, 64, 128, 256, 256)] for images in (1, 16))
    yield "nce five maps", lambda: _forward(differing, unit=True)
    yield "nce five maps, many rows", lambda: _forward(more, unit=True)
    yield "nce five maps, many rows, any length", lambda: _forward(more)
    both, most = ([_tensor(images, 256, 256) for _ in range(8)] for images in (1, 16))
    yield "nce eight problems, extra keys", lambda: _forward(both, extra=both, unit=True)
    yield "nce eight problems, any length, extra keys", lambda: _forward(both, extra=both)
    yield "nce eight problems, many rows, extra keys", lambda: _forward(most, extra=most, unit=True)
    yield "nce eight problems, many rows, any length, extra keys", lambda: _forward(most, extra=most)
    rows = [_tensor(256, 256) for _ in range(8)]
    yield "rows: unit length", lambda: cosine.cosine(rows)
    for divided in (True, False):
        yield (
            f"rows: gradient, divided={divided}",
            lambda d=divided: cosine.row_gradients(rows, rows, _scales(), divided=d),
        )
    ragged = [_tensor(3, 49, 101)[:, :, 1:]]  # no vector load can read these
    yield "nce ragged", lambda: _forward(ragged)


def _forward(x, extra=(), log_weight=(), pair_weight=(), temperature=0.07, learned=False, **options):
    scales = [_learned_scale() for _ in x] if learned else ()
    return nce.nce_forward(x, x, extra, log_weight, pair_weight, [temperature] * len(x), scales, **options)


def _learned_scale() -> torch.Tensor:
    return _tensor(4, dtype=torch.float32)


def _in_tf32(call: Callable[[], object]) -> Callable[[], object]:
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


def _scales() -> torch.Tensor:
    return _tensor(2, dtype=torch.float32)


def _keys(x: torch.Tensor, weight: Sequence[torch.Tensor] = (), extra: bool = False, learned: bool = False):
    rows = _tensor(x.shape[0] * x.shape[1], dtype=torch.float32)
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
        yield f"sample D={dim} tf32", _in_tf32(lambda d=dim, c=channels: _sample(d, c, dtype=torch.float32))
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
    yield "sample D=256 taps tf32", _in_tf32(lambda: _sample(256, published, dtype=torch.float32, taps=True))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout in ("nchw", "channels_last"):
            yield f"add rows {layout} {str(dtype).removeprefix('torch.')}", lambda t=dtype, o=layout: _add_rows(t, o)
    yield "sample without MLP", lambda: _sample(0, published)
    yield "draw", lambda: sample.draw_ids(_tensor(5, 2, dtype=torch.int64), [68644, 65536, 16384], 256)
    yield "mean", lambda: nce.mean_by_direction(_tensor(1280, dtype=torch.float32), [256] * 5, 1)


def loss_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """The losses of generators and discriminators, of every kind and dtype."""
    kinds = [kind.value for kind in (loss_terms.SQUARE, loss_terms.SOFTPLUS, loss_terms.LINEAR, loss_terms.HINGE)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for kind, objective in zip(kinds, ("squares", "softplus", "means", "hinge"), strict=True):
            yield f"loss: {objective} {name}", lambda k=kind, t=dtype: _loss(k, t)
    yield "loss: distances and spectra", lambda: _loss(loss_terms.HINGE.value, torch.bfloat16, cycles=True)


def _loss(kind: int, dtype: torch.dtype, cycles: bool = False) -> None:
    judged, given = _tensor(2, 1, 30, 30, dtype=dtype), _tensor(2, dtype=torch.float32)
    linear, distance, spectrum = (k.value for k in (loss_terms.LINEAR, loss_terms.DISTANCE, loss_terms.SPECTRUM))
    tensors = [judged, given]
    parts = [loss_terms.Part(kind, 1.0, 0.5, 1.0, 0, 0, 0, (i, i + 1)) for i in range(2)]
    parts += [loss_terms.Part(linear, 1.0, 1.0, 0.5, 1 + i, 1, 1, (i, i + 1)) for i in range(2)]
    if cycles:
        tensors += [_tensor(1, 3, 256, 256, dtype=torch.float32) for _ in range(2)]
        tensors.append(_tensor(2, 3, 256, 129, 2, dtype=torch.float32))
        parts.append(loss_terms.Part(distance, 0.0, 0.5, 1.0, 3, 2, 3))
        parts.append(loss_terms.Part(spectrum, 0.0, 0.5, 1.0, 4, 4, 4, (0, 1), (1, 2), 129, 128))
    loss_terms.loss_values(tensors, *parts)
    loss_terms.loss_slopes(_tensor(dtype=torch.float32), tensors, [tensors[part.x] for part in parts], *parts)


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
    maps = [_tensor(images, c, 32, 32, dtype=dtype).to(memory_format=torch.channels_last) for c in channels]
    maps[0] = _tensor(images, channels[0], 32, 32, dtype=torch.float32)  # an image beside 16-bit features
    ids = [_tensor(sets, 256, dtype=torch.int64) for _ in maps]
    shapes = [s for c in channels for s in ((dim, c), (dim,), (dim, dim), (dim,))] if dim else []
    mlp = [_tensor(*shape, dtype=weights if len(shape) == 2 else torch.float32) for shape in shapes]
    biases = [None, *(_tensor(c, dtype=torch.float32) for c in channels[1:])] if taps else []
    units, *saved = project.project(maps, ids, mlp, dtype, len(maps), biases)
    layouts = [rows_layout(m, 256) if taps and i else map_layout(m) for i, m in enumerate(maps)]
    upstream = _tensor(directions, dtype=torch.float32) if directions else None
    project_backward.project_backward(
        units, upstream, directions or 1, layouts, ids, mlp, units, *saved,
        distinct=distinct, wanted=[True] * len(maps), weights_wanted=True,
    )  # fmt: skip


def _add_rows(dtype: torch.dtype, layout: str) -> None:
    target = _tensor(2, 128, 32, 32, dtype=dtype)
    target = target.to(memory_format=torch.channels_last) if layout == "channels_last" else target
    rows, ids = _tensor(2 * 256, 128, dtype=torch.float32), _tensor(2, 256, dtype=torch.int64)
    for more in (False, True):
        add_rows.add_rows(target, rows, ids, _tensor(128, dtype=torch.float32), more=more)


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
    plain, large = _tensor(2, 64, 32, 32), _tensor(2, 64, 256, 256)
    yield "layer: norm, plain", lambda: _norm(plain, 0.0, 1, 0, False)
    yield "layer: norm, large, plain", lambda: _norm(large, 0.0, 1, 0, False)
    yield "layer: norm, large, blur down, plain", lambda: _norm(large, 0.2, 0, 1, False)
    yield "layer: bias, leaky ReLU, plain", partial(_activate, plain, 0)
    yield "layer: pad and blur, plain", lambda: (_pad(plain, 1), _blurs(plain))


def _map(channels: int, side: int, dtype: torch.dtype) -> torch.Tensor:
    return _tensor(2, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)


def _norm(x: torch.Tensor, slope: float, margin: int, blurred: int, residual: bool) -> None:
    """With a residual, its gradient is wanted, and y has another gradient: that of the next block's residual."""
    more = x if residual else None
    y, statistics = instance_norm.instance_norm(x, more, 1e-5, slope, margin, blurred)
    instance_norm_backward.instance_norm_backward(y, more, x, statistics, slope, margin, blurred, residual)


def _activate(x: torch.Tensor, blurred: int) -> None:
    bias = _tensor(x.shape[1], dtype=torch.float32)
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
        weight = _tensor(outputs, channels, kernel, kernel, dtype=torch.float32)
        weight = weight.to(memory_format=torch.channels_last)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = _map(channels, side + kernel - 1 - 2 * padding, dtype)
            call = partial(_in_precision, "ieee", partial(_few_outputs, x, weight, padding))
            yield f"few outputs: {name} {str(dtype).removeprefix('torch.')}", call
            if dtype == torch.float32:
                yield f"few outputs: {name} tf32", _in_tf32(partial(_few_outputs, x, weight, padding))


def _few_outputs(x: torch.Tensor, weight: torch.Tensor, padding: int) -> None:
    bias = _tensor(weight.shape[0], dtype=torch.float32)
    y = few_outputs.few_outputs(x, weight, bias, padding)
    few_outputs_backward.few_outputs_backward(y, x, weight, padding, True, True, True)


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
    r"|layer: (norm, ReLU, pad 1|norm, residual|norm, one pixel|pad 1 C=256|blur C=128) torch.bfloat16"
    r"|few outputs: 64 to 3, 7x7 (bfloat16|float16|float32|tf32)|few outputs: 256 to 16, 5x5 bfloat16"
)
"""The forms of the published training steps, and the most demanding form of each kernel. They take one or two minutes
on an idle machine; all cases take ten."""
