"""The benchmark programs run, measure what they say, and write what they promise. No times are asserted."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    baselines,
    cases,
    chain,
    compiled,
    count,
    loss,
    machine,
    measure,
    observe,
    plot,
    published,
    run,
    step,
    table,
    watch,
    waterfall,
)
from fastnce import patch_nce
from fastnce.common import timing
from fastnce.nce.impl import reference
from tests.conftest import plain_environment

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

STAND_IN_LOSS = """
import torch
from torch import nn
import visdom
import torchvision.transforms as transforms

class PatchNCELoss(nn.Module):
    def __init__(self, opt):
        super().__init__()
        self.opt = opt

    def forward(self, feat_q, feat_k):
        logits = feat_q @ feat_k.detach().T / self.opt.nce_T
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkouts" / "standin"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").write_text("")
    (folder / "models" / "patchnce.py").write_text(STAND_IN_LOSS)
    return folder


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "results"
    command = [sys.executable, "benchmarks/run.py", "--out", str(out), "--quick", "--device", "cpu", "--threads", "1"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=_environment())
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


def _environment():
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


@pytest.mark.slow
def test_quick_run_writes_every_row_with_its_machine(quick_run):
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
        assert row["joules"] == row["joules_per_1000_images"] == ""  # not measured on a CPU: empty, not zero
        assert row["launch_floor_ms"] == ""
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
    assert "x what the step takes" in printed
    assert "growth of a step: time side^" in printed
    assert {path.name for path in out.iterdir()} <= {"results.csv", "results.json", "infonce.png"}


def test_list_names_every_part(capsys):
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(part.name in printed for part in run.PARTS)


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "--published", "tests"], ["--only", "nothing"]])
def test_a_wrong_command_is_one_sentence(arguments, capsys, monkeypatch):
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
    print("much more than one line", file=sys.stderr)
    raise RuntimeError("went wrong")

def slow(context):
    yield Row("slow", "x", "eager", note="first")
    time.sleep(600)

def providers(context):
    context.patience = 3.0
    # the profiler may take that long on a busy machine; this is a process of its own
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
    beside = module.time_interleaved
    def dies_beside(calls, *args, **options):
        if any("captured" in key for key in calls): os._exit(7)
        return beside(calls, *args, **options)
    module.time_interleaved = dies_beside
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
    # these parts do not use it; where this process has asked for a device, a forked one would begin from nothing
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


def test_a_part_that_fails_or_hangs_loses_nobody_elses_rows(broken, capsys):
    code, results, out = broken(["bad", "slow", "good"], 0.1)
    assert code == 1
    assert [row["benchmark"] for row in results["rows"]] == ["bad", "slow", "good"]
    assert "went wrong" in results["parts"]["bad"]
    assert "stopped at its limit" in results["parts"]["slow"]
    assert results["parts"]["good"].startswith("ran in")
    assert {path.name for path in out.iterdir()} == {"results.csv", "results.json", "logs.txt"}
    words = (out / "logs.txt").read_text()
    bad = words[words.index("===== bad: ") : words.index("===== slow: ")]
    assert "much more than one line" in bad
    assert "Traceback" in bad
    assert "===== good" not in words
    complaint = capsys.readouterr().err
    assert "part bad failed" in complaint
    assert "part slow failed" in complaint


def test_time_that_is_over_is_said_of_each_part(broken):
    code, results, _ = broken(["slow", "good", "good"], 0.007)  # less than LEAST_SECONDS
    assert code == 1
    assert results["parts"] == {"slow": measure.OVER, "good": measure.OVER}


@pytest.mark.slow
def test_a_provider_that_hangs_or_ends_the_process_loses_nobody_elses_figures(broken, monkeypatch):
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


def test_a_fault_while_several_are_timed_leaves_out_those_with_graphs(broken):
    code, results, out = broken(["timing"], 0.4)
    rows = {(row["benchmark"], row["provider"]): row for row in results["rows"]}
    assert rows["timing", "eager"]["note"] == rows["after", "eager"]["note"] == ""
    assert rows["timing", "eager"]["p50_ms"] > 0
    graph = rows["timing", "graph"]
    assert graph["p50_ms"] > 0
    assert graph["note"].startswith(f"{measure.ALONE}; stopped: exit code 7")
    assert rows["after", "eager"]["launches"] > 0
    assert "begun again after timing () by graph, captured: exit code 7" in results["parts"]["timing"]
    assert code == 1
    assert "===== timing: ran to its end =====" in (out / "logs.txt").read_text()


def test_times_alone_outlive_the_process(broken, monkeypatch):
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
def test_a_part_whose_process_cannot_be_forked_begins_from_nothing(tmp_path, monkeypatch):
    # as on a CUDA machine where something has used the device before
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(loss, "patchnce", None)  # what a forked process would call
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--out", str(tmp_path), "--quick", "--device", "cpu", "--only", "patchnce", "--minutes", "2"]
    assert run.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 3
    assert all(row["p50_ms"] > 0 for row in rows)


def test_what_steps_cost_is_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "COUNTED", [("cut", 1)])
    options = run.parse(["--out", str(tmp_path), "--work", str(tmp_path), "--side", "32"])
    assert run.count(options) == 0
    known = count.Counts(tmp_path / run.COUNTS)
    monkeypatch.setattr(count, "count_step", None)  # nothing is left to count
    full, half = (known.get("cut", 1, 32, precision) for precision in ("fp32", "bf16"))
    assert full[0] == half[0] > 1e9
    assert full[1] > half[1] > 0


def test_a_process_that_is_killed_is_named(tmp_path):
    outcome = watch.supervise(
        lambda seconds: os.kill(os.getpid(), signal.SIGKILL) or 0, tmp_path / "a.jsonl", tmp_path / "a.log", 20.0
    )
    assert outcome.trouble == "killed by SIGKILL: it said nothing"
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


def test_a_second_try_without_times_takes_no_figure_away():
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


def test_energy_and_launches_come_when_all_times_are_there(monkeypatch):
    order = []

    def timed(calls, *_, **__):
        order.append("alone" if list(calls) == [""] else "beside")
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(measure, "time_interleaved", timed)
    monkeypatch.setattr(measure, "joules", lambda *_: order.append("joules") or 3.0)
    monkeypatch.setattr(measure, "launches", lambda *_: order.append("launches") or 7)
    monkeypatch.setattr(measure, "peak_bytes", lambda *_: 1)
    context = cases.Context(CPU)
    calls = [cases.Provider("a", lambda x: x, energy=True), cases.Provider("b", lambda x: x)]
    rows = []
    for name in ("one", "two"):
        rows += measure.measure(cases.Case(name, {"images": 1}, lambda: (torch.ones(3),), calls), context)
    assert {(row.joules, row.launches) for row in rows} == {(None, None)}
    again = list(measure.measure_rest(context))
    assert order == ["alone", "alone", "beside"] * 2 + ["joules"] * 2 + ["launches"] * 4
    assert {row.key() for row in again} == {row.key() for row in rows}
    assert [(row.joules, row.launches) for row in rows] == [(3.0, 7), (None, 7)] * 2
    assert not list(measure.measure_rest(context))


def test_a_slow_call_is_timed_alone_by_its_first_one(monkeypatch):
    called = []
    monkeypatch.setattr(measure, "SLOW", -1.0)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, _: call())
    monkeypatch.setattr(measure, "time_interleaved", lambda calls, *_, **__: {name: [] for name in calls})
    case = cases.Case("toy", {}, lambda: (torch.ones(3),), [cases.Provider("x", lambda x: called.append(x))])
    (row,) = measure.measure(case, cases.Context(CPU, quick=True))
    assert (row.note, row.rounds, len(called)) == (measure.ALONE, 1, 2)
    assert row.p50_ms > 0


def test_nothing_begins_after_the_time_is_over():
    called = []
    provider = cases.Provider("x", lambda x: called.append(x))
    case = cases.Case("toy", {}, lambda: (torch.ones(3),), [provider])
    (row,) = measure.measure(case, cases.Context(CPU, quick=True, until=time.monotonic() + 1.0))
    assert (row.note, called) == (measure.OVER, [])


def test_slow_calls_stop_at_the_end_of_the_time():
    calls = {name: (lambda: time.sleep(0.05)) for name in "ab"}
    times = timing.time_interleaved(calls, CPU, 5.0, until=time.monotonic() + 0.12)
    assert 2 <= sum(len(t) for t in times.values()) <= 4


def test_rates_and_floors_of_a_row():
    limits = {"matmul_bfloat16_flop_per_s": 1e9, "copy_bytes_per_s": 1e9, "launch_eager_s": 1e-3}
    row = cases.Row("toy", "x", "eager", images=4, dtype="bfloat16", p50_ms=2000.0, launches=7, joules=3.0)
    provider = cases.Provider("x", lambda: None, bytes=1e8)
    case = cases.Case("toy", {}, tuple, [provider], flop=1e9, bytes=5.0, steps=600)
    measure._Ready(row, case, provider, provider.call, 2, provider.call, "").take([4000.0], limits)
    assert (row.steps_per_s, row.images_per_s) == (0.5, 2.0)
    assert (row.floor_ms, row.floor_fraction, row.ceiling_fraction) == (1000.0, 0.5, 0.5)
    assert row.launch_floor_ms == 7.0
    assert row.joules_per_1000_images == 750.0
    assert row.note == "600 steps: 20.0 minutes"


def test_stages_of_the_waterfall_add_one_thing_each():
    for loss_can_be_told in (True, False):
        stages = waterfall.stages(cuda=True, loss=loss_can_be_told)
        for before, after in itertools.pairwise(stages):
            changed = {name for name, value in vars(after).items() if value != getattr(before, name)} - {"name"}
            assert len(changed) == 1, (before, after)
        assert len({stage.loss for stage in stages}) == 1 + loss_can_be_told
    assert {stage.precision for stage in waterfall.stages(cuda=False)} == {"fp32", "bf16"}


def test_a_table_leaves_out_what_nobody_measured():
    row = {**vars(cases.Row("toy", "fastnce", "eager", images=2)), "p50_ms": 1.0, "p20_ms": 0.5, "p80_ms": 2.0}
    header, line = table.table([row], {"device": "CPU"}).splitlines()
    assert header.split() == ["benchmark", "size", "provider", "mode", "ms", "20..80", "%", "x", "ours"]
    assert line.split() == ["toy", "2", "fastnce", "eager", "1.000", "0.500..2.000", "1.00"]
    assert table.table([], {}) == "no rows"


class FakeRecorder:
    """Records nothing and replays nothing."""

    fails = False

    def warm(self, function):
        return function()

    def record(self, function):
        if self.fails:
            raise RuntimeError("no memory for it")
        return object(), function()

    def replay(self, graph):
        pass

    def close(self, graphs):
        pass


@pytest.fixture
def small_step():
    context = cases.Context(CPU, quick=True)
    recorder = FakeRecorder()
    made = step.OurStep("cut", context, "fp32", {"graph": recorder}, patches=16)
    return made, recorder, step.pictures(1, 32, CPU)


def test_a_step_that_is_recorded_anew_says_so(small_step, monkeypatch):
    made, recorder, pictures = small_step
    made(*pictures)
    made(*pictures)
    assert made.check() == ""
    with step.library_flags(benchmark=not torch.backends.cudnn.benchmark):
        with pytest.warns(UserWarning, match="anew"):
            made(*pictures)
        assert made.check() == "not captured"
        for _ in range(step.WARM_UP):
            made(*pictures)
        assert made.check() == "recorded anew while it was timed"
    recorder.fails = True
    for _ in range(step.WARM_UP):  # outside, with the flag as it was
        made(*pictures)
    with pytest.warns(UserWarning, match="uncaptured"):
        made(*pictures)
    assert made.check() == "recording failed: no memory for it"


def test_a_check_after_the_timing_is_part_of_the_note():
    provider = cases.Provider("x", lambda x: x, note="first", check=lambda: "not captured")
    case = cases.Case("toy", {}, lambda: (torch.ones(3),), [provider], steps=1)
    (row,) = measure.measure(case, cases.Context(CPU, quick=True))
    assert row.note == "first; not captured; 1 steps: 0.0 minutes"


class FakeCheckout:
    """Their repository as far as a step needs it; its model turns cuDNN's trying of kernels on, as theirs does."""

    name = "fake"

    def __init__(self):
        self.seen = []

    def model(self, arguments):
        torch.backends.cudnn.benchmark = True
        self.opt = None
        return self

    def data_dependent_initialize(self, data): ...

    def setup(self, opt): ...

    def parallelize(self): ...

    def set_input(self, data): ...

    def optimize_parameters(self):
        self.seen.append(torch.backends.cudnn.benchmark)
        if len(self.seen) == 3:
            raise RuntimeError("out of memory")


def test_what_their_code_sets_in_the_library_does_not_reach_ours():
    checkout = FakeCheckout()
    call = step._theirs(checkout, "cut", 1, cases.Context(CPU, quick=True))
    with step.library_flags(benchmark=False):
        for _ in range(2):
            call(None, None)
            assert not torch.backends.cudnn.benchmark
        with pytest.raises(RuntimeError):
            call(None, None)
        assert not torch.backends.cudnn.benchmark
    assert checkout.seen == [True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cut", "dclgan", "dcdgan-released"])
def test_the_published_step_of_the_dry_run(name):
    folder = os.environ.get("FASTNCE_PUBLISHED")
    if folder is None:
        pytest.skip("no published checkouts: set FASTNCE_PUBLISHED to a folder that holds them")
    context = cases.Context(CPU, quick=True, published=published.find_checkouts(sorted(Path(folder).iterdir())))
    provider = next(p for p in step.step_providers(name, 1, context) if "published" in p.name)
    (row,) = measure.measure(step.step_case(name, 1, context, [provider]), context)
    assert row.p50_ms is not None, row.note
    assert not torch.backends.cudnn.benchmark


@pytest.fixture
def planned(monkeypatch):
    """The cases of a part on a GPU, without running them."""

    def plan(part, module):
        found = []
        monkeypatch.setattr(module, "measure", lambda case, context: found.append(case) or iter(()))
        context = cases.Context(torch.device("cuda"))
        context.counts.get = lambda *_: (1.0, 2.0)
        assert not list(part(context))
        return found

    return plan


def test_compilers_come_last_and_the_goals_first(planned):
    assert run.PARTS[-1].name == "compiled"
    steps = [case for part in (step.cut, step.dual, step.fastcut) for case in planned(part, step)]
    assert [(case.benchmark, case.size["images"]) for case in steps] == [
        ("step cut", 1),
        ("step cut", 8),
        ("step dclgan", 1),
        ("step dcdgan-released", 1),
        ("step dclgan", 4),
        ("step dcdgan", 1),
        ("step fastcut", 1),
    ]
    stages = planned(waterfall.waterfall, waterfall)
    assert not any("compile" in provider.mode for case in steps + stages for provider in case.providers)
    tried = planned(waterfall.cudnn, waterfall)
    assert [case.size["images"] for case in tried] == [1, 8]
    assert all(provider.call._flags["benchmark"] for case in tried for provider in case.providers)
    assert not any(provider.call._flags["benchmark"] for case in stages for provider in case.providers)
    for case in steps:
        first, second, *rest = case.providers
        assert (first.mode, first.energy, second.energy) == ("captured", True, True)
        assert second.note == "stands in for the published step"
        assert not any(provider.energy for provider in rest)
    by_compiler = planned(compiled.compiled, compiled)
    assert [(case.benchmark, case.size["images"]) for case in by_compiler] == [
        ("compiled step cut", 1),
        ("compiled step fastcut", 1),
        ("compiled step cut", 8),
    ]
    modes = [provider.mode for provider in by_compiler[0].providers]
    assert modes == ["captured", "compile whole, captured", "compile, captured"]


def test_a_compiled_provider_has_a_case_of_its_own(monkeypatch):
    context = cases.Context(CPU)
    monkeypatch.setattr(cases.Context, "large", True)
    found = list(loss.infonce_cases(context))
    assert [case.benchmark for case in found] == ["infonce"] * 3 + ["infonce, compiled"]
    assert [provider.mode for provider in found[-1].providers] == ["eager", "compile"]
    assert found[-1].size == found[1].size
    assert not any(provider.mode == "compile" for case in found[:3] for provider in case.providers)


def test_graphs_of_a_compiled_function_are_counted():
    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    for function, graphs in ((broken, "2 graphs"), (lambda x: x * 2, "1 graph")):
        counted = loss.CountsGraphs(torch.compile(function, backend="eager"))
        for _ in range(2):
            counted(torch.ones(3))
        assert counted.check() == f"compiled to {graphs}"


def test_memory_of_all_layers_is_asked_for():
    context = cases.Context(CPU)
    rows = 256
    one = 4 * rows * rows * loss.DIM * 4
    layers = context.free_bytes() // one
    assert loss.fits_here(context, rows, cosine=True, layers=layers - 1)
    assert not loss.fits_here(context, rows, cosine=True, layers=layers + 1)


def test_the_commit_is_not_that_of_a_folder_above(tmp_path, monkeypatch):
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


def test_peak_memory_on_the_cpu_is_that_of_the_tensors():
    def call():
        a = torch.empty(1000, 1000)
        b = torch.empty(1000, 1000)
        del a
        return torch.empty(500, 1000), b

    assert observe.peak_bytes(call, CPU) == 8_000_000


def test_operators_are_counted():
    x = torch.ones(3, requires_grad=True)
    one = observe.launches(lambda: x.detach() * 2, CPU, "eager")
    two = observe.launches(lambda: x.detach() * 2 * 2, CPU, "eager")
    assert two == one + 1
    backward = observe.launches(lambda: torch.autograd.grad((x * 2).sum(), x), CPU, "eager")
    assert backward > observe.launches(lambda: (x * 2).sum(), CPU, "eager")


def test_spans_that_a_program_names_are_no_launches():
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
        """Of a PyTorch whose profiler holds its results elsewhere."""

        @staticmethod
        def events():
            return [Public, Public, Public]

    assert observe.device_events(Other) == 3


def test_what_a_profiler_holds_is_read():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3) + 1
    assert profile.profiler.kineto_results.events()  # else launches on a GPU would be counted the slow way
    assert observe.device_events(profile) == 0


def test_interleaved_times_have_a_round_each():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.time_interleaved(calls, CPU, 0.0, min_rounds=4, least_ms=0.0)
    assert [len(t) for t in times.values()] == [4, 4]
    assert order[-8:] == list("abbaabba")
    assert timing.percentiles([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_a_provider_that_raises_gets_a_row_without_figures():
    def broken(x):
        raise MemoryError("too large")

    providers = [cases.Provider("good", lambda x: x + 1), cases.Provider("bad", broken)]
    case = cases.Case("toy", {"patches": 3}, lambda: (torch.ones(3),), providers)
    good, bad = measure.measure(case, cases.Context(CPU, quick=True))
    assert good.p50_ms > 0
    assert bad.p50_ms is None
    assert bad.note == "did not run: MemoryError: too large"


def test_floor_is_the_larger_of_arithmetic_and_traffic():
    limits = {"matmul_float32_flop_per_s": 1e9, "copy_bytes_per_s": 1e6}
    assert timing.floor_ms(1e9, 2e6, "float32", limits) == 2000.0
    assert timing.floor_ms(1e9, 1e3, "float32", limits) == 1000.0
    assert timing.floor_ms(1e9, 1e3, "float32", {}) is None


@pytest.mark.parametrize("images", [1, 3])
def test_baselines_compute_the_definition(images):
    queries, keys = torch.nn.functional.normalize(torch.randn(2, images * 12, 16, dtype=torch.float64), dim=2)
    queries.requires_grad_()
    exact, _, _ = reference.nce_rows(
        queries.unflatten(0, (images, -1)), keys.unflatten(0, (images, -1)), temperature=0.07
    )
    torch.testing.assert_close(baselines.cut_loss(queries, keys, images), exact.flatten())
    whole = patch_nce(queries, keys, images=1, reduction="none")
    for function in (baselines.dclgan_loss, baselines.normalized_cross_entropy):
        torch.testing.assert_close(function(queries, keys), whole)
    (gradient,) = torch.autograd.grad(whole.sum(), queries)
    torch.testing.assert_close(baselines.sdpa_query_gradient(queries, keys), gradient)


def test_every_provider_of_the_chain_does_the_same_work():
    context = cases.Context(CPU, quick=True)
    torch.manual_seed(0)
    (case,) = chain.chain_cases(context)
    inputs = case.make_inputs()
    results = [provider.call(*inputs) for provider in case.providers]
    shapes = [[tuple(t.shape) for t in result] for result in results]
    assert shapes[0] == shapes[1] == shapes[2]


def test_checkouts_are_found_alone_and_in_a_folder(checkout):
    for folder in (checkout, checkout.parent):
        (found,) = published.find_checkouts([folder])
        assert (found.name, found.folder) == ("standin", checkout)
    with pytest.raises(ValueError, match=r"models/patchnce\.py is missing"):
        published.find_checkouts([checkout / "models"])


def test_a_checkout_that_is_not_there_is_left_out(checkout, capsys):
    (found,) = published.find_checkouts([checkout.parent / "nowhere", checkout])
    assert found.name == "standin"
    assert "nowhere is not there" in capsys.readouterr().err


def test_a_parser_that_ends_the_process_only_fails(checkout):
    (checkout / "options").mkdir()
    (checkout / "options" / "__init__.py").write_text("")
    (checkout / "options" / "train_options.py").write_text("raise SystemExit(2)")
    with pytest.raises(RuntimeError, match="standin ended with 2"):
        published.Checkout(checkout).model(["--netG", "unknown"])


def test_a_checkout_leaves_the_names_of_others_alone(checkout, monkeypatch):
    before = dict(sys.modules)
    mine = type(sys)("models")
    monkeypatch.setitem(sys.modules, "models", mine)
    opened = published.Checkout(checkout)
    cls = opened.losses()["PatchNCELoss"]
    assert sys.modules["models"] is mine
    assert not {"models.patchnce"} & set(sys.modules)
    assert str(checkout) not in sys.path
    assert "visdom" in before or "visdom" not in sys.modules
    queries, keys = loss.unit_rows(8, 4, CPU, torch.float32)
    rows = cls(published.loss_options())(queries, keys)
    torch.testing.assert_close(rows, patch_nce(queries, keys, reduction="none"))
    assert not opened.cosine


def test_growth_is_fitted_and_a_plot_without_matplotlib_is_a_sentence(tmp_path, monkeypatch):
    row = {"benchmark": "infonce", "provider": "x", "mode": "eager"}
    rows = [row | {"patches": s, "p50_ms": 1e-3 * s**2, "peak_bytes": 5 * s} for s in (64, 256, 1024)]
    assert list(plot.growth(rows)) == ["growth of x: time S^2.00, memory S^1.00"]
    steps = [
        {"benchmark": "growth cut", "images": b, "side": 64, "patches": 256, "p50_ms": 3.0 + 2.0 * b} for b in (1, 2, 4)
    ]
    steps += [steps[0] | {"side": side, "p50_ms": 5.0 * (side / 64) ** 2} for side in (128, 256)]
    by_images, by_side = plot.step_growth(steps)
    assert by_images.endswith("3 ms + 2 ms an image")
    assert "time side^2.00 from side 64 to 256" in by_side
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.draw(tmp_path, rows) == "no plot: matplotlib is not installed"
    assert "fewer than two sizes" in plot.draw(tmp_path, rows[:1])


def test_pytest_benchmark_finds_the_same_cases():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--collect-only"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=plain_environment())
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for wanted in ("test_chain[chain-1x16-fastnce]", "test_patchnce[patchnce-1x64-CUT]", "test_infonce[infonce-1x128"):
        assert wanted in finished.stdout
