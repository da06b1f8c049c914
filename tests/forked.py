"""Commands in processes of their own, without the seconds that importing PyTorch takes: forks of the test's process."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Forked:
    """`work()` in a fork; its output goes to files in `folder`.

    Args:
        work: returns the exit code.
        ignore: signals that the process ignores from its beginning on.
    """

    def __init__(self, work: Callable[[], int], folder: Path, ignore: tuple[int, ...] = ()):
        self.out, self.err = folder / "stdout.txt", folder / "stderr.txt"
        self.out.touch()
        self.err.touch()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN if number in ignore else signal.SIG_DFL)
            if signal.SIGINT not in ignore:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            for stream, file, number in ((sys.stdout, self.out, 1), (sys.stderr, self.err, 2)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
                del stream
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
            code = work()
        except BaseException as error:  # as an interpreter would
            import traceback

            traceback.print_exception(error, file=sys.stderr)
        finally:
            sys.stdout.flush()
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
