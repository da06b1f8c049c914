"""Counted FLOP, bytes, launches and live memory against values derived by hand and against a measurement."""

import functools
import os
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import observe, predict
from benchmarks.count import Count
from benchmarks.step import build
from benchmarks.step_costs import Counted, count_step
from fastnce.methods import Batch
from fastnce.networks.fused import blur_down, instance_norm, reflection_pad
from tests.programs import run_program

SMALL = {"generator": "resnet_4blocks", "width": 8, "discriminator_width": 8}


@functools.cache
def counted(name: str, side: int, precision: str = "fp32", fake: bool = True) -> Counted:
    return count_step(name, 1, side, precision, network=SMALL, fake=fake)


def test_the_cost_of_convolution_and_norm():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    with Count() as count:
        y = F.conv2d(x, weight, padding=1)
        F.group_norm(y, 4)
    map_in, kernel, map_out = 4 * 2 * 3 * 64, 4 * 4 * 3 * 9, 4 * 2 * 4 * 64  # bytes
    forward = 2 * (2 * 4 * 64) * (3 * 9)  # two FLOP per weight and output
    convolution, norm = count.works
    assert (convolution.flop, convolution.bytes, convolution.launches) == (forward, map_in + kernel + map_out, 1)
    # the map is read for the moments, read again and written for the result; 2 * 4 planes have two moments each
    assert (norm.flop, norm.bytes, norm.launches) == (0, 3 * map_out + 2 * 4 * 8, 2)
    upstream = torch.randn_like(y)
    with Count() as count:
        torch.autograd.grad(y, (x, weight), upstream)
    (backward,) = count.works
    assert backward.flop == 2 * forward
    assert backward.bytes == 2 * map_out + 2 * map_in + 2 * kernel
    assert backward.launches == 2


def test_a_launch_of_a_layer_moves_its_tensors_once():
    """The layers say how many launches they take; maps of a pad and a blur are read once and written once."""
    x = torch.randn(1, 64, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    for layer, written in ((functools.partial(reflection_pad, margin=3), 38 * 38), (blur_down, 16 * 16)):
        with Count() as count:
            y = layer(x)
        (work,) = count.works
        assert (work.launches, work.bytes) == (1, 2 * 64 * (32 * 32 + written))
        with Count() as count:
            torch.autograd.grad(y, x, torch.ones_like(y))
        backward = next(work for work in count.works if work.name.endswith("_backward"))
        assert (backward.launches, backward.bytes) == (1, 2 * 64 * (32 * 32 + written))


@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_counts_its_own_launches(residual):
    x = torch.randn(1, 64, 96, 96).bfloat16().contiguous(memory_format=torch.channels_last)
    more = torch.randn_like(x) if residual else None
    with Count() as count:
        instance_norm(x, residual=more, slope=0.0)
    (work,) = count.works
    size = 2 * x.numel()
    # a plane that does not fit on chip is read twice; means, deviations and their parts are small
    assert work.launches >= 2
    assert (3 + residual) * size < work.bytes < (3.1 + residual) * size
    with FakeTensorMode(allow_non_fake_inputs=True), Count() as fake:
        instance_norm(x, residual=more, slope=0.0)
    assert (fake.launches, fake.bytes) == (count.launches, count.bytes)


def test_views_move_nothing_and_gathers_only_selected_rows():
    x = torch.randn(100, 8)
    ids = torch.tensor([3, 1])
    with Count() as count:
        x.t().unflatten(0, (2, 4)).permute(1, 0, 2)
    assert (count.bytes, count.launches) == (0, 0)
    with Count() as count:
        x[ids]
    assert count.bytes == 2 * (2 * 8 * 4) + 2 * 8
    with Count() as count:
        x.add_(1.0)
    assert count.bytes == 2 * 100 * 8 * 4


def test_live_memory_is_that_of_live_tensors():
    with Count() as count:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100)  # a view has no storage of its own
        d = torch.zeros(500)
    assert count.peak == 8000
    assert count.live == 6000
    del b, c, d
    assert count.live == 0


@pytest.mark.parametrize("name", ["cut", "dclgan"])
def test_fake_and_real_tensors_have_equal_counts(name):
    fake, real = (counted(name, 32, fake=fake) for fake in (True, False))
    operators = []
    for step in (fake, real):
        found = step.count.by_operator()
        for norm in ("_foreach_norm", "linalg_vector_norm"):  # fake tensors compute gradient norms separately
            found.pop(norm, None)
        operators.append(found)
    assert operators[0] == operators[1]
    assert fake.count.flop == real.count.flop > 0
    assert fake.parameters == real.parameters
    assert fake.count.peak == pytest.approx(real.count.peak, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_counted_peak_is_the_measured_peak(precision):
    """On a CPU, where the profiler reports allocations. Libraries may allocate 3 % inside of operators."""
    side = 32
    step = build("cut", SMALL, torch.device("cpu"), precision, {"layout": torch.contiguous_format}, {})
    batch = Batch(*(torch.rand(2, 1, 3, side, side) * 2 - 1))

    def call():
        step.run(batch, step.method.draw(random.Random(0)))

    call()
    measured = observe.peak_bytes(call, torch.device("cpu"))
    peak = counted("cut", side, precision).count.peak
    assert abs(peak - measured) < 0.03 * measured, (peak, measured)


def test_a_step_is_predicted_from_its_work():
    assumed = {"bandwidth": 1e9, "cached": 2e9, "cache": 5e6, "bfloat16": 2e9, "tf32": 1e9}
    device = predict.Device(**assumed, products=0.5, few=0.5, multiprocessors=4, node=1e-3)
    with Count() as count:
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)
    ones, _, product = count.works
    assert device.seconds(ones) == pytest.approx(4e6 / 2e9)  # fits into the cache
    assert replace(device, cache=3e6).seconds(ones) == pytest.approx(4e6 / 1e9)
    # 64 tiles of 128 x 128 fill 4 multiprocessors 16 times, at half of TF32's rate
    assert product.tiles == 64
    assert device.seconds(product) == pytest.approx(2e9 / (1e9 * 0.5))
    assert device.device_seconds(count) == pytest.approx(2 * 2e-3 + 4.0)


def test_bfloat16_moves_less_and_computes_as_much():
    full, half = (counted("cut", 32, precision) for precision in ("fp32", "bf16"))
    assert half.count.flop == full.count.flop
    assert half.least_bytes < full.least_bytes
    assert 0 < full.least_bytes < full.count.bytes


def test_importing_the_prediction_does_not_set_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = "import os, benchmarks.predict; assert 'TRITON_INTERPRET' not in os.environ"
    finished = run_program(["-c", program], environment=environment, anew=["benchmarks"])
    assert finished.returncode == 0, finished.stderr
