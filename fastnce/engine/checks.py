"""Check the options of a run before anything is written."""

from __future__ import annotations

import importlib.util

import torch

from ..common.messages import brief, nearest
from ..common.options import check
from ..methods.base import Method
from .accumulate import check_parts
from .choices import pick_streams
from .cudagraph import pick_graph
from .options import TRACKERS, OptimOptions, RunOptions
from .recompute import blocks_of


def check_run(method: Method, optim: OptimOptions, run: RunOptions, device: torch.device) -> None:
    """Refuse options that are out of range, or that this method or device cannot follow; ValueError names one."""
    check(optim, "optim")
    check(run, "run")
    check_schedule(optim)
    check_parts(method, optim.accumulate)
    pick_graph(run.graph, device)
    pick_streams(run.streams, device, compiled=False)
    if run.checkpoint_activations:
        blocks_of(method)


def check_schedule(optim: OptimOptions) -> None:
    """ValueError if the options of the schedule contradict each other."""
    epochs = optim.n_epochs + optim.n_epochs_decay
    if epochs < 1:
        raise ValueError("optim.n_epochs=0 and optim.n_epochs_decay=0 leave nothing to train: one must be at least 1")
    if optim.first_epoch > epochs:
        raise ValueError(
            f"optim.first_epoch={optim.first_epoch} is after the last epoch, {epochs:,} (optim.n_epochs and "
            f"n_epochs_decay together): it must be at most that"
        )
    if optim.schedule == "cosine" and optim.n_epochs < 1:
        raise ValueError("optim.schedule=cosine falls over optim.n_epochs=0 epochs: it must be at least 1")


def check_trackers(track: str) -> None:
    """ValueError if a tracker that `run.track` names is unknown or not installed."""
    for name in track_names(track):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name here, such as one that wandb made, has none
            raise ValueError(f"run.track={track} needs {name}, which is not installed: pip install {name}")


def track_names(track: str) -> list[str]:
    """The trackers that `run.track` names, each once.

    Raises:
        ValueError: one is unknown.
    """
    names = [name.strip() for name in track.split(",")] if track.strip() else []
    for name in names:
        if name not in TRACKERS:
            raise ValueError(
                f"run.track={brief(track)}: unknown tracker {brief(name)}{nearest(name, TRACKERS)}; write some of "
                f"{', '.join(TRACKERS)}, separated by commas"
            )
    return list(dict.fromkeys(names))
