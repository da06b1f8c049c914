"""Find the weighting of PatchNCE that `loss.weighting` names, and set its options."""

from __future__ import annotations

import functools
import inspect
import math
import tomllib
from typing import Any

import torch

from ..common.imports import first_line, is_import_path, load_object
from ..common.messages import shown
from ..nce.weights import WEIGHTINGS, Weighting, Weights

WEIGHTING_NAMES = ("none", *WEIGHTINGS)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHTING_HELP = (
    'weights of negatives: "none"; "monce": by optimal transport; "hdce": by similarity to the positive; '
    "or your own function (mylosses.py:weight)"
)
OPTIONS_HELP = "options of the weighting, e.g. eps=0.5,iterations=20 (monce) or gamma=0.5 (hdce); empty: its defaults"


def find_weighting(name: str, options: str = "") -> Weighting | None:
    """Return the weighting of this name with its options set; None for "none".

    Args:
        name: "none", a key of `WEIGHTINGS`, or the import path of a function (queries, keys, groups) -> `Weights`.
        options: `name=value,...` for its keyword arguments that have a default.

    Raises:
        ValueError: an unknown option, a value out of range, or a function that returns something else.
    """
    if name == "none":
        if options:
            raise ValueError(f"loss.weighting_options={options} needs a loss.weighting, such as monce")
        return None
    function = load_object(name, "loss.weighting") if is_import_path(name) else WEIGHTINGS[name]
    if not callable(function):
        raise ValueError(f"loss.weighting={name} must be a function (queries, keys, groups) -> fastnce.nce.Weights")
    weighting = functools.partial(function, **_parse(name, function, options))
    _check_result(name, weighting)
    return weighting


def _parse(name: str, function: Any, options: str) -> dict[str, Any]:
    """Parse `name=value,...` and check that each is a keyword argument of the function, of the type of its default."""
    accepted = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.default is not p.empty}
    found: dict[str, Any] = {}
    for text in options.split(",") if options else []:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals and key in accepted:
            raise ValueError(f"loss.weighting_options: write {key}=VALUE, not {text.strip()!r}")
        if not equals or key not in accepted:
            known = ", ".join(accepted) or "none"
            raise ValueError(f"loss.weighting_options: {name} has no option {text.strip()!r}; its options: {known}")
        if key in found:
            raise ValueError(f"loss.weighting_options: {key} is given twice")
        found[key] = _value(value)
        default = accepted[key]
        if isinstance(default, float) and type(found[key]) is int:
            found[key] = float(found[key])
        if isinstance(found[key], float) and not math.isfinite(found[key]):
            raise ValueError(f"loss.weighting_options: {key} must be finite, not {value}")
        if default is not None and type(found[key]) is not type(default):
            kind = type(default).__name__
            raise ValueError(f"loss.weighting_options: {key} must be of type {kind}, not {value!r}")
    return found


def _value(text: str) -> Any:
    """Parse a TOML value; return the text unchanged if it is not one."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _tried(name: str, weighting: Weighting, groups: int, size: int) -> tuple[torch.Tensor, Any]:
    """Call the weighting on random rows; return the queries and its result."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        rows = torch.randn(2, groups * size, 6, generator=generator)
        queries, keys = torch.nn.functional.normalize(rows, dim=2)
        try:
            return queries, weighting(queries, keys, groups)
        except ValueError as error:
            raise ValueError(f"loss.weighting={name}: {error}") from None
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"loss.weighting={name} fails on queries and keys of {groups * size} rows in {groups} groups: "
                f"{first_line(error)}"
            ) from error


def _check_result(name: str, weighting: Weighting) -> None:
    """Call the weighting once on two groups of rows, to refuse a wrong one before training.

    Four rows per group show a mistake best. A function that needs more is called with as many as are usual.
    """
    groups, few, usual = 2, 4, 256
    try:
        size, queries, weights = few, *_tried(name, weighting, groups, few)
    except ValueError as error:
        try:
            size, queries, weights = usual, *_tried(name, weighting, groups, usual)
        except ValueError:
            raise error from error.__cause__
    if not isinstance(weights, Weights):
        raise ValueError(f"loss.weighting={name} must return fastnce.nce.Weights, not {type(weights).__name__}")
    if not isinstance(weights.decoupled, bool):
        raise ValueError(f"loss.weighting={name}: decoupled must be True or False, not {weights.decoupled!r}")
    pairs, rows_ = (groups, size, size), (groups * size,)
    for field, shape in (("pair_log_weight", pairs), ("pair_weight", pairs), ("query_weight", rows_)):
        value = getattr(weights, field)
        if value is None:
            continue
        if isinstance(value, torch.Tensor) and (value.dtype not in FLOATS or value.device != queries.device):
            where = f"{value.dtype} on {value.device}"
            raise ValueError(f"loss.weighting={name}: {field} must be floats on the device of the queries, not {where}")
        if isinstance(value, torch.Tensor) and value.layout != torch.strided:
            raise ValueError(f"loss.weighting={name}: {field} must be dense, not {value.layout}")
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            what = "(groups, rows, rows)" if shape == pairs else "(groups * rows,)"
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else shown(value)
            raise ValueError(f"loss.weighting={name}: {field} must be {what}, here {shape}, not {found}")
        if shape == pairs:  # the diagonal is ignored
            value = value.masked_fill(torch.eye(size, dtype=torch.bool, device="cpu"), 0)
        if field == "pair_log_weight":  # -inf leaves a pair out
            value = value.masked_fill(value == -math.inf, 0)
        if not value.isfinite().all():
            raise ValueError(f"loss.weighting={name}: {field} must be finite numbers")
