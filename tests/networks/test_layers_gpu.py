"""Tests of the layers' kernels that need a device: large sizes, dtypes, repeatability, capture, determinism.

If there is a device, the tests of `test_kernels_layers.py` and `test_layers_fused.py` also run on it, without the
interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastnce.kernels import few_outputs, few_outputs_backward, instance_norm, instance_norm_backward
from torch import Tensor

from fastnce.networks import PatchGAN, ResnetGenerator, channels_last, set_implementation
from tests.maps import DEVICE, FILTERS, GATE, error, filter_truth, norm_truth

pytestmark = pytest.mark.gpu

SIZES = ((2, 256, 64, 64), (1, 64, 256, 256), (1, 128, 128, 130), (2, 130, 61, 67), (1, 3, 256, 256), (16, 512, 8, 8))


def random_map(*shape: int, dtype=torch.float32) -> Tensor:
    x = 2 * torch.randn(*shape, device=DEVICE) + 1
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_instance_norm_at_the_published_sizes(size, dtype):
    images, channels, height, width = size
    x = random_map(*size, dtype=dtype)
    # Values within rounding of the mean may fall on either side of the activation's corner: move them away.
    close = (x.double() - x.double().mean((2, 3), keepdim=True)).abs() < 1e-4
    x = torch.where(close, x + 0.05, x)
    for slope, margin, residual in (
        (0.0, 1, None),
        (0.0, 3, None),
        (0.2, 0, None),
        (1.0, 0, random_map(*size, dtype=dtype)),
    ):
        upstream = random_map(images, channels, height + 2 * margin, width + 2 * margin, dtype=dtype)
        truth, d_truth = norm_truth(x, slope, margin, residual, upstream)
        results = []
        for _ in range(2):
            y, statistics = instance_norm.instance_norm(x, residual, 1e-5, slope, margin)
            results.append(
                (y, instance_norm_backward.instance_norm_backward(upstream, None, x, statistics, slope, margin)[0])
            )
        assert error(results[0][0], truth) <= GATE[dtype]
        assert error(results[0][1], d_truth) <= GATE[dtype]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FILTERS)
def test_pads_and_blurs_at_the_published_sizes(name, size, dtype):
    forward, backward = FILTERS[name]
    x = random_map(*size, dtype=dtype)
    leaf = x.double().cpu().requires_grad_()
    truth = filter_truth(name, leaf)
    upstream = random_map(*truth.shape, dtype=dtype)
    (d_truth,) = torch.autograd.grad(truth, leaf, upstream.double().cpu())
    results = [(forward(x, *truth.shape[2:]), backward(upstream, *size[2:])) for _ in range(2)]
    assert error(results[0][0], truth) <= GATE[dtype]
    assert error(results[0][1], d_truth) <= GATE[dtype]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_large_flat_picture():
    x = (3 + 0.01 * torch.randn(1, 64, 2048, 2048, device=DEVICE)).contiguous(memory_format=torch.channels_last)
    y, statistics = instance_norm.instance_norm(x, None, 1e-5, 1.0, 0)
    upstream = random_map(*x.shape)
    d_x = instance_norm_backward.instance_norm_backward(upstream, None, x, statistics, 1.0, 0)[0]
    for channel in (0, 37):
        truth, d_truth = norm_truth(x[:, channel : channel + 1], 1.0, 0, None, upstream[:, channel : channel + 1])
        assert error(y[:, channel : channel + 1], truth) <= 5e-5  # of which the rounding of the mean is the most
        assert error(d_x[:, channel : channel + 1], d_truth) <= 5e-5


def test_more_than_2_to_the_31_elements():
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free device memory")
    x = torch.empty(1, 64, 5888, 5888, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).normal_()
    assert x.numel() > 2**31
    y, statistics = instance_norm.instance_norm(x, None, 1e-5, 0.0, 1)
    d_x = instance_norm_backward.instance_norm_backward(y, None, x, statistics, 0.0, 1)[0]
    for channel in (0, 63):
        some = slice(channel, channel + 1)
        truth, d_truth = norm_truth(x[:, some], 0.0, 1, None, y[:, some])
        assert error(y[:, some], truth) <= GATE[torch.bfloat16]
        assert error(d_x[:, some], d_truth) <= GATE[torch.bfloat16]


FEW_OUTPUTS = (
    # channels, side, outputs, kernel, padding
    (64, 262, 3, 7, 0), (32, 256, 3, 3, 1), (65, 61, 1, 7, 0), (256, 64, 16, 5, 2), (3, 128, 4, 3, 0), (16, 40, 3, 1, 0)
)  # fmt: skip


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("size", FEW_OUTPUTS, ids=str)
def test_few_outputs_compared_with_cudnn(size, dtype, tf32, record_property):
    """Sums of 16-bit maps are ten times as exact as cuDNN's TF32. Repeated runs are bit-equal."""
    channels, side, outputs, kernel, padding = size
    x = torch.randn(2, channels, side, side, device=DEVICE).relu().to(dtype, memory_format=torch.channels_last)
    weight = 0.05 * torch.randn(outputs, channels, kernel, kernel, device=DEVICE)
    bias = torch.randn(outputs, device=DEVICE)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*leaves, padding=padding)
    upstream = torch.randn(y.shape, device=DEVICE)
    truth = [y, *torch.autograd.grad(y, leaves, upstream.double())]
    results = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        for _ in range(2):
            ours = few_outputs.few_outputs(x, weight, bias, padding)
            backward = few_outputs_backward.few_outputs_backward
            results.append([ours, *backward(upstream, x, weight, padding, True, True, True)])
        wide = [t.float().requires_grad_() for t in (x, weight.detach(), bias.detach())]
        library = F.conv2d(*wide, padding=padding)
        theirs = [library, *torch.autograd.grad(library, wide, upstream)]
    errors = [
        (error(ours, exact), error(other, exact)) for ours, other, exact in zip(results[0], theirs, truth, strict=True)
    ]
    print(f"{size} {dtype} TF32 {tf32}: errors of the kernels and of cuDNN", errors)
    record_property("errors", str(errors))
    sums = 3e-5 if dtype != torch.float32 else 5e-4 if tf32 else 5e-6
    of_map = GATE[dtype] if dtype != torch.float32 else sums
    for (ours, _), gate in zip(errors, (sums, of_map, sums, 5e-6), strict=True):
        assert ours <= gate
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def networks() -> list[tuple[torch.nn.Module, Tensor]]:
    torch.manual_seed(2)
    pairs = []
    for network in (ResnetGenerator(width=32, blocks=4), PatchGAN(width=32)):
        network.to(DEVICE)
        channels_last(network)
        pairs.append((network, random_map(2, 3, 128, 128).requires_grad_()))
    return pairs


def forward_and_backward(network, x) -> list[Tensor]:
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = network(x)
        loss = (y.float() + 0.5).square().mean()
    leaves = [x, *(p for p in network.parameters() if p.dim() == 4)]
    return [y.detach(), *torch.autograd.grad(loss, leaves)]


def test_networks_in_bfloat16():
    """A device uses the kernels by default. Their error to float32 is about that of eager bfloat16."""
    for network, x in networks():
        set_implementation(network, "eager")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            y = network(x)
            leaves = [x, *(p for p in network.parameters() if p.dim() == 4)]
            truth = [y.detach(), *torch.autograd.grad((y + 0.5).square().mean(), leaves)]
        theirs = forward_and_backward(network, x)
        set_implementation(network, None)
        ours = forward_and_backward(network, x)
        for a, b, exact in zip(ours, theirs, truth, strict=True):
            assert error(a, exact.double()) <= 1.5 * error(b, exact.double()) + 1e-3


def test_networks_in_a_cuda_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA or ROCm graphs")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for network, x in networks():
            set_implementation(network, "triton")
            expected = forward_and_backward(network, x)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    forward_and_backward(network, x)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = forward_and_backward(network, x)
            for _ in range(2):
                graph.replay()
                assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_a_device_that_is_not_the_current_one():
    if torch.accelerator.device_count() < 2:
        pytest.skip("one device only")
    other = torch.device(DEVICE.type, 1)
    network = PatchGAN(width=8, layers=1).to(other)
    set_implementation(network, "triton")
    y = network(torch.randn(1, 3, 32, 32, device=other))
    y.sum().backward()
    assert y.device == other
    assert y.isfinite().all()


def test_a_deterministic_step_on_the_device():
    """With `torch.use_deterministic_algorithms(True)`, a step is bit-equal when repeated and equals the eager one."""
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVIDIA_TF32_OVERRIDE": "0", "PYTHONPATH": str(root)
    }  # fmt: skip
    program = "from tests.maps import check_a_deterministic_step; check_a_deterministic_step(repeat=True)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_pytorchs_instance_norm_at_batch_1(record_property):
    """Print its errors on this device. On the CPU its gradient is wrong for a channels-last incoming gradient."""
    errors = {}
    for images in (1, 2):
        x = random_map(images, 64, 32, 32)
        upstream = random_map(images, 64, 32, 32)
        _, truth = norm_truth(x, 1.0, 0, None, upstream)
        for layout in (torch.contiguous_format, torch.channels_last):
            leaf = x.contiguous(memory_format=layout).requires_grad_()
            (theirs,) = torch.autograd.grad(F.instance_norm(leaf), leaf, upstream)
            errors[f"batch {images}, x {str(layout).removeprefix('torch.')}"] = error(theirs, truth)
        _, statistics = instance_norm.instance_norm(x, None, 1e-5, 1.0, 0)
        assert (
            error(instance_norm_backward.instance_norm_backward(upstream, None, x, statistics, 1.0, 0)[0], truth)
            <= 5e-6
        )
    print(f"F.instance_norm on {DEVICE}, channels-last gradient:", errors)
    record_property("library_instance_norm", str(errors))
