"""The trained models that come with the package, each in a folder of its name beside this file.

    NAME/{config.json, model.safetensors, README.md}

These are the files of `fastnce export --format safetensors`. config.json also has "about": what the model does, what it
was trained on, and its licence. README.md is the model card, with the measured figures.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    """The names of the models that come with the package, which `fastnce.load` takes, in order."""
    return sorted(file.parent.name for file in _HERE.glob("*/config.json"))


def folder(name: str) -> Path:
    """The folder of a model that comes with the package: weights, config.json, and README.md with its figures.

    Args:
        name: one of `names()`.

    Raises:
        ValueError: there is no model of this name.
    """
    if name not in names():
        raise ValueError(f"no model {name!r} comes with fastnce: it has {', '.join(names())}")
    return _HERE / name
