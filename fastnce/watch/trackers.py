"""The trackers that `run.track` names."""

from __future__ import annotations

from collections.abc import Callable

from ..engine.checks import track_names
from .mlflow import MLflowTracker
from .tensorboard import TensorBoardTracker
from .tracking import Tracker
from .trackio import TrackioTracker
from .wandb import WandbTracker

_CLASSES = {one.name: one for one in (TensorBoardTracker, WandbTracker, TrackioTracker, MLflowTracker)}


def make_trackers(track: str, say: Callable[[str], None] = lambda sentence: None) -> list[Tracker]:
    """Make the callbacks for `run.track`. Their libraries are imported when the run begins.

    Args:
        track: names, separated by commas; may be empty.
        say: receives a sentence for the user.

    Raises:
        ValueError: a name is unknown.
    """
    return [_CLASSES[name](say) for name in track_names(track)]
