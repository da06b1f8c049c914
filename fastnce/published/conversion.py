"""From a published command to a configuration, and to what is said of each of its options."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ..common.messages import brief
from ..common.toml import format_value
from ..config.check import check
from ..config.config import Config, from_preset, keys_of
from ..config.resolve import apply
from ..methods.presets import find_preset
from .detect import identify
from .flag import Flag, NotSupported, Published
from .own import DUAL, experiment
from .reading import Source
from .table import CUTS, UNREAD, flags_of, named

TWO = ("cyclegan", "dclgan", "simdcl", "dcdgan-released")
"""Presets with two generators, whose test.py translates in both directions."""

IGNORED = {"pool_size": CUTS, "flip_equivariance": DUAL}
"""Options that some published models have and never read; here they have their effect."""


@dataclass
class Conversion:
    """A published command, as ours.

    Args:
        published: its options.
        config: the configuration of the training.
        lines: one sentence for each option that was given.
        flags: the option that each changed key comes from.
    """

    published: Published
    config: Config
    lines: list[str] = field(default_factory=list)
    flags: dict[str, Flag] = field(default_factory=dict)

    @property
    def changed(self) -> dict[str, Any]:
        """The values that differ from those of our preset, by key."""
        usual = from_preset(self.config.method, find_preset(self.config.method))
        pairs = {key: (_value(self.config, key), _value(usual, key)) for key in keys_of(self.config)}
        return {key: value for key, (value, preset) in pairs.items() if value != preset}

    def as_toml(self) -> str:
        """The changed values as a file for --config, with the published names as comments."""
        lines = [f"method = {format_value(self.config.method)}"]
        changed = self.changed
        for section in Config.SECTIONS:
            keys = [key for key in changed if key.startswith(f"{section}.")]
            lines += ["", f"[{section}]"] if keys else []
            for key in keys:
                flag = self.flags.get(key)
                text = f"{key.partition('.')[2]} = {format_value(changed[key])}"
                usual = "" if flag is None or flag.name in self.published.given else " (published default)"
                lines.append(f"{text:<32}  # --{flag.name}{usual}" if flag else text)
        return "\n".join(lines) + "\n"

    @property
    def run(self) -> str:
        """The folder of the run: runs/NAME, or the folder that --checkpoints_dir names."""
        place = self.published.values["checkpoints_dir"]
        usual = "checkpoints_dir" not in self.published.given
        return str(PurePath("runs" if usual else place) / experiment(self.published))

    def commands(self, file: str = "") -> list[str]:
        """The commands to run: one training, or one translation for each generator.

        Args:
            file: the TOML file that was written; empty: the values follow on the command line.
        """
        if self.published.test:
            names = ("", "G_B") if self.published.method in TWO and self.published.model != "test" else ("",)
            return [shlex.join(self._translation(name)) for name in names]
        devices = self.published.devices
        words = ["fastnce", "train"]
        if file:
            words += ["--config", file]
            words += [] if self.config.data.dir else ["--data", "DIR"]
        else:
            words += [self.config.method, "--data", self.config.data.dir or "DIR"]
        words += ["--out", self.run]
        words += ["--nproc", str(len(devices))] if len(devices) > 1 else []
        if not file:
            words += [f"{key}={_word(value)}" for key, value in self.changed.items() if key != "data.dir"]
        plain = [str(number) for number in range(len(devices))]
        chosen = f"CUDA_VISIBLE_DEVICES={','.join(devices)} " if len(devices) > 1 and devices != plain else ""
        return [chosen + shlex.join(words)]

    def _translation(self, generator: str) -> list[str]:
        published = self.published
        values = published.values
        label = "_".join((values["phase"], values["epoch"], *([generator] if generator else [])))  # a page for each
        out = PurePath(values["results_dir"]) / experiment(published) / label
        data = values["dataroot"] if "dataroot" in published.given else "DIR"
        words = ["fastnce", "translate", self.run, data, "--out", str(out), "--layout", "published"]
        if published.model != "test":  # which reads the folder itself
            words += ["--phase", values["phase"]]
        words += ["--num", values["num_test"]]
        words += ["--load-size", values["load_size"]] if "resize" in values["preprocess"] else []
        words += ["--epoch", values["epoch"]] if values["epoch"] != "latest" else []
        words += ["--direction", "BtoA"] if values["direction"] == "BtoA" else []
        changes = not published.on("no_dropout") or "batch" in (values.get("normG"), values.get("norm"))
        words += ["--train-mode"] if changes and not published.on("eval") else []
        generator = generator or f"G{values.get('model_suffix', '')}".replace("G_A", "").removesuffix("G")
        words += ["--generator", generator] if generator else []
        devices = published.devices
        device = "cpu" if not devices else "" if devices[0] == "0" else f"cuda:{devices[0]}"
        return words + (["--device", device] if device else [])


def convert(source: Source, wanted: str = "") -> Conversion:
    """Convert a published command. Nothing is read but the command, and nothing is written.

    Args:
        source: of `read_source`.
        wanted: the repository, as in `identify`.

    Raises:
        ValueError: the model has no preset here, or a value is wrong there or here; the message names the option.
    """
    published = identify(source, wanted)
    config = from_preset(published.method, find_preset(published.method))
    result = Conversion(published, config)
    own = flags_of(published.repository, published.model, published.test)
    known = keys_of(config)
    _ours(own["suffix"], published)  # first, because sentences have the name of the run
    for name, flag in own.items():
        found, reason = _ours(flag, published)
        first = next(iter(found), "")
        if first and first not in known:
            reason = f"{config.method} has no {first}"
        found = {key: value for key, value in found.items() if key in known}
        if not (published.test and flag.phase != "train"):
            try:
                apply(config, found)
            except ValueError as error:
                raise ValueError(f"--{name} {published.values[name]}: {error}") from None
        for key in found:
            if key not in result.flags or name in published.given:
                result.flags[key] = flag
        if name in published.given:
            result.lines.append(_sentence(flag, result, found, reason))
    for name in source.given:
        if name not in own:
            models = dict.fromkeys(model for flag in named(name) for model in flag.models)
            whose = f"an option of {' and '.join(models)}" if models else "no option of this program"
            result.lines.append(f"--{name}: not supported: it is {whose}, and this is {published.model}")
    result.lines += [f"--{name}: unknown: no published code has it, so a fork added it" for name in source.unknown]
    if published.test:
        if "resize" in published.values["preprocess"] and published.whole("load_size") % 4:
            raise ValueError(f"--load_size {published.values['load_size']} must be a multiple of 4 for a translation")
    else:
        if config.data.dir == "placeholder" or "dataroot" not in published.values:
            config.data.dir = ""
        try:
            check(config)
        except ValueError as error:
            raise ValueError(f"the published options cannot be trained here: {error}") from None
    return result


def _ours(flag: Flag, published: Published) -> tuple[dict[str, Any], str]:
    """Our values of a published option, and the reason if it has no equal."""
    if flag.convert is None:
        return {}, "" if flag.ours or flag.test else flag.remark
    text = published.values[flag.name]
    try:
        return flag.convert(text, published), ""
    except NotSupported as why:
        return {}, str(why)
    except ValueError as error:
        raise ValueError(f"--{flag.name} {brief(text)} must be {error}") from None


def _sentence(flag: Flag, result: Conversion, found: dict[str, Any], reason: str) -> str:
    """What is said of an option that was given."""
    published = result.published
    text = published.values[flag.name]
    said = f"--{flag.name}" if flag.takes == "switch" else f"--{flag.name} {text}"
    if published.test:
        if flag.name == "eval":
            return f"{said}: same, eval mode is the default here"
        here = flag.test
        if not here:
            return f"{said}: " + (f"not supported: {flag.remark}" if not flag.ours else "the model has it already")
        if flag.name == "eval":
            return f"{said}: same, what fastnce does without {here}"
        crops = "crop" in published.values["preprocess"] and text != published.values["load_size"]
        if flag.name == "crop_size" and crops:
            return f"{said}: not supported: a random crop of a test picture; the whole picture is translated"
        if flag.name in ("preprocess", "load_size") and "resize" not in published.values["preprocess"]:
            same = text == "none"
            return f"{said}: {'same' if same else 'not supported'}: pictures are translated at their own size"
        return f"{said}: {'same' if here.lstrip('-') == flag.name else 'renamed'}, {here}"
    if reason:
        return f"{said}: not supported: {reason}"
    kind = "same" if flag.kind == "same" else "renamed"
    ours = ", ".join(f"{key} = {format_value(value)}" for key, value in found.items())
    if flag.name == "gpu_ids" and len(published.devices) > 1:
        ours = f"--nproc {len(published.devices)}"
    ours = ours or {"--out": f"--out {result.run}", "METHOD": f"METHOD {published.method}"}.get(flag.ours, flag.ours)
    said_of_all = f" ({flag.remark})" if flag.remark and kind == "renamed" else ""
    ignored = published.model in IGNORED.get(flag.name, ())
    remark = f" ({UNREAD}; here it has its effect)" if ignored else said_of_all
    return f"{said}: {kind}, {ours}{remark}"


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _word(value: Any) -> str:
    """A value as `section.key=value` takes it."""
    if isinstance(value, list):
        return ",".join(map(format_value, value))
    return value if isinstance(value, str) else format_value(value)
