"""A step with `run.streams` gives the bits of one without, and reads nothing before it is there."""

from __future__ import annotations

import threading

import pytest
import torch

from fastnce.common.beside import active, beside, streaming
from fastnce.engine.choices import pick_streams
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws
from tests.engine.test_engine import random_batch, small_method
from tests.methods.test_methods_more import build, pictures


class LateStreams:
    """Streams of a slow device: the second part is over before the first, and results aside are there after `join`."""

    def __init__(self):
        self.late: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.pairs = self.aside_calls = self.joined = 0

    def beside(self, first, second):
        self.pairs += 1
        other = second()
        return first(), other

    def aside(self, work, reads):
        self.aside_calls += 1
        results = [None if result is None else result.clone() for result in work()]
        for result in results:
            if result is not None:
                self.late.append((result, result.clone()))
                result.fill_(float("nan"))
        return results

    def join(self):
        self.joined += len(self.late)
        for result, value in self.late:
            result.copy_(value)
        self.late.clear()

    def drop(self):
        self.late.clear()


def assert_same_steps(make, batches: list[Batch], **options) -> LateStreams:
    streams = LateStreams()
    methods = [make(), make()]
    methods[1].load_state_dict(methods[0].state_dict())
    steps = [Step(methods[0], OptimOptions(), **options), Step(methods[1], OptimOptions(), streams=streams, **options)]
    for seed, batch in enumerate(batches):
        losses = []
        for step in steps:
            torch.manual_seed(seed)
            losses.append(step.run(batch, Draws()))
        assert losses[0].keys() == losses[1].keys()
        assert all(torch.equal(loss, losses[1][name]) for name, loss in losses[0].items())
    one, other = (step.state() for step in steps)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert active() is None
    assert not streams.late
    return streams


@pytest.mark.parametrize("preset", ["cyclegan", "dclgan", "simdcl", "dcdgan"])
def test_two_directions_beside_each_other(preset):
    batches = [Batch(*(picture.float() for picture in pictures())) for _ in range(2)]
    streams = assert_same_steps(lambda: build(preset, pool_size=0).float(), batches, precision="bf16")
    assert streams.pairs >= 2 * 3  # per step: generate, the discriminators' loss, and what judges the fakes
    assert streams.aside_calls > 50


def test_weight_gradients_aside(one_block):
    streams = assert_same_steps(small_method, [random_batch(2) for _ in range(2)], precision="bf16")
    assert streams.pairs == 0
    assert streams.joined >= streams.aside_calls > 10


def test_weight_gradients_aside_of_recomputed_blocks_and_parts(one_block):
    make = small_method
    assert assert_same_steps(make, [random_batch(2)], precision="bf16", recompute=True).aside_calls > 10


def test_float32_computes_nothing_aside(one_block):
    """Its weights are not converted, so autograd itself adds their gradients."""
    assert assert_same_steps(small_method, [random_batch(1)]).aside_calls == 0


def test_without_streams_parts_run_in_order():
    order: list[int] = []
    assert beside(lambda: order.append(1) or "one", lambda: order.append(2) or "two") == ("one", "two")
    assert order == [1, 2]
    streams = LateStreams()
    with streaming(streams):
        beside(lambda: order.append(3), lambda: order.append(4))
    assert order == [1, 2, 4, 3]
    assert streams.pairs == 1


def test_a_failure_leaves_no_streams_active():
    with pytest.raises(ZeroDivisionError), streaming(LateStreams()):
        beside(lambda: 1 / 0, lambda: None)
    assert active() is None


def test_a_compiler_sees_one_part_after_the_other():
    @torch.compile(backend="eager", fullgraph=True)
    def both(x):
        return beside(lambda: x + 1, lambda: x * 2)

    streams = LateStreams()
    with streaming(streams):
        one, two = both(torch.ones(2))
    assert one.tolist() == [2, 2]
    assert two.tolist() == [2, 2]
    assert streams.pairs == 0


def test_which_devices_have_streams():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert pick_streams(True, cuda, False)
    assert not pick_streams(False, cuda, True)
    with pytest.warns(UserWarning, match=r"no effect on a compiled step: set run\.compile=false"):
        assert not pick_streams(True, cuda, True)
    with pytest.raises(ValueError, match=r"run\.streams=true needs a CUDA device, not cpu"):
        pick_streams(True, cpu, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("graph", [False, True])
def test_a_device_gives_the_same_bits(graph):
    steps = []
    for streams in (False, True):
        torch.manual_seed(0)
        method = build("dclgan").float().cuda()
        torch.backends.cudnn.deterministic = True
        step = Step(method, OptimOptions(), "bf16", graph=graph, streams=streams)
        for seed in range(6):
            torch.manual_seed(seed)
            batch = Batch(*(picture.float().cuda() for picture in pictures()))
            step.run(batch, Draws())
        steps.append(step.state())
    assert all(torch.equal(tensor, steps[1][name]) for name, tensor in steps[0].items())
    torch.backends.cudnn.deterministic = False


def test_another_thread_has_streams_of_its_own():
    first, second, found = LateStreams(), LateStreams(), []
    begun, over = threading.Event(), threading.Event()

    def other():
        with streaming(second):
            found.append(active())
            begun.set()
            over.wait(10)
        found.append(active())

    with streaming(first):
        thread = threading.Thread(target=other)
        thread.start()
        begun.wait(10)
        found.append(active())
    over.set()
    thread.join()
    assert found == [second, first, None]
    assert active() is None


def test_nothing_is_kept_after_a_failure():
    streams = LateStreams()

    def fail() -> None:
        with streaming(streams):
            streams.aside(lambda: [torch.ones(2)], ())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not streams.late
    assert streams.joined == 0
