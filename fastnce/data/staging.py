"""Make the next batch while the device computes with the current one.

    staging = Staging(make, torch.device("cuda"))
    real_a, real_b = staging.take(step, decaying)  # make(step, decaying), usually ready

This is for data sets that do not fit into the device's memory. A thread reads the windows, possibly from the disk, into
page-locked memory. A separate stream copies, crops, mirrors and normalises them beside the training step.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Pictures = tuple[Tensor, Tensor]


class Staging:
    """Batches of consecutive steps, one made ahead. A batch of any other step is made on request.

    Args:
        make: (step, decaying) -> A and B on `device`, launched on the current stream. Only one thread calls it.
        device: on a device with streams (CUDA, XPU), the work runs on a separate stream; on the CPU, only in the
            thread.
    """

    def __init__(self, make: Callable[[int, bool], Pictures], device: torch.device):
        self.make, self.device = make, device
        self.module = None if device.type == "cpu" else torch.get_device_module(device)
        self.stream = None if self.module is None else self.module.Stream(device)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="fastnce-staging")
        self.ahead: tuple[tuple[int, bool], Future[tuple[Pictures, Any]]] | None = None

    def take(self, step: int, decaying: bool) -> Pictures:
        """Return the batch of a step, and start making the next one.

        Work launched on the current stream from now on sees the complete batch, and the batch's memory is not reused
        before that work has finished.
        """
        wanted = (step, decaying)
        if self.ahead is None or self.ahead[0] != wanted:
            self._begin(*wanted)
        assert self.ahead is not None
        future = self.ahead[1]
        self.ahead = None  # even if the result is an error: the next call then starts again
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
        """Stop the thread after the batch that it is making."""
        self.ahead = None
        self.thread.shutdown(cancel_futures=True)
