"""The next batch is made while the device computes with the present one.

    staging = Staging(make, torch.device("cuda"))
    real_a, real_b = staging.take(step, decaying)  # make(step, decaying), most likely ready

For data sets that do not fit into the device's memory: a thread reads the windows (perhaps from the disk) into
page-locked memory, and a stream of its own copies, crops, mirrors and normalises them beside the training step.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Pictures = tuple[Tensor, Tensor]


class Staging:
    """Batches of consecutive steps, one ahead; any other step is made when it is asked for.

    Args:
        make: (step, decaying) to A and B on `device`, launched on the current stream; called from one thread only.
        device: with streams (CUDA, XPU) the work goes on one of its own; on the CPU only the thread is beside.
    """

    def __init__(self, make: Callable[[int, bool], Pictures], device: torch.device):
        self.make, self.device = make, device
        self.module = None if device.type == "cpu" else torch.get_device_module(device)
        self.stream = None if self.module is None else self.module.Stream(device)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="fastnce-staging")
        self.ahead: tuple[tuple[int, bool], Future[tuple[Pictures, Any]]] | None = None

    def take(self, step: int, decaying: bool) -> Pictures:
        """The pictures of a step; those of the next one are begun.

        Whatever is launched on the current stream from now on sees them whole, and their memory is not handed out again
        before it has been used.
        """
        wanted = (step, decaying)
        if self.ahead is None or self.ahead[0] != wanted:
            self._begin(*wanted)
        assert self.ahead is not None
        future = self.ahead[1]
        self.ahead = None  # also where the result is an error: the next call asks anew
        pictures, ready = future.result()
        self._begin(step + 1, decaying)
        if self.module is not None:
            current = self.module.current_stream(self.device)
            current.wait_event(ready)
            for one in pictures:
                one.record_stream(current)
        return pictures

    def _begin(self, step: int, decaying: bool) -> None:
        self.ahead = ((step, decaying), self.thread.submit(self._make, step, decaying))

    def _make(self, step: int, decaying: bool) -> tuple[Pictures, Any]:
        if self.module is None:
            return self.make(step, decaying), None
        with self.module.device(self.device), self.module.stream(self.stream):
            pictures = self.make(step, decaying)
            ready = self.module.Event()
            ready.record(self.stream)
        return pictures, ready

    def close(self) -> None:
        """End the thread; a batch that it is making is finished first."""
        self.ahead = None
        self.thread.shutdown(cancel_futures=True)
