"""Restore the configuration that is stored with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from ..common.imports import CodeError, is_import_path
from ..common.messages import brief
from ..common.options import check as check_options
from ..methods.presets import find_preset
from .config import Config, from_preset, renamed


def _named_code(stored: dict[str, Any], generators_only: bool, all_code: bool) -> Iterator[Any]:
    """Yield the values of a stored configuration that may be import paths."""
    method = stored.get("method")
    yield method
    keys = [("network", "generator")]
    if not generators_only or is_import_path(method):
        keys += [("network", "discriminator"), ("loss", "weighting")]
    if all_code:
        keys += [("data", "dataset"), ("run", "metric"), ("run", "best"), ("run", "metrics")]
    for section, key in keys:
        values = stored.get(section, {})
        yield values.get(key) if isinstance(values, dict) else None


def from_dict(
    stored: dict[str, Any], *, trust_code: bool = False, generators_only: bool = False, all_code: bool = False
) -> Config:
    """Restore the configuration that `as_dict` returned; keys of other versions are ignored.

    Only the values of `network` are checked: a run of another version may have values that are refused now, but its
    generators can still be used.

    Args:
        trust_code: import the classes and functions outside fastnce that it names. The author of the checkpoint chose
            them, and importing runs their code.
        generators_only: only the generators will be built, so the code of other parts needs no trust.
        all_code: the run will be trained, so its data set and its metric need trust too.

    Raises:
        ValueError: not such a dictionary, an unknown method, or networks that cannot be built. CodeError: it names code
            of its own that is not trusted or cannot be imported.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"a stored configuration must be a table of sections, not {type(stored).__name__}")
    own = [value for value in _named_code(stored, generators_only, all_code) if is_import_path(value)]
    if own and not trust_code:
        raise CodeError(
            f"this run uses code of its own, {', '.join(own)}: if you trust it, add --trust-code to import it"
        )
    method: Any = stored.get("method")
    config = from_preset(method, find_preset(method))
    for section in Config.SECTIONS:
        target, values = getattr(config, section), stored.get(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"a stored configuration's {section} must be a table of keys, not {brief(values)}")
        values = renamed(section, values)
        for key in {f.name for f in fields(target)} & values.keys():
            setattr(target, key, values[key])
    check_options(config.network, "network")
    return config
