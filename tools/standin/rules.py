"""Check that the stand-ins enforce CUDA's rules: a tool that permits everything would pass every case.

python -m tools.standin.rules, in the environment that `install.environment` returns, with STANDIN_LOG. Each rule is
broken once, and the error or the log line that must follow is looked for. The exit code is 1 if one is missing.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from tools.standin import log

runtime = ctypes.CDLL("libcudart.so.13")
driver = ctypes.CDLL("libcuda.so.1")
INVALID_VALUE = 1


def events(rule: Callable[[], None]) -> list[log.Event]:
    """Return what a rule logged."""
    with Path(os.environ["STANDIN_LOG"]).open() as lines:
        return next(section.events for section in log.parse(lines) if section.name == rule.__name__)


def first_error(rule: Callable[[], None]) -> tuple[str, str]:
    """Return the function and the code of the first error that a rule logged; the later ones follow from it."""
    return next(((e.name, e.more[0]) for e in events(rule) if e.event == "error"), ("none", ""))


def capture(work: Callable[[torch.Tensor], object], mode: str = "thread_local") -> str:
    """Capture `work` on a small tensor; return the error that ended the capture, or "" if it succeeded."""
    x = torch.zeros(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode=mode):
            work(x)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    graph.replay()
    return ""


def work_is_captured_and_replayed() -> None:
    assert capture(lambda x: x.add_(1).mul_(2)) == ""
    found = events(work_is_captured_and_replayed)
    assert sum(e.event == "launch" and e.where == "captured" for e in found) == 2
    assert [e.more for e in found if e.event == "graph"] == [("2",)]


def waiting_for_the_device_ends_a_capture() -> None:
    assert capture(lambda x: torch.cuda.synchronize()) != ""
    assert first_error(waiting_for_the_device_ends_a_capture) == ("cudaDeviceSynchronize", "900")
    assert any(e.event == "sync" and e.where == "outside" for e in events(waiting_for_the_device_ends_a_capture))


def waiting_for_the_stream_ends_a_capture() -> None:
    assert capture(lambda x: torch.cuda.current_stream().synchronize()) != ""
    assert first_error(waiting_for_the_stream_ends_a_capture) == ("cudaStreamSynchronize", "900")


def reading_a_value_ends_a_capture() -> None:
    assert capture(lambda x: x.sum().item()) != ""
    assert first_error(reading_a_value_ends_a_capture) == ("cudaStreamSynchronize", "900")


def work_of_another_stream_is_outside() -> None:
    other = torch.cuda.Stream()

    def work(x: torch.Tensor) -> None:
        x.add_(1)
        with torch.cuda.stream(other):
            x.mul_(2)

    assert capture(work) == ""
    assert [e.where for e in events(work_of_another_stream_is_outside) if e.event == "launch"].count("outside") == 1


def a_joined_stream_is_captured() -> None:
    other = torch.cuda.Stream()

    def work(x: torch.Tensor) -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x.mul_(2)
        torch.cuda.current_stream().wait_stream(other)

    assert capture(work) == ""
    assert all(e.where != "outside" for e in events(a_joined_stream_is_captured) if e.event == "launch")


def a_stream_that_is_not_joined_ends_a_capture() -> None:
    other = torch.cuda.Stream()

    def work(x: torch.Tensor) -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x.mul_(2)

    assert capture(work) != ""
    assert first_error(a_stream_that_is_not_joined_ends_a_capture) == ("cudaStreamEndCapture", "904")


def an_event_from_outside_ends_a_capture() -> None:
    event = torch.cuda.Event()
    event.record()
    assert capture(lambda x: torch.cuda.current_stream().wait_event(event)) != ""
    assert first_error(an_event_from_outside_ends_a_capture) == ("cudaStreamWaitEvent", "905")


def a_second_capture_is_refused() -> None:
    def work(x: torch.Tensor) -> None:
        stream = torch.cuda.Stream()
        assert runtime.cudaStreamBeginCapture(ctypes.c_void_p(stream.cuda_stream), 1) != 0

    assert capture(work) != ""
    assert first_error(a_second_capture_is_refused) == ("cudaStreamBeginCapture", "900")


def an_unsafe_call_of_another_thread_ends_a_global_capture() -> None:
    def work(x: torch.Tensor) -> None:
        thread = threading.Thread(target=lambda: runtime.cudaFree(ctypes.c_void_p(1)))
        thread.start()
        thread.join()

    assert capture(work, "global") != ""
    assert capture(work, "thread_local") == ""


def a_launch_has_limits() -> None:
    function, stream = ctypes.c_void_p(), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    assert driver.cuModuleGetFunction(ctypes.byref(function), None, b"kernel") == 0

    def launch(grid_y: int, threads: int, shared: int) -> int:
        return driver.cuLaunchKernel(function, 1, grid_y, 1, threads, 1, 1, shared, stream, None, None)

    assert launch(1, 128, 1024) == 0
    assert launch(65536, 128, 0) == INVALID_VALUE
    assert launch(1, 2048, 0) == INVALID_VALUE
    assert launch(1, 128, 100 << 10) == INVALID_VALUE
    attribute = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert driver.cuFuncSetAttribute(function, attribute, 228 << 10) == INVALID_VALUE
    assert driver.cuFuncSetAttribute(function, attribute, 200 << 10) == 0
    assert launch(1, 128, 100 << 10) == 0


def copies_that_block_are_logged() -> None:
    x = torch.zeros(8, device="cuda")
    x.cpu()
    x.copy_(torch.zeros(8).pin_memory(), non_blocking=True)
    waits = [e.name for e in events(copies_that_block_are_logged) if e.event == "sync"]
    assert waits == ["cudaMemcpyAsync, device to host, pageable memory", "cudaStreamSynchronize"]


RULES = (
    work_is_captured_and_replayed,
    waiting_for_the_device_ends_a_capture,
    waiting_for_the_stream_ends_a_capture,
    reading_a_value_ends_a_capture,
    work_of_another_stream_is_outside,
    a_joined_stream_is_captured,
    a_stream_that_is_not_joined_ends_a_capture,
    an_event_from_outside_ends_a_capture,
    a_second_capture_is_refused,
    an_unsafe_call_of_another_thread_ends_a_global_capture,
    a_launch_has_limits,
    copies_that_block_are_logged,
)


def main() -> int:
    broken = []
    for rule in RULES:
        runtime.standin_mark(rule.__name__.encode())
        try:
            rule()
        except AssertionError as error:
            line = error.__traceback__.tb_next.tb_lineno if error.__traceback__ and error.__traceback__.tb_next else 0
            broken.append(f"the stand-ins do not enforce that {rule.__name__.replace('_', ' ')} (line {line})")
    print(*broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
