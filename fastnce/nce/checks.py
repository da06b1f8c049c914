"""Checks of arguments: each raises a ValueError of one sentence that names the argument, its value and what is right.

They read only types, shapes, dtypes and devices, so they never wait for a device and a compiler can trace them. (`ids`
also reads the values of ids on the CPU.)
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.messages import brief, shown

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30
"""Within these bounds, 1 / T and the logits of unit rows are normal float32 numbers."""

_LISTS = (list, tuple)  # isinstance is faster with a tuple than with `list | tuple`


def tensor(name: str, value: Any) -> None:
    """Check that a value is a tensor of a floating dtype."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not {shown(value)}")
    if not value.dtype.is_floating_point:
        raise ValueError(f"{name} must have a floating dtype, not {value.dtype}")


def same_shape(name: str, value: Any, other_name: str, other: Any, dims: int | None = None) -> None:
    """Check two floating tensors: one shape with `dims` dimensions, at least one element, one device."""
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
    """Check that a value is one of the choices."""
    if (value is not None and not isinstance(value, str)) or value not in choices:
        *most, last = ("None" if c is None else f'"{c}"' for c in choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, not {shown(value)}")


def count(name: str, value: Any, least: int = 1) -> int:
    """Check a whole number of at least `least` and return it. NumPy and symbolic integers pass; bools do not."""
    if type(value) is not int:
        if isinstance(value, bool | Tensor) or not isinstance(value, int | torch.SymInt | numbers.Integral):
            raise ValueError(f"{name} must be a whole number of at least {least}, not {shown(value)}")
        if not isinstance(value, int | torch.SymInt):
            value = int(value)  # operators do not accept NumPy integers
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {brief(value)}")
    return value


def number(name: str, value: Any, low: float, high: float) -> float:
    """Check a number in [low, high], bounds included, and return it as a float. NaN, bools and tensors fail."""
    if type(value) is float and low <= value <= high:  # the common case
        return value
    if isinstance(value, bool | Tensor) or not isinstance(value, int | float | torch.SymFloat | numbers.Real):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {shown(value)}")
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} must be from {low:g} to {high:g}, not {brief(value)}")
    return float(value)


def temperature(value: Any) -> float:
    """Check T and return it as a float. A tensor fails: `given_temperature` accepts those where they can be used."""
    if isinstance(value, Tensor):
        raise ValueError(
            f"temperature must be a number here, not {shown(value)}: pass float(temperature) for a constant; to learn "
            "it, pass the tensor to patch_nce, or use PatchNCEHead with learn_temperature=True"
        )
    return number("temperature", value, LEAST_TEMPERATURE, MOST_TEMPERATURE)


def temperatures(value: Any, layers: int) -> list[float]:
    """Check T, one number or one number per layer, and return one float per layer."""
    if isinstance(value, Tensor | str) or not hasattr(value, "__len__"):
        return [temperature(value)] * layers
    if len(value) != layers:
        raise ValueError(f"temperature must be one number or {layers}, not {len(value)}")
    return [temperature(t) for t in value]


def listed(name: str, value: Any, of: str, length: int | None = None) -> None:
    """Check a list or tuple that is not empty; `of` describes it in the message: "tensors, one per layer"."""
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
    """Check queries, keys and the tensors that accompany them; return the number of groups."""
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
        _accompanying("extra_keys", extra_keys, queries)
        extra = tuple(extra_keys.shape)
        if len(extra) not in (2, 3) or extra[-1] != dim or (len(extra) == 3 and extra[0] != groups) or 0 in extra:
            raise ValueError(f"extra_keys must be (count, {dim}) or ({groups}, count, {dim}), not {extra}")
    if query_weight is not None:
        _accompanying("query_weight", query_weight, queries)
        if query_weight.shape != (total,):
            raise ValueError(f"query_weight must be ({total},), not {tuple(query_weight.shape)}")
    if decoupled and total == groups and extra_keys is None:
        raise ValueError(
            "decoupled needs at least one negative per row: there is one patch per group and no extra keys"
        )
    return groups


def weights(given: Any, kind: type, required: bool = False) -> tuple[Any, Any, Any, bool]:
    """Check a `Weights` and return its four members; None means no weights unless they are `required`."""
    if given is None and not required:
        return None, None, None, False
    if not isinstance(given, kind):
        none = "" if required else " or None"
        raise ValueError(f"weights must be a fastnce.nce.Weights{none}, not {shown(given)}")
    if not isinstance(given.decoupled, bool):  # type: ignore[attr-defined]
        raise ValueError(f"decoupled must be True or False, not {shown(given.decoupled)}")  # type: ignore[attr-defined]
    return given  # type: ignore[return-value]


def groups_of(name: str, value: Any, total: int) -> int:
    """Check a count that must divide the number of rows, and return it."""
    groups = count(name, value)
    if total % groups:
        raise ValueError(f"{total} rows cannot be shared equally among {name}={brief(groups)}")
    return groups


def _accompanying(name: str, value: Any, queries: Tensor) -> None:
    """Check a floating tensor on the device of the queries."""
    tensor(name, value)
    if value.device != queries.device:
        raise ValueError(f"{name} is on {value.device}, queries are on {queries.device}: move one of them")


def pairs(name: str, weight: Any, queries: Tensor, groups: int, size: int) -> Tensor:
    """Check weights of pairs; return them as a constant (groups, rows of a group, rows of a group)."""
    _accompanying(name, weight, queries)
    if weight.dim() == 2 and groups == 1:
        weight = weight[None]
    if weight.shape != (groups, size, size):
        raise ValueError(f"{name} must be ({groups}, {size}, {size}), not {tuple(weight.shape)}")
    return weight.detach()


def nested(given: dict[str, Any]) -> tuple[int, int]:
    """Check lists of directions of layers of floating tensors; return the numbers of directions and layers."""
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
                raise ValueError(f"{' and '.join(given)} must have the same directions and layers")
    return directions, layers


# Maps


def maps(name: str, value: Any, layers: int | None = None) -> None:
    """Check one floating (images, channels, height, width) per layer: none empty, all on one device."""
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
    """Check that the maps of queries and keys have the same locations; return the number of images.

    `channels`: whether the channels must be equal too, as they must without projection.
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
            raise ValueError(f"query map {layer} has {a[0]} images, query map 0 has {images}: these must be equal")
    if keys[0].device != queries[0].device:
        raise ValueError(f"key_maps are on {keys[0].device}, query_maps on {queries[0].device}: move one side")
    return images


def directions(value: Any, images: int) -> int:
    """Check a number of directions, which must divide the number of images, and return it."""
    value = count("directions", value)
    if images % value:
        raise ValueError(f"{images} images cannot be shared equally among directions={value}")
    return value


def ids(patch_ids: Any, feature_maps: Sequence[Tensor], read: bool = False) -> None:
    """Check one set of locations per map, or several that its images share; `read`: values too, on every device."""
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
        if read or (device.type == "cpu" and not compiling):
            locations, low, high = one.shape[2] * one.shape[3], int(given.min()), int(given.max())
            if low < 0 or high >= locations:
                wanted = f"be in 0..{locations - 1}"
                raise ValueError(f"patch_ids[{layer}] must {wanted}, but range from {low} to {high}")


def mlps(given: Any, feature_maps: Sequence[Tensor]) -> None:
    """Check one (weight1, bias1, weight2, bias2) per map, on the device of the map, all of one floating dtype."""
    listed("mlps", given, "MLPs, one per map", len(feature_maps))
    dtype = None
    for layer, (mlp, feature_map) in enumerate(zip(given, feature_maps, strict=True)):
        if not isinstance(mlp, _LISTS) or len(mlp) != 4:
            raise ValueError(f"mlps[{layer}] must be (weight1, bias1, weight2, bias2), not {shown(mlp)}")
        device = feature_map.device
        for weight in mlp:
            if not isinstance(weight, Tensor):
                tensor(f"mlps[{layer}]", weight)
            if weight.device != device:
                raise ValueError(f"mlps[{layer}] is on {weight.device}, its map on {device}: move one of them")
            if weight.dtype is not dtype:
                if dtype is not None:
                    raise ValueError(f"mlps must have one dtype, not {dtype} and {weight.dtype}")
                tensor(f"mlps[{layer}]", weight)
                dtype = weight.dtype
        first, bias_first, second, bias_second = (weight.shape for weight in mlp)
        channels = feature_map.shape[1]
        if len(first) == 2 and first[1] != channels:
            raise ValueError(f"MLP {layer} takes {first[1]} channels, map {layer} has {channels}")
        fits = len(first) == len(second) == 2 and second[1] == first[0]
        if not fits or bias_first != first[:1] or bias_second != second[:1]:
            shapes = ", ".join(str(tuple(weight.shape)) for weight in mlp)
            raise ValueError(f"mlps[{layer}] must be (dim, {channels}), (dim,), (dim, dim), (dim,), not {shapes}")


def whole_ids(patch_ids: Any, feature_maps: Sequence[Tensor]) -> list[Tensor]:
    """Convert locations that are tensors, arrays or lists, as published, to int64 on the device of their maps."""
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


def ids_by_direction(patch_ids: Any, directions: int, layers: int, images: int) -> None:
    """Check one list per direction of one set per layer, or of one set per image; `images` are those per direction."""
    listed("patch_ids", patch_ids, "lists, one per direction", directions)
    for direction, per_layer in enumerate(patch_ids):
        listed(f"patch_ids[{direction}]", per_layer, "tensors, one per layer", layers)
        for layer, (one, first) in enumerate(zip(per_layer, patch_ids[0], strict=True)):
            name = f"patch_ids[{direction}][{layer}]"
            if not isinstance(one, Tensor) or one.dtype != torch.int64:
                raise ValueError(f"{name} must be an int64 tensor, not {shown(one)}")
            if one.dim() not in (1, 2) or (one.dim() == 2 and one.shape[0] != images):
                raise ValueError(f"{name} must be (patches,) or ({images}, patches), not {tuple(one.shape)}")
            if one.shape[-1] != first.shape[-1] or one.device != first.device:
                raise ValueError(f"{name} must have as many patches as direction 0, on its device, not {shown(one)}")


# Modules


def state(module: torch.nn.Module, given: Any, strict: bool) -> None:
    """Raise the RuntimeError of a failing `load_state_dict` before any part is copied."""
    if not isinstance(given, Mapping):
        return  # PyTorch raises an error for it
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
