"""A run's configuration: the preset's defaults, then a TOML file, then `section.key=value` from the command line."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .common.imports import CodeError, is_import_path
from .common.messages import brief
from .common.options import check as check_options
from .common.options import check_value, converted, describe, option, range_of
from .common.toml import format_value, parse_value
from .data.rain import RainOptions, parse_ranges
from .data.target import PREPROCESS
from .engine.memory import check_networks_fit
from .engine.options import OptimOptions, RunOptions
from .evaluate.pairs import RAIN_SIDES
from .methods import Method, NetworkOptions
from .methods.contract import check_contract, check_planned
from .methods.presets import Preset, find_preset
from .networks.tracing import on_cpu

__all__ = ["Config", "resolve"]

MOST_SIDE = 16_384
"""Largest side of an image, in pixels: a square image of this side takes 3 GiB as float32."""


@dataclass
class DataOptions:
    """Where images come from, and how they are resized and cropped (see `fastnce.data.UnpairedData`)."""

    dir: str = option("", "folder with trainA and trainB (testA, testB for samples)", anything=True)
    load_size: int | list[int] = option(
        286, "size to resize to before cropping: one side, or [height, width]", low=1, high=MOST_SIDE
    )
    crop_size: int | list[int] = option(
        256, "side of the crops, or [height, width]; multiples of 4", low=1, high=MOST_SIDE
    )
    preprocess: str = option(
        "resize_and_crop",
        "resize_and_crop, crop, scale_width_and_crop, scale_shortside_and_crop, none (whole images), zoom_and_patch",
        choices=(*PREPROCESS, "zoom_and_patch"),
    )
    flip: bool = option(True, "mirror half of the images")
    rain: float = option(0.0, "share of A's images that are B's with rendered rain; 1 needs no trainA", low=0, high=1)
    rain_like: str = option(
        "", "rain for data.rain, e.g. density=0.1:0.3,angle=-40:40; empty: the defaults of fastnce rain", anything=True
    )
    validate: str = option(
        "", "folder of held-out pairs for run.validate_every; empty: test in the data folder, if paired", anything=True
    )
    rain_side: str = option("right", "the rainy half of held-out strips: right or left", choices=RAIN_SIDES)
    dataset: str = option(
        "", "your own data set instead of folders (mydata.py:MyData); empty: trainA and trainB", anything=True
    )
    batch: int = option(1, "images of each domain per step", low=1, high=65_536)
    skip_bad: bool = option(False, "skip images that cannot be read; false: stop")
    cache_dir: str = option("", "folder for decoded images; empty: .fastnce-cache in the data folder", anything=True)


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
        """Return plain nested dicts, as stored with checkpoints."""
        sections = {s: {k: v for k, (v, _) in describe(getattr(self, s)).items()} for s in self.SECTIONS}
        return {"method": self.method, **sections}

    def as_toml(self) -> str:
        """Return a TOML file for `--config`, with the help text and the accepted values of each key."""
        lines = [f"method = {format_value(self.method)}"]
        for section in self.SECTIONS:
            lines += ["", f"[{section}]"]
            for key, (value, consequence) in describe(getattr(self, section)).items():
                accepted = range_of(getattr(self, section), key)
                accepted = f" [{accepted}]" if accepted else ""
                comment = " ".join(f"{consequence}{accepted}".split())
                lines.append(f"{key} = {format_value(value)}".ljust(36) + f"  # {comment}")
        return "\n".join(lines) + "\n"

    def differences(self, other: dict[str, Any], *, any_batch: bool = False) -> list[str]:
        """Return the keys, except those of `run`, that differ from a stored configuration, as "key: stored, now".

        Args:
            any_batch: ignore `data.batch`: only the batch of all ranks counts (`fastnce.engine.progress.check_batch`).
        """
        mine = self.as_dict()
        if mine["method"] != other.get("method"):
            return [f"method: {other.get('method')}, now {mine['method']}"]
        found = []
        for section in self.SECTIONS:
            for key, value in mine[section].items():
                stored = other.get(section, {}).get(key, _absent(self.method, section, key, other))
                free = (section == "run" and key != "seed") or (section, key) in _MAY_CHANGE
                free = free or (any_batch and (section, key) == ("data", "batch"))
                if stored != value and not free:
                    found.append(f"{section}.{key}: {stored}, now {value}")
        return found


_MAY_CHANGE = {
    *(("data", key) for key in ("dir", "cache_dir", "skip_bad", "validate", "rain_side")),
    *(("optim", key) for key in ("max_bad_steps", "accumulate")),
}
"""Keys that a resumed run may change, besides those of `run`: results stay the same, except for rounding."""


def resolve(method: str, file: Path | None = None, overrides: list[str] | None = None) -> Config:
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
        for section, values in stored.items():
            named = brief(section)
            if not isinstance(values, dict):
                raise ValueError(f"--config {file}: {named} must be in a section{_nearest_key(config, section)}")
            if section not in Config.SECTIONS and not values:
                raise ValueError(f"--config {file}: unknown section {named}; known: {', '.join(Config.SECTIONS)}")
            for key, value in values.items():
                _set(config, f"{section}.{key}", value, f"--config {file}")
    for text in overrides or []:
        name, equals, value = text.partition("=")
        if not equals and name in _keys(config):
            section, key = name.split(".")
            raise ValueError(
                f"{name} needs a value, such as {name}={format_value(getattr(getattr(config, section), key))}"
            )
        if not equals:
            raise ValueError(f"{brief(text)}: write section.key=value{_nearest_key(config, name)}")
        _set(config, name.strip(), value.strip(), "", parse=True)
    check(config)
    return config


def check(config: Config) -> None:
    """Refuse a configuration with a value outside its range, or with values that contradict each other.

    Only the configuration is checked, not whether networks, images and this machine fit it.

    Raises:
        ValueError: names the first wrong key, its value, and what is accepted.
    """
    preset = from_preset(config.method, find_preset(config.method))
    for section in Config.SECTIONS:
        options, wanted = getattr(config, section), type(getattr(preset, section))
        if not isinstance(options, wanted):
            raise ValueError(f"{section} must be {wanted.__name__} for {config.method}, not {type(options).__name__}")
        check_options(options, section)
    data, optim = config.data, config.optim
    if optim.n_epochs + optim.n_epochs_decay < 1:
        raise ValueError("optim.n_epochs=0 and optim.n_epochs_decay=0 leave nothing to train: one must be at least 1")
    if data.batch % optim.accumulate:
        raise ValueError(
            f"data.batch={data.batch} cannot be computed in optim.accumulate={optim.accumulate} equal parts"
        )
    for name, text in (
        ("data.rain_like", data.rain_like),
        ("loss.rendered_rain", getattr(config.loss, "rendered_rain", "")),
    ):
        try:
            RainOptions(**parse_ranges(name, text))
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None
    _check_sides(data)


def _check_sides(data: DataOptions) -> None:
    """Check the sizes of crops. `fastnce.data` checks whole images and the crops of SinCUT."""
    if data.preprocess in ("none", "zoom_and_patch"):
        return
    (load_height, load_width), (height, width) = (sides(size) for size in (data.load_size, data.crop_size))
    if height % 4 or width % 4:
        raise ValueError(f"data.crop_size={data.crop_size} must have sides that are multiples of 4")
    if data.preprocess == "crop":  # load_size is not used
        return
    if load_width < width or (load_height < height and data.preprocess != "scale_width_and_crop"):
        raise ValueError(
            f"data.load_size={data.load_size} is too small for data.crop_size={data.crop_size}: it must be at least as "
            f"large"
        )


def sides(size: int | list[int]) -> tuple[int, int]:
    """Return (height, width) of an option that holds one side or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def plan(config: Config) -> Method:
    """Check a configuration and build its method to check it, not to train it.

    It is on the meta device, which needs no memory. A user's own method or network is on the CPU, because its
    constructor may read the values of what it makes. PyTorch's random numbers do not advance.

    Raises:
        ValueError: what `check` refuses, or options that do not fit the networks.
    """
    check(config)
    with torch.device("meta"):
        if not is_import_path(config.method):
            return build_method(config)
        check_networks_fit(config.network)
        with on_cpu():
            built = build_method(config)
            check_planned(built, config.method)
            return built


def build_method(config: Config) -> Method:
    """Build the method of a configuration on the current default device.

    Raises:
        ValueError: options or networks that do not fit together, or a user's own method that fails.
    """
    method = find_preset(config.method).method
    if not is_import_path(config.method):
        return method(config.loss, config.network)
    try:
        built = method(config.loss, config.network)
        check_contract(built, config.method)
        return built
    except ValueError:
        raise
    except Exception as error:
        call = f"{config.method.rpartition(':')[2]}(options, network)"
        raise CodeError(f"method={config.method}: {call} fails: {type(error).__name__}: {error}") from error


def _named_code(stored: dict[str, Any], generators_only: bool) -> Iterator[Any]:
    """Yield the values of a stored configuration that may be import paths."""
    method = stored.get("method")
    yield method
    keys = [("network", "generator")]
    if not generators_only or is_import_path(method):
        keys += [("network", "discriminator"), ("loss", "weighting")]
    for section, key in keys:
        values = stored.get(section, {})
        yield values.get(key) if isinstance(values, dict) else None


def from_preset(method: str, preset: Preset) -> Config:
    """Return the defaults of a method.

    Raises:
        CodeError: a user's own method names an option in its `sections` that does not exist.
    """
    config = Config(method, DataOptions(), NetworkOptions(), preset.options(), OptimOptions(), RunOptions())
    known = _keys(config)
    for section, values in preset.sections.items():
        for key, value in values.items():
            if (name := f"{section}.{key}") not in known:
                raise CodeError(f"method={method}: its sections name {name}, which is no option")
            check_value(getattr(config, section), key, value, f"method={method}: its {name}")
            setattr(getattr(config, section), key, value)
    return config


def from_dict(stored: dict[str, Any], *, trust_code: bool = False, generators_only: bool = False) -> Config:
    """Restore the configuration that `as_dict` returned; keys of other versions are ignored.

    Only the values of `network` are checked: a run of another version may have values that are refused now, but its
    generators can still be used.

    Args:
        trust_code: import the classes and functions outside fastnce that it names. The author of the checkpoint chose
            them, and importing runs their code.
        generators_only: only the generators will be built, so the code of other parts needs no trust.

    Raises:
        ValueError: not such a dictionary, an unknown method, or networks that cannot be built. CodeError: it names code
            of its own that is not trusted or cannot be imported.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"a stored configuration must be a table of sections, not {type(stored).__name__}")
    own = [value for value in _named_code(stored, generators_only) if is_import_path(value)]
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
        for key in {f.name for f in fields(target)} & values.keys():
            setattr(target, key, values[key])
    check_options(config.network, "network")
    return config


def _absent(method: str, section: str, key: str, other: dict[str, Any]) -> Any:
    """Return the value that versions without this key used: that of the preset, except for WGAN-GP's penalty."""
    if key == "lambda_gp" and other.get("loss", {}).get("gan_mode") == "wgangp":
        return 0.0
    return getattr(getattr(from_preset(method, find_preset(method)), section), key)


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
    target = getattr(config, section) if section in Config.SECTIONS else None
    if target is None or key not in {f.name for f in fields(target)}:
        raise ValueError(f"{where}unknown key {brief(name)}{_nearest_key(config, name)}")
    text = value if parse else ""
    if parse:
        value = parse_value(value, getattr(target, key))
    value = converted(target, key, value)
    shown = "" if isinstance(value, str) or len(text) > 60 else text  # as the user wrote it: [1, 2,] or 1e-3
    check_value(target, key, value, f"{where}{name}", shown)
    setattr(target, key, value)
