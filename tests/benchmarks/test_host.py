"""The benchmark of the host's CPU time: its arithmetic, its lines, and what it says without a device."""

from __future__ import annotations

import pytest
import torch

from benchmarks import host


def busy(count: int):
    def call():
        total = 0
        for i in range(count):
            total += i
        return total

    return call


@pytest.fixture(autouse=True)
def without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_ratio_compares_cpu_time():
    """Eight times the work has a ratio well above 1 on any machine."""
    row = host.measure(host.Comparison("work", busy(80_000), busy(10_000), "0.30x"), rounds=3, seconds=0.01)
    assert row.ratio > 2
    assert row.ours_us > row.published_us > 0
    assert row.per_launch_us is None
    assert f"ratio {row.ratio:.2f}x  (goal 0.30x)" in host.line(row)


def test_launches_share_the_time_of_a_call():
    row = host.measure(host.Comparison("norm", busy(5_000), None, "15 us", launches=3), rounds=3, seconds=0.001)
    assert row.per_launch_us == pytest.approx(row.ours_us / 3)
    assert row.ratio is None
    assert "us per launch  (goal 15 us)" in host.line(row)


def test_without_a_device_it_ends_in_one_sentence(capsys):
    assert host.main([]) == 2
    assert capsys.readouterr().err.strip() == "error: PyTorch finds no CUDA device, nor libraries that stand in for one"


def test_the_floor_has_the_gradients_of_its_class():
    """The functions without work return what autograd expects, so that they pass through the same engine."""
    rows, gradient = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    (found,) = torch.autograd.grad(host._Nothing.apply(rows, torch.zeros(4), gradient).sum(), rows)
    assert torch.equal(found, gradient)


def test_no_rounds_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        host.main(["--rounds", "0"])
    assert ended.value.code == 2
    assert "--rounds must be at least 1, not 0" in capsys.readouterr().err
