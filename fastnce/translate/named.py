"""A model by its path, or by the name of one that comes with the package (`fastnce.models`)."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ..common.messages import nearest
from ..engine.stored import missing
from ..models import folder, names
from .exported import CONFIG, WEIGHTS

OF_A_RUN = ("checkpoints", "state.json", "config.toml")


def locate(source: str | os.PathLike[str]) -> Path:
    """Return the path of a model: `source` itself, or the folder of the model of this name.

    A path that exists comes before a name, unless it is a folder without a model, such as the `--out` of an earlier
    translation. A warning says what was taken. `./derain` is never a name. A path that `Path` would shorten to a name
    is returned as an absolute one, so that it stays a path.

    Args:
        source: a path, or one of `fastnce.models.names()`. It need not exist.
    """
    path, name = Path(source), os.fspath(source)
    if name not in names():
        return path.absolute() if str(path) in names() else path
    shipped = folder(name)
    if not os.path.lexists(path):
        return shipped
    if path.is_dir() and not _has_a_model(path):
        warnings.warn(
            f"the folder {name} holds no model: {name} is taken as the model that comes with fastnce, not as ./{name}",
            stacklevel=3,
        )
        return shipped
    kind = "folder" if path.is_dir() else "file"
    warnings.warn(
        f"{name} is taken as the {kind} of this name; the model that comes with fastnce is {shipped}", stacklevel=3
    )
    return path.absolute()


def model_path(text: str) -> Path:
    """Read the path or the name of a model from a command line: `./derain` stays a path, which `Path` shortens."""
    path = Path(text)
    return path.absolute() if text != path.name and str(path) in names() else path


def absent(path: Path) -> str:
    """Say that there is no such run or file; for a bare word also which models come with the package."""
    sentence = missing(path)
    if str(path) != path.name or path.suffix:
        return sentence
    return f"{sentence}, and the models that come with fastnce are: {', '.join(names())}{nearest(path.name, names())}"


def _has_a_model(path: Path) -> bool:
    """Whether a folder may be a run, a checkpoint, an export or published files."""
    return any((path / name).exists() for name in (*OF_A_RUN, CONFIG, WEIGHTS)) or any(path.glob("*.pth"))
