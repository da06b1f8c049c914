"""What a run shows of its progress: lines and metrics, warnings, held-out pairs and sample grids.

Nothing here changes training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Batch
from ..nce.temperature import learned_temperatures
from .busy import BusyWatch
from .callbacks import RunInfo
from .contracts import DataSet
from .distributed import Ranks
from .grid import save_grid
from .log import Pace, RunLog, SilentLog, clock
from .machine import machine, versions
from .monitor import Monitor
from .options import RunOptions
from .progress import Progress
from .samples import padded, translated
from .step import Step
from .trained import count_parameters
from .validate import Validation


class Observer:
    """Reads a run between two steps, and writes to its log and its folder.

    Args:
        step: the step, with its method.
        data: gives the sample images.
        run: how many samples to take.
        folder: the run's.
        log: receives every line; silent on all ranks but the first.
        ranks: the processes that share the run.
        validation: held-out pairs, if the run has any.
    """

    def __init__(
        self,
        step: Step,
        data: DataSet,
        run: RunOptions,
        folder: Path,
        log: RunLog | SilentLog,
        ranks: Ranks,
        validation: Validation | None,
    ):
        self.step, self.method, self.data = step, step.method, data
        self.run, self.folder, self.log, self.ranks, self.validation = run, folder, log, ranks, validation
        self.monitor = Monitor(self.method.discriminator_losses(), self.method.identity_losses())
        self.validated_at = -1
        """The step after which the held-out pairs were last measured."""
        self._samples: Batch | None = None
        self._announced = 0
        self._busy = BusyWatch(step.bad_steps.device.type == "cpu")

    def begin(self, config: dict[str, Any], done: int, total: int, batch: int) -> None:
        """Tell the log and the callbacks that the run begins, or continues after `done` steps.

        Args:
            total: steps after which the run ends.
            batch: images of each domain per step.
        """
        self._announced = done
        device = next(self.method.parameters()).device
        numbers = count_parameters(self.method)
        info = RunInfo(self.folder, config, done, total, str(device), numbers, machine(device), versions())
        known = {"command": sys.argv, "ranks": self.ranks.world, "parameters": numbers}
        self.log.begin(info, batch, self.run.save_every, **known)
        self.log.callbacks.begin(info)

    def announce(self, saved_at: int, best_at: int) -> None:
        """Tell the callbacks of a checkpoint, once it is on the disk.

        Args:
            saved_at, best_at: the steps of the newest checkpoint and of the best one.
        """
        if saved_at > self._announced:
            self._announced = saved_at
            folder = self.folder / "checkpoints" / f"step-{saved_at:08d}"
            self.log.callbacks.saved(saved_at, folder, best_at == saved_at)

    def samples(self) -> Batch:
        """The images of sample grids and of the monitor, padded to sides that the generators take."""
        if self._samples is None:
            self._samples = padded(self.method, *self.data.samples(max(self.run.samples, 2)))
        return self._samples

    def report(
        self, done: int, total: int, progress: Progress, learning_rate: float, losses: dict[str, Tensor], pace: Pace
    ) -> float:
        """Write a progress line and its metrics; returns the length of the open row of bad steps.

        Args:
            done: steps up to now.
            total: steps after which the run ends.
            losses: of the last step, on the device; every rank takes part in their mean. Learned temperatures, as they
                are after the step, are logged with them, and are read back in the same copy.
            pace: of the steps since the last line.
        """
        losses = {**losses, **learned_temperatures(self.method.projectors())}
        names = list(losses)
        stacked = torch.stack([losses[name].float() for name in names] + [self.step.bad_steps.float()])
        *values, bad = self.ranks.mean(stacked).tolist()
        found = pace.read(progress.batch, total - done)
        if self.ranks.first and (advice := self._busy.look(found["data_share"])):
            self.log.warn(advice)
        epoch = progress.epoch(done - 1)
        line = (
            f"epoch {epoch + 1}/{progress.epochs} step {done:,}/{total:,} | {found['images_per_second']:.2f} images/s, "
            f"data {found['data_share']:.0%}, ETA {clock(found['seconds_left'])} | "
            + " ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True))
            + (f" | {bad:.0f} steps in a row not finite: none was applied" if bad else "")
        )
        logged = dict(zip(names, values, strict=True))
        for sentence in self.monitor.judge(logged):
            self.log.warn(sentence)
        for words in (self.validation.short() if self.validation else "", self.monitor.short()):
            line += f" | {words}" if words else ""
        self.log.progress(line, f"epoch {epoch + 1}/{progress.epochs} ", line.split(" | ", 2)[2])
        self.log.metrics(
            done,
            logged
            | self.monitor.metrics()
            | {"epoch": epoch + 1, "pictures": progress.seen(done), "lr": learning_rate, "skipped_steps": bad}
            | {key: found[key] for key in ("images_per_second", "data_share")},
        )
        return bad

    def monitor_samples(self) -> None:
        """Let the monitor translate the samples, and say what it finds."""
        if self.monitor.pictures is None:
            self.monitor.pictures = self.samples()
        for sentence in self.monitor.look(self.method):
            self.log.warn(sentence)
        self.method.train()

    def save_samples(self, done: int) -> None:
        """Write a sample grid; a disk that does not take it is a line in the log."""
        samples = Batch(*(column[: self.run.samples] for column in self.samples()))
        self.method.eval()
        with torch.no_grad(), self.step.averaged():
            pictures = translated(self.method, samples)
        self.method.train()
        path = self.folder / "samples" / f"step-{done:08d}.png"
        try:
            save_grid(pictures, path)
        except OSError as error:
            self.log.warn(f"{path}: no sample grid ({error.strerror or error}); training goes on")
        self.log.callbacks.samples(done, pictures)

    def measure_inputs(self, validation: Validation) -> None:
        """Measure the inputs of the held-out pairs, for comparison."""
        inputs = validation.measure_inputs()
        for sentence in validation.take_messages():
            self.log.warn(sentence)
        self.log.say(inputs)

    def measure_start(self, validation: Validation) -> None:
        """Measure a run with `run.start_from` before its first step. No checkpoint holds these weights."""
        with self.step.averaged():
            validation.measure(self.method)
        self.method.train()
        for sentence in validation.take_messages():
            self.log.warn(sentence)
        self.log.say(f"before the first step: {validation.short()}")
        validation.best, validation.latest = float("-inf"), {}

    def validate(self, validation: Validation, done: int, images: int) -> bool:
        """Measure the held-out pairs; returns whether the method is better than ever before.

        Every rank measures its share, so all of them agree.

        Args:
            done: steps up to now.
            images: of each domain that the run has seen.
        """
        with self.step.averaged():
            better = validation.measure(self.method)
        self.method.train()
        self.validated_at = done
        for sentence in validation.take_messages():
            self.log.warn(sentence)
        self.log.metrics(done, {"pictures": images} | validation.metrics())
        self.log.say(f"step {done:,}: {validation.short()}{', the best so far' if better else ''}")
        return better
