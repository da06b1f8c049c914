"""What watches a run while it trains: callbacks of the user, trackers and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.imports import CodeError, first_line
from .stop import Stopped


class StopTraining(Exception):
    """Raised by a callback to end a run cleanly: the state is saved, and the same call continues it.

    Args:
        reason: for the log, such as "PSNR is good enough"; empty: "a callback asked to stop".
    """


@dataclass(frozen=True)
class RunInfo:
    """What a callback learns when a run begins or continues.

    folder: of the run.
    config: the configuration as nested dicts: "method", then the sections "data", "network", "loss", "optim", "run".
    step, total: steps done before, and the step after which the run ends.
    device: such as "cuda:0".
    parameters: the number of weights of all networks.
    machine, versions: names and values to show, such as {"GPU": ...} and {"fastnce": ..., "torch": ...}.
    """

    folder: Path
    config: dict[str, Any]
    step: int
    total: int
    device: str
    parameters: int
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class Callback:
    """Watches a run. Override what you need; every method does nothing by default.

    All methods are called between two steps, on the first rank only. They may raise `StopTraining`. Any other error
    ends the run after the state of the finished steps is saved, unless `optional` is true.
    """

    optional: bool = False
    """If true, an error of this callback is one warning; the callback is not called again, and training goes on."""

    def begin(self, run: RunInfo) -> None:
        """The run begins, or continues after `run.step` steps."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Called every `run.log_every` steps, and after each validation.

        Args:
            step: steps done.
            values: as in metrics.jsonl: each loss by its name, "lr", "epoch" (from 1), "pictures",
                "images_per_second" and so on; or, after a validation, "held_out_psnr_y" and so on.
        """

    def samples(self, step: int, pictures: dict[str, Tensor]) -> None:
        """Called every `run.sample_every` steps.

        Args:
            step: steps done.
            pictures: by name, such as "A", "fake_B": (images, channels, height, width) in [-1, 1], float32 on the CPU.
        """

    def warn(self, step: int, sentence: str) -> None:
        """The run warns, for example that a discriminator has won."""

    def saved(self, step: int, folder: Path, best: bool) -> None:
        """A checkpoint is complete in `folder`; `best` says whether it is the best so far."""

    def end(self, step: int, state: str, reason: str) -> None:
        """The run ends.

        Args:
            step: steps done.
            state: "finished" (nothing is left to do), "stopped" (the same call continues) or "failed".
            reason: one sentence; empty if the run is finished.
        """


class _Function(Callback):
    """A function (step, values), called like `Callback.log`."""

    def __init__(self, function: Callable[[int, dict[str, float]], Any]):
        self.function = function

    def log(self, step: int, values: dict[str, float]) -> None:
        self.function(step, values)


class Callbacks:
    """Calls several callbacks in order.

    Args:
        callbacks: instances of `Callback`, or functions (step, values) that are called like `Callback.log`.
        say: receives a sentence, for example if an optional callback fails; None: keep sentences for `speak`.

    Raises:
        ValueError: one is neither.
    """

    def __init__(
        self, callbacks: Sequence[Callback | Callable[..., Any]] = (), say: Callable[[str], None] | None = None
    ):
        self.early: list[str] = []
        """Sentences from before the run's log is open."""
        self.say = say or self.early.append
        self.step = 0
        """Steps done, for `warn`, which may come from anywhere."""
        self.stop = ""
        """Why a callback asked to stop; empty as long as none did."""
        self._left: list[Callback] = []
        for one in callbacks:
            if isinstance(one, type) or not (isinstance(one, Callback) or callable(one)):
                raise ValueError(
                    f"callbacks must be instances of fastnce.Callback or functions (step, values), not {one!r}"
                )
            self._left.append(one if isinstance(one, Callback) else _Function(one))

    def speak(self, say: Callable[[str], None]) -> None:
        """Let `say` receive the early sentences, and all that follow."""
        self.say = say
        while self.early:
            say(self.early.pop(0))

    def begin(self, run: RunInfo) -> None:
        self.step = run.step
        for one in list(self._left):
            self._one(one, "begin", deepcopy(run))  # a callback may change its own

    def log(self, step: int, values: dict[str, float]) -> None:
        for one in list(self._left):
            self._one(one, "log", step, dict(values))  # a callback may change its own

    def samples(self, step: int, pictures: dict[str, Tensor]) -> None:
        for one in list(self._left):
            own = {name: picture.detach().to("cpu", torch.float32, copy=True) for name, picture in pictures.items()}
            self._one(one, "samples", step, own)

    def warn(self, sentence: str) -> None:
        self._call("warn", self.step, sentence)

    def saved(self, step: int, folder: Path, best: bool) -> None:
        self._call("saved", step, folder, best)

    def end(self, step: int, state: str, reason: str) -> None:
        self._call("end", step, state, reason)

    def _call(self, name: str, *arguments: Any) -> None:
        for one in list(self._left):
            self._one(one, name, *arguments)

    def _one(self, callback: Callback, name: str, *arguments: Any) -> None:
        kind = type(callback).__name__
        try:
            with _kept():
                getattr(callback, name)(*arguments)
        except StopTraining as reason:
            self.stop = self.stop or str(reason) or "a callback asked to stop"
        except KeyboardInterrupt as error:
            if isinstance(error, Stopped):  # a signal before the first step
                raise
            self.stop = self.stop or f"KeyboardInterrupt in {kind}"
        except (Exception, SystemExit) as error:
            if not callback.optional:
                if isinstance(error, SystemExit):  # an ordinary error, before which the state is saved
                    raise CodeError(f"{kind}.{name} ended the run by sys.exit({error.code!r})") from error
                raise
            self._left.remove(callback)
            self.say(f"{kind} fails ({first_line(error)}): training goes on without it")


@contextmanager
def _kept() -> Iterator[None]:
    """Restore afterwards what a callback may change in this process and the next step depends on."""
    threads, dtype, precision = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    gradients = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
