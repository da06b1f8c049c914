"""Commands in processes of their own, without the seconds that importing PyTorch takes: forks of the test's process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import pytest
import torch


def skip_beside_a_gpu() -> None:
    if torch.cuda.device_count():
        pytest.skip("beside a GPU, PyTorch computes no gradients in forks: CUDA_VISIBLE_DEVICES= includes this test")


class Told:
    """What a process has written to a stream so far. A pipe holds it: limits on the sizes of files do not."""

    ROOM = 2**20

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, self.ROOM)
        self._bytes = b""

    def read_text(self) -> str:
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.read_end, self.ROOM):
                self._bytes += part
        return self._bytes.decode(errors="replace")

    def __del__(self) -> None:
        os.close(self.read_end)


class Forked:
    """`work()` in a fork.

    Args:
        work: returns the exit code.
        ignore: signals that the process ignores from its beginning on.
    """

    def __init__(self, work: Callable[[], int], ignore: tuple[int, ...] = ()):
        skip_beside_a_gpu()
        self.out, self.err = Told(), Told()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            for told in (self.out, self.err):
                os.close(told.write_end)
            return
        code = 99
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN if number in ignore else signal.SIG_DFL)
            if signal.SIGINT not in ignore:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(self.out.write_end, 1)
            os.dup2(self.err.write_end, 2)
            for told in (self.out, self.err):  # who waits for the end of a stream waits for the last that holds it
                os.close(told.write_end)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
            code = work()
        except BaseException as error:  # as an interpreter would
            traceback.print_exception(error, file=sys.stderr)
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
            with contextlib.suppress(BaseException):
                sys.stderr.flush()
            os._exit(code)

    def wait_for(self, what: Callable[[], object], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            assert ended is None or what(), f"it has ended: {self.out.read_text()}{self.err.read_text()}"
            assert time.monotonic() < end, f"{self.out.read_text()}{self.err.read_text()}"
            time.sleep(0.02)

    def wait_for_line(self, text: str) -> None:
        self.wait_for(lambda: text in self.out.read_text())

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, seconds: float = 60.0) -> int:
        """The exit code, negative where a signal ended it."""
        stop = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > stop:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it did not end: {self.out.read_text()}{self.err.read_text()}")
            time.sleep(0.02)
