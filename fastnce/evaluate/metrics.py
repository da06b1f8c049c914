"""The metric that decides which checkpoint of a run is the best: by name, or a user's own function.

To add one, write its function here and add it to `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.imports import CodeError, is_import_path, load_object
from .quality import KEYS


class Metric(NamedTuple):
    """A measure of an output compared with its truth.

    name: name of the column in metrics.jsonl.
    measure: (output, truth) -> number, both float32 (1, channels, height, width) in [-1, 1] on the CPU. None for the
        keys of `DerainingMetrics`, which are always measured.
    higher_is_better: the direction. A user's function sets it to False by the attribute `lower_is_better = True`.
    path: as `run.metric` names it, such as mymetrics.py:distance.
    """

    name: str
    measure: Callable[[Tensor, Tensor], Any] | None = None
    higher_is_better: bool = True
    path: str = ""


PSNR_Y = Metric("psnr_y")


def l1(output: Tensor, truth: Tensor) -> float:
    """Return the mean absolute difference, in levels from 0 to 255."""
    return float((output - truth).abs().mean() * 127.5)


l1.lower_is_better = True  # type: ignore[attr-defined]

METRICS: dict[str, Callable[[Tensor, Tensor], Any]] = {"l1": l1}

METRIC_NAMES = (*KEYS, *METRICS)
TAKEN = (*KEYS, "seconds", "pairs")
"""Names that held-out measures already have in metrics.jsonl (as held_out_NAME) or in a checkpoint."""
METRIC_HELP = (
    "metric on held-out pairs that decides which checkpoint is the best: psnr_y, ssim_y, psnr_rgb, ssim_rgb, l1, or "
    "your own (mymetrics.py:distance)"
)


def find_metric(name: str, channels: int = 3) -> Metric:
    """Return the metric of this name.

    Args:
        name: one of `METRIC_NAMES`, or the import path of a function (output, truth) -> number. An instance of
            `nn.Module` is set to evaluation mode.
        channels: of the images that it will measure.

    Raises:
        CodeError: the function cannot be imported, has the name of another measure, or fails on two equal images.
    """
    if name in KEYS:
        return Metric(name)
    function = load_object(name, "run.metric") if is_import_path(name) else METRICS[name]
    if not callable(function):
        raise CodeError(f"run.metric={name} must be a function (output, truth) -> number")
    if isinstance(function, type):
        raise CodeError(f"run.metric={name} must be a function (output, truth) -> number, or an instance of this class")
    column = name.rpartition(":")[2]
    if column in TAKEN:
        raise CodeError(
            f"run.metric={name}: the name {column} is taken by another column of metrics.jsonl: rename the function"
        )
    if isinstance(function, nn.Module):
        function.eval()
    metric = Metric(column, function, not getattr(function, "lower_is_better", False), name)
    measured(metric, *torch.zeros(2, 1, channels, 64, 64))
    return metric


def measured(metric: Metric, output: Tensor, truth: Tensor) -> float:
    """Apply the function of a metric to copies of two images, without gradients, and return the result as a float.

    Raises:
        CodeError: the function fails, or does not return a number.
    """
    assert metric.measure is not None
    try:
        with torch.no_grad():
            # the copies are no inference tensors, and the function may change them
            return float(metric.measure(output.clone(), truth.clone()))
    except (Exception, SystemExit) as error:
        sizes = f"images {tuple(output.shape)}"
        raise CodeError(f"run.metric: {metric.name} fails on two {sizes}: {type(error).__name__}: {error}") from error
