"""Start one process per accelerator of this machine with one command: `fastnce train ... --nproc auto`.

It does the same as `torchrun --standalone --nproc_per_node=N -m fastnce train ...`. Signals are passed on, the exit
code is that of one process, and no process is left behind.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress

import torch

from .stop import end_with_parent, handled, heeded

COMMAND = [sys.executable, "-m", "fastnce"]
LAUNCHER = "FASTNCE_LAUNCHER"
"""The environment variable with the id of the process that started this one."""
GRACE = 10.0
"""Seconds that the other processes have to end after one has failed."""


def processes(text: str, device: str) -> int:
    """The number of processes that `--nproc` asks for; ValueError if this machine cannot run so many.

    Args:
        text: of `--nproc`; "auto" is one process per accelerator, or one on the CPU.
        device: `run.device`; with "cpu", up to eight processes per core are allowed.
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

    Every signal is passed on to all of them. Each has a session of its own, so it receives a terminal's Ctrl-C once.
    If one fails, the others have `GRACE` seconds to notice and end. If this process is killed, they save and end.
    """
    environment = os.environ | {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    environment[LAUNCHER] = str(os.getpid())
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int, frame: object) -> None:
        for rank in ranks:
            with suppress(ProcessLookupError):
                rank.send_signal(signum)

    with handled(heeded(), pass_on):
        try:
            for place in range(number):
                own = environment | {"RANK": str(place), "LOCAL_RANK": str(place)}
                ranks.append(subprocess.Popen([*COMMAND, *arguments], env=own, start_new_session=True))
            return _wait(ranks)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first process that failed, 128 + n if signal n ended it; 0 if none failed."""
    failed: int | None = None
    since = 0.0
    while None in [rank.poll() for rank in ranks]:
        if failed is None:
            failed = next((rank.returncode for rank in ranks if rank.returncode), None)
            since = time.monotonic()
        elif time.monotonic() - since > GRACE:
            break
        time.sleep(0.05)
    if failed is None:
        failed = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def watch_launcher() -> None:
    """In a launched process: save and end when the launcher is gone."""
    if os.environ.get(LAUNCHER) or os.environ.get("TORCHELASTIC_RUN_ID"):
        end_with_parent(int(os.environ.get(LAUNCHER) or os.getppid()))


def without(arguments: list[str], name: str) -> list[str]:
    """The arguments without the option `--name VALUE` or `--name=VALUE`."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != name and not argument.startswith(f"{name}="):
            kept.append(argument)
        skip = not skip and argument == name
    return kept
