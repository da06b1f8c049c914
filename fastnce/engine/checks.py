"""Check the options of a run before anything is written."""

from __future__ import annotations

import importlib.util

import torch

from ..common.options import check
from ..methods.base import Method
from .accumulate import check_parts
from .cudagraph import pick_graph
from .options import OptimOptions, RunOptions
from .recompute import blocks_of


def check_run(method: Method, optim: OptimOptions, run: RunOptions, device: torch.device) -> None:
    """Refuse options that are out of range, or that this method or device cannot follow; ValueError names one."""
    check(optim, "optim")
    check(run, "run")
    if run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("run.tensorboard needs TensorBoard: pip install 'fastnce[tensorboard]'")
    check_parts(method, optim.accumulate)
    pick_graph(run.graph, device)
    if run.checkpoint_activations:
        blocks_of(method)
