"""Held-out pairs during training: PSNR and SSIM over steps, as `fastnce evaluate` counts them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import DataError
from ..evaluate.quality import KEYS, DerainingMetrics
from ..methods.base import Method
from .distributed import Ranks

if TYPE_CHECKING:
    from ..evaluate.pairs import Pair

MEASURE = "psnr_y"
"""Decides which checkpoint is the best."""


def find_validation(data: str, validate: str, limit: int = 0, rain_side: str = "right") -> list[Pair]:
    """The pairs that a run is validated on.

    Args:
        data: the run's data folder, whose subfolder `test` is tried where `validate` is empty.
        validate: a folder of pairs in any layout that `fastnce evaluate` knows.
        limit: at most so many, spread evenly over the set; 0 takes all.
        rain_side: the half of strips that is rainy, "right" or "left".

    Returns:
        pairs in the order of their names; none where `validate` is empty and DIR/test does not pair.

    Raises:
        DataError: `validate` names a folder that does not pair.
    """
    from ..evaluate.pairs import check_rain_side, find_pairs

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
    """Translates pairs by a method's first generator (A to B) and measures them; remembers the best value.

    Pictures are whole, at their own size, in float32; every rank takes its share of them.

    Args:
        pairs: as `find_validation` gives.
        channels: of the method's pictures, 1 or 3.
        device: where the generator computes.
        ranks: the processes that share the work.
    """

    def __init__(self, pairs: Sequence[Pair], channels: int, device: torch.device, ranks: Ranks | None = None):
        if pairs and channels not in (1, 3):
            raise ValueError(f"run.validate_every measures pictures of 1 or 3 channels, not {channels}: set it to 0")
        self.pairs, self.channels, self.device = list(pairs), channels, device
        self.ranks = ranks or Ranks()
        self.inputs: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.best = float("-inf")

    def digest(self) -> str:
        """Of the pairs' names and sizes in bytes: values on other pictures are not comparable."""
        listing = [(p.name, p.rainy.stat().st_size, p.clean.stat().st_size) for p in self.pairs]
        return hashlib.sha256(json.dumps([self.channels, listing]).encode()).hexdigest()

    def measure_inputs(self) -> str:
        """Measure the rainy pictures themselves, and say so in a sentence."""
        self.inputs = self._measure(None)
        where = self.pairs[0].rainy.parent
        return (
            f"held out: {len(self.pairs)} pairs, {where} among them; the inputs have {self.inputs['psnr_y']:.2f} dB / "
            f"{self.inputs['ssim_y']:.4f} on Y"
        )

    def measure(self, method: Method) -> bool:
        """Measure the method as it stands; whether it is better than ever before.

        The method is left in evaluation mode.
        """
        from ..inference import Translator  # which reads configurations, which name the engine's options

        began = time.monotonic()
        method.eval()
        generator = next(net for name, net in method.networks().items() if name.startswith("G"))
        self.latest = self._measure(Translator(generator, self.device))
        self.latest["seconds"] = time.monotonic() - began
        better = self.latest[MEASURE] > self.best
        if better:
            self.best = self.latest[MEASURE]
        return better

    def _measure(self, translate: Any) -> dict[str, float]:
        metrics = DerainingMetrics()
        sums = torch.zeros(len(KEYS), dtype=torch.float64)
        for pair in self.pairs[self.ranks.rank :: self.ranks.world]:
            rainy, clean = (picture[None] for picture in pair.load(self.channels))
            (row,) = metrics.update(rainy if translate is None else translate(rainy), clean)
            sums += torch.tensor([row[key] for key in KEYS], dtype=torch.float64)
        total: Tensor = sums if self.ranks.world == 1 else self.ranks.mean(sums.to(self.device)) * self.ranks.world
        return dict(zip(KEYS, (total / len(self.pairs)).tolist(), strict=True))

    def metrics(self) -> dict[str, float]:
        """The latest values for metrics.jsonl and TensorBoard, as held_out_psnr_y and so on."""
        return {f"held_out_{key}": value for key, value in self.latest.items()}

    def short(self) -> str:
        """The latest values for the progress line; empty before the first."""
        if not self.latest:
            return ""
        gain = self.latest[MEASURE] - self.inputs[MEASURE]
        return f"held out {self.latest[MEASURE]:.2f} dB ({gain:+.2f}) / {self.latest['ssim_y']:.4f}"

    def state(self) -> dict[str, Any]:
        """What is written beside a checkpoint that was just measured."""
        return {"pairs": self.digest(), **{key: self.latest[key] for key in KEYS}}

    def resume(self, stored: dict[str, Any] | None) -> str:
        """Take over the best checkpoint's `state`; returns a sentence where its value does not count any more."""
        if stored is None:
            return ""
        if stored["pairs"] != self.digest():
            return "the best checkpoint was measured on other pictures: a new best is looked for"
        self.best = stored[MEASURE]
        return ""
