"""Measure held-out images during training, as `fastnce evaluate` does, and find the best checkpoint."""

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

from ..common.imports import CodeError
from ..common.messages import counted
from ..data import DataError, load_image
from ..evaluate.metrics import PSNR_Y, Metric, measured
from ..evaluate.networks import Networks
from ..evaluate.pairs import Pair
from ..evaluate.quality import KEYS, DerainingMetrics
from ..methods.base import Method
from ..methods.translation import translation_of
from .distributed import Ranks
from .held_out import Lone, sizes_of

Translate = Callable[[Tensor], Tensor]
"""Images (images, channels, height, width) in [-1, 1] to as many of the same size."""


class Validation:
    """Translates held-out images with a method's first generator (A to B), measures them and keeps the best value.

    Images are whole, at their own size, in float32. Every rank translates its share of them; the first rank computes
    FID and other distances of sets from the features of all.

    Args:
        pairs: as `find_validation` returns; or the images of testA as `find_unpaired` returns, all without truth.
        channels: of the method's images, 1 or 3.
        device: where the generator computes.
        translator: makes a function that translates images from a generator and the device, such as
            `fastnce.translate.Translator`.
        ranks: the processes that share the work.
        skip_bad: leave out an image that cannot be read.
        metric: decides which checkpoint is the best.
        more: are measured as well.
        networks: those of the measures that compare sets.
        reference: the files that these compare with; empty: the truths of the pairs.

    Raises:
        ValueError: the channels cannot be measured, or a distance of sets has too few images.
    """

    def __init__(
        self,
        pairs: Sequence[Pair | Lone],
        channels: int,
        device: torch.device,
        translator: Callable[[nn.Module, torch.device], Translate],
        ranks: Ranks | None = None,
        skip_bad: bool = False,
        metric: Metric = PSNR_Y,
        more: Sequence[Metric] = (),
        networks: Networks | None = None,
        reference: Sequence[Path] = (),
        truth_channels: int | None = None,
    ):
        self.pairs, self.channels, self.device = list(pairs), channels, device
        self.truth_channels = truth_channels or channels
        if pairs and (wrong := {channels, self.truth_channels} - {1, 3}):
            raise ValueError(f"run.validate_every measures pictures of 1 or 3 channels, not {wrong.pop()}: set it to 0")
        self.translator, self.ranks, self.skip_bad = translator, ranks or Ranks(), skip_bad
        self.metric, self.networks, self.reference = metric, networks or Networks(), list(reference)
        self.paired = not any(isinstance(item, Lone) for item in self.pairs)
        named = {each.name: each for each in (metric, *more)}
        self.functions = [each for each in named.values() if each.measure is not None]
        self.sets = [each for each in named.values() if each.needs == "sets"]
        if self.sets:
            self.networks.check_counts(len(self.pairs), len(self.pairs) if self.paired else len(self.reference))
        self.columns = [*(KEYS if self.paired else ()), *(each.name for each in self.functions)]
        """The means over single images."""
        self.sizes = {item.name: sizes_of(item) for item in self.pairs}
        self.reference_sizes = [file.stat().st_size for file in self.reference]
        self.inputs: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.best = float("-inf")
        self.messages: list[str] = []
        """About images that are left out and measures that fail; `take_messages` returns and clears them."""
        self._reported = False
        self._reference_features: Tensor | None = None

    def digest(self) -> str:
        """The digest of the images' names and sizes in bytes. Values with another digest are not comparable."""
        listing: list[Any] = [(item.name, *self.sizes[item.name]) for item in self.pairs]
        if self.reference:
            files = [file.name for file in self.reference]
            listing.append(list(zip(files, self.reference_sizes, strict=True)))
        known = [*dict.fromkeys((self.channels, self.truth_channels)), listing]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def measure_inputs(self) -> str:
        """Measure the inputs themselves; returns a message."""
        self.inputs = self._measure(None)
        if isinstance(first := self.pairs[0], Lone):
            found = ", ".join(f"{name} {value:.4g}" for name, value in self.inputs.items()) or "no value"
            what = f"{counted(len(self.pairs), 'picture')} of {first.domain}"
            other = "testA" if first.domain == "testB" else "testB"
            what += f", and {len(self.reference)} of {other}" if self.sets else ""
        else:
            what = f"{counted(len(self.pairs), 'pair')}, {first.rainy.parent} among them"
            others = "".join(f", {each.name} {self.inputs[each.name]:.4g}" for each in self._shown(self.inputs))
            found = f"{self.inputs['psnr_y']:.2f} dB / {self.inputs['ssim_y']:.4f} on Y{others}"
        return f"held out: {what}; the inputs have {found}"

    def measure(self, method: Method) -> bool:
        """Measure the method; returns whether it is better than ever before.

        A value of `run.best` that is missing or not finite is never the best. The method is left in evaluation mode.
        """
        if not (self.paired or self.functions or self.sets):  # all of them have failed
            self.latest = {"seconds": 0.0}
            return False
        began = time.monotonic()
        method.eval()
        generator = translation_of(method)
        self.latest = self._measure(self.translator(generator, self.device))
        self.latest["seconds"] = time.monotonic() - began
        if self.metric.name not in self.latest:
            return False
        value = self.latest[self.metric.name] * (1 if self.metric.higher_is_better else -1)
        better = value > self.best and self._counts(value)
        if better:
            self.best = value
        return better

    def _measure(self, translate: Translate | None) -> dict[str, float]:
        """The means over the images, then the distances of sets.

        If an image cannot be read and `skip_bad` is off, DataError on every rank.
        """
        quality, columns = DerainingMetrics(), list(self.columns)
        channels = self.truth_channels if translate is None else self.channels
        width = self.networks.width if self.sets else 0
        # the columns, the features, and 1 where an image was read
        table = torch.zeros(len(self.pairs), len(columns) + width + 1, dtype=torch.float64)
        reasons: dict[int, str] = {}
        failures: dict[str, str] = {}
        with self.ranks.together(self.device):
            for place in range(self.ranks.rank, len(self.pairs), self.ranks.world):
                try:
                    picture, truth = self.pairs[place].load(channels, self.truth_channels)
                except DataError as error:
                    if not self.skip_bad:
                        raise
                    reasons[place] = str(error)
                    continue
                output = picture[None] if translate is None else translate(picture[None])
                row = self._row(quality, output, None if truth is None else truth[None], failures)
                table[place, : len(columns)] = torch.tensor([row.get(key, 0.0) for key in columns], dtype=torch.float64)
                if self.sets:
                    table[place, len(columns) : -1] = self.networks.features(output, self._names(), failures)
                table[place, -1] = 1.0
        if self.ranks.world > 1:
            table = (self.ranks.mean(table.to(self.device)) * self.ranks.world).cpu()
        self._stop_failing(failures)
        self._report_not_finite(columns, table)
        read = table[:, -1] > 0.5
        if not read.all():
            self._leave_out(read.tolist(), reasons)
        means = dict(zip(columns, table[read, : len(columns)].mean(dim=0).tolist(), strict=True))
        found = {key: means[key] for key in self.columns}
        return found | self._of_sets(table[read, len(columns) : -1])

    def _row(
        self, quality: DerainingMetrics, output: Tensor, truth: Tensor | None, failures: dict[str, str]
    ) -> dict[str, float]:
        """The measures of one image; a measure that fails is left out, and its reason is added to `failures`."""
        row = {}
        if truth is not None:
            (row,) = quality.update(output, truth)
        for metric in self.functions:
            if metric.name not in failures:
                try:
                    row = row | {metric.name: measured(metric, output, truth)}
                except CodeError as error:
                    failures[metric.name] = str(error)
        return row

    def _stop_failing(self, failures: dict[str, str]) -> None:
        """Give up the measures that failed, on any rank, and say so."""
        able = [*self.functions, *self.sets]
        if not able:
            return
        failed = self.ranks.most([float(each.name in failures) for each in able], self.device)
        gone = [each for each, one in zip(able, failed, strict=True) if one]
        for metric in gone:
            why = failures.get(metric.name, f"{metric.name} fails on another rank")
            if metric.name == self.metric.name:
                after = "from now on no best checkpoint is looked for, the one before stays; training goes on"
                self.messages.append(f"run.best: {why}: {after}")
            else:
                self.messages.append(f"run.metrics: {why}: it is not measured any more; training goes on")
        self.functions = [each for each in self.functions if each not in gone]
        self.sets = [each for each in self.sets if each not in gone]
        names = {each.name for each in gone}
        self.columns = [name for name in self.columns if name not in names]

    def _of_sets(self, features: Tensor) -> dict[str, float]:
        """The distances of these features: computed by the first rank, so that all ranks have the same number."""
        if not self.sets:
            return {}
        failures: dict[str, str] = {}
        if self._reference_features is None:
            self._reference_features = self._measure_reference(failures)
        measured: dict[str, float] = {}
        if self.ranks.first:
            measured = self.networks.distances(features, self._reference_features, self._names(), failures)
        values = torch.tensor([measured.get(name, 0.0) for name in self._names()], dtype=torch.float64)
        if self.ranks.world > 1:
            values = (self.ranks.mean(values.to(self.device)) * self.ranks.world).cpu()
        found = dict(zip(self._names(), values.tolist(), strict=True))
        self._stop_failing(failures)
        for name in found:
            self._not_finite(name, found[name], "these pictures")
        return {each.name: found[each.name] for each in self.sets}

    def _names(self) -> list[str]:
        return [each.name for each in self.sets]

    def _measure_reference(self, failures: dict[str, str]) -> Tensor:
        """The features of the truths, or of the reference, (images, features). They are computed once."""
        pairs = [item for item in self.pairs if isinstance(item, Pair)]
        count = len(pairs) or len(self.reference)
        table = torch.zeros(count, self.networks.width + 1, dtype=torch.float64)
        with self.ranks.together(self.device):
            for place in range(self.ranks.rank, count, self.ranks.world):
                try:
                    truth = pairs[place].load(self.truth_channels)[1] if pairs else None
                    picture = load_image(self.reference[place], self.truth_channels) if truth is None else truth
                except DataError as error:
                    if not self.skip_bad:
                        raise
                    self.messages.append(f"left out of the reference: {error}")
                    continue
                table[place, :-1] = self.networks.features(picture[None], self._names(), failures)
                table[place, -1] = 1.0
        if self.ranks.world > 1:
            table = (self.ranks.mean(table.to(self.device)) * self.ranks.world).cpu()
        return table[table[:, -1] > 0.5, :-1]

    def _counts(self, value: float) -> bool:
        """Whether a value may be the best. An infinite PSNR may, because the images are equal."""
        return self.metric.name in KEYS or math.isfinite(value)

    def _report_not_finite(self, columns: list[str], table: Tensor) -> None:
        """Add a message about the first image whose value of the metric is not finite, once per run."""
        if self.metric.measure is None or self.metric.name not in self.columns:
            return
        values = table[:, columns.index(self.metric.name)].tolist()
        for item, value in zip(self.pairs, values, strict=True):
            self._not_finite(self.metric.name, value, item.name)

    def _not_finite(self, name: str, value: float, where: str) -> None:
        if name == self.metric.name and not math.isfinite(value) and not self._reported:
            self._reported = True
            what = "not a number" if math.isnan(value) else "infinite"
            self.messages.append(f"run.best: {name} is {what} on {where}: a mean that is not finite is never the best")

    def _leave_out(self, read: list[bool], reasons: dict[int, str]) -> None:
        lost = [place for place, one in enumerate(read) if not one]
        what = "pair" if self.paired else "picture"
        if len(lost) == len(read):
            first = self.pairs[0]
            example = first.file if isinstance(first, Lone) else first.rainy
            raise DataError(f"none of the {len(read)} held-out {what}s can be read, such as {example}")
        for place in lost:
            reason = reasons.get(place, "another rank cannot read it")
            self.messages.append(f"the held-out {what} {self.pairs[place].name} is left out from now on: {reason}")
        self.pairs = [item for item, one in zip(self.pairs, read, strict=True) if one]
        if self.paired and self._reference_features is not None:
            self._reference_features = self._reference_features[torch.tensor(read)]
        if self.inputs:  # measured on all images
            self.messages.append(f"a new best checkpoint is looked for, on the {what}s that are left")
            self.best = float("-inf")
            self.inputs = self._measure(None)

    def take_messages(self) -> list[str]:
        """Return the sentences for the log since the last call."""
        messages, self.messages = self.messages, []
        return messages

    def metrics(self) -> dict[str, float]:
        """The latest values for metrics.jsonl and the trackers, as held_out_psnr_y and so on."""
        return {f"held_out_{key}": value for key, value in self.latest.items()}

    def _shown(self, values: dict[str, float]) -> list[Metric]:
        """The measures beside PSNR and SSIM on Y that a line shows."""
        named = {each.name: each for each in (self.metric, *self.functions, *self.sets)}
        return [each for name, each in named.items() if name in values and name not in ("psnr_y", "ssim_y")]

    def short(self) -> str:
        """The latest values for the progress line; empty before the first."""
        if not self.latest:
            return ""
        if self.paired:
            gain = self.latest["psnr_y"] - self.inputs["psnr_y"]
            parts = [f"{self.latest['psnr_y']:.2f} dB ({gain:+.2f}) / {self.latest['ssim_y']:.4f} on Y"]
            parts += [f"{each.name} {self.latest[each.name]:.4g}" for each in self._shown(self.latest)]
        else:
            parts = [
                f"{each.name} {self.latest[each.name]:.4g}"
                + (f" (inputs {self.inputs[each.name]:.4g})" if each.name in self.inputs else "")
                for each in self._shown(self.latest)
            ]
        return f"held out {', '.join(parts) or 'nothing is measured any more'}"

    def state(self) -> dict[str, Any]:
        """What is written beside a checkpoint that was just measured."""
        path = {"run.best": self.metric.path} if self.metric.path else {}
        values = {key: value for key, value in self.latest.items() if key != "seconds"}
        return {"pairs": self.digest(), **path, **(values or self.latest)}  # a state needs a number

    def resume(self, stored: dict[str, Any] | None) -> str:
        """Take over the value of the best checkpoint's `state`; returns a message if it is not comparable."""
        if stored is None:
            return ""
        if stored["pairs"] != self.digest():
            return "the best checkpoint was measured on other pictures: a new best is looked for"
        if self.metric.name not in stored:
            return f"the best checkpoint was not measured by {self.metric.name}: a new best is looked for"
        # older checkpoints call it run.metric, or have no path
        path = self.metric.path and stored.get("run.best", stored.get("run.metric", self.metric.path))
        if path != self.metric.path:
            return f"the best checkpoint was measured by {path}, not {self.metric.path}: a new best is looked for"
        if not self._counts(stored[self.metric.name]):
            return f"the best checkpoint's {self.metric.name} is not finite: a new best is looked for"
        self.best = stored[self.metric.name] * (1 if self.metric.higher_is_better else -1)
        return ""
