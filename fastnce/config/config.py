"""A run's configuration, by section."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ..common.imports import CodeError, same_object
from ..common.options import check_value, describe, range_of
from ..common.toml import format_value
from ..engine.options import OptimOptions, RunOptions
from ..methods import NetworkOptions
from ..methods.presets import Preset, find_preset
from .options import DataOptions


class Change(NamedTuple):
    """A key whose value differs from a stored configuration's.

    key: such as "optim.lr"; "method" for the method itself.
    stored, now: both values.
    free: a run may be continued with another value, because its results stay the same, except for rounding.
    """

    key: str
    stored: Any
    now: Any
    free: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.stored}, now {self.now}"


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

    def changes(self, other: dict[str, Any]) -> list[Change]:
        """Return every key whose value differs from a stored configuration's. Another method is the only change.

        Paths of own code are equal if they name the same file (`fastnce.common.imports.same_object`).
        """
        mine = self.as_dict()
        if not same_object(mine["method"], other.get("method")):
            return [Change("method", other.get("method"), mine["method"], free=False)]
        found = []
        for section in self.SECTIONS:
            for key, value in mine[section].items():
                stored = other.get(section, {}).get(key, _absent(self.method, section, key, other))
                if not same_object(stored, value):
                    free = (section == "run" and key != "seed") or (section, key) in _MAY_CHANGE
                    found.append(Change(f"{section}.{key}", stored, value, free))
        return found

    def differences(self, other: dict[str, Any], *, any_batch: bool = False) -> list[str]:
        """Return the changes that are not free, as "key: stored, now".

        Args:
            any_batch: ignore `data.batch`: only the batch of all ranks counts (`fastnce.engine.progress.check_batch`).
        """
        return [
            str(change)
            for change in self.changes(other)
            if not change.free and not (any_batch and change.key == "data.batch")
        ]


_MAY_CHANGE = {
    *(("data", key) for key in ("dir", "cache_dir", "skip_bad", "max_pixels", "validate", "rain_side")),
    *(("optim", key) for key in ("max_bad_steps", "accumulate")),
}
"""Keys that a resumed run may change, besides those of `run`: results stay the same, except for rounding."""


def from_preset(method: str, preset: Preset) -> Config:
    """Return the defaults of a method.

    Raises:
        CodeError: a user's own method names an option in its `sections` that does not exist.
    """
    config = Config(method, DataOptions(), NetworkOptions(), preset.options(), OptimOptions(), RunOptions())
    known = keys_of(config)
    for section, values in preset.sections.items():
        for key, value in values.items():
            if (name := f"{section}.{key}") not in known:
                raise CodeError(f"method={method}: its sections name {name}, which is no option")
            check_value(getattr(config, section), key, value, f"method={method}: its {name}")
            setattr(getattr(config, section), key, value)
    return config


def _absent(method: str, section: str, key: str, other: dict[str, Any]) -> Any:
    """Return the value that versions without this key used: that of the preset, except for WGAN-GP's penalty."""
    if key == "lambda_gp" and other.get("loss", {}).get("gan_mode") == "wgangp":
        return 0.0
    return getattr(getattr(from_preset(method, find_preset(method)), section), key)


def renamed(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a stored section, with the present names of keys that had another one.

    `run.metric` is `run.best` now. Its default was psnr_y, which "auto" means for pairs. `run.tensorboard` was off by
    default, which an empty `run.track` means.
    """
    if section != "run":
        return values
    kept = {key: value for key, value in values.items() if (key, value) != ("tensorboard", False)}
    if "metric" not in kept:
        return kept
    del kept["metric"]
    return {"best": "auto" if values["metric"] == "psnr_y" else values["metric"]} | kept


def keys_of(config: Config) -> list[str]:
    return [f"{section}.{f.name}" for section in Config.SECTIONS for f in fields(getattr(config, section))]
