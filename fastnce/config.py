"""A run's configuration: the preset's defaults, then a TOML file, then `section.key=value` from the command line."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from .engine.loop import RunOptions
from .engine.optim import OptimOptions
from .methods import PRESETS, NetworkOptions, Preset
from .options import describe, option


@dataclass
class DataOptions:
    """Where pictures come from and how they are cut (see `fastnce.data.UnpairedData`)."""

    dir: str = option("", "folder with trainA and trainB (testA, testB for samples)")
    load_size: int | list[int] = option(286, "resize to this before cropping, one side or [height, width]")
    crop_size: int | list[int] = option(256, "side of the crops, or [height, width]; multiples of 4")
    preprocess: str = option(
        "resize_and_crop",
        "resize_and_crop, crop, scale_width_and_crop, scale_shortside_and_crop, none (whole pictures), zoom_and_patch",
    )
    flip: bool = option(True, "mirror half of the pictures")
    rain: float = option(0.0, "share of A's pictures that are B's with rendered rain; 1 needs no trainA")
    rain_like: str = option("", "that rain, e.g. density=0.1:0.3,angle=-40:40; empty: the ranges of fastnce rain")
    validate: str = option("", "held-out pairs for run.validate_every; empty: the data folder's test, if it pairs")
    rain_side: str = option("right", "half of held-out strips that is rainy, right or left")
    batch: int = option(1, "pictures of each domain a step")
    skip_bad: bool = option(False, "pass over pictures that cannot be read instead of stopping")
    cache_dir: str = option("", "where decoded pictures are kept; empty: .fastnce-cache in the data folder")


@dataclass
class Config:
    """Everything that defines a run, by section."""

    method: str
    data: DataOptions
    network: NetworkOptions
    loss: Any
    optim: OptimOptions
    run: RunOptions

    SECTIONS = ("data", "network", "loss", "optim", "run")

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as stored with checkpoints."""
        sections = {s: {k: v for k, (v, _) in describe(getattr(self, s)).items()} for s in self.SECTIONS}
        return {"method": self.method, **sections}

    def as_toml(self) -> str:
        """The configuration as a TOML file that `--config` takes, with what each key does."""
        lines = [f"method = {_toml(self.method)}"]
        for section in self.SECTIONS:
            lines += ["", f"[{section}]"]
            for key, (value, consequence) in describe(getattr(self, section)).items():
                lines.append(f"{key} = {_toml(value)}".ljust(36) + f"  # {consequence}")
        return "\n".join(lines) + "\n"

    def differences(self, other: dict[str, Any], *, any_batch: bool = False) -> list[str]:
        """Keys, apart from `run`'s, whose values differ from a stored configuration, as "key: stored, now".

        Args:
            any_batch: leave `data.batch` out: what counts is that of all ranks (`fastnce.engine.progress.check_batch`).
        """
        mine = self.as_dict()
        if mine["method"] != other.get("method"):
            return [f"method: {other.get('method')}, now {mine['method']}"]
        found = []
        for section in self.SECTIONS:
            for key, value in mine[section].items():
                stored = other.get(section, {}).get(key)
                free = (section == "run" and key != "seed") or (section, key) in _MAY_CHANGE
                free = free or (any_batch and (section, key) == ("data", "batch"))
                if stored != value and not free:
                    found.append(f"{section}.{key}: {stored}, now {value}")
        return found


_MAY_CHANGE = {
    *(("data", key) for key in ("dir", "cache_dir", "skip_bad", "validate", "rain_side")),
    *(("optim", key) for key in ("max_bad_steps", "accumulate")),
}
"""Keys that a resumed run may change besides `run`'s: they do not change what is computed (to rounding)."""


def resolve(method: str, file: Path | None = None, overrides: list[str] | None = None) -> Config:
    """The configuration of a method after its preset, a file and overrides.

    Raises:
        ValueError: an unknown method or key (with the nearest known one), or a value of the wrong kind.
    """
    if method not in PRESETS:
        raise ValueError(f"unknown method {method!r}{_nearest(method, list(PRESETS))}; known: {', '.join(PRESETS)}")
    config = from_preset(method, PRESETS[method])
    if file is not None:
        try:
            stored = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--config {file}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {file}: not TOML: {error}") from None
        if stored.pop("method", method) != method:
            raise ValueError(f"--config {file} is for another method than {method}")
        for section, values in stored.items():
            if not isinstance(values, dict):
                raise ValueError(f"--config {file}: {section!r} must be in a section{_nearest_key(config, section)}")
            for key, value in values.items():
                _set(config, f"{section}.{key}", value, f"--config {file}")
    for text in overrides or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: write section.key=value{_nearest_key(config, name)}")
        _set(config, name.strip(), value.strip(), "", parse=True)
    return config


def from_preset(method: str, preset: Preset) -> Config:
    """The published defaults."""
    config = Config(method, DataOptions(), NetworkOptions(), preset.options(), OptimOptions(), RunOptions())
    for section, values in preset.sections.items():
        for key, value in values.items():
            setattr(getattr(config, section), key, value)
    return config


def from_dict(stored: dict[str, Any]) -> Config:
    """What `as_dict` gave; keys of other versions are ignored."""
    if stored.get("method") not in PRESETS:
        raise ValueError(f"unknown method {stored.get('method')!r}; known: {', '.join(PRESETS)}")
    config = from_preset(stored["method"], PRESETS[stored["method"]])
    for section in Config.SECTIONS:
        target = getattr(config, section)
        for key, value in stored.get(section, {}).items():
            if hasattr(target, key):
                setattr(target, key, value)
    return config


def _keys(config: Config) -> list[str]:
    return [f"{section}.{f.name}" for section in Config.SECTIONS for f in fields(getattr(config, section))]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _nearest_key(config: Config, name: str) -> str:
    keys = _keys(config)
    bare = [key for key in keys if key.split(".")[1] == name.split(".")[-1]]
    return f"; did you mean {bare[0]!r}?" if bare else _nearest(name, keys)


def _set(config: Config, name: str, value: Any, where: str, parse: bool = False) -> None:
    where = f"{where}: " if where else ""
    section, _, key = name.partition(".")
    target = getattr(config, section, None) if section in Config.SECTIONS else None
    if not is_dataclass(target) or key not in {f.name for f in fields(target)}:
        raise ValueError(f"{where}unknown key {name!r}{_nearest_key(config, name)}")
    old = getattr(target, key)
    annotation = str({f.name: f.type for f in fields(target)}[key])
    if parse:
        value = _parse(value, old)
    numbers = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(old, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif "int | list[int]" in annotation:
        whole = isinstance(value, int) and not isinstance(value, bool)
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) for v in value)
        fits, wanted = whole or pair, "a whole number or [height, width]"
    elif isinstance(old, int):
        fits, wanted = numbers and int(value) == value, "a whole number"
        value = int(value) if fits else value
    elif isinstance(old, float):
        fits, wanted = numbers, "a number"
        value = float(value) if fits else value
    elif isinstance(old, list):
        kind = "float" if "float" in annotation else "int"
        good = (int, float) if kind == "float" else int
        fits = isinstance(value, list) and all(isinstance(v, good) and not isinstance(v, bool) for v in value)
        wanted = f"a list of {'numbers' if kind == 'float' else 'whole numbers'}, like {_toml(old)}"
    else:
        fits, wanted = isinstance(value, str), "text"
    if not fits:
        raise ValueError(f"{where}{name} must be {wanted}, not {value!r}")
    setattr(target, key, value)


def _parse(text: str, old: Any) -> Any:
    """A value from the command line: TOML, where strings need no quotes and lists no brackets."""
    if isinstance(old, str):
        return text.strip("\"'")
    if isinstance(old, list) and not text.startswith("["):
        text = f"[{text}]"
    lowered = {"true": "true", "false": "false", "yes": "true", "no": "false", "on": "true", "off": "false"}
    try:
        return tomllib.loads(f"value = {lowered.get(text.lower(), text)}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return repr(value)
