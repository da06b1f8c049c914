"""One process for each accelerator of this machine, from one command: `fastnce train ... --nproc auto`.

The same as `torchrun --standalone --nproc_per_node=N -m fastnce train ...`, for which this is shorter to type.
"""

from __future__ import annotations

import os

import torch


def processes(text: str, device: str) -> int:
    """How many "auto" or a number mean on this machine; ValueError for more than it can serve.

    Args:
        text: of `--nproc`; "auto" is one for each accelerator, or one process on the CPU.
        device: the run's (`run.device`); with "cpu" up to eight share a core.
    """
    there = torch.accelerator.device_count() if device != "cpu" else 0
    if text == "auto":
        return max(1, there)
    most = max(there, 8 * (os.cpu_count() or 1))
    number = int(text) if text.isdecimal() and len(text) < 10 else 0
    if number < 1:
        raise ValueError(f"--nproc must be auto or a number of processes from 1 on, not {text[:60]!r}")
    if number > 1 and device != "cpu" and number > there:
        raise ValueError(
            f"--nproc {number} wants an accelerator for each process, and {there} are there: fewer, or run.device=cpu"
        )
    if number > most:
        raise ValueError(f"--nproc {number} is too many for this machine: its cores are shared by {most} at most")
    return number


def launched() -> bool:
    """Whether this process is already one of several that a launcher started."""
    return "WORLD_SIZE" in os.environ


def start(number: int, arguments: list[str]) -> int:
    """Run `fastnce ARGUMENTS` in `number` connected processes until all end; returns the exit code.

    A signal to this process reaches all of them; when one dies, the others are ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # else the launcher sets one thread each, and warns
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    mine = ["--standalone", f"--nproc-per-node={number}", "--max-restarts=0", "-m", "fastnce", *arguments]
    try:
        run(get_args_parser().parse_args(mine))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException:
        return 0  # every rank has saved before it ended
    return 0


def without(arguments: list[str], name: str) -> list[str]:
    """Arguments without an option `--name VALUE` or `--name=VALUE`."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != name and not argument.startswith(f"{name}="):
            kept.append(argument)
        skip = not skip and argument == name
    return kept
