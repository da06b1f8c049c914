"""The supervisor of a part: killed processes, and the rows of its journal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from benchmarks import measure, watch


def test_a_killed_process_is_reported(tmp_path):
    outcome = watch.supervise(
        lambda seconds: os.kill(os.getpid(), signal.SIGKILL) or 0, tmp_path / "a.jsonl", tmp_path / "a.log", 20.0
    )
    assert outcome.trouble == "killed by SIGKILL: no output"
    assert outcome.rows == []


def test_rows_of_providers_that_were_not_timed_are_kept():
    journal = watch.Journal()
    for event in (
        {"begin": "a", "row": {"note": ""}, "seconds": 1.0},
        {"end": "a", "row": {"note": "n", "launches": 7}},
        {"begin": "b", "row": {"note": ""}, "seconds": 1.0},
        {"refuse": "b", "why": "hung", "row": {"note": ""}},
        {"row": {"note": "done"}, "key": "c"},
    ):
        journal.take(event)
    assert list(journal.all_rows()) == [
        {"note": "done"},
        {"note": "n; stopped before it was timed", "launches": 7},
        {"note": "did not run: hung"},
    ]


def test_a_second_try_without_times_replaces_no_time():
    journal = watch.Journal()
    alone = {"note": measure.ALONE, "p50_ms": 2.0}
    for event in (
        {"end": "a", "row": alone},
        {"end": "b", "row": alone},
        {"timing": ["a"], "seconds": 1.0},
    ):
        journal.take(event)
    assert journal.suspects() == {"a": alone}
    for event in (
        {"refuse": "a", "why": "died", "row": alone},
        {"row": {"note": "did not run: died", "p50_ms": None}, "key": "a"},
        {"end": "b", "row": {"note": "did not run: no memory", "p50_ms": None}},
    ):
        journal.take(event)
    assert not journal.suspects()
    first, second = journal.all_rows()
    assert first == alone | {"note": f"{measure.ALONE}; stopped: died"}
    assert second == alone
    journal.take({"row": {"note": "", "p50_ms": 1.0}, "key": "b"})
    assert {row["p50_ms"] for row in journal.all_rows()} == {1.0, 2.0}


def seconds_until_hung(monkeypatch, rate, seconds=20.0):
    """Simulate a process that uses the CPU at this rate (a number, or a function from time to CPU seconds)."""
    clock = [0.0]
    used = rate if callable(rate) else lambda now: rate * now
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watch, "cpu_seconds", lambda group: used(clock[0]))
    patience = watch.Patience(1, seconds)
    while clock[0] < 1000:
        clock[0] += 0.1
        if patience.over(clock[0]):
            return clock[0]
    return None


def test_a_compiler_on_a_busy_machine_is_not_hung(monkeypatch):
    assert seconds_until_hung(monkeypatch, 0.0) == pytest.approx(20.0, abs=0.5)  # sleeps
    assert seconds_until_hung(monkeypatch, 1.0) == pytest.approx(20.0, abs=0.5)  # spins
    assert seconds_until_hung(monkeypatch, 0.25) == pytest.approx(80.0, abs=0.5)  # a quarter of a core
    # compiles for a while, then waits in vain
    assert seconds_until_hung(monkeypatch, lambda now: min(0.25 * now, 10.0)) == pytest.approx(48.0, abs=1.0)


def test_cpu_time_is_that_of_the_group_and_its_ended_children():
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    words = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {burn!r}])\nprint(flush=True)\n"
    words += "time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", words], start_new_session=True, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert watch.cpu_seconds(process.pid) >= 0.4
        assert watch.cpu_seconds(2**22 + 1) == 0.0  # no such group
    finally:
        process.kill()
        process.wait()
