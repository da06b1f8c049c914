"""Advice about steps that wait: from invented figures, and one look at this process."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastnce.engine import busy
from fastnce.engine.busy import BusyWatch, Usage, advice, cpu_quota, throttled_seconds

MEASURED = Usage(wall=10, cpu=3.1, data=0.0, threads=2, cores=2, load=5.3)
"""As measured beside other processes: two threads made 0.7 steps per second, and one made 5."""


def test_threads_that_wait_for_each_other():
    assert advice(MEASURED) == (
        "the machine is busy (load 5.3 on 2 cores), and the 2 threads of this run wait for each other (they compute "
        "16% of the time): run.threads=1 is often several times faster (the same command with it continues the run)"
    )
    assert advice(replace(MEASURED, threads=1, load=4.9)) == (  # there is nothing to do about it
        ""
    )
    large = Usage(wall=10, cpu=20, data=0, threads=16, cores=16, load=28)
    assert "run.threads=4 " in advice(large)  # 12 cores are taken by others


@pytest.mark.parametrize(
    "usage",
    [
        replace(MEASURED, cpu=19, load=2.0),  # alone on the machine
        replace(MEASURED, cpu=14, load=3.5),  # another process, but most of the time is spent computing
        replace(MEASURED, load=1.5),  # waits, but not for a core
        replace(MEASURED, load=None),
        replace(MEASURED, data=0.45, cpu=8),  # computed when it had images
        Usage(wall=10, cpu=39, data=0, threads=4, cores=64, quota=4.0, throttled=5, load=4),
        Usage(wall=10, cpu=39, data=0, threads=64, cores=64, quota=4.0, throttled=0, load=64),
    ],
)
def test_no_advice(usage):
    assert advice(usage) == ""


def test_more_threads_than_a_container_may_use():
    usage = Usage(wall=10, cpu=39, data=0, threads=64, cores=64, quota=4.0, throttled=300, load=70)
    assert advice(usage).startswith("this container may use 4 cores, and 64 threads exceed that")
    assert "run.threads=4 is faster" in advice(usage)
    assert "run.threads=1 " in advice(replace(usage, quota=0.5))


def test_images_that_are_waited_for():
    usage = replace(MEASURED, data=0.6)
    for on_cpu in (True, False):
        assert advice(usage, on_cpu=on_cpu).startswith("60% of the time goes into waiting for images")
    assert advice(MEASURED, on_cpu=False) == ""


def test_a_look_measures_this_process():
    watch = BusyWatch(on_cpu=True)
    begin = time.process_time()
    while time.process_time() - begin < 0.05:
        torch.ones(100, 100) @ torch.ones(100, 100)
    used = time.process_time() - begin
    time.sleep(0.1)
    watch.look(0.5)
    found = watch.usage()
    assert found.cpu >= used
    assert found.wall >= 0.1
    assert 0 < found.data <= 0.5  # half of the time up to the look
    assert found.threads == torch.get_num_threads()
    assert found.cores >= 1
    assert found.load is None or found.load >= 0
    assert found.throttled >= 0


def test_the_advice_comes_once_and_after_some_seconds(monkeypatch):
    monkeypatch.setattr(BusyWatch, "usage", lambda self: MEASURED)
    watch = BusyWatch(on_cpu=True)
    assert watch.look(0.0) == ""
    monkeypatch.setattr(busy, "SECONDS", 0.0)
    assert "run.threads=1" in watch.look(0.0)
    assert watch.look(0.0) == ""


def test_a_measure_without_advice_begins_anew(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(busy, "time", SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 2))
    watch = BusyWatch(on_cpu=False)
    for seconds, judged in ((3.0, False), (3.0, True), (1.0, False)):
        now[0] += seconds
        assert watch.look(0.2) == ""
        assert (watch.usage().wall < 1) == judged
    assert (watch.usage().wall, watch.usage().cpu) == (1.0, 0.5)
    assert watch.usage().data == pytest.approx(0.2)


def test_quotas_of_both_versions_of_control_groups(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    for folder, files in (
        (new, {"cpu.max": "250000 100000\n", "cpu.stat": "usage_usec 5\nnr_throttled 3\nthrottled_usec 1500000\n"}),
        (
            old,
            {
                "cpu.cfs_quota_us": "150000\n",
                "cpu.cfs_period_us": "100000\n",
                "cpu.stat": "throttled_time 2500000000\n",
            },
        ),
    ):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    missing = tmp_path / "missing"
    assert [cpu_quota((missing, group)) for group in (new, old)] == [2.5, 1.5]
    assert [throttled_seconds((missing, group)) for group in (new, old)] == [1.5, 2.5]
    (new / "cpu.max").write_text("max 100000\n")
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    assert [cpu_quota((group,)) for group in (new, old, missing, Path("/dev/null"))] == [None] * 4
    (new / "cpu.stat").write_text("no numbers here\n")
    assert throttled_seconds((new,)) == throttled_seconds((missing,)) == 0
