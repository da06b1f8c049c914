"""Tests that need a GPU: capture in a CUDA graph, sizes, the current device, repeatability, the sanitizer.

With a GPU, the interpreter is off, and `test_kernels_nce.py`, `test_kernels_sample.py` and `test_nce_ops.py` run on the
GPU as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastnce import NegativeBank, PatchNCEHead, patch_nce
from fastnce.nce.api import products
from tests.oracle import DEVICE, GRADIENT_GATE, error, oracle, unit_rows

pytestmark = pytest.mark.gpu

CHANNELS, SIDES = (3, 128, 256, 256, 256), (262, 256, 128, 64, 64)


def published_maps(images: int, dtype=torch.bfloat16) -> list[torch.Tensor]:
    maps = [torch.randn(images, c, s, s, device=DEVICE) for c, s in zip(CHANNELS, SIDES, strict=True)]
    maps = [m.to(memory_format=torch.channels_last) for m in maps]
    return [maps[0], *(m.to(dtype) for m in maps[1:])]  # the image stays float32


def published_head(implementation="triton") -> PatchNCEHead:
    torch.manual_seed(1)
    return PatchNCEHead(CHANNELS, init_gain=1.0, implementation=implementation).to(DEVICE)


def step(head, queries, keys, **options):
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = head(queries, keys, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), [*queries, *head.parameters()])


def leaves(maps):
    return [m.detach().requires_grad_() for m in maps]


def test_head_at_the_published_size_equals_eager():
    head, queries, keys = published_head(), leaves(published_maps(2)), published_maps(2)
    ids = head.draw_ids(keys, 2)
    ours = step(head, queries, keys, patch_ids=ids, directions=2)
    head.implementation = "eager"
    theirs = step(head, queries, keys, patch_ids=ids, directions=2)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-2, atol=1e-2)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert error(a, b) <= 3e-2  # two bfloat16 paths


def test_head_repeats_bitwise():
    head, queries, keys = published_head(), leaves(published_maps(2)), published_maps(2)
    ids = head.draw_ids(keys, 2)
    once, again = (step(head, queries, keys, patch_ids=ids, directions=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_head_and_bank_in_a_cuda_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA or ROCm graphs")
    head, queries, keys = published_head(), leaves(published_maps(2)), published_maps(2)
    bank = NegativeBank(512, [16], device=DEVICE)
    rows = [torch.randn(64, 16, device=DEVICE)]
    ids = head.draw_ids(keys, 2)
    expected = step(head, queries, keys, patch_ids=ids, directions=2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(head, queries, keys, patch_ids=ids, directions=2)
            step(head, queries, keys, directions=2)
            bank.enqueue(rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fixed = step(head, queries, keys, patch_ids=ids, directions=2)
        drawn = step(head, queries, keys, directions=2)
        bank.enqueue(rows)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(fixed, expected, strict=True))
    first, pointer = drawn[0].clone(), int(bank.pointer)
    graph.replay()
    assert not torch.equal(first, drawn[0])  # other locations at every replay
    assert int(bank.pointer) == (pointer + 64) % 512


@pytest.mark.parametrize("rows", [16384, 65536])
def test_large_problems_are_exact_in_linear_memory(rows):
    q, k = (unit_rows(rows, 256, dtype=torch.bfloat16).to(DEVICE) for _ in range(2))
    q.requires_grad_()
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    loss = patch_nce(q, k, reduction="none", unit_rows=True, implementation="triton")
    (d_q,) = torch.autograd.grad(loss.sum(), q)
    peak = torch.accelerator.max_memory_allocated() - before
    assert peak <= 6 * q.numel() * q.element_size()
    some = torch.arange(0, rows, rows // 64, device=DEVICE)
    logits = q.detach()[some].double() @ k.double().T / 0.07
    truth = torch.logsumexp(logits, 1) - logits.gather(1, some[:, None])[:, 0]
    assert error(loss[some], truth) <= 1e-5
    d_truth = (torch.softmax(logits, 1) @ k.double() - k[some].double()) / 0.07
    assert error(d_q[some], d_truth) <= GRADIENT_GATE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_every_tile_of_the_table(dim, dtype):
    for groups, rows in ((3, 200), (9, 1000)):  # few rows, many rows
        q, k = unit_rows(groups, rows, dim, dtype=dtype), unit_rows(groups, rows, dim, dtype=dtype)
        for unit in (True, False):
            leaf = q.to(DEVICE).requires_grad_()
            upstream = torch.ones(groups, rows)
            loss = patch_nce(
                leaf.flatten(0, 1), k.to(DEVICE).flatten(0, 1), images=groups, reduction="none", unit_rows=unit,
                implementation="triton",
            )  # fmt: skip
            (d_q,) = torch.autograd.grad(loss.sum(), leaf)
            truth = oracle(q, k, upstream, temperature=0.07)
            assert error(loss.view(groups, rows), truth.loss) <= 1e-5
            assert error(d_q, truth.d_queries) <= GRADIENT_GATE[dtype]


@pytest.mark.parametrize("dim", [64, 256, 512])
def test_float32_is_exact_unless_the_library_may_use_tf32(dim):
    if not torch.cuda.is_available() or torch.version.hip:
        pytest.skip("only CUDA devices have TF32")
    q, k = unit_rows(1, 1000, dim), unit_rows(1, 1000, dim)
    truth = oracle(q, k, torch.ones(1, 1000), temperature=0.07)
    kept = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for allowed in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = allowed
            leaf = q[0].to(DEVICE).requires_grad_()
            loss = patch_nce(leaf, k[0].to(DEVICE), reduction="sum", implementation="triton")
            errors[products(torch.float32, leaf.device)] = error(torch.autograd.grad(loss, leaf)[0], truth.d_queries[0])
    finally:
        torch.backends.cuda.matmul.fp32_precision = kept
    assert errors["exact"] <= GRADIENT_GATE[torch.float32]
    assert 1e-5 <= errors["tf32"] <= 2e-3


def test_a_device_that_is_not_the_current_one():
    if torch.accelerator.device_count() < 2:
        pytest.skip("one device only")
    q = unit_rows(64, 32, dtype=torch.bfloat16).to(torch.device(DEVICE.type, 1)).requires_grad_()
    loss = patch_nce(q, q.detach().flip(0), implementation="triton")
    loss.backward()
    assert loss.device.index == 1
    assert q.grad.isfinite().all()


def test_under_the_sanitizer():
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    program = (
        "import torch; from fastnce import PatchNCEHead\n"
        "h = PatchNCEHead([3, 20], dim=48, patches=30).cuda()\n"
        "q = [torch.randn(2, c, 9, 7, device='cuda', requires_grad=True) for c in (3, 20)]\n"
        "with torch.autocast('cuda', dtype=torch.bfloat16):\n"
        "    h(q, [x.detach() for x in q], directions=2).sum().backward()\n"
    )
    # allocate each tensor separately: the sanitizer does not see borders inside a cached block
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--error-exitcode", "9", sys.executable, "-c", program]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer takes more than 150 s here")
    if "Device not supported" in result.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, result.stdout[-3000:]
