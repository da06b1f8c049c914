"""The measures of held-out images: by name, through torch-fidelity and pyiqa, or a user's own function.

To add one, write its function here and add it to `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..common.imports import CodeError, first_line, is_import_path, load_object
from . import iqa
from .networks import SETS, Networks, load_networks
from .quality import KEYS


class Metric(NamedTuple):
    """A measure of translated images.

    name: name of the column in metrics.jsonl.
    measure: (output, truth) -> number, or (output) -> number, float32 (1, channels, height, width) in [-1, 1]. None for
        the keys of `DerainingMetrics`, which are always measured on pairs, and for the measures of sets.
    higher_is_better: the direction. A user's function sets it to False by the attribute `lower_is_better = True`.
    path: as `run.best` names a user's own function, such as mymetrics.py:distance.
    needs: "truth" for a measure of pairs, "nothing" for one of single images, "sets" for those of `SETS`.
    """

    name: str
    measure: Callable[..., Any] | None = None
    higher_is_better: bool = True
    path: str = ""
    needs: Literal["truth", "nothing", "sets"] = "truth"


PSNR_Y = Metric("psnr_y")


def l1(output: Tensor, truth: Tensor) -> float:
    """Return the mean absolute difference, in levels from 0 to 255."""
    return float((output - truth).abs().mean() * 127.5)


l1.lower_is_better = True  # type: ignore[attr-defined]

METRICS: dict[str, Callable[[Tensor, Tensor], Any]] = {"l1": l1}
NAMED = (*KEYS, *METRICS, *SETS)
TAKEN = (*NAMED, "seconds", "pairs")
"""Names that held-out measures already have in metrics.jsonl (as held_out_NAME) or in a checkpoint."""
AUTO = "auto"
BEST_HELP = (
    "the measure that decides which checkpoint is the best: psnr_y, ssim_y, psnr_rgb, ssim_rgb, l1, fid, kid, "
    "frechet_lite0, kernel_lite0, one of pyiqa's (lpips, niqe, ...), or your own (mymetrics.py:distance); auto: psnr_y "
    "of pairs, else the first of run.metrics"
)
METRICS_HELP = (
    "further measures at each validation, with commas between them: fid,kid,frechet_lite0,kernel_lite0,lpips,niqe,"
    "mymetrics.py:distance"
)
FEATURE_WEIGHTS_HELP = "file with torch-fidelity's Inception weights, for fid and kid; empty: its own place"


@dataclass
class Measures:
    """What a run measures on held-out images.

    Args:
        best: the measure that `run.best` names; None for "auto".
        more: those of `run.metrics`.
        networks: those of the measures of sets that are named.
    """

    best: Metric | None = None
    more: tuple[Metric, ...] = ()
    networks: Networks = field(default_factory=Networks)

    def deciding(self, paired: bool) -> Metric | None:
        """Return the measure that decides which checkpoint is best; None if nothing can be measured.

        Args:
            paired: whether the held-out images have truths.

        Raises:
            ValueError: a measure needs a truth, and there is none.
        """
        if not paired:
            for key, metric in [("run.best", self.best), *(("run.metrics", each) for each in self.more)]:
                if metric is not None and metric.needs == "truth":
                    raise ValueError(
                        f"{key}={metric.path or metric.name} compares pairs, and testA and testB are none: take fid, "
                        f"kid, kernel_lite0 or a measure of single pictures such as niqe, or name pairs by "
                        f"data.validate"
                    )
        if self.best is not None:
            return self.best
        return PSNR_Y if paired else (self.more[0] if self.more else None)


def find_measures(
    best: str, metrics: str, channels: int = 3, device: torch.device | str = "cpu", weights: str = ""
) -> Measures:
    """Return the measures that `run.best` and `run.metrics` name, with their weights loaded.

    Args:
        best: one name, or "auto".
        metrics: names with commas between them, or "".
        channels: of the images that they will measure.
        device: where networks compute.
        weights: of `Inception`.

    Raises:
        ValueError: as `find_metric` and `load_networks` do; or two measures have the same name.
    """
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    first = None if best == AUTO else find_metric(best, channels, "run.best", device)
    more: list[Metric] = []
    for name in names:
        if first is not None and name == best:
            continue
        metric = find_metric(name, channels, "run.metrics", device)
        if metric.name in {each.name for each in [*more, *([first] if first else [])]}:
            raise ValueError(f"run.metrics={metrics}: two measures have the name {metric.name}: name each one once")
        more.append(metric)
    sets = [metric.name for metric in [*more, *([first] if first else [])] if metric.needs == "sets"]
    return Measures(first, tuple(more), load_networks(sets, device, weights))


def find_metric(name: str, channels: int = 3, key: str = "run.best", device: torch.device | str = "cpu") -> Metric:
    """Return the measure of this name.

    Args:
        name: one of `NAMED`, one of pyiqa's, or the import path of a function (output, truth) -> number. An instance of
            `nn.Module` is set to evaluation mode.
        channels: of the images that it will measure.
        key: the option that holds the name, for messages.
        device: where pyiqa's networks compute. A user's own function gets its images on the CPU.

    Raises:
        ValueError: there is no such measure, or its weights are not available. CodeError: a user's function cannot be
            imported, has the name of another measure, or fails on two equal images.
    """
    if name in KEYS:
        return Metric(name)
    if name in SETS:
        return Metric(name, higher_is_better=False, needs="sets")
    if name not in METRICS and not is_import_path(name):
        measure, paired, higher = iqa.load(name, key, device)
        metric = Metric(name, measure, higher, needs="truth" if paired else "nothing")
        # noise, because measures of natural images are undefined on a constant one
        noise = torch.rand(1, channels, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
        _try(metric, key, noise, noise)
        return metric
    function = load_object(name, key) if is_import_path(name) else METRICS[name]
    if not callable(function):
        raise CodeError(f"{key}={name} must be a function (output, truth) -> number")
    if isinstance(function, type):
        raise CodeError(f"{key}={name} must be a function (output, truth) -> number, or an instance of this class")
    column = name.rpartition(":")[2]
    if column in TAKEN and column != name:
        raise CodeError(
            f"{key}={name}: the name {column} is taken by another column of metrics.jsonl: rename the function"
        )
    if isinstance(function, nn.Module):
        function.eval()
    path = name if is_import_path(name) else ""
    metric = Metric(column, function, not getattr(function, "lower_is_better", False), path)
    _try(metric, key, *torch.zeros(2, 1, channels, 64, 64))
    return metric


def _try(metric: Metric, key: str, output: Tensor, truth: Tensor) -> None:
    try:
        measured(metric, output, truth)
    except CodeError as error:
        raise CodeError(f"{key}: {error}") from error


def measured(metric: Metric, output: Tensor, truth: Tensor | None) -> float:
    """Apply the function of a measure to copies of the images, without gradients, and return the result as a float.

    Raises:
        CodeError: the function fails, or does not return a number.
    """
    assert metric.measure is not None
    pictures: Sequence[Tensor] = (output,) if metric.needs == "nothing" or truth is None else (output, truth)
    try:
        with torch.no_grad():
            # the copies are no inference tensors, and the function may change them
            return float(metric.measure(*(picture.clone() for picture in pictures)))
    except (Exception, SystemExit) as error:
        what = "two images" if len(pictures) == 2 else "an image"
        raise CodeError(f"{metric.name} fails on {what} {tuple(output.shape)}: {first_line(error)}") from error
