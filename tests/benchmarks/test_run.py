"""`benchmarks/run.py` measures every part, writes the results, and survives parts that fail or hang."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import loss, measure, run, step, step_costs, watch
from tests.programs import run_program

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick_run(few_blocks, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "results"
    command = ["benchmarks/run.py", "--out", out, "--quick", "--device", "cpu", "--threads", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = run_program(command, environment=environment, anew=["benchmarks"], seconds=300)
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


@pytest.mark.slow
def test_a_quick_run_writes_every_row_with_the_machine(quick_run):
    out, printed = quick_run
    results = json.loads((out / "results.json").read_text())
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["rows"]) > 20
    assert list(results["parts"]) == [part.name for part in run.PARTS]
    steps = {"step cut", "step dcdgan-released", "step fastcut", "growth cut", "waterfall cut", "data step"}
    assert {row["benchmark"] for row in rows} == {"patchnce", "chain", "infonce", "data", "data cache built"} | steps
    for row in rows:
        assert not row["note"].startswith("did not run"), row
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["images_per_s"]) > 0
        assert row["joules"] == row["joules_per_1000_images"] == ""  # not measured on a CPU, thus empty
        assert row["launch_floor_ms"] == row["do_bench_ms"] == row["do_bench_p20_ms"] == row["do_bench_p80_ms"] == ""
        assert row["torch"] == torch.__version__
        if row["benchmark"] != "data cache built":
            assert int(row["peak_bytes"]) > 0
            assert int(row["launches"]) > 0
        if not row["benchmark"].startswith(("data", "growth")):
            assert float(row["floor_ms"]) > 0
            assert float(row["ceiling_fraction"]) > 0
    machine = results["machine"]
    assert machine["threads"] == 1
    assert machine["ceilings"]["copy_bytes_per_s"] > 0
    assert str(ROOT) not in json.dumps(results)
    for text in ("No accelerator: the eager implementation was measured", "fastnce, drop-in classes", "213,400 steps:"):
        assert text in printed
    assert "x the rate of the step" in printed
    assert "growth of a step: time side^" in printed
    assert {path.name for path in out.iterdir()} <= {"results.csv", "results.json", "infonce.png"}


def test_list_names_every_part(capsys):
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(part.name in printed for part in run.PARTS)


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "--published", "tests"], ["--only", "nothing"]])
def test_a_wrong_command_is_an_error_message(arguments, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


BROKEN_PARTS = """
import os, sys, time
import torch
from benchmarks import measure as module
from benchmarks.cases import Case, Provider, Row
from benchmarks.measure import measure

def good(context):
    yield Row("good", "x", "eager")

def bad(context):
    yield Row("bad", "x", "eager", note="first")
    print("more output", file=sys.stderr)
    raise RuntimeError("went wrong")

def slow(context):
    yield Row("slow", "x", "eager", note="first")
    time.sleep(600)

def providers(context):
    context.patience = 3.0
    # on a busy machine the profiler may exceed the patience; this runs in its own process
    module.peak_bytes = module.launches = lambda *_: None
    def works(x): return x + 1
    def raises(x): raise MemoryError("too large")
    def hangs(x): time.sleep(600)
    def dies(x): os._exit(7)
    calls = {f.__name__: f for f in (works, raises, hangs, dies)}
    case = Case("first", {"patches": 3}, lambda: (torch.ones(3),), [Provider(n, f) for n, f in calls.items()])
    yield from measure(case, context)
    yield from measure(Case("second", {}, lambda: (torch.ones(3),), [Provider("works", works)]), context)

def timing(context):
    def works(x): return x + 1
    original = module.time_interleaved
    def dies_with_graphs(calls, *args, **options):
        if any("captured" in key for key in calls): os._exit(7)
        return original(calls, *args, **options)
    module.time_interleaved = dies_with_graphs
    providers = [Provider("eager", works), Provider("graph", works, "captured")]
    yield from measure(Case("timing", {}, lambda: (torch.ones(3),), providers), context)
    yield from measure(Case("after", {}, lambda: (torch.ones(3),), providers[:1]), context)

def killed(context):
    def works(x): return x + 1
    def hangs(x): time.sleep(600)
    providers = [Provider("works", works), Provider("hangs", hangs)]
    yield from measure(Case("killed", {}, lambda: (torch.ones(3),), providers), context)
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    (tmp_path / "broken_parts.py").write_text(BROKEN_PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run, "MACHINE", run.Part("machine", "nothing", "nothing", 1))
    monkeypatch.setattr(run, "LEAST_SECONDS", 0.5)
    monkeypatch.setattr(run, "LAST_SECONDS", 0.0)
    monkeypatch.setattr(watch, "RESTART_SECONDS", 1.0)
    monkeypatch.setattr(watch, "GRACE", 0.1)
    # if this process has used a device, a forked process would start a new one; these parts use no device
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)

    def start(names, minutes):
        parts = [run.Part(name, "broken_parts", name, 1) for name in names]
        monkeypatch.setattr(run, "PARTS", parts)
        (tmp_path / "out").mkdir(exist_ok=True)
        began = time.monotonic()
        code = run.main(["--out", str(tmp_path / "out"), "--quick", "--device", "cpu", "--minutes", str(minutes)])
        assert time.monotonic() - began < 60 * minutes + 10
        return code, json.loads((tmp_path / "out" / "results.json").read_text()), tmp_path / "out"

    return start


def test_a_part_that_fails_or_hangs_keeps_the_rows_of_others(broken, capsys):
    code, results, out = broken(["bad", "slow", "good"], 0.06)
    assert code == 1
    assert [row["benchmark"] for row in results["rows"]] == ["bad", "slow", "good"]
    assert "went wrong" in results["parts"]["bad"]
    assert "stopped at its limit" in results["parts"]["slow"]
    assert results["parts"]["good"].startswith("ran in")
    assert {path.name for path in out.iterdir()} == {"results.csv", "results.json", "logs.txt"}
    logs = (out / "logs.txt").read_text()
    bad = logs[logs.index("===== bad: ") : logs.index("===== slow: ")]
    assert "more output" in bad
    assert "Traceback" in bad
    assert "===== good" not in logs
    errors = capsys.readouterr().err
    assert "part bad failed" in errors
    assert "part slow failed" in errors


def test_parts_after_the_time_limit_are_reported(broken):
    code, results, _ = broken(["slow", "good", "good"], 0.007)  # less than LEAST_SECONDS
    assert code == 1
    assert results["parts"] == {"slow": measure.OVER, "good": measure.OVER}


@pytest.mark.slow
def test_a_provider_that_hangs_or_ends_the_process_keeps_the_results_of_others(broken, monkeypatch):
    monkeypatch.setattr(measure, "LEAST_LEFT", 0.2)
    code, results, out = broken(["providers"], 0.4)
    rows = {(row["benchmark"], row["provider"]): row for row in results["rows"]}
    assert len(rows) == 5
    assert rows["first", "works"]["p50_ms"] > 0
    assert rows["second", "works"]["p50_ms"] > 0
    assert rows["first", "raises"]["note"] == "did not run: MemoryError: too large"
    assert rows["first", "hangs"]["note"] == "did not run: hung: it took more than 3 s"
    assert "exit code 7" in rows["first", "dies"]["note"]
    assert all(rows["first", name]["p50_ms"] is None for name in ("raises", "hangs", "dies"))
    assert code == 0
    assert results["parts"]["providers"].count("hung") == 1
    assert "MemoryError: too large" in (out / "logs.txt").read_text()


def test_a_fault_during_interleaved_timing_refuses_the_graphs(broken):
    code, results, out = broken(["timing"], 0.4)
    rows = {(row["benchmark"], row["provider"]): row for row in results["rows"]}
    assert rows["timing", "eager"]["note"] == rows["after", "eager"]["note"] == ""
    assert rows["timing", "eager"]["p50_ms"] > 0
    graph = rows["timing", "graph"]
    assert graph["p50_ms"] > 0
    assert graph["note"].startswith(f"{measure.ALONE}; stopped: exit code 7")
    assert rows["after", "eager"]["launches"] > 0
    assert "restarted after timing () by graph, captured: exit code 7" in results["parts"]["timing"]
    assert code == 1
    assert "===== timing: finished =====" in (out / "logs.txt").read_text()


def test_times_alone_survive_the_process(broken, monkeypatch):
    monkeypatch.setattr(measure, "LEAST_LEFT", 0.2)
    monkeypatch.setattr(watch, "RESTART_SECONDS", 100.0)
    code, results, _ = broken(["killed"], 0.07)
    works, hangs = results["rows"]
    assert works["p50_ms"] > 0
    assert works["note"] == measure.ALONE
    assert hangs["p50_ms"] is None
    assert "1 of 2 rows alone, not interleaved" in results["parts"]["killed"]
    assert code == 1


@pytest.mark.slow
def test_a_part_that_cannot_be_forked_starts_a_new_process(tmp_path, monkeypatch):
    # as on a CUDA machine whose device is already in use by this process
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(loss, "patchnce", None)  # a forked process would call this
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = run.parse(["--out", str(tmp_path), "--quick", "--device", "cpu", "--only", "patchnce"])
    options.work = tmp_path
    (tmp_path / run.FACTS).write_text("{}")
    (part,) = (part for part in run.PARTS if part.name == "patchnce")
    outcome = run.start(part, options, 120.0)
    assert outcome.trouble is None
    assert len(outcome.rows) == 3
    assert all(row["p50_ms"] > 0 for row in outcome.rows)


def test_step_costs_are_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "COUNTED", [("cut", 1)])
    count, few_blocks = step_costs.count_step, {"generator": "resnet_4blocks"}
    monkeypatch.setattr(step_costs, "count_step", lambda *a, **options: count(*a, **options | {"network": few_blocks}))
    options = run.parse(["--out", str(tmp_path), "--work", str(tmp_path), "--side", "32"])
    assert run.count(options) == 0
    known = step_costs.Counts(tmp_path / run.COUNTS)
    monkeypatch.setattr(step_costs, "count_step", None)  # everything is counted already
    full, half = (known.get("cut", 1, 32, precision) for precision in ("fp32", "bf16"))
    assert full[0] == half[0] > 1e9
    assert full[1] > half[1] > 0
