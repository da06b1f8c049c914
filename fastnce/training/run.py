"""Train as a configuration says: what `fastnce train` runs.

from fastnce.config import resolve
from fastnce.training import train_run
train_run(resolve("fastcut", overrides=["data.dir=DIR"]), Path("runs/mine"))
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..common.imports import CodeError, place_in_own_code
from ..common.locking import hold
from ..common.messages import counted
from ..common.streams import print_line, warnings_through
from ..common.writing import sweep, write_whole
from ..config.build import build_method, plan
from ..config.check import check
from ..config.config import Config
from ..config.options import MAX_PIXELS, batch_sizes
from ..config.paths import absolute
from ..data.limit import accepting
from ..engine.callbacks import Callback, Callbacks
from ..engine.checkpoint import Checkpoints
from ..engine.checks import check_run
from ..engine.choices import pick_device, pick_precision, tf32_allowed
from ..engine.distributed import Ranks, ranks_of_launcher, read_ranks
from ..engine.loop import TrainingFailed, train
from ..engine.memory import check_room, keep_freed_memory, out_of_memory, too_large
from ..engine.progress import check_pictures
from ..engine.recompute import recompute_blocks
from ..engine.trained import count_parameters
from ..watch import ReportCallback
from ..watch.report import NAME as REPORT
from ..watch.trackers import make_trackers
from .checks import check_code, check_place, check_plan, check_same_run, decays
from .continuing import note, note_changes, steps_left, with_origin
from .data import open_checked, open_validation
from .starting import plan_start

ONE = threading.Lock()
"""Held by the training of this process: all of them would draw from one random number generator."""


def train_run(
    config: Config,
    out: str | os.PathLike[str],
    *,
    quiet: bool = False,
    callbacks: Sequence[Callback | Callable[..., Any]] = (),
    changes: Collection[str] = (),
    warnings_to_log: bool = False,
) -> int:
    """Build everything that a configuration names, and train; returns the steps done.

    Args:
        out: the folder of the run. If it holds a run of the same configuration, that run continues.
        quiet: print nothing.
        callbacks: watch the run on the first rank: instances of `fastnce.Callback`, or functions (step, values).
        changes: keys in which the configuration may differ from the run's, as `continue_config` returns them.
        warnings_to_log: Python's warnings become lines of the run's log.

    The number of threads, PyTorch's random numbers and its TF32 settings are restored at the end.

    Raises:
        ValueError: the configuration or its images cannot be trained, or (`InUse`) another process trains in `out`, or
            another thread of this process trains.
        TrainingFailed: as `fastnce.engine.loop.train`.
    """
    if not ONE.acquire(blocking=False):
        raise ValueError("a training runs in this process already: wait for its end, or start another process")
    watching = Callbacks()
    try:
        trackers = make_trackers(config.run.track, lambda sentence: watching.say(sentence))
        report = [ReportCallback()] if config.run.report else []
        watching = Callbacks([*callbacks, *trackers, *report])
        with warnings_through(lambda sentence: watching.say(sentence)) if warnings_to_log else nullcontext():
            done = _train(config, Path(out), quiet, watching, changes)
        if report and not quiet and read_ranks().first and (page := Path(out) / REPORT).is_file():
            print_line(f"{page} shows the run")
        return done
    finally:
        ONE.release()
        for sentence in watching.early if read_ranks().first else ():  # the run has ended before it had a log
            warnings.warn(sentence.removeprefix("warning: "), stacklevel=2)


def _train(config: Config, out: Path, quiet: bool, callbacks: Callbacks, changes: Collection[str]) -> int:
    check(config)
    check_place(config, out)
    with accepting(config.data.max_pixels, MAX_PIXELS), hold_run(out) if read_ranks().first else nullcontext():
        state = check_same_run(config, out, read_ranks().world, changes)
        if state is not None:
            config = with_origin(config, state)
        with ranks_of_launcher(config.run.device) as ranks:
            try:
                with _restored(pick_device(ranks.device(config.run.device)), config.run.tf32):
                    return _train_rank(config, out, ranks, quiet or not ranks.first, state, callbacks, changes)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, TrainingFailed) or not out_of_memory(error):  # it may quote the allocator
                    raise
                raise TrainingFailed(too_large(error)) from None
            except SystemExit as error:
                raise CodeError(
                    f"own code ended the run by sys.exit({error.code!r}){place_in_own_code(error)}"
                ) from error


@contextmanager
def _restored(device: torch.device, tf32: str) -> Iterator[None]:
    """Restore afterwards what a training changes in this process."""
    threads = torch.get_num_threads()
    before = tf32_allowed() if device.type == "cuda" and tf32 != "auto" else None
    kind = device.type if device.type != "cpu" else "cuda"
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=kind):
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if before is not None:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def hold_run(out: Path) -> Iterator[None]:
    """Within: no other process trains in this folder. Partial files of killed processes are removed first.

    Raises:
        InUse: another process trains in it.
    """
    with hold(out, "fastnce train", "take another --out"):
        for folder in (out, out / "samples"):
            sweep(folder, held=True)
        Checkpoints(out / "checkpoints").clean()
        yield


def _train_rank(
    config: Config,
    out: Path,
    ranks: Ranks,
    quiet: bool,
    state: dict[str, Any] | None,
    callbacks: Callbacks,
    changes: Collection[str],
) -> int:
    device = pick_device(ranks.device(config.run.device))
    if device.type == "cpu":
        keep_freed_memory()
    planned = check_plan(config)
    measures = check_code(config, device)
    check_run(planned, config.optim, config.run, device)
    _check_memory(config, device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with ranks.together(device):
        data = open_checked(config, planned, device, ranks, quiet)
        if state is not None:
            check_pictures(state, data.digest(), str(out), changes)
        start = plan_start(config, planned) if state is None else None
        validation = open_validation(config, measures, device, ranks, quiet)
    del planned  # a user's own has weights in memory
    torch.manual_seed(config.run.seed)
    method = build_method(config).to(device)
    if start is not None:
        start.load(method)
        config = replace(config, run=replace(config.run, start_from=start.path))  # a name depends on the folder here
    steps = data.steps_per_epoch
    left = state is None or steps_left(config, state, processes=ranks.world, steps_per_epoch=steps)
    with ranks.together(device):
        if ranks.first and left:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / "config.toml", absolute(config).as_toml().encode("utf-8"))
    if not quiet:
        parameters = count_parameters(method)
        sizes = [getattr(data, name, None) for name in ("size_a", "size_b")]
        pictures = "" if None in sizes else f"{sizes[0]:,} + {sizes[1]:,} pictures, "
        print_line(
            f"{config.method} on {device}: {parameters / 1e6:.1f} M parameters, {pictures}"
            f"{counted(data.steps_per_epoch, 'step')} an epoch; run in {out}"
        )
        for path, reason in getattr(data, "skipped", []):
            print_line(f"skipped {path}: {reason}")
    if ranks.first and start is not None:
        sentences = [f"begins with the weights of {start.source}", *start.lines]
        note(out, "from", 0, sentences, quiet, source=start.source, lines=start.lines)
    if ranks.first and state is not None:
        note_changes(config, state, changes, out, processes=ranks.world, steps_per_epoch=steps, quiet=quiet)
    return train(
        method,
        data,
        config.optim,
        replace(config.run, change_batch=config.run.change_batch or "data.batch" in changes),
        out,
        config=config.as_dict(),
        batch_size=config.data.batch,
        quiet=quiet,
        ranks=ranks,
        validation=validation,
        callbacks=callbacks,
    )


def _check_memory(config: Config, device: torch.device) -> None:
    planned = plan(config)
    if config.run.checkpoint_activations:
        recompute_blocks(planned)
    size = max(batch_sizes(config.data, decays(config)), key=math.prod, default=None)
    sixteen_bits = pick_precision(config.run.precision, device) != "fp32"
    part = config.data.batch // config.optim.accumulate
    check_room(planned, part, size, device=device, sixteen_bits=sixteen_bits)
