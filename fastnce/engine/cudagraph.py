"""Record the step in CUDA graphs: one launch instead of thousands, so that the host no longer limits the speed.

    graphs = Graphs(step.compute, CudaRecorder(device), settings=..., places=...)
    losses = graphs.run(batch, draws)

The first steps of each kind warm up: they run launch by launch on a side stream, and train as usual. The next step is
recorded, which computes nothing, and then replayed, as are all later ones. Each choice that the host makes ahead of a
step (`Draws.flip`) has its own graph; all graphs share one pool of memory.

A graph always does the same work on the same addresses. Everything that changes from step to step is therefore in
memory: the images (copied into buffers that the graph reads), the learning rate, the loss scale, pools and banks.
Random numbers follow `torch.manual_seed`, because PyTorch passes seed and offset to a graph at every replay.
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
"""Steps of each kind before recording: they compile kernels, make moments and pools, and start libraries."""


def pick_graph(name: str, device: torch.device) -> bool:
    """ "auto" records on CUDA devices; ValueError for "true" elsewhere."""
    if name not in ("auto", "true", "false"):
        raise ValueError(f"run.graph must be auto, true or false, not {name!r}")
    if name == "true" and device.type != "cuda":
        raise ValueError(f"run.graph=true needs a CUDA device, not {device.type}: auto uses one if there is one")
    return name != "false" and device.type == "cuda"


class Recorder(Protocol):
    """What `Graphs` needs of a device. `record` computes nothing; it only records what `function` launches."""

    def warm(self, function: Callable[[], Losses]) -> Losses: ...

    def record(self, function: Callable[[], Losses]) -> tuple[Any, Losses]: ...

    def replay(self, graph: Any) -> None: ...

    def close(self, graphs: Sequence[Any]) -> None: ...


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """One stream for all recorders of a device: libraries keep some ten MiB of scratch memory per stream."""
    return torch.cuda.Stream(index)


class CudaRecorder:
    """Records CUDA graphs: a side stream for warm-up and recording, and a pool of memory that all graphs share."""

    def __init__(self, device: torch.device):
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.stream = _stream(self.index)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, function: Callable[[], Losses]) -> Losses:
        """Run on the stream of the recording, because handles and workspaces of libraries belong to a stream."""
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
            # The outer context leaves the stream even if the inner one fails at its end. "thread_local", because
            # calls of other threads (which stage images or watch NCCL) must not break the recording.
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
            raise first or error from None  # the cause, not its consequence at the end
        finally:
            first = None  # its traceback refers to this frame: a cycle that would keep memory
        return graph, losses

    def _recover(self, graph: torch.cuda.CUDAGraph, generator: torch.Generator, clean: torch.Generator) -> None:
        """After a failed recording, reset allocator and generator, so that training can go on without graphs."""
        torch.cuda.synchronize(self.index)
        with suppress(Exception):  # an invalid capture neither closes nor releases the pool
            torch._C._cuda_endAllocateToPool(self.index, self.pool)
            torch._C._cuda_releasePool(self.index, self.pool)
        with suppress(RuntimeError):
            graph.reset()
        generator.graphsafe_set_state(clean)  # the current state may still be marked as being recorded

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.replay()

    def close(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        """Free the graphs once the device has finished with them (NCCL's communicators must outlive them)."""
        torch.cuda.synchronize(self.index)
        for graph in graphs:
            graph.reset()
        self.pool = torch.cuda.graph_pool_handle()  # a released pool cannot be used again


@dataclass
class _Kind:
    """The steps that launch the same work: their warm-up, their graph and the losses that it writes."""

    warmed: int = 0
    graph: Any = None
    losses: Losses | None = None


class Graphs:
    """Runs a step from graphs, or launch by launch where a graph cannot replace it.

    Launch by launch run: the warm-up; steps with given patch ids, whose addresses change; images of another size than
    the first ones; and all steps after a recording has failed. If the settings change after a recording, the graphs are
    dropped and recorded anew. One warning reports each of these, apart from the warm-up and given patch ids.

    Args:
        compute: the step. It changes its state in place, computes on the device alone and returns losses.
        recorder: of the device.
        settings: everything else that decides what is launched; called at every step, so it must be cheap.
        places: the addresses of the state that the step reads and writes; called at every step once one is recorded, so
            it must be cheap. The warm-up may still allocate parts of the state.
        layout: memory format of the images.
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
        self._recorded_settings: Hashable = None
        self._recorded_places: Hashable = None
        self._warned: set[str] = set()
        self.failed = ""
        """Why recording failed; empty if it has not."""

    def run(self, batch: Batch, draws: Draws) -> Losses:
        """As `compute`. The next replay of a graph overwrites its losses: read or copy them before."""
        if self.failed or draws.patch_ids is not None:
            return self.compute(batch, draws)
        settings = self.settings()
        recorded = any(kind.graph is not None for kind in self.kinds.values())
        if settings != self._recorded_settings or (recorded and self.places() != self._recorded_places):
            if self.kinds:
                self._warn_once(
                    "settings", "the step is recorded anew: settings, or addresses of its state, have changed"
                )
                self.reset()
            self._recorded_settings = settings
        if self.inputs is None:
            self.inputs = Batch(*(torch.empty_like(p, memory_format=self.layout) for p in batch))
        if any(_kind_of(p) != _kind_of(kept) for p, kept in zip(batch, self.inputs, strict=True)):
            sizes = " and ".join(str(tuple(p.shape)) for p in batch)
            self._warn_once(
                "size", f"pictures of {sizes} run uncaptured: the graphs are for {tuple(self.inputs.a.shape)}"
            )
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
                self._recorded_places = self.places()
            except Exception as error:
                self._give_up(error)
        if self.failed:  # outside of the handler: the error keeps memory that the step may need
            gc.collect()
            torch.cuda.empty_cache()  # does nothing if CUDA is not in use
            return self.compute(batch, draws)
        self.recorder.replay(kind.graph)
        assert kind.losses is not None
        return dict(kind.losses)

    def _give_up(self, error: Exception) -> None:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self.reset()
        self.failed = reason[:300]
        warnings.warn(f"the step runs uncaptured, launch by launch: recording it failed ({self.failed})", stacklevel=4)

    def _warn_once(self, occasion: str, sentence: str) -> None:
        if occasion not in self._warned:
            self._warned.add(occasion)
            warnings.warn(sentence, stacklevel=4)

    def reset(self) -> None:
        """Free all graphs, their memory and their buffers; the next steps warm up again."""
        graphs = [kind.graph for kind in self.kinds.values() if kind.graph is not None]
        if graphs:
            self.recorder.close(graphs)
        self.kinds.clear()
        self.inputs = None


def _kind_of(pictures: Tensor) -> Hashable:
    return pictures.shape, pictures.dtype, pictures.device


def library_settings() -> Hashable:
    """The settings of PyTorch's libraries that decide which kernels a step launches."""
    return (
        *tf32_allowed(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    )
