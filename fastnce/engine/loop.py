"""The training loop: resume, step, log, validate, save and stop.

The random choices of a step follow from (seed, rank, step) alone, so a run that was interrupted continues bit for bit.
"""

from __future__ import annotations

import random
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import first_use
from ..common.imports import CodeError
from ..methods.base import Batch, Draws, Method
from ..networks.tracing import KEPT, was_traced
from .bad_steps import BadStepCount
from .callbacks import Callbacks
from .checkpoint import Checkpoints
from .checks import check_run
from .choices import pick_compile, pick_precision, pick_streams, set_tf32
from .contracts import DataSet
from .cudagraph import pick_graph
from .distributed import RankLost, Ranks
from .ending import EndOfRun
from .live_check import nothing_to_compare
from .log import Pace, RunLog, SilentLog, clock
from .memory import out_of_memory, too_large
from .observe import Observer
from .options import OptimOptions, RunOptions
from .progress import Progress, check_batch, check_pictures
from .saving import Saving, TrainingFailed
from .schedule import Rate
from .step import Step
from .stop import Stopped, StopRequest
from .validate import Validation

COMPILED_AFTER = 20
"""Steps after which every kind of step (such as FastCUT's mirrored one) has most likely been compiled."""


def train(
    method: Method,
    data: DataSet,
    optim: OptimOptions,
    run: RunOptions,
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    batch_size: int = 1,
    quiet: bool = False,
    ranks: Ranks | None = None,
    validation: Validation | None = None,
    callbacks: Callbacks | None = None,
) -> int:
    """Train until the schedule ends, `run.steps` is reached or a signal asks to stop; returns the steps done.

    Args:
        method: on its device.
        data: gives the batches.
        optim, run: the sections of the configuration.
        folder: of the run. The same call with the same folder continues where it stopped.
        config: stored in every checkpoint, so that translation can rebuild the networks.
        batch_size: images of each domain per step of this rank, for images per second and the place in the epochs.
        quiet: print nothing.
        ranks: the processes that share the run; the first one writes.
        validation: measured every `run.validate_every` steps; it decides which checkpoint `best` names.
        callbacks: watch the run on the first rank.

    Raises:
        TrainingFailed: too many steps in a row were not finite, memory is too small, or the last state could not be
            saved.
        ValueError: the options cannot be followed (raised before anything is written); or the checkpoint in the folder
            belongs to another method or data set, or has another batch size of all ranks while `run.change_batch` is
            off. Its subclass DataError: an image cannot be read.

    If an error is raised between two steps, the state of the complete steps is saved first, if possible.
    """
    ranks = ranks or Ranks()
    check_run(method, optim, run, next(method.parameters()).device)
    if batch_size < 1 or batch_size % optim.accumulate:
        raise ValueError(
            f"batch_size={batch_size} must be at least 1 and a multiple of optim.accumulate={optim.accumulate}"
        )
    if data.steps_per_epoch < 1:
        raise ValueError("there is nothing to train: data.steps_per_epoch must be at least 1")
    with ranks.together(next(method.parameters()).device):
        log = RunLog(folder, quiet, callbacks) if ranks.first else SilentLog()
    log.callbacks.speak(log.warn)
    try:
        with StopRequest(verbose=ranks.first) as stop, first_use.checks(run.check_kernels):
            training = _Run(method, data, optim, run, folder, config or {}, batch_size, log, ranks, validation)
            try:
                return training.go(stop)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise TrainingFailed(too_large(error)) from None
            finally:
                training.step.close()
    except (Exception, Stopped) as error:  # the caller prints it; log.txt needs it too
        user = isinstance(error, ValueError | OSError | TrainingFailed | RankLost | Stopped)
        reason = str(error) if user else f"{type(error).__name__}: {error}"
        log.end_bar()
        log.note(reason)
        with suppress(Exception):  # the first error counts
            log.end("stopped" if isinstance(error, Stopped) else "failed", reason)
        raise
    finally:
        log.close()


def due(every: int, done: int) -> bool:
    """Whether an action of every `every` steps follows step `done`; 0 is never."""
    return every > 0 and done % every == 0


class _Run:
    """One call of `train`: the schedule, the steps, the checkpoints, and when to stop."""

    def __init__(
        self,
        method: Method,
        data: DataSet,
        optim: OptimOptions,
        run: RunOptions,
        folder: Path,
        config: dict[str, Any],
        batch_size: int,
        log: RunLog | SilentLog,
        ranks: Ranks,
        validation: Validation | None = None,
    ):
        self.method, self.data, self.optim, self.run = method, data, optim, run
        self.config, self.log, self.ranks = config, log, ranks
        epochs = optim.n_epochs + optim.n_epochs_decay
        progress = Progress(epochs, data.steps_per_epoch, batch_size * ranks.world, ranks.world)
        self.progress = progress.begun(optim.first_epoch)
        device = next(method.parameters()).device
        precision, compiled = pick_precision(run.precision, device), pick_compile(run.compile, device)
        if run.compile == "auto" and not getattr(data, "one_size", True):
            compiled = False  # every size would be compiled anew, in minutes
        if tf32 := set_tf32(run.tf32, device):
            log.say(tf32)
        self.step = Step(
            method,
            optim,
            precision,
            compiled,
            ranks,
            graph=pick_graph(run.graph, device),
            recompute=run.checkpoint_activations,
            streams=pick_streams(run.streams, device, compiled),
        )
        self.device = self.step.bad_steps.device
        self.bad_count = BadStepCount(self.step.bad_steps, optim.max_bad_steps)
        self.ending = EndOfRun(run.minutes, ranks, self.device, lambda: log.callbacks.stop)
        self.rate = Rate(optim, self.step.plateau, self.step.set_learning_rate)
        self.checkpoints = Checkpoints(folder / "checkpoints", run.keep, log.say)
        networks = list(method.networks().values())
        self.saving = Saving(self._save, self.checkpoints, networks, ranks, self.device, log.say)
        self.best_at = -1
        self.started = sys.maxsize
        """The steps done before the first one of this call; none has been done yet."""
        self.agreed = 0
        """The steps after which kernels and plain PyTorch were last compared, and agreed."""
        self.validation: Validation | None = validation if run.validate_every and validation else None
        self.observer = Observer(self.step, data, run, folder, log, ranks, self.validation)

    def go(self, stop: StopRequest) -> int:
        """Train; returns the steps done, all of which are saved."""
        try:
            done = self._go(stop)
        except Exception as error:
            self.saving.after(error)
            raise
        self.saving.end()
        self.observer.announce(self.saving.saved_at, self.best_at)
        self.log.end_bar()
        why = self.ending.why
        if why and 0 < done < self.total:
            self.log.say(f"{why}: stopped after step {done:,} and saved; the same command continues")
        elif done > self.started:
            self.log.say(f"finished: step {done:,}, {clock(self.ending.seconds())} since the start")
        self.log.end("finished" if done >= self.total else "stopped", why)
        return done

    def _go(self, stop: StopRequest) -> int:
        done = self._resume()
        self.total = self.progress.end(self.run.steps)
        if beyond := self.progress.beyond(self.run.steps):
            self.log.say(beyond)
        if done >= self.total:
            return done
        stateful = [*self.method.networks().values(), *self.method.extra_state_modules().values()]
        self.ranks.broadcast(stateful)
        with self.ranks.together(self.device):
            if self.ranks.first and (self.run.monitor_every or (self.run.sample_every and self.run.samples)):
                self.observer.samples()  # now, because files may be gone later
        self.observer.begin(self.config, done, self.total, self.progress.batch)
        if self.validation is not None:
            self._begin_validation(done, self.validation)
        if reason := nothing_to_compare(self.device) if self.run.check_every else "":
            self.log.say(f"run.check_every compares nothing: {reason}")
        compares = self.run.check_every and not reason
        self.started = started = done
        pace, decaying = Pace(), None
        self.method.train()
        self.ending.begin(done)
        known = -1  # the epoch that the method knows of
        while done < self.total and not self.ending.now(stop, done):
            place, epoch = self.progress.place(done), self.progress.epoch(done)
            self.rate.before_step(place, self.data.steps_per_epoch)
            if epoch != known:
                known = epoch
                self.method.begin_epoch(epoch + 1, self.progress.epochs)
            began = time.perf_counter()
            before, decaying = decaying, epoch >= self.optim.n_epochs
            # the epochs after n_epochs take other versions of the images, which may have to be decoded first
            with self.ranks.together(self.device) if decaying != before else nullcontext():
                batch = Batch(*self.data.batch(place, decaying=decaying))
            pace.step(time.perf_counter() - began)
            rng = random.Random(f"{self.run.seed}/{done}")
            draws = self.method.draw(rng)
            torch.manual_seed(rng.getrandbits(63))
            if compares and due(self.run.check_every, done):
                self._compare(batch, draws, done)
            self.saving.step_begins()
            losses = self.step.run(batch, draws)
            done += 1
            self.saving.step_ends(done)
            self.log.step(done)
            stop.wait_for_steps()
            if done == started + 1 and any(was_traced(loss) for loss in losses.values()):
                raise CodeError(f"the first step {KEPT}")
            if done == started + 1 and self.step.compile_seconds:
                self.log.say(f"compiled, and ran the first step, in {self.step.compile_seconds:.0f} s")
            if done == started + COMPILED_AFTER:
                self.ranks.settle()
            if (ended := self.progress.ended(done)) and (said := self.rate.after_epoch()):
                self.log.say(f"epoch {ended}: {said}")
            if due(self.run.monitor_every, done) and self.ranks.first:
                self.observer.monitor_samples()
            if self.validation and (due(self.run.validate_every, done) or done == self.total):
                self._validate(done, self.validation)
            if due(self.run.log_every, done) or done == self.total:
                self._report(done, losses, pace)
            self._end_if_bad(*self.bad_count.read(done))
            grids = self.run.sample_every if self.run.samples and self.ranks.first else 0
            if due(grids, done) or (grids and done == self.total):
                self.observer.save_samples(done)
            if (due(self.run.save_every, done) or self._kept(done)) and done < self.total:
                self.saving.save()
            self.observer.announce(self.saving.saved_at, self.best_at)
        return done

    def _resume(self) -> int:
        """Take over the newest checkpoint, if there is one; returns the steps done."""
        found = self.checkpoints.load()
        if found is None:
            return 0
        tensors, state, path = found
        check_pictures(state, self.data.digest(), str(path))
        done, stored = state["step"], state.get("progress")
        if not self.run.change_batch:
            check_batch(stored, self.progress.batch, self.ranks.world, str(path), self.method)
        self.progress = self.progress.resumed(done, stored)
        try:
            self.step.load_state(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; remove that folder to continue from the one before") from None
        self.saving.resumed(done)
        if self.ranks.first and (epoch := self._kept(done)):
            self.checkpoints.keep_for_good(path, epoch)
        for sentence in self.progress.resume_messages(done, self.run.steps, stored, str(path)):
            self.log.say(sentence)
        return done

    def _report(self, done: int, losses: dict[str, Tensor], pace: Pace) -> None:
        learning_rate = next(iter(self.step.groups.values())).base_lr * self.rate.factor
        bad = self.observer.report(done, self.total, self.progress, learning_rate, losses, pace)
        self._end_if_bad(bad, done)

    def _end_if_bad(self, bad: float, step: int) -> None:
        """End after too many bad steps in a row, `bad` after `step`. The ranks have the same count, so all end here."""
        if 0 < self.optim.max_bad_steps <= bad:
            self.saving.sound = False  # such a state is not to be continued from
            good = self.checkpoints.good(step, int(bad))
            kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint that is known to be good"
            raise TrainingFailed(
                f"{bad:.0f} steps in a row were not finite at step {step:,}, none of them was applied; {kept}; "
                f"try a lower optim.lr with another --out"
            )

    def _compare(self, batch: Batch, draws: Draws, done: int) -> None:
        """End the run if the kernels and plain PyTorch disagree on the data of step `done` + 1, on any rank."""
        found = self.step.compare(batch, draws)
        if any(self.ranks.most([float(found is not None)], self.device)):
            self.saving.sound = False  # such a state is not to be continued from
            what = f"at step {done + 1:,} the kernels of another process disagree with plain PyTorch"
            raise TrainingFailed(
                f"{what if found is None else found.sentence(done + 1)}; nothing is saved, and checkpoints after step "
                f"{self.agreed:,} may be wrong; please report this with the output of `fastnce doctor`"
            )
        self.agreed = done

    def _begin_validation(self, done: int, validation: Validation) -> None:
        """Measure the inputs, and take over the best value if the run is continued."""
        self.observer.measure_inputs(validation)
        if done == 0:
            self.log.metrics(0, {f"held_out_{key}": value for key, value in validation.inputs.items()})
            if self.run.start_from:
                self.observer.measure_start(validation)
            return
        best = self.checkpoints.best()
        if changed := validation.resume(best[1].get("validation") if best else None):
            self.log.say(changed)

    def _validate(self, done: int, validation: Validation) -> None:
        """Measure the held-out pairs, and save the state if it is the best."""
        best = validation.best
        if not self.observer.validate(validation, done, self.progress.seen(done)):
            return
        self.best_at = done
        self.saving.save()
        if any(self.ranks.most([float(self.saving.saved_at != done)], self.device)):
            validation.best = best  # of the checkpoint that is on the disk

    def _save(self, done: int) -> None:
        state = {
            "data": self.data.digest(),
            "progress": self.progress.state(done),
            "generators": list(self.method.generators()),
            "config": self.config,
        }
        if self.validation and self.observer.validated_at == done:
            state["validation"] = self.validation.state()
        best, epoch = self.best_at == done, self._kept(done)
        weights, tensors = self.step.generator_weights(), self.step.state()
        self.checkpoints.save(done, weights, tensors, state, best=best, epoch=epoch)

    def _kept(self, done: int) -> int:
        """The epoch that step `done` ends, if its checkpoint is kept for good; else 0."""
        ended = self.progress.ended(done)
        return ended if ended and due(self.run.keep_epochs, ended) else 0
