"""Checks of arguments: each raises a ValueError of one sentence that names the argument, its value and what is right.

They look at types, shapes, dtypes and devices alone. So they never wait for a device, and a compiler traces through
them. (`ids` reads those that lie on the CPU.)
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30
"""1 / T and logits of unit rows stay normal numbers of float32."""

_LISTS = (list, tuple)  # a tuple is looked up faster than `list | tuple`


def shown(value: Any) -> str:
    """A value as a sentence names it: numbers and text as they are, other things by their type."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, bool | int | float | complex | str):
        return repr(value)
    return f"a {type(value).__module__.split('.')[0]}.{type(value).__name__}".replace(" builtins.", " ")


def tensor(name: str, value: Any) -> None:
    """A tensor of a floating dtype."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not {shown(value)}")
    if not value.dtype.is_floating_point:
        raise ValueError(f"{name} must have a floating dtype, not {value.dtype}")


def same_shape(name: str, value: Any, other_name: str, other: Any, dims: int | None = None) -> None:
    """Two floating tensors of one shape, with `dims` dimensions and at least one element, on one device."""
    tensor(name, value)
    tensor(other_name, other)
    if value.shape != other.shape:
        shapes = f"{tuple(value.shape)} and {tuple(other.shape)}"
        raise ValueError(f"{name} and {other_name} must have the same shape, not {shapes}")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, not {tuple(value.shape)}")
    if value.numel() == 0:
        raise ValueError(f"{name} must not be empty: {tuple(value.shape)}")
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, {other_name} on {other.device}: move one of them")


def choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    if (value is not None and not isinstance(value, str)) or value not in choices:
        *most, last = ("None" if c is None else f'"{c}"' for c in choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, not {shown(value)}")


def count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`: NumPy's and symbolic ones too, but no bool, no float and no tensor."""
    if type(value) is not int:
        if isinstance(value, bool | Tensor) or not isinstance(value, int | torch.SymInt | numbers.Integral):
            raise ValueError(f"{name} must be a whole number of at least {least}, not {shown(value)}")
        if not isinstance(value, int | torch.SymInt):
            value = int(value)  # NumPy's, which operators do not take
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number in [low, high], bounds included: neither NaN, nor a bool, nor a tensor."""
    if type(value) is float and low <= value <= high:  # the everyday case
        return value
    if isinstance(value, bool | Tensor) or not isinstance(value, int | float | torch.SymFloat | numbers.Real):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {shown(value)}")
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} must be from {low:g} to {high:g}, not {value}")
    return float(value)


def temperature(value: Any) -> float:
    """T as a float. A tensor is refused: its gradient would be lost, and reading it may wait for a device."""
    if isinstance(value, Tensor):
        raise ValueError(
            f"temperature must be a number, not {shown(value)}: pass float(temperature) for a constant; to learn it, "
            "divide the queries by it and call patch_nce with temperature=1.0"
        )
    return number("temperature", value, LEAST_TEMPERATURE, MOST_TEMPERATURE)


def temperatures(value: Any, layers: int) -> list[float]:
    """One T for each layer, from one number or from one for each layer."""
    if isinstance(value, Tensor | str) or not hasattr(value, "__len__"):
        return [temperature(value)] * layers
    if len(value) != layers:
        raise ValueError(f"temperature must be one number or {layers}, not {len(value)}")
    return [temperature(t) for t in value]


def listed(name: str, value: Any, of: str, length: int | None = None) -> None:
    """A list or tuple that is not empty; `of` says of what, such as "tensors, one per layer"."""
    if not isinstance(value, _LISTS) and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise ValueError(f"{name} must be a list of {of}, not {shown(value)}")
    if len(value) == 0:
        raise ValueError(f"{name} must be a list of {of}, not empty")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} must be a list of {of}: {length}, not {len(value)}")


# Rows


def rows(
    queries: Any, keys: Any, images: int, negatives: str, extra_keys: Any, query_weight: Any, decoupled: bool
) -> int:
    """Refuse rows and what goes with them where they do not fit; return the number of groups."""
    if not (isinstance(queries, Tensor) and isinstance(keys, Tensor)):
        name, wrong = ("keys", keys) if isinstance(queries, Tensor) else ("queries", queries)
        raise ValueError(f"{name} must be a tensor, (rows, dim), not {shown(wrong)}")
    shape = queries.shape
    if len(shape) != 2 or keys.dim() != 2:
        raise ValueError(f"queries and keys must be (rows, dim), not {tuple(shape)} and {tuple(keys.shape)}")
    if shape != keys.shape:
        raise ValueError(f"queries and keys must have the same shape, not {tuple(shape)} and {tuple(keys.shape)}")
    if not queries.dtype.is_floating_point or queries.dtype != keys.dtype:
        raise ValueError(f"queries and keys must share a floating dtype, not {queries.dtype} and {keys.dtype}")
    if keys.device != queries.device:
        raise ValueError(f"keys is on {keys.device}, queries are on {queries.device}: move one of them")
    if negatives != "image" and negatives != "batch":
        choice("negatives", negatives, ("image", "batch"))
    total, dim = shape
    if total == 0 or dim == 0:
        raise ValueError(f"queries are empty: {tuple(shape)}")
    if type(images) is not int or images < 1 or total % images:
        images = groups_of("images", images, total)
    groups = images if negatives == "image" else 1
    if extra_keys is not None:
        _beside("extra_keys", extra_keys, queries)
        extra = tuple(extra_keys.shape)
        if len(extra) not in (2, 3) or extra[-1] != dim or (len(extra) == 3 and extra[0] != groups) or 0 in extra:
            raise ValueError(f"extra_keys must be (count, {dim}) or ({groups}, count, {dim}), not {extra}")
    if query_weight is not None:
        _beside("query_weight", query_weight, queries)
        if query_weight.shape != (total,):
            raise ValueError(f"query_weight must be ({total},), not {tuple(query_weight.shape)}")
    if decoupled and total == groups and extra_keys is None:
        raise ValueError("decoupled needs at least one negative a row: there is one patch a group and no extra keys")
    return groups


def weights(given: Any, kind: type) -> tuple[Any, Any, Any, bool]:
    """The four members of a `Weights`; None stands for no weights."""
    if given is None:
        return None, None, None, False
    if not isinstance(given, kind):
        raise ValueError(f"weights must be a fastnce.nce.Weights or None, not {shown(given)}")
    return given  # type: ignore[return-value]


def groups_of(name: str, value: Any, total: int) -> int:
    """A count that divides the rows."""
    groups = count(name, value)
    if total % groups:
        raise ValueError(f"{total} rows cannot be shared equally among {name}={groups}")
    return groups


def _beside(name: str, value: Any, queries: Tensor) -> None:
    tensor(name, value)
    if value.device != queries.device:
        raise ValueError(f"{name} is on {value.device}, queries are on {queries.device}: move one of them")


def pairs(name: str, weight: Any, queries: Tensor, groups: int, size: int) -> Tensor:
    """Weights of pairs as a constant (groups, rows of a group, rows of a group)."""
    _beside(name, weight, queries)
    if weight.dim() == 2 and groups == 1:
        weight = weight[None]
    if weight.shape != (groups, size, size):
        raise ValueError(f"{name} must be ({groups}, {size}, {size}), not {tuple(weight.shape)}")
    return weight.detach()


def nested(given: dict[str, Any]) -> tuple[int, int]:
    """Lists of directions of layers of floating tensors, all alike; return the two lengths."""
    directions = layers = 0
    for name, per_direction in given.items():
        listed(name, per_direction, "lists, one per direction")
        for direction, per_layer in enumerate(per_direction):
            listed(f"{name}[{direction}]", per_layer, "tensors, one per layer")
            for layer, one in enumerate(per_layer):
                if not isinstance(one, Tensor) or not one.dtype.is_floating_point:
                    tensor(f"{name}[{direction}][{layer}]", one)
            directions, layers = directions or len(per_direction), layers or len(per_layer)
            if len(per_direction) != directions or len(per_layer) != layers:
                raise ValueError(f"{' and '.join(given)} must hold the same directions and layers")
    return directions, layers


# Maps


def maps(name: str, value: Any, layers: int | None = None) -> None:
    """One floating (images, channels, height, width) per layer, none of them empty, all on one device."""
    listed(name, value, "maps, one per layer", layers)
    device = getattr(value[0], "device", None)
    for layer, one in enumerate(value):
        if not isinstance(one, Tensor) or not one.dtype.is_floating_point:
            tensor(f"{name}[{layer}]", one)
        if one.dim() != 4 or one.numel() == 0:
            wanted = "(images, channels, height, width) and not empty"
            raise ValueError(f"{name}[{layer}] must be {wanted}, not {tuple(one.shape)}")
        if one.device != device:
            raise ValueError(f"{name}[{layer}] is on {one.device}, {name}[0] on {device}: move one of them")


def sides(queries: Any, keys: Any, layers: int, channels: bool) -> int:
    """Maps of queries and keys whose locations correspond; return the number of images.

    `channels`: whether these must be equal too (they are not projected).
    """
    maps("query_maps", queries, layers)
    maps("key_maps", keys, layers)
    images: int = queries[0].shape[0]
    for layer, (q, k) in enumerate(zip(queries, keys, strict=True)):
        a, b = q.shape, k.shape
        if a != b and (a[0] != b[0] or a[2:] != b[2:] or channels):
            wanted = "the same shape" if channels else "the same images, height and width"
            raise ValueError(f"query and key map {layer} must have {wanted}, not {tuple(a)} and {tuple(b)}")
        if a[0] != images:
            raise ValueError(f"query map {layer} has {a[0]} images, query map 0 has {images}: they must be as many")
    if keys[0].device != queries[0].device:
        raise ValueError(f"key_maps are on {keys[0].device}, query_maps on {queries[0].device}: move one side")
    return images


def directions(value: Any, images: int) -> int:
    value = count("directions", value)
    if images % value:
        raise ValueError(f"{images} images cannot be shared equally among directions={value}")
    return value


def ids(patch_ids: Any, feature_maps: Sequence[Tensor], look: bool = False) -> None:
    """One set of locations per map, or several that its images share; `look` reads them wherever they lie."""
    listed("patch_ids", patch_ids, "tensors, one per map", len(feature_maps))
    compiling = torch.compiler.is_compiling()
    for layer, (one, given) in enumerate(zip(feature_maps, patch_ids, strict=True)):
        if not isinstance(given, Tensor):
            raise ValueError(f"patch_ids[{layer}] must be an int64 tensor, not {shown(given)}")
        shape, device = given.shape, given.device
        if len(shape) not in (1, 2) or 0 in shape or (len(shape) == 2 and one.shape[0] % shape[0]):
            wanted = f"(patches,) or ({one.shape[0]}, patches)"
            raise ValueError(f"patch_ids[{layer}] must be {wanted}, not {tuple(shape)}")
        if given.dtype is not torch.int64 or device != one.device:
            wanted = f"int64 on {one.device}"
            raise ValueError(f"patch_ids[{layer}] must be {wanted}, not {given.dtype} on {device}")
        if look or (device.type == "cpu" and not compiling):
            locations, low, high = one.shape[2] * one.shape[3], int(given.min()), int(given.max())
            if low < 0 or high >= locations:
                wanted = f"lie in 0..{locations - 1}"
                raise ValueError(f"patch_ids[{layer}] must {wanted}, but reach from {low} to {high}")


def mlps(given: Any, feature_maps: Sequence[Tensor]) -> None:
    """One (weight1, bias1, weight2, bias2) per map, on its device, all of one floating dtype."""
    listed("mlps", given, "MLPs, one per map", len(feature_maps))
    dtype = None
    for layer, (four, one) in enumerate(zip(given, feature_maps, strict=True)):
        if not isinstance(four, _LISTS) or len(four) != 4:
            raise ValueError(f"mlps[{layer}] must be (weight1, bias1, weight2, bias2), not {shown(four)}")
        device = one.device
        for weight in four:
            if not isinstance(weight, Tensor):
                tensor(f"mlps[{layer}]", weight)
            if weight.device != device:
                raise ValueError(f"mlps[{layer}] is on {weight.device}, its map on {device}: move one of them")
            if weight.dtype is not dtype:
                if dtype is not None:
                    raise ValueError(f"mlps must have one dtype, not {dtype} and {weight.dtype}")
                tensor(f"mlps[{layer}]", weight)
                dtype = weight.dtype
        first, bias_first, second, bias_second = (weight.shape for weight in four)
        channels = one.shape[1]
        if len(first) == 2 and first[1] != channels:
            raise ValueError(f"MLP {layer} takes {first[1]} channels, map {layer} has {channels}")
        fits = len(first) == len(second) == 2 and second[1] == first[0]
        if not fits or bias_first != first[:1] or bias_second != second[:1]:
            shapes = ", ".join(str(tuple(weight.shape)) for weight in four)
            raise ValueError(f"mlps[{layer}] must be (dim, {channels}), (dim,), (dim, dim), (dim,), not {shapes}")


def whole_ids(patch_ids: Any, feature_maps: Sequence[Tensor]) -> list[Tensor]:
    """Locations as published callers give them, tensors, arrays or lists, as int64 on the device of their maps."""
    try:
        given = list(patch_ids)
        every = [one if isinstance(one, Tensor) else torch.as_tensor(one) for one in given]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"patch_ids must hold whole numbers, one set per map, not {shown(patch_ids)}") from None
    if len(every) != len(feature_maps):
        raise ValueError(f"patch_ids must hold one set per map: {len(feature_maps)} maps, {len(every)} sets")
    for layer, one in enumerate(every):
        if one.numel() and (one.dtype.is_floating_point or one.dtype.is_complex or one.dtype == torch.bool):
            raise ValueError(f"patch_ids[{layer}] must hold whole numbers, not {one.dtype}")
    return [one.to(m.device, torch.int64) for one, m in zip(every, feature_maps, strict=True)]


def ids_by_direction(patch_ids: Any, directions: int, layers: int, share: int) -> None:
    """One list per direction of one set per layer, or of one set per image of the direction."""
    listed("patch_ids", patch_ids, "lists, one per direction", directions)
    for direction, per_layer in enumerate(patch_ids):
        listed(f"patch_ids[{direction}]", per_layer, "tensors, one per layer", layers)
        for layer, (one, first) in enumerate(zip(per_layer, patch_ids[0], strict=True)):
            name = f"patch_ids[{direction}][{layer}]"
            if not isinstance(one, Tensor) or one.dtype != torch.int64:
                raise ValueError(f"{name} must be an int64 tensor, not {shown(one)}")
            if one.dim() not in (1, 2) or (one.dim() == 2 and one.shape[0] != share):
                raise ValueError(f"{name} must be (patches,) or ({share}, patches), not {tuple(one.shape)}")
            if one.shape[-1] != first.shape[-1] or one.device != first.device:
                raise ValueError(f"{name} must have as many patches as direction 0, on its device, not {shown(one)}")


# Modules


def state(module: torch.nn.Module, given: Any, strict: bool) -> None:
    """What `load_state_dict` would refuse, before it has copied a part: the same RuntimeError."""
    if not isinstance(given, Mapping):
        return  # PyTorch says so
    own = module.state_dict()
    wrong = []
    for name in own.keys() & given.keys():
        kept, new = own[name], given[name]
        if not isinstance(new, Tensor):
            wrong.append(f"{name} must be a tensor, not {shown(new)}.")
        elif new.shape != kept.shape:
            wrong.append(f"size mismatch for {name}: {tuple(new.shape)} where {tuple(kept.shape)} is expected.")
    if strict:
        for what, names in ("Missing", own.keys() - given.keys()), ("Unexpected", given.keys() - own.keys()):
            wrong += [f"{what} key(s) in state_dict: {', '.join(map(repr, sorted(names)))}."] if names else []
    if wrong:
        where = type(module).__name__
        raise RuntimeError(f"Error(s) in loading state_dict for {where}: {' '.join(wrong)} Nothing was loaded.")
