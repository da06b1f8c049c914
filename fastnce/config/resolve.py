"""A configuration from a preset's defaults, then a TOML file, then `section.key=value` from the command line."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..common.messages import brief
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
    """Build the configuration of a method from its preset, then a file, then overrides.

    Raises:
        ValueError: an unknown method or key (the message names the nearest known one), or what `check` refuses.
    """
    config = from_preset(method, find_preset(method))
    if file is not None:
        try:
            stored = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ValueError(f"--config {file}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # also for too long numbers and too deep lists
            raise ValueError(f"--config {file}: not TOML: {error}") from None
        if not stored:  # a full disk can leave an empty file
            raise ValueError(f"--config {file} is empty: leave it out, or write a section such as [data]")
        if stored.pop("method", method) != method:
            raise ValueError(f"--config {file} is for another method than {method}")
        for section, held in stored.items():
            named = brief(section)
            if not isinstance(held, dict):
                raise ValueError(f"--config {file}: {named} must be in a section{_nearest_key(config, section)}")
            if section not in Config.SECTIONS and not held:
                raise ValueError(f"--config {file}: unknown section {named}; known: {', '.join(Config.SECTIONS)}")
            for key, value in renamed(section, held).items():
                _set(config, f"{section}.{key}", value, f"--config {file}")
    for text in overrides or []:
        name, equals, value = text.partition("=")
        if not equals and name in keys_of(config):
            section, key = name.split(".")
            raise ValueError(
                f"{name} needs a value, such as {name}={format_value(getattr(getattr(config, section), key))}"
            )
        if not equals:
            raise ValueError(f"{brief(text)}: write section.key=value{_nearest_key(config, name)}")
        _set(config, name.strip(), value.strip(), "", parse=True)
    for key, value in (values or {}).items():
        _set(config, key, value, "")
    check(config)
    return config


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _nearest_key(config: Config, name: str) -> str:
    keys = keys_of(config)
    bare = [key for key in keys if key.split(".")[1] == name.split(".")[-1]]
    return f"; did you mean {bare[0]!r}?" if bare else _nearest(name, keys)


def _set(config: Config, name: str, value: Any, where: str, parse: bool = False) -> None:
    where = f"{where}: " if where else ""
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
