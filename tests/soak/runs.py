"""A run that was never disturbed, and how far another one is the same. Nothing here is read by the package's code."""

from __future__ import annotations

import hashlib
import json
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
    r"config\.toml|log\.txt|metrics\.jsonl|samples(/step-\d{8}\.png)?"
    r"|checkpoints(/(latest|best|good)|/step-\d{8}(/(generator\.safetensors|training\.safetensors|state\.json))?)?"
)
"""What a run that nobody works at consists of."""
PACE = ("images_per_second", "data_share", "held_out_seconds")
"""What differs from run to run in metrics.jsonl."""


@dataclass(frozen=True)
class Reference:
    """seconds, events: of the whole run, for moments in it."""

    data: Path
    run: Path
    seconds: float
    events: int


def arguments(data: Path, out: Path, *more: str, steps: int = STEPS) -> list[str]:
    return ["train", "fastcut", "--data", str(data), "--out", str(out), *OPTIONS, f"run.steps={steps}", *more]


def reference(folder: Path, *more: str) -> Reference:
    """Pictures, cached, and a run on them."""
    data, out = training_pictures(folder / "data"), folder / "reference"
    done(run(arguments(data, folder / "first", *more, steps=1)))
    events = Events(out)
    ended = done(run(arguments(data, out, *more), prepare=events.watch()))
    return Reference(data, out, ended.seconds, events.count)


def done(ended: Ended) -> Ended:
    """AssertionError where a command that nothing was done to has failed."""
    assert not ended.wrong(0), f"{ended.out}{ended.err}"
    return ended


def whole(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Checkpoints whose files have the digests that state.json says, by step; and the names of all others."""
    good, bad = {}, []
    for path in sorted(folder.glob("checkpoints/step-*")):
        try:
            if not all((path / name).is_file() for name in (*FILES, "state.json")):  # a device may have no end
                raise OSError(f"{path} holds what is no file")
            state = json.loads((path / "state.json").read_text())
            if all(hashlib.sha256((path / n).read_bytes()).hexdigest() == state["sha256"][n] for n in FILES):
                good[state["step"]] = path
                continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        bad.append(path.name)
    return good, bad


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint, 0 where there is none."""
    return max(whole(folder)[0], default=0)


def measured(folder: Path, lines: list[str] | None = None) -> list[dict]:
    """The lines of metrics.jsonl; those that are torn are added to `lines`."""
    found = []
    path = folder / "metrics.jsonl"
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            (lines if lines is not None else []).append(f"a torn line in metrics.jsonl: {line[:80]!r}")
    if path.exists() and lines is not None and path.read_bytes()[-1:] not in (b"", b"\n"):
        lines.append("the last line of metrics.jsonl is not finished")
    return found


def logged(folder: Path) -> int:
    """The last step that metrics.jsonl has a loss of."""
    return max((line["step"] for line in measured(folder) if "G" in line), default=0)


def differences(found: Path, wanted: Path, ended: int) -> list[str]:
    """What is not as in a run that was never disturbed: the last checkpoint bit for bit, the metrics, the names.

    Args:
        ended: how often it was; each time, the line of one step may be missing, which was saved before it was logged.
    """
    metrics = _metrics_differ(found, wanted, ended)
    torn = [f"{name} is not whole" for name in whole(found)[1]]
    return [*torn, *tensors_differ(found, wanted), *metrics, *strangers(found), *_pointers(found)]


def tensors_differ(found: Path, wanted: Path) -> list[str]:
    """Between the two runs' newest whole checkpoints, of which nothing but the bits counts."""
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
    """Each line must be one of the other run's, and nearly all of those be there; what was repeated is there twice."""
    wrong: list[str] = []
    mine, theirs = ({_line(line) for line in measured(folder, wrong)} for folder in (found, wanted))
    if mine - theirs:
        wrong.append(f"lines of metrics.jsonl are of no undisturbed run, such as {min(mine - theirs)[:120]}")
    if len(theirs - mine) > ended:
        wrong.append(f"{len(theirs - mine)} lines of metrics.jsonl are missing, such as {min(theirs - mine)[:120]}")
    return wrong


def _line(values: dict) -> str:
    return json.dumps({key: value for key, value in values.items() if key not in PACE}, sort_keys=True)


def strangers(folder: Path) -> list[str]:
    """Files that no run should have: what is half written, or left by a process that is gone."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [f"{name} is left" for name in names if not NAMES.fullmatch(name)]


def _pointers(folder: Path) -> list[str]:
    good, _ = whole(folder)
    wrong = []
    for name in ("latest", "best", "good"):
        path = folder / "checkpoints" / name
        if path.exists() and folder / "checkpoints" / path.read_text() not in good.values():
            wrong.append(f"{name} names {path.read_text()!r}, which is no whole checkpoint")
    return wrong


def half_files(folder: Path, wanted: Path) -> list[str]:
    """What a run that a fault has met must not hold: torn lines, checkpoints, pictures or configurations."""
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
