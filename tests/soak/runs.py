"""An undisturbed run, and its comparison with another. Files are read without the package's own code."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from .common import TINY, Ended, run, training_pictures
from .faults import Events

STEPS, SAVE_EVERY = 10, 2
OPTIONS = [
    *TINY,
    "optim.lr=0.002",
    "optim.ema=0.9",
    "run.samples=1",
    "run.sample_every=4",
    "run.validate_every=5",
    f"run.save_every={SAVE_EVERY}",
]
FILES = ("generator.safetensors", "training.safetensors")
NAMES = re.compile(
    r"config\.toml|log\.txt|metrics\.jsonl|history\.jsonl|report\.html|samples(/step-\d{8}\.png)?"
    r"|checkpoints(/(latest|best|good)|/step-\d{8}(/(generator\.safetensors|training\.safetensors|state\.json))?)?"
)
"""The files of a run that is not in progress."""
PACE = ("images_per_second", "data_share", "held_out_seconds")
"""Keys of metrics.jsonl that differ from run to run."""


@dataclass(frozen=True)
class Reference:
    """An undisturbed run, with its duration and number of file operations."""

    data: Path
    run: Path
    seconds: float
    events: int


def arguments(data: Path, out: Path, *more: str, steps: int = STEPS) -> list[str]:
    return ["train", "fastcut", "--data", str(data), "--out", str(out), *OPTIONS, f"run.steps={steps}", *more]


_REFERENCES: dict[tuple[str, ...], Reference] = {}


def reference(beside: Path, *more: str) -> Reference:
    """Create pictures, their cache, and a run on them: once in a process, as campaigns only read them.

    Args:
        beside: the folder of a campaign.
    """
    if more not in _REFERENCES:
        _REFERENCES[more] = _make_reference(beside.parent / f"reference-{os.getpid()}-{len(_REFERENCES)}", *more)
    return _REFERENCES[more]


def _make_reference(folder: Path, *more: str) -> Reference:
    data, out = training_pictures(folder / "data"), folder / "reference"
    done(run(arguments(data, folder / "first", *more, steps=1)))
    events = Events(out)
    ended = done(run(arguments(data, out, *more), prepare=events.watch()))
    return Reference(data, out, ended.seconds, events.count)


def done(ended: Ended) -> Ended:
    """Return the ended command. Raise AssertionError if it failed."""
    assert not ended.wrong(0), f"{ended.out}{ended.err}"
    return ended


def whole(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Return checkpoints whose files match the digests of state.json, by step, and the names of all others."""
    good, bad = {}, []
    for path in sorted(folder.glob("checkpoints/step-*")):
        try:
            if not all((path / name).is_file() for name in (*FILES, "state.json")):  # a device may be endless
                raise OSError(f"{path} has an entry that is not a file")
            state = json.loads((path / "state.json").read_text())
            if all(hashlib.sha256((path / n).read_bytes()).hexdigest() == state["sha256"][n] for n in FILES):
                good[state["step"]] = path
                continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        bad.append(path.name)
    return good, bad


def newest(folder: Path) -> int:
    """Return the step of the newest intact checkpoint, or 0."""
    return max(whole(folder)[0], default=0)


def measured(folder: Path, lines: list[str] | None = None) -> list[dict]:
    """Return the lines of metrics.jsonl. A fault for each partial line is added to `lines`."""
    found = []
    path = folder / "metrics.jsonl"
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            (lines if lines is not None else []).append(f"a partial line in metrics.jsonl: {line[:80]!r}")
    if path.exists() and lines is not None and path.read_bytes()[-1:] not in (b"", b"\n"):
        lines.append("the last line of metrics.jsonl is partial")
    return found


def logged(folder: Path) -> int:
    """Return the last step with a loss in metrics.jsonl."""
    return max((line["step"] for line in measured(folder) if "G" in line), default=0)


def differences(found: Path, wanted: Path, ended: int) -> list[str]:
    """Return the differences from an undisturbed run: in the bits of the last checkpoint, the metrics, the names.

    Args:
        ended: number of interruptions. Each may lose the line of one step, which was saved before it was logged.
    """
    metrics = _metrics_differ(found, wanted, ended)
    torn = [f"{name} is not whole" for name in whole(found)[1]]
    return [*torn, *tensors_differ(found, wanted), *metrics, *strangers(found), *_pointers(found)]


def tensors_differ(found: Path, wanted: Path) -> list[str]:
    """Return the differences between the bits of the two runs' newest intact checkpoints."""
    mine, theirs = whole(found)[0], whole(wanted)[0]
    at = max(theirs)
    if at != max(mine, default=0):
        return [f"the newest checkpoint should be of step {at}, and there are {sorted(mine)}"]
    wrong = []
    for name in FILES:
        a, b = load_file(mine[at] / name), load_file(theirs[at] / name)
        if a.keys() != b.keys():
            wrong.append(f"{name}: other tensors, such as {sorted(a.keys() ^ b.keys())[:3]}")
        differ = [key for key in a.keys() & b.keys() if a[key].numpy().tobytes() != b[key].numpy().tobytes()]
        if differ:
            wrong.append(f"{name} of step {at}: {len(differ)} tensors differ, such as {min(differ)}")
    return wrong


def _metrics_differ(found: Path, wanted: Path, ended: int) -> list[str]:
    """Return faults: lines that the other run does not have, and too many missing lines. Repeated lines are allowed."""
    wrong: list[str] = []
    mine, theirs = ({_line(line) for line in measured(folder, wrong)} for folder in (found, wanted))
    if mine - theirs:
        wrong.append(f"lines of metrics.jsonl differ from an undisturbed run, such as {min(mine - theirs)[:120]}")
    if len(theirs - mine) > ended:
        wrong.append(f"{len(theirs - mine)} lines of metrics.jsonl are missing, such as {min(theirs - mine)[:120]}")
    return wrong


def _line(values: dict) -> str:
    return json.dumps({key: value for key, value in values.items() if key not in PACE}, sort_keys=True)


def strangers(folder: Path) -> list[str]:
    """Return files that a run must not have: partial files, or files left by an ended process."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [f"{name} is left" for name in names if not NAMES.fullmatch(name)]


def _pointers(folder: Path) -> list[str]:
    good, _ = whole(folder)
    wrong = []
    for name in ("latest", "best", "good"):
        path = folder / "checkpoints" / name
        if path.exists() and folder / "checkpoints" / path.read_text() not in good.values():
            wrong.append(f"{name} names {path.read_text()!r}, which is not an intact checkpoint")
    return wrong


def half_files(folder: Path, wanted: Path) -> list[str]:
    """Return faults of a run after an injected fault: partial lines, checkpoints, pictures or configurations."""
    wrong = [*strangers(folder), *_pointers(folder), *(f"{name} is not whole" for name in whole(folder)[1])]
    measured(folder, wrong)
    for path in folder.glob("samples/*.png"):
        other = wanted / "samples" / path.name
        if not other.exists() or path.read_bytes() != other.read_bytes():
            wrong.append(f"{path.name} is not the sample grid of an undisturbed run")
    config = folder / "config.toml"
    if config.exists():
        try:
            if tomllib.loads(config.read_text())["method"] != "fastcut":
                wrong.append("config.toml is of another method")
        except (ValueError, KeyError):
            wrong.append(f"config.toml of {config.stat().st_size} bytes is not whole")
    return wrong
