"""Measure held-out pairs during training: PSNR and SSIM, computed as in `fastnce evaluate`."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import DataError
from ..evaluate.metrics import PSNR_Y, Metric, measured
from ..evaluate.pairs import Pair, check_rain_side, find_pairs
from ..evaluate.quality import KEYS, DerainingMetrics
from ..methods.base import Method
from ..methods.translation import translation_of
from .distributed import Ranks

Translate = Callable[[Tensor], Tensor]
"""Images (images, channels, height, width) in [-1, 1] to as many of the same size."""


def find_validation(data: str, validate: str, limit: int = 0, rain_side: str = "right") -> list[Pair]:
    """Find the held-out pairs of a run.

    Args:
        data: the run's data folder. Its subfolder `test` is tried if `validate` is empty.
        validate: a folder of pairs in any layout that `fastnce evaluate` accepts.
        limit: take at most this many, spread evenly over the set; 0 takes all.
        rain_side: the rainy half of strips, "right" or "left".

    Returns:
        the pairs in the order of their names; none if `validate` is empty and DIR/test has no pairs.

    Raises:
        DataError: `validate` names a folder without pairs.
    """
    check_rain_side(rain_side)
    if validate:
        pairs = find_pairs(validate, rain_side)
    else:
        try:
            pairs = find_pairs(Path(data) / "test", rain_side)
        except DataError:
            return []
    if limit < 0:
        raise ValueError(f"run.validate_pictures must be at least 0, not {limit}")
    if 0 < limit < len(pairs):
        pairs = [pairs[i * len(pairs) // limit] for i in range(limit)]
    return pairs


class Validation:
    """Translates held-out pairs with a method's first generator (A to B), measures them and keeps the best value.

    Images are whole, at their own size, in float32. Every rank measures its share of them.

    Args:
        pairs: as `find_validation` returns.
        channels: of the method's images, 1 or 3.
        device: where the generator computes.
        translator: makes a function that translates images from a generator and the device, such as
            `fastnce.translate.Translator`.
        ranks: the processes that share the work.
        skip_bad: leave out a pair that cannot be read.
        metric: decides which checkpoint is the best.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        channels: int,
        device: torch.device,
        translator: Callable[[nn.Module, torch.device], Translate],
        ranks: Ranks | None = None,
        skip_bad: bool = False,
        metric: Metric = PSNR_Y,
    ):
        if pairs and channels not in (1, 3):
            raise ValueError(f"run.validate_every measures pictures of 1 or 3 channels, not {channels}: set it to 0")
        self.pairs, self.channels, self.device = list(pairs), channels, device
        self.translator, self.ranks, self.skip_bad = translator, ranks or Ranks(), skip_bad
        self.metric = metric
        self.columns = KEYS if metric.name in KEYS else (*KEYS, metric.name)
        self.sizes = {p.name: (p.rainy.stat().st_size, p.clean.stat().st_size) for p in self.pairs}
        self.inputs: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.best = float("-inf")
        self.messages: list[str] = []
        """About pairs that are left out, and a metric that is not finite; `take_messages` returns and clears them."""
        self._reported = False

    def digest(self) -> str:
        """The digest of the pairs' names and sizes in bytes. Values with another digest are not comparable."""
        listing = [(p.name, *self.sizes[p.name]) for p in self.pairs]
        return hashlib.sha256(json.dumps([self.channels, listing]).encode()).hexdigest()

    def measure_inputs(self) -> str:
        """Measure the rainy images themselves; returns a message."""
        self.inputs = self._measure(None)
        where = self.pairs[0].rainy.parent
        return (
            f"held out: {len(self.pairs)} pairs, {where} among them; the inputs have {self.inputs['psnr_y']:.2f} dB / "
            f"{self.inputs['ssim_y']:.4f} on Y"
        )

    def measure(self, method: Method) -> bool:
        """Measure the method; returns whether it is better than ever before.

        A value of `run.metric` that is not finite is never the best. The method is left in evaluation mode.
        """
        began = time.monotonic()
        method.eval()
        generator = translation_of(method)
        self.latest = self._measure(self.translator(generator, self.device))
        self.latest["seconds"] = time.monotonic() - began
        value = self.latest[self.metric.name] * (1 if self.metric.higher_is_better else -1)
        better = value > self.best and self._counts(value)
        if better:
            self.best = value
        return better

    def _measure(self, translate: Translate | None) -> dict[str, float]:
        """The means over the pairs. If one cannot be read and `skip_bad` is off, DataError on every rank."""
        metrics = DerainingMetrics()
        table = torch.zeros(len(self.pairs), len(self.columns) + 1, dtype=torch.float64)  # 1 where a pair was read
        reasons: dict[int, str] = {}
        with self.ranks.together(self.device):
            for place in range(self.ranks.rank, len(self.pairs), self.ranks.world):
                try:
                    rainy, clean = (picture[None] for picture in self.pairs[place].load(self.channels))
                except DataError as error:
                    if not self.skip_bad:
                        raise
                    reasons[place] = str(error)
                    continue
                output = rainy if translate is None else translate(rainy)
                (row,) = metrics.update(output, clean)
                if self.metric.measure is not None:
                    row = row | {self.metric.name: measured(self.metric, output, clean)}
                table[place] = torch.tensor([*(row[key] for key in self.columns), 1.0], dtype=torch.float64)
        if self.ranks.world > 1:
            table = (self.ranks.mean(table.to(self.device)) * self.ranks.world).cpu()
        self._report_not_finite(table)
        read = table[:, -1] > 0.5
        if not read.all():
            self._leave_out(read.tolist(), reasons)
        return dict(zip(self.columns, table[read, :-1].mean(dim=0).tolist(), strict=True))

    def _counts(self, value: float) -> bool:
        """Whether a value may be the best. An infinite PSNR may, because the images are equal."""
        return self.metric.measure is None or math.isfinite(value)

    def _report_not_finite(self, table: Tensor) -> None:
        """Add a message about the first pair whose value of the metric is not finite, once per run."""
        if self.metric.measure is None or self._reported:
            return
        for pair, value in zip(self.pairs, table[:, -2].tolist(), strict=True):
            if not math.isfinite(value):
                self._reported = True
                what = "not a number" if math.isnan(value) else "infinite"
                self.messages.append(
                    f"run.metric: {self.metric.name} is {what} on {pair.name}: a mean that is not finite is never the "
                    f"best"
                )
                return

    def _leave_out(self, read: list[bool], reasons: dict[int, str]) -> None:
        lost = [place for place, one in enumerate(read) if not one]
        if len(lost) == len(read):
            raise DataError(f"none of the {len(read)} held-out pairs can be read, such as {self.pairs[0].rainy}")
        for place in lost:
            reason = reasons.get(place, "another rank cannot read it")
            self.messages.append(f"the held-out pair {self.pairs[place].name} is left out from now on: {reason}")
        self.pairs = [pair for pair, one in zip(self.pairs, read, strict=True) if one]
        if self.inputs:  # measured on all pairs
            self.messages.append("a new best checkpoint is looked for, on the pairs that are left")
            self.best = float("-inf")
            self.inputs = self._measure(None)

    def take_messages(self) -> list[str]:
        """Return the sentences for the log since the last call."""
        messages, self.messages = self.messages, []
        return messages

    def metrics(self) -> dict[str, float]:
        """The latest values for metrics.jsonl and TensorBoard, as held_out_psnr_y and so on."""
        return {f"held_out_{key}": value for key, value in self.latest.items()}

    def short(self) -> str:
        """The latest values for the progress line; empty before the first."""
        if not self.latest:
            return ""
        gain = self.latest["psnr_y"] - self.inputs["psnr_y"]
        own = (
            ""
            if self.metric.name in ("psnr_y", "ssim_y")
            else f", {self.metric.name} {self.latest[self.metric.name]:.4g}"
        )
        return f"held out {self.latest['psnr_y']:.2f} dB ({gain:+.2f}) / {self.latest['ssim_y']:.4f}{own}"

    def state(self) -> dict[str, Any]:
        """What is written beside a checkpoint that was just measured."""
        path = {"run.metric": self.metric.path} if self.metric.path else {}
        return {"pairs": self.digest(), **path, **{key: self.latest[key] for key in self.columns}}

    def resume(self, stored: dict[str, Any] | None) -> str:
        """Take over the value of the best checkpoint's `state`; returns a message if it is not comparable."""
        if stored is None:
            return ""
        if stored["pairs"] != self.digest():
            return "the best checkpoint was measured on other pictures: a new best is looked for"
        if self.metric.name not in stored:
            return f"the best checkpoint was not measured by {self.metric.name}: a new best is looked for"
        path = self.metric.path and stored.get("run.metric", self.metric.path)  # older checkpoints have no path
        if path != self.metric.path:
            return f"the best checkpoint was measured by {path}, not {self.metric.path}: a new best is looked for"
        if not self._counts(stored[self.metric.name]):
            return f"the best checkpoint's {self.metric.name} is not finite: a new best is looked for"
        self.best = stored[self.metric.name] * (1 if self.metric.higher_is_better else -1)
        return ""
