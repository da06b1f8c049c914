"""Peak memory, launches and the measured commit."""

from __future__ import annotations

import contextlib
import subprocess

import pytest
import torch
from triton import testing

from benchmarks import machine, observe

CPU = torch.device("cpu")


def test_peak_memory_on_the_cpu_is_that_of_the_tensors():
    def call():
        a = torch.empty(1000, 1000)
        b = torch.empty(1000, 1000)
        del a
        return torch.empty(500, 1000), b

    assert observe.peak_bytes(call, CPU) == 8_000_000


@pytest.mark.parametrize(
    ("mode", "name"),
    [("eager", "do_bench"), ("compile", "do_bench"), ("captured", "do_bench"), ("graph", "do_bench_cudagraph")],
)
def test_triton_times_the_call_on_its_device(monkeypatch, mode, name):
    used = []

    def function(call, quantiles):
        used.append(call())
        return [10 * q for q in quantiles]

    def device(given):
        used.append(given)
        return contextlib.nullcontext()

    monkeypatch.delattr(testing, "do_bench")
    monkeypatch.delattr(testing, "do_bench_cudagraph")
    monkeypatch.setattr(testing, name, function, raising=False)
    monkeypatch.setattr(torch.cuda, "device", device)
    assert observe.do_bench(lambda: "called", torch.device("cuda:1"), mode) == (5.0, 2.0, 8.0)
    assert used == [torch.device("cuda:1"), "called"]


def test_triton_times_nothing_on_a_cpu():
    assert observe.do_bench(lambda: 1 / 0, CPU, "eager") is None


def test_operators_are_counted():
    x = torch.ones(3, requires_grad=True)
    one = observe.launches(lambda: x.detach() * 2, CPU, "eager")
    two = observe.launches(lambda: x.detach() * 2 * 2, CPU, "eager")
    assert two == one + 1
    backward = observe.launches(lambda: torch.autograd.grad((x * 2).sum(), x), CPU, "eager")
    assert backward > observe.launches(lambda: (x * 2).sum(), CPU, "eager")


def test_user_annotations_are_not_launches():
    cuda, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    class Event:
        def __init__(self, device, named):
            self.device_type, self.is_user_annotation = (lambda: device), (lambda: named)

    class Profile:
        class profiler:
            class kineto_results:
                @staticmethod
                def events():
                    return [Event(cuda, False), Event(cuda, True), Event(cuda, False), Event(host, False)]

    assert observe.device_events(Profile) == 2

    class Public:
        device_type, is_user_annotation = cuda, False

    class Other:
        """A profile of a PyTorch version with another private interface."""

        @staticmethod
        def events():
            return [Public, Public, Public]

    assert observe.device_events(Other) == 3


def test_the_private_interface_of_the_profiler_exists():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3) + 1
    assert profile.profiler.kineto_results.events()  # otherwise launches on a GPU are counted slowly
    assert observe.device_events(profile) == 0


def test_the_commit_is_not_that_of_a_parent_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTNCE_COMMIT", raising=False)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path / "inside")
    assert machine._commit() == ""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert len(machine._commit().removesuffix("+")) == 12
    monkeypatch.setenv("FASTNCE_COMMIT", "abc")
    assert machine._commit() == "abc"
