"""Continue a run: with the configuration that is stored in it, and with a changed one.

    config, changes = continue_config(Path("runs/mine"), {"optim.lr": 1e-4})
    train_run(config, "runs/mine", changes=changes)

A change holds from the step at which the run continues. Later commands compare with the newest checkpoint, so if the
process ends before its first checkpoint, the run is as it was before, and the same change can be made again.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.imports import is_import_path, same_object
from ..common.messages import brief
from ..common.streams import print_line
from ..common.toml import format_value
from ..config.build import plan
from ..config.check import check
from ..config.config import Change, Config
from ..config.options import batch_sizes
from ..config.paths import PATHS
from ..config.resolve import apply
from ..config.stored import from_dict
from ..engine.checkpoint import Checkpoints
from ..engine.log import RunLog
from ..engine.progress import Progress
from ..engine.stored import read_tensors
from ..engine.training_state import misfits, planned_state
from ..methods import Method
from ..methods.cyclegan import ImagePool

Values = Sequence[str] | Mapping[str, Any]
"""Texts such as "optim.lr=1e-4", or Python values by key."""


def continue_config(
    out: Path, changes: Values = (), overrides: Values = (), *, trust_code: bool = False
) -> tuple[Config, list[str]]:
    """Return the configuration that a run continues with, and the keys that it changes, for `train_run`.

    The configuration is that of the newest checkpoint. Paths are those of RUN/config.toml, which are absolute.

    Args:
        out: the folder of the run.
        changes: keys to change, such as "optim.lr=1e-4".
        overrides: keys that may differ without being a change, such as "run.steps=2000".
        trust_code: import the code of its own that the run names.

    Raises:
        ValueError: there is no run, or a key cannot change. CodeError: it names code that is not trusted.
    """
    stored = stored_config(out)
    config = from_dict(_located(stored, out), trust_code=trust_code, all_code=True)
    keys = apply_changes(config, out, changes)
    apply(config, overrides)
    refused = [change for change in config.changes(stored) if not change.free and change.key not in keys]
    if refused:
        raise ValueError(
            f"{out} was trained with {'; '.join(f'{c.key}={_shown(c.stored)}' for c in refused)}: to continue it with "
            f"another value, write --change {as_overrides(refused)}"
        )
    check(config)
    return config, keys


def apply_changes(config: Config, out: Path, changes: Values) -> list[str]:
    """Set the changed keys of a run's configuration; returns them.

    Raises:
        ValueError: there is no run in `out`, or a key is unknown, has a wrong value, or can never change.
    """
    if not changes:
        return []
    stored = stored_config(out, f": leave out --change, and write {_first(changes)} instead")
    for text in changes:
        if text.partition("=")[0].strip() == "method":
            raise ValueError(f"--change {text}: the method of a run cannot change: {_anew(out)}")
    keys = apply(config, changes)
    check(config)
    for change in config.changes(stored):
        if change.key in keys and is_fixed(change.key):
            raise ValueError(f"--change {change.key}: the weights of {out} would not fit: {_anew(out)}")
    return keys


def stored_config(out: Path, remedy: str = ": name METHOD and --data DIR to begin one") -> dict[str, Any]:
    """Return the configuration of the newest checkpoint of a run, as `Config.as_dict` stores it.

    Raises:
        ValueError: there is no checkpoint, it holds no configuration, or all are damaged.
    """
    found = Checkpoints(out / "checkpoints", log=lambda sentence: None).state()
    if found is None:
        raise ValueError(f"{out} holds no run to continue{remedy}")
    state, folder = found
    if "config" not in state:
        raise ValueError(f"{folder} holds no configuration: name METHOD and all that differs from its defaults")
    config: dict[str, Any] = state["config"]
    return config


def is_fixed(key: str) -> bool:
    """Whether a run can never change this key."""
    return key == "method" or key.startswith("network.")


def as_overrides(changes: Sequence[Change], *, stored: bool = False) -> str:
    """Write changes as words of a command line, with the values now or with the stored ones."""
    return " ".join(shlex.quote(f"{c.key}={_shown(c.stored if stored else c.now)}") for c in changes)


def check_fit(config: Config, state: dict[str, Any], folder: Path, out: Path, changes: Collection[str]) -> None:
    """Refuse changes after which the tensors of the newest checkpoint do not fit the run.

    Args:
        state, folder: of that checkpoint.
        changes: the keys that may differ.

    Raises:
        ValueError: names the first key that cannot change and why.
    """
    made = [change for change in config.changes(state.get("config", {})) if change.key in changes]
    if not made:
        return
    found = read_tensors(folder / "training.safetensors")
    problem = _misfit(config, found)
    if not problem:
        return
    for change in made:  # find the one that is to blame
        alone = deepcopy(config)
        for other in made:
            if other is not change:
                apply(alone, {other.key: other.stored})
        if alone_problem := _problem_alone(alone, found):
            raise ValueError(
                f"--change {change.key}: {out} cannot continue with {_shown(change.now)} after "
                f"{_shown(change.stored)}, because its state does not fit ({alone_problem}): {_anew(out)}"
            )
    keys = ", ".join(change.key for change in made)
    raise ValueError(f"--change {keys}: the state of {out} does not fit ({problem}): {_anew(out)}")


def with_origin(config: Config, state: dict[str, Any]) -> Config:
    """Return the configuration with the weights that the run began with, which a later command need not name."""
    stored = state.get("config", {}).get("run", {})
    origin = {key: stored[key] for key in ("start_from", "start_networks") if key in stored}
    return replace(config, run=replace(config.run, **origin))


def note_changes(
    config: Config,
    state: dict[str, Any],
    changes: Collection[str],
    out: Path,
    *,
    processes: int,
    steps_per_epoch: int,
    quiet: bool,
) -> None:
    """Say and record what a run does differently from its newest checkpoint; nothing if no steps are left to do.

    Args:
        state: of that checkpoint.
        changes: the keys that the user changes.
        processes: that train now.
        steps_per_epoch: of the data set.
    """
    if not changes:
        return
    found = [str(change) for change in config.changes(state.get("config", {})) if change.key in changes]
    before = (state.get("progress") or {}).get("ranks", processes)
    found += [f"processes: {before}, now {processes}"] if before != processes else []
    if not found:
        return
    done = state["step"]
    if not steps_left(config, state, processes=processes, steps_per_epoch=steps_per_epoch):
        if not quiet:
            print_line(f"nothing changes, because no step is left to do: {'; '.join(found)}")
    else:
        sentences = [f"changed from step {done:,} on: {change}" for change in found]
        note(out, "change", done, sentences, quiet, changes=found)


def steps_left(config: Config, state: dict[str, Any], *, processes: int, steps_per_epoch: int) -> bool:
    """Whether a run that continues from this state has steps to do."""
    done, epochs = state["step"], config.optim.n_epochs + config.optim.n_epochs_decay
    progress = Progress(epochs, steps_per_epoch, config.data.batch * processes, processes)
    return done < progress.resumed(done, state.get("progress")).end(config.run.steps)


def note(out: Path, name: str, step: int, sentences: Sequence[str], quiet: bool, **values: Any) -> None:
    """Say sentences on the terminal and in log.txt, and add one event to history.jsonl."""
    with closing(RunLog(out, quiet)) as log:
        log.step(step)
        for sentence in sentences:
            log.say(sentence)
        log.event(name, **values)


def _problem_alone(config: Config, found: dict[str, Tensor]) -> str:
    try:
        return _misfit(config, found)
    except ValueError:  # the others belong to it
        return ""


def _misfit(config: Config, found: dict[str, Tensor]) -> str:
    """Return how the tensors of a checkpoint do not fit a configuration; empty if they do."""
    planned = plan(config)
    problems = misfits(planned_state(planned, config.optim.ema), found)
    return problems[0] if problems else _other_pool(config, planned, found)


def _other_pool(config: Config, planned: Method, found: dict[str, Tensor]) -> str:
    """Return why images of another size cannot go into the pools of images that were filled before."""
    for name, pool in planned.extra_state_modules().items():
        kept = found.get(f"extra/{name}/pictures")
        if not isinstance(pool, ImagePool) or kept is None or not kept.numel() or config.data.dataset:
            continue
        if tuple(kept.shape[2:]) not in batch_sizes(config.data):
            return f"{name} keeps pictures of {kept.shape[3]}x{kept.shape[2]}"
    return ""


def _located(stored: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return a stored configuration with the paths of RUN/config.toml, which are absolute.

    A path of own code is only taken if it may be the stored one. Without a file that can be read, the stored values
    stand.
    """
    try:
        written = tomllib.loads((out / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return stored
    stored = deepcopy(stored)

    def take(target: dict[str, Any], key: str, value: Any, name: str) -> None:
        own_code = is_import_path(value) and _same_code(value, target.get(key))
        if own_code or (name in PATHS and isinstance(value, str)):
            target[key] = value

    take(stored, "method", written.get("method"), "method")
    for section in Config.SECTIONS:
        values = written.get(section, {})
        for key, value in values.items() if isinstance(values, dict) else ():
            take(stored.setdefault(section, {}), key, value, f"{section}.{key}")
    return stored


def _same_code(one: str, other: Any) -> bool:
    """Whether two lists of import paths and names, separated by commas, name the same."""
    parts, there = one.split(","), str(other).split(",")
    return len(parts) == len(there) and all(map(same_object, parts, there))


def _anew(out: Path) -> str:
    return f"begin a new run with run.start_from={out}"


def _first(changes: Values) -> str:
    key = next(iter(changes))
    return f"{key}={_shown(changes[key])}" if isinstance(changes, Mapping) else brief(key).strip("'")


def _shown(value: Any) -> str:
    """Write a value as on a command line."""
    if isinstance(value, str):
        return value
    return format_value(value).replace(", ", ",").strip("[]")
