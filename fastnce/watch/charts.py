"""The curves of a report: which there are, in which order, under which names, and their numbers for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluate.quality import KEYS
from ..methods.contract import COLUMNS
from .series import HELD_OUT, Curve, Metrics

SPANS = 400
"""The most spans of a curve in a page."""
ALL_SPANS = 24_000
"""The most spans of all curves of a page."""
FEWEST = 16
TITLES = {
    "lr": "Learning rate",
    "images_per_second": "Images per second",
    "data_share": "Share of the time spent on data",
    "skipped_steps": "Steps in a row that were not finite",
    "warnings": "Open warnings",
    "temperature": "Learned temperature",
    "response": "Response of the output to the input",
    "identity_psnr": "Identity of pictures of B (dB)",
    "held_out_psnr_y": "PSNR on Y (dB)",
    "held_out_ssim_y": "SSIM on Y",
    "held_out_psnr_rgb": "PSNR on RGB (dB)",
    "held_out_ssim_rgb": "SSIM on RGB",
    "held_out_fid": "FID",
    "held_out_kid": "KID",
    "held_out_frechet_lite0": "Fréchet distance on EfficientNet-Lite0 features",
    "held_out_kernel_lite0": "Kernel distance on EfficientNet-Lite0 features",
}
AXES = ("step", "epoch", "pictures")
SPEED = ("images_per_second", "lr", "data_share", "response", "identity_psnr", "skipped_steps", "warnings")
SMOOTHED = ("images_per_second", "data_share", "response", "identity_psnr")
"""Of `SPEED`; losses are smoothed too."""
QUIET = ("skipped_steps", "warnings")
"""Not shown as long as they are 0."""
NO_MEASURE = ("held_out_seconds", "held_out_pairs")


def title_of(name: str) -> str:
    """The title of a curve's chart."""
    return TITLES.get(name, name.removeprefix(HELD_OUT))


def groups(runs: Sequence[Metrics]) -> dict[str, list[str]]:
    """The names of the curves of all runs: "validation", "losses" and "speed"."""
    names = list(dict.fromkeys(name for run in runs for name, curve in run.curves.items() if len(curve)))
    held_out = [name for name in names if name.startswith(HELD_OUT) and name not in NO_MEASURE]
    held_out.sort(key=lambda name: KEYS.index(short) if (short := name.removeprefix(HELD_OUT)) in KEYS else -1)
    losses = [name for name in names if name not in COLUMNS and not name.startswith(HELD_OUT)]
    speed = [name for name in SPEED if name in names and not (name in QUIET and _always_0(runs, name))]
    return {"validation": held_out, "losses": losses, "speed": speed}


def _always_0(runs: Sequence[Metrics], name: str) -> bool:
    curves = [run.curves[name] for run in runs if name in run.curves]
    return not any(curve.high.any() or curve.low.any() for curve in curves)


def numbers(runs: Sequence[Metrics], names: Sequence[str]) -> list[dict[str, Any]]:
    """The curves of these names for the page, per run.

    Returns:
        per run {"curves": {name: {"x": steps, "y": means, "low": ..., "high": ..., "bad": count, "newest": value}},
        "axes": {"epoch": [steps, values], "pictures": [steps, values]}}. "low" and "high" are left out where they equal
        "y"; "newest" is the value of the last line, None if it is not finite.
    """
    limit = max(FEWEST, min(SPANS, ALL_SPANS // max(1, len(names) * len(runs))))
    found = []
    for run in runs:
        curves = {
            name: _packed(run.curves[name].thinned(limit)) | {"newest": _short(np.array([run.newest[name]]))[0]}
            for name in names
            if name in run.curves
        }
        found.append({"curves": curves, "axes": {"epoch": epochs(run), "pictures": pictures(run)}})
    return found


def _packed(curve: Curve) -> dict[str, Any]:
    mean = curve.mean
    packed: dict[str, Any] = {"x": curve.last.tolist(), "y": _short(mean)}
    if (curve.count > 1).any():
        packed |= {"low": _short(curve.low), "high": _short(curve.high)}
    if curve.not_finite:
        packed["bad"] = curve.not_finite
    return packed


def _short(values: np.ndarray) -> list[float | None]:
    """The numbers with six digits. Sums of finite numbers can be infinite: those become None."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def pictures(run: Metrics) -> list[list[float]] | None:
    """Knots (steps, pictures seen); None if the run did not log them."""
    curve = run.curves.get("pictures")
    if curve is None or not len(curve):
        return None
    curve = curve.thinned(100)
    return [[0, *curve.last.tolist()], [0.0, *curve.high.tolist()]]


def epochs(run: Metrics) -> list[list[float]] | None:
    """Knots (steps, epochs done); None if the run did not log them. Older runs count epochs from 0."""
    curve = run.curves.get("epoch")
    if curve is None or not len(curve):
        return None
    curve = curve.thinned(200)
    numbers = curve.low - curve.low.min() if curve.low.min() < 1 else curve.low - 1
    new = np.flatnonzero(np.diff(numbers)) + 1  # an epoch begins after the last line of the one before
    steps, done = [0.0, *curve.last[new - 1].astype(float).tolist()], [0.0, *numbers[new].tolist()]
    end = float(curve.last[-1])
    if end > steps[-1]:  # within the last epoch: as fast as the epochs before
        pace = done[-1] / steps[-1] if done[-1] > 0 else 1 / end
        now = min(done[-1] + 1, done[-1] + pace * (end - steps[-1]))
        steps, done = [*steps, end], [*done, max(now, float(numbers[-1]))]
    return [steps, done]
