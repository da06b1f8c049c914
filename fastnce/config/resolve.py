"""A configuration from a preset's defaults, then a TOML file, then `section.key=value` from the command line."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..common.imports import same_object
from ..common.messages import brief, nearest
from ..common.options import check_value, converted
from ..common.toml import format_value, parse_value
from ..methods.presets import find_preset
from .check import check
from .config import Config, from_preset, keys_of, renamed


def resolve(
    method: str,
    file: Path | None = None,
    overrides: list[str] | None = None,
    *,
    values: dict[str, Any] | None = None,
) -> Config:
    """Build the configuration of a method from its preset, then a file, then overrides, then values.

    Args:
        method: a preset or the import path of your own; empty: the method that `file` names.
        file: a TOML file with sections.
        overrides: texts such as "data.batch=4", as on the command line.
        values: Python values by key, such as {"data.batch": 4}. A path may be a `pathlib.Path`, a list may be a tuple.

    Raises:
        ValueError: an unknown method or key (the message names the nearest known one), or what `check` refuses.
    """
    stored = _read(file) if file is not None else {}
    named = stored.pop("method", None)
    if not method and named is None:
        where = f"--config {file} names no method: " if file is not None else "there is no method: "
        raise ValueError(f"{where}name one, such as fastcut")
    method = method or str(named)
    config = from_preset(method, find_preset(method))
    if named is not None and not same_object(named, method):
        raise ValueError(f"--config {file} is for another method than {method}")
    for section, keys in stored.items():
        shown = brief(section)
        if not isinstance(keys, dict):
            raise ValueError(f"--config {file}: {shown} must be in a section{_nearest_key(config, section)}")
        if section not in Config.SECTIONS and not keys:
            known = ", ".join(Config.SECTIONS)
            raise ValueError(
                f"--config {file}: unknown section {shown}{nearest(section, Config.SECTIONS)}; known: {known}"
            )
        for key, value in renamed(section, keys).items():
            _set(config, f"{section}.{key}", value, f"--config {file}")
    apply(config, overrides or [])
    apply(config, values or {})
    check(config)
    return config


def apply(config: Config, changes: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Set values of a configuration, without comparing them with each other; returns their keys.

    Args:
        changes: texts such as "data.batch=4", or Python values by key.

    Raises:
        ValueError: an unknown key, or a value that the key does not accept.
    """
    if isinstance(changes, Mapping):
        for name, value in changes.items():
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            _set(config, name, list(value) if isinstance(value, tuple) else value, "")
        return list(changes)
    keys = []
    for text in changes:
        name, equals, value = text.partition("=")
        if not equals and name in keys_of(config):
            section, key = name.split(".")
            raise ValueError(
                f"{name} needs a value, such as {name}={format_value(getattr(getattr(config, section), key))}"
            )
        if not equals:
            raise ValueError(f"{brief(text)}: write section.key=value{_nearest_key(config, name)}")
        _set(config, name.strip(), value.strip(), "", parse=True)
        keys.append(name.strip())
    return keys


def _read(file: Path) -> dict[str, Any]:
    """Read a TOML file; ValueError if it is none, or empty."""
    try:
        stored = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"--config {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also for too long numbers and too deep lists
        raise ValueError(f"--config {file}: not TOML: {error}") from None
    if not stored:  # a full disk can leave an empty file
        raise ValueError(f"--config {file} is empty: leave it out, or write a section such as [data]")
    return stored


def _nearest_key(config: Config, name: str) -> str:
    keys = keys_of(config)
    bare = [key for key in keys if key.split(".")[1] == name.split(".")[-1]]
    return f"; did you mean {bare[0]!r}?" if bare else nearest(name, keys)


def _set(config: Config, name: Any, value: Any, where: str, parse: bool = False) -> None:
    where = f"{where}: " if where else ""
    name = name if isinstance(name, str) else brief(name)
    if name == "run.tensorboard":
        raise ValueError(f"{where}run.tensorboard is replaced: write run.track=tensorboard, or leave it out")
    section, _, key = name.partition(".")
    target = getattr(config, section) if section in Config.SECTIONS else None
    if name == "run.metric":
        raise ValueError(f"{where}run.metric is called run.best now: write run.best={brief(value).strip(chr(39))}")
    if target is None or key not in {f.name for f in fields(target)}:
        raise ValueError(f"{where}unknown key {brief(name)}{_nearest_key(config, name)}")
    text = value if parse else ""
    if parse:
        value = parse_value(value, getattr(target, key))
    value = converted(target, key, value)
    shown = "" if isinstance(value, str) or len(text) > 60 else text  # as the user wrote it: [1, 2,] or 1e-3
    check_value(target, key, value, f"{where}{name}", shown)
    setattr(target, key, value)
