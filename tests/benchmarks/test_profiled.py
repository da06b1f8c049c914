"""The profile of a step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import profiled


def test_launches_are_summed_by_name(tmp_path):
    launches = [("a", 0.0, 4.0), ("b", 4.0, 5.0), ("a", 5.0, 7.0), ("c", 9.0, 10.0), ("d", 19.0, 20.0)]
    lines = profiled.lines_of("cut", 1, [profiled.Launch(*launch) for launch in launches], most=2)
    assert [(line.kernel, line.count, line.microseconds) for line in lines] == [
        ("a", 2, 6.0),
        ("b", 1, 1.0),
        (profiled.REST, 2, 2.0),
    ]
    assert sum(line.share for line in lines) == pytest.approx(1.0)
    assert {line.busy for line in lines} == {9.0 / 20.0}
    profiled.write(tmp_path / "profile.csv", lines)
    assert [line.kernel for line in profiled.read(tmp_path / "profile.csv")] == ["a", "b", profiled.REST]
    assert profiled.lines_of("cut", 1, []) == []


def test_a_step_that_fails_does_not_affect_other_profiles(tmp_path, monkeypatch):
    def replayed(name, images, *_):
        if (name, images) == ("cut", 1):
            raise RuntimeError("out of memory")
        return [profiled.Launch("kernel", 0.0, 2.0)]

    monkeypatch.setattr(profiled, "replayed", replayed)
    assert profiled.main([str(tmp_path / "profile.csv")]) == 1
    lines = profiled.read(tmp_path / "profile.csv")
    assert [(line.step, line.images) for line in lines] == [("cut", 8), ("fastcut", 1)]


def test_user_annotations_are_not_kernels():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(
            name=name, device_type=kind, is_user_annotation=named, time_range=SimpleNamespace(start=1, end=3)
        )
        for name, kind, named in (("kernel", cuda, False), ("span", cuda, True), ("operator", cpu, False))
    ]
    profile = SimpleNamespace(events=lambda: events)
    assert profiled.launches_of(profile) == [profiled.Launch("kernel", 1, 3)]
