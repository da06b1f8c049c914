"""The papers, by the name that `fastnce train` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .base import Batch, Draws, Group, Method, NetworkOptions, Phase
from .cut import CUT, CUTOptions


@dataclass(frozen=True)
class Preset:
    """A paper's published defaults: its class, its options, and what it changes in the other sections."""

    method: Callable[[Any, NetworkOptions], Method]
    options: Callable[[], Any]
    paper: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)


PRESETS = {
    "cut": Preset(
        CUT,
        CUTOptions,
        "Park et al., Contrastive Learning for Unpaired Image-to-Image Translation, ECCV 2020",
        {"optim": {"n_epochs": 200, "n_epochs_decay": 200}},
    ),
    "fastcut": Preset(
        CUT,
        CUTOptions.fastcut,
        "Park et al., Contrastive Learning for Unpaired Image-to-Image Translation, ECCV 2020",
        {"optim": {"n_epochs": 150, "n_epochs_decay": 50}},
    ),
}

__all__ = ["CUT", "PRESETS", "Batch", "CUTOptions", "Draws", "Group", "Method", "NetworkOptions", "Phase", "Preset"]
