"""The checkpoints that are named: of an epoch, the last, which `translate` uses, and the best."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..engine.stored import missing, step_of
from .exported import CONFIG, LARGEST, READABLE, read_details
from .translator import Translator

CHECKPOINTS = ("best", "last", "both")


def last_and_best(
    model: Path,
    load: Callable[[Path], Translator],
    which: str | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> tuple[Translator, Translator | None, str]:
    """Load the checkpoints of a run that are to be measured.

    Args:
        model: a run, or anything else that `load` takes.
        load: makes a translator of a path, such as `load_translator`.
        which: one of `CHECKPOINTS`; None: both where they differ.
        say: receives a sentence if the best checkpoint cannot be read and `which` is None.

    Returns:
        (the model, the run's best checkpoint if it is measured too, the name of the model's checkpoint). The name is
        empty for anything but a run that has a best checkpoint.

    Raises:
        ValueError: the model cannot be loaded, or has no such checkpoint.
    """
    pointer = model / "checkpoints" / "best"
    if not (model / "checkpoints").is_dir():
        if which is not None:
            raise ValueError(f"--checkpoint {which} chooses between the checkpoints of a run, and {model} is none")
        return load(model), None, ""
    if not pointer.is_file() and which in ("best", "both"):
        raise ValueError(f"--checkpoint {which}: {model} has no best checkpoint, because nothing was validated")
    if which == "best":
        return load(pointer), None, "best"
    last = load(model)
    if which == "last":
        return last, None, "last"
    if not pointer.is_file():
        return last, None, ""
    try:
        best = load(pointer)
    except ValueError as error:
        if which == "both":
            raise
        say(f"only the last checkpoint is measured: {error}")
        return last, None, "last"
    return (last, None, "best and last") if step_loaded(best) == step_loaded(last) else (last, best, "last")


def chosen_model(model: Path, epoch: str = "", generator: str = "") -> tuple[Path, str]:
    """Find what `load_translator` takes for a run, or for a folder of published files.

    Args:
        model: a run; a folder with files such as latest_net_G.pth; anything else is returned unchanged, as is a folder
            whose config.json describes the generator.
        epoch: "last" or "latest", "best", or the number of an epoch whose checkpoint is kept; empty: the last.
        generator: as `load_translator` takes it. Of published files, it chooses between latest_net_G_A.pth and
            latest_net_G_B.pth.

    Returns:
        the path, and the generator that is still to be chosen in it.

    Raises:
        ValueError: there is no such checkpoint or file; the message names those that are there.
    """
    label = {"": "latest", "last": "latest"}.get(epoch, epoch)
    if label not in ("latest", "best") and not re.fullmatch(r"[1-9]\d{0,17}", label):
        raise ValueError(f"--epoch must be last, best or the number of an epoch, not {epoch}")
    if (model / "checkpoints").is_dir():
        if label == "latest":
            return model, generator
        if label != "best":
            return of_epoch(model, int(label)), generator
        pointer = model / "checkpoints" / "best"
        if not pointer.is_file():
            raise ValueError(missing(pointer))
        return pointer, generator
    files = {file.name: file for file in sorted(model.glob("*_net_G*.pth"))} if model.is_dir() else {}
    if not files:
        if epoch:
            raise ValueError(f"--epoch {epoch} chooses a checkpoint of a run, and {model} is none")
        return model, generator
    if not epoch and _described(model, generator):
        return model, generator
    names = [f"{label}_net_{generator}.pth"] if generator else [f"{label}_net_{g}.pth" for g in ("G", "G_A")]
    for name in names:
        if name in files:
            return files[name], ""
    raise ValueError(f"{model} has no {' or '.join(names)}: it holds {', '.join(files)}")


def _described(model: Path, generator: str) -> bool:
    """Whether a config.json of `fastnce export` describes this generator of a folder of published files.

    Raises:
        ValueError: it is damaged. One of another program is ignored.
    """
    if not (model / CONFIG).is_file():
        return False
    with (model / CONFIG).open("rb") as opened:
        if b'"fastnce"' not in opened.read(LARGEST):
            return False
    details = read_details(model)
    return details["format"] in READABLE and generator in ("", details["generator"])


def of_epoch(model: Path, epoch: int) -> Path:
    """Return the path of the checkpoint that a run keeps of an epoch (`run.keep_epochs`), for `load_translator`.

    Args:
        model: a run.
        epoch: its number, counted from 1, as in the published `--epoch`.

    Raises:
        ValueError: `model` is no run, or has no checkpoint of this epoch; the message names those that it has.
    """
    if not (model / "checkpoints").is_dir():
        raise ValueError(f"--epoch {epoch} chooses a checkpoint of a run, and {model} is none")
    pointer = model / "checkpoints" / f"epoch-{epoch}"
    if not pointer.is_file():
        raise ValueError(missing(pointer))
    return pointer


def step_loaded(translator: Translator | None) -> int | None:
    """The step of the checkpoint that a translator was loaded from."""
    return None if translator is None else step_of(translator.sources[0].parent)
