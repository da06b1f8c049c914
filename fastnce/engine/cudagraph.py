"""The whole step in CUDA graphs: one launch in place of some thousand, so that the host no longer sets the pace.

    graphs = Graphs(step.compute, CudaRecorder(device), settings=..., places=...)
    losses = graphs.run(batch, draws)

The first steps of each kind run as they are, on a side stream, and count as training steps; the next one is recorded
while nothing is computed, then replayed, as are all after it. There is one graph for each choice that the host makes
ahead of a step (`Draws.flip`), all in one pool of memory.

What a graph does is frozen, so everything that changes from step to step has to lie in memory: the pictures (copied
into buffers that the graph reads), the learning rate, the loss scale, pools and banks. Random numbers follow
`torch.manual_seed` because PyTorch's generator hands seed and offset to a graph at every replay.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..methods.base import Batch, Draws
from .choices import tf32_allowed

Losses = dict[str, Tensor]
Compute = Callable[[Batch, Draws], Losses]

WARM_UP = 3
"""Steps of each kind before the recording: kernels are compiled, moments and pools made, libraries started."""


def pick_graph(name: str, device: torch.device) -> bool:
    """ "auto" records on CUDA devices; ValueError for "true" elsewhere."""
    if name not in ("auto", "true", "false"):
        raise ValueError(f"run.graph must be auto, true or false, not {name!r}")
    if name == "true" and device.type != "cuda":
        raise ValueError(f"run.graph=true needs a CUDA device, not {device.type}: auto uses one where it is there")
    return name != "false" and device.type == "cuda"


class Recorder(Protocol):
    """What `Graphs` asks of a device; `record` only takes down what `function` launches."""

    def warm(self, function: Callable[[], Losses]) -> Losses: ...

    def record(self, function: Callable[[], Losses]) -> tuple[Any, Losses]: ...

    def replay(self, graph: Any) -> None: ...

    def close(self, graphs: Sequence[Any]) -> None: ...


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """One for all recorders of a device: products keep some ten MiB of scratch memory for every stream they ran on."""
    return torch.cuda.Stream(index)


class CudaRecorder:
    """CUDA's own: a side stream for warm-up and recording, and a pool of memory that all graphs share."""

    def __init__(self, device: torch.device):
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.stream = _stream(self.index)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, function: Callable[[], Losses]) -> Losses:
        """Run it on the stream of the recording: handles and workspaces of libraries belong to a stream."""
        outside = torch.cuda.current_stream(self.index)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            losses = function()
        outside.wait_stream(self.stream)
        for loss in losses.values():
            loss.record_stream(outside)
        return losses

    def record(self, function: Callable[[], Losses]) -> tuple[torch.cuda.CUDAGraph, Losses]:
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.index]
        clean = generator.clone_state()
        first: Exception | None = None
        try:
            # The outer context leaves the stream also where the inner one fails at its end. Calls of other threads,
            # such as one that stages pictures or watches NCCL, are none of this recording's: "thread_local".
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                try:
                    losses = function()
                except Exception as error:
                    first = error
                    raise
        except BaseException as error:
            self._recover(graph, generator, clean)
            raise first or error from None  # what broke the recording, not how its end noticed
        finally:
            first = None  # its traceback holds this frame: a circle that would keep the failed step's memory
        return graph, losses

    def _recover(self, graph: torch.cuda.CUDAGraph, generator: torch.Generator, clean: torch.Generator) -> None:
        """After a failed recording: leave allocator and generator as they were, so that training goes on without it."""
        torch.cuda.synchronize(self.index)
        with suppress(Exception):  # an invalid capture ends without closing the pool, nor letting go of it
            torch._C._cuda_endAllocateToPool(self.index, self.pool)
            torch._C._cuda_releasePool(self.index, self.pool)
        with suppress(RuntimeError):
            graph.reset()
        generator.graphsafe_set_state(clean)  # the state that was in use may believe that it is still recorded

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.replay()

    def close(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        """Free the graphs after the device has finished with them (NCCL's communicators must outlive them)."""
        torch.cuda.synchronize(self.index)
        for graph in graphs:
            graph.reset()
        self.pool = torch.cuda.graph_pool_handle()  # a pool that was let go of cannot be recorded into again


@dataclass
class _Kind:
    """Steps that launch the same work: their warm-up, then their graph with what it reads and writes."""

    warmed: int = 0
    graph: Any = None
    losses: Losses | None = None


class Graphs:
    """Runs a step from graphs, or as it is wherever a graph cannot stand for it.

    As it is run: the warm-up; given patch ids, which lie elsewhere each time; pictures of another size than the first
    ones; and everything after a recording failed, whatever the reason. Other settings than at the recording end the
    graphs and warm up anew. Each of these says so once.

    Args:
        compute: the step. It changes its state in place, computes on the device alone and returns losses.
        recorder: of the device.
        settings: everything else that decides what is launched; cheap, asked at every step.
        places: where the state lies that the step reads and writes; cheap, asked at every step that is recorded. The
            warm-up may still make parts of it.
        layout: of the pictures in memory.
    """

    def __init__(
        self,
        compute: Compute,
        recorder: Recorder,
        settings: Callable[[], Hashable],
        places: Callable[[], Hashable] = tuple,
        layout: torch.memory_format = torch.contiguous_format,
    ):
        self.compute, self.recorder, self.layout = compute, recorder, layout
        self.settings, self.places = settings, places
        self.kinds: dict[bool, _Kind] = {}
        self.inputs: Batch | None = None
        self._was: Hashable = None
        self._lay: Hashable = None
        self._said: set[str] = set()
        self.failed = ""
        """Why nothing is recorded any more; empty while all is well."""

    def run(self, batch: Batch, draws: Draws) -> Losses:
        """As `compute`. Losses that come from a graph are overwritten by its next replay: read or copy them before."""
        if self.failed or draws.patch_ids is not None:
            return self.compute(batch, draws)
        settings = self.settings()
        recorded = any(kind.graph is not None for kind in self.kinds.values())
        if settings != self._was or (recorded and self.places() != self._lay):
            if self.kinds:
                self._once("settings", "the step is recorded anew: settings, or where its state lies, have changed")
                self.reset()
            self._was = settings
        if self.inputs is None:
            self.inputs = Batch(*(torch.empty_like(p, memory_format=self.layout) for p in batch))
        if any(_kind_of(p) != _kind_of(kept) for p, kept in zip(batch, self.inputs, strict=True)):
            sizes = " and ".join(str(tuple(p.shape)) for p in batch)
            self._once("size", f"pictures of {sizes} run uncaptured: the graphs are for {tuple(self.inputs.a.shape)}")
            return self.compute(batch, draws)
        for kept, pictures in zip(self.inputs, batch, strict=True):
            kept.copy_(pictures)
        kind = self.kinds.setdefault(draws.flip, _Kind())
        inputs, fixed = self.inputs, Draws(flip=draws.flip)
        if kind.warmed < WARM_UP:
            kind.warmed += 1
            return self.recorder.warm(lambda: self.compute(inputs, fixed))
        if kind.graph is None:
            try:
                kind.graph, kind.losses = self.recorder.record(lambda: self.compute(inputs, fixed))
                self._lay = self.places()
            except Exception as error:
                self._give_up(error)
        if self.failed:  # out here, where the error is gone: without what it held, the step may fit into memory
            gc.collect()
            torch.cuda.empty_cache()  # nothing where CUDA is not in use
            return self.compute(batch, draws)
        self.recorder.replay(kind.graph)
        assert kind.losses is not None
        return dict(kind.losses)

    def _give_up(self, error: Exception) -> None:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self.reset()
        self.failed = reason[:300]
        warnings.warn(f"the step runs uncaptured, launch by launch: recording it failed ({self.failed})", stacklevel=4)

    def _once(self, occasion: str, sentence: str) -> None:
        if occasion not in self._said:
            self._said.add(occasion)
            warnings.warn(sentence, stacklevel=4)

    def reset(self) -> None:
        """Let go of all graphs, their memory and their buffers; the next steps warm up again."""
        graphs = [kind.graph for kind in self.kinds.values() if kind.graph is not None]
        if graphs:
            self.recorder.close(graphs)
        self.kinds.clear()
        self.inputs = None


def _kind_of(pictures: Tensor) -> Hashable:
    return pictures.shape, pictures.dtype, pictures.device


def library_settings() -> Hashable:
    """What the libraries were told that decides which kernels a step launches."""
    return (
        *tf32_allowed(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    )
