"""Trained models that come with the package: `fastnce translate derain PICTURES --out OUT`."""

from .shipped import folder, names

__all__ = ["folder", "names"]
