"""`benchmarks/check.py` loses nothing to a stage that fails or hangs, and says last what matters."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import brief, cases, chain, check, compiled, outcomes, profiled, run, short, watch, waterfall
from fastnce.commands.main import main as fastnce
from tests.benchmarks.test_benchmarks import planned  # noqa: F401  # a fixture
from tests.conftest import plain_environment

ROOT = Path(__file__).resolve().parents[2]

PARTS = """
from benchmarks.cases import Row

def good(context):
    yield Row("good", "x", "eager", p50_ms=1.0)

def broken(context):
    yield Row("broken", "x", "eager", p50_ms=2.0)
    raise RuntimeError("went wrong")
"""


def python(words: str):
    return lambda options: [sys.executable, "-c", words.replace("WORK", repr(str(options.work)))]


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """Runs these stages in place of the plan; returns (exit code, results, folder)."""
    (tmp_path / "check_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv(outcomes.FILE, "")
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    monkeypatch.setattr(run, "count", lambda *_: 0)
    monkeypatch.setattr(check, "LEAST_SECONDS", 0.2)
    monkeypatch.setattr(watch, "GRACE", 0.1)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)

    def start(*stages, minutes=1.0):
        monkeypatch.setattr(check, "FIRST", list(stages))
        out = tmp_path / "out"
        code = check.main(["--out", str(out), "--quick", "--device", "cpu", "--minutes", str(minutes)])
        return code, json.loads((out / "results.json").read_text()), out

    return start


def test_a_stage_that_fails_or_hangs_costs_no_other(checked, tmp_path, capsys):
    child = tmp_path / "child"
    hangs = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid)); print('began', flush=True); time.sleep(600)\n"
    )
    part = {name: run.Part(name, "check_parts", name, 1) for name in ("good", "broken")}
    code, results, out = checked(
        check.Stage("fails", 20, command=python("print('much to say'); raise SystemExit(3)")),
        check.Stage("hangs", 8, command=python(hangs)),
        check.Stage("broken", 20, part["broken"]),
        check.Stage("good", 20, part["good"]),
    )
    assert code == 0
    assert [row["benchmark"] for row in results["rows"]] == ["broken", "good"]
    troubles = {stage["name"]: stage["trouble"] for stage in results["stages"]}
    assert list(troubles) == ["fails", "hangs", "broken", "good"]
    assert troubles["fails"] == "exit code 3: much to say"
    assert "stopped at its limit" in troubles["hangs"]
    assert "went wrong" in troubles["broken"]
    assert troubles["good"] == ""
    process = Path("/proc", child.read_text(), "stat")  # its group ended with it
    assert not process.exists() or process.read_text().rpartition(")")[2].split()[0] == "Z"
    words = (out / "logs.txt").read_text()
    assert "much to say" in words
    assert "began" in words
    printed = capsys.readouterr().out.splitlines()
    assert printed == (out / "summary.txt").read_text().splitlines()
    assert any(line.startswith("hangs") for line in printed)
    assert len(list(out.iterdir())) <= 8


def test_what_is_found_is_on_the_disk_after_every_stage(checked, tmp_path):
    """Whatever ends the check itself costs only what comes after."""
    seen = tmp_path / "seen"
    look = f"import shutil; shutil.copy({str(tmp_path / 'out' / 'results.json')!r}, {str(seen)!r})"
    checked(
        check.Stage("good", 20, run.Part("good", "check_parts", "good", 1)),
        check.Stage("look", 20, command=python(look)),
        check.Stage("later", 20, command=python("pass")),
    )
    then = json.loads(seen.read_text())
    assert [row["benchmark"] for row in then["rows"]] == ["good"]
    assert [stage["name"] for stage in then["stages"]] == ["good"]


def test_a_fault_of_the_program_itself_costs_no_other_stage(checked, monkeypatch):
    def broken(options):
        raise OSError("no space left")

    code, results, _ = checked(
        check.Stage("broken", 20, command=broken), check.Stage("good", 20, run.Part("good", "check_parts", "good", 1))
    )
    assert code == 0
    assert [stage["trouble"] for stage in results["stages"]] == ["OSError: no space left", ""]
    assert len(results["rows"]) == 1


def test_the_second_call_knows_its_machine_and_leaves_eight_files(checked, tmp_path, monkeypatch):
    grids = (
        "import pathlib; d = pathlib.Path(WORK) / 'training' / 'samples'; d.mkdir(parents=True)\n"
        "[(d / f'step-{i}.png').write_text('x') for i in range(5)]; print('the last line')"
    )
    out = tmp_path / "out"
    parity = f"import pathlib; d = pathlib.Path({str(out)!r}) / 'parity'; d.mkdir()\n"
    parity += "[(d / n).write_text('x') for n in ('losses.csv', 'losses.png', 'summary.json')]\nprint('as float32')"
    commands = {"parity": parity, "tests": "pass", "training": grids}
    stages = [replace(s, command=python(commands[s.name])) if s.command else s for s in check.SECOND]
    monkeypatch.setattr(check, "SECOND", stages)
    assert check.main(["--second", "--out", str(out), "--quick", "--device", "cpu", "--minutes", "2"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"]["command"] == "python benchmarks/check.py --out DIR --second"
    assert sorted(path.name for path in out.glob("*.png")) == ["fastcut-step-3.png", "fastcut-step-4.png"]
    assert len([path for path in out.rglob("*") if path.is_file()]) <= 8
    assert {"as float32"} == set(results["stages"][1]["lines"])
    assert results["stages"][-1]["lines"] == ["the last line"]


def test_time_that_is_over_is_said(checked):
    code, results, _ = checked(
        check.Stage("first", 20, command=python("pass")),
        check.Stage("second", 20, command=python("pass")),
        minutes=check.LAST_SECONDS / 60 + 0.001,
    )
    assert code == 0
    assert {stage["trouble"] for stage in results["stages"]} == {"not begun: the time is over"}


def test_the_shares_leave_room_for_the_summary_and_the_start():
    for plan, minutes in ((check.FIRST, check.MINUTES), (check.SECOND, check.MINUTES_SECOND)):
        assert sum(stage.seconds for stage in plan) + check.LAST_SECONDS <= 60 * minutes
    assert 60 * check.MINUTES <= 590
    assert check.FIRST[-1].name == "compiled"  # it takes whatever it is given
    for stage in check.FIRST:
        assert stage.part is None or stage.part in [run.MACHINE, *run.SHORT, *run.PARTS]  # found again by its name


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--out", "x", "--only", "nothing"],
        ["--out", "file"],
        *(["--out", "x", "--minutes", n] for n in ("0", "-1")),
    ],
)
def test_a_wrong_command_is_one_sentence(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as stopped:
        check.main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_not_carried_along_is_done_without(checked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "FIRST", [check.Stage("good", 20, command=python("pass"))])
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.xz").write_bytes(b"\xfd7zXZ\0\0\4")
    published = ["--published", str(tmp_path / "none"), str(tmp_path / "empty")]
    more = ["--cache", str(tmp_path / "cut.xz"), "--data", str(tmp_path / "none"), *published]
    assert check.main(["--out", str(tmp_path / "out"), "--quick", "--device", "cpu", *more]) == 0
    said = capsys.readouterr().err
    assert said.count("warning: ") == 4
    assert json.loads((tmp_path / "out" / "results.json").read_text())["stages"][0]["trouble"] == ""


def test_list_names_the_stages(capsys):
    assert check.main(["--list"]) == 0
    *stages, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in stages] == [stage.name for stage in check.FIRST]
    assert total.split() == ["515", "s", "of", "570"]


@pytest.mark.slow
def test_a_dry_run_measures_what_a_cpu_can(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/check.py", "--out", str(tmp_path), "--quick", "--device", "cpu"]
    command += ["--only", "ceilings", "loss", "--minutes", "4"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [stage["trouble"] for stage in results["stages"]] == ["", ""], finished.stderr
    assert {row["benchmark"] for row in results["rows"]} == {"chain", "infonce"}
    assert all(row["p50_ms"] > 0 for row in results["rows"])
    assert results["machine"]["ceilings"]["copy_bytes_per_s"] > 0
    assert str(ROOT) not in json.dumps(results)
    for words in ("our own writing, no checkout", "P1 chain", "chain 1x16, ms: ours"):
        assert words in finished.stdout


# --- the second call ---------------------------------------------------------------------------------------------


def test_the_training_of_the_second_call_is_a_command_that_train_takes(tmp_path, capsys):
    data = tmp_path / "data"
    for domain in ("trainA", "trainB"):
        (data / domain).mkdir(parents=True)
    options = SimpleNamespace(data=data, work=tmp_path, left=lambda: 100.0)
    command = check._training(options)
    assert command[:3] == [sys.executable, "-m", "fastnce"]
    assert fastnce([*command[3:], "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "sample_every = 500" in printed
    assert 'compile = "false"' in printed


# --- what is said last -------------------------------------------------------------------------------------------


def row(benchmark, provider, p50, **more):
    return vars(cases.Row(benchmark, provider, more.pop("mode", "eager"), p50_ms=p50, **more))


def large_report() -> brief.Report:
    report = brief.Report(machine={"device": "A device", "driver": "1" * 300, "torch": "2.11.0"})
    report.stages = [brief.Outcome(f"stage {i}", 10.0, 9.0, "trouble " * 60) for i in range(40)]
    report.smoke = {
        "checks": [{"name": f"check {i} " * 20, "error": None, "gate": 1e-3, "ok": False} for i in range(60)]
    }
    report.tests = [
        {"name": f"tests/test_x.py::test_{i}", "outcome": "failed", "why": "wrong " * 50, "seconds": 1.0}
        for i in range(99)
    ]
    report.rows = [row(f"case {i} {'x' * 99}", f"provider {j}", 1.0, patches=j) for i in range(50) for j in range(9)]
    report.rows += [row("missing", f"provider {i}", None, note=f"did not run: reason {i}") for i in range(50)]
    report.profile = [
        profiled.Line(f"step {i}", 1, "kernel " * 30, 1, 2.0, 0.5, 0.9) for i in range(30) for _ in range(60)
    ]
    return report


def test_the_summary_fits_whatever_was_found():
    lines = brief.summary(large_report())
    assert len(lines) <= brief.LINES
    assert max(map(len, lines)) <= brief.WIDTH
    assert sum(len(line) + 1 for line in lines) < 12_000
    assert any("more lines" in line for line in lines)
    assert brief.summary(brief.Report())  # nothing found at all


def test_a_faulty_section_costs_no_other():
    report = brief.Report(machine={"device": "A device", "ceilings": "none"})
    report.stages = [brief.Outcome("smoke", 10.0, 9.0)]
    lines = brief.summary(report)
    assert "a section of this summary failed: AttributeError" in lines[1]
    assert lines[2].startswith("smoke")


def test_goals_are_told_with_what_was_found():
    report = brief.Report()
    report.rows = [
        row("chain", "cut classes", 3.0, images=1, note="published"),
        row("chain, bf16", "fastnce", 0.05, images=1, mode="graph"),
        row("chain", "fastnce", 0.5, images=1),
        row("infonce", "fastnce", 1.0, patches=16384, ceiling_fraction=0.5, peak_bytes=2**20),
        row("infonce", "fastnce", 0.7, patches=16384, mode="graph", ceiling_fraction=0.7),
        row("infonce", "fastnce, unit rows", 0.5, patches=16384),
        row("infonce", "CUT", 8.0, patches=16384, note="written here, no checkout was given"),
        row("step fastcut", "fastnce bf16", 3.0, images=1, mode="captured"),
        row("step fastcut", "cut published", 9.0, images=1, note="published"),
    ]
    said = "\n".join(brief._goals(report))
    assert "captured bf16 60.00x (goal 30x)" in said
    assert "captured float32 ? (9x)" in said
    assert "uncaptured 6.00x (4x)" in said
    assert "50% of the ceiling, captured 70% (goal 60 %), with unit_rows 2.00x, beside CUT (our own writing, " in said
    assert "no checkout) 8.00x (goal 6x), memory 1 MiB" in said
    assert "3.00 ms, 213,400 steps: 10.7 minutes; 3.00x cut" in said


# --- tests as they end -------------------------------------------------------------------------------------------


def test_how_each_test_ended_survives_the_end_of_pytest(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'one is not two'\n"
        "def test_passed_over(): pytest.skip('not here')\n"
        "@pytest.fixture\ndef broken(): raise ValueError('no fixture')\n"
        "def test_without_its_fixture(broken): pass\n"
        "def test_that_ends_everything(): os._exit(9)\n"
    )
    file = tmp_path / "outcomes.jsonl"
    environment = plain_environment() | {outcomes.FILE: str(file), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.outcomes", "-p", "no:cacheprovider", str(tmp_path)]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120).returncode == 9
    found = {line["name"].split("::")[1]: (line["outcome"], line["why"]) for line in outcomes.read(file)}
    assert found["test_right"] == ("passed", "")
    assert found["test_wrong"][0] == "failed"
    assert "one is not two" in found["test_wrong"][1]
    assert found["test_passed_over"][0] == "skipped"
    assert found["test_without_its_fixture"][0] == "failed"
    assert "no fixture" in found["test_without_its_fixture"][1]
    assert "test_that_ends_everything" not in found


def test_each_test_of_the_engine_is_in_one_of_the_calls():
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu and not slow"]
    found = []
    for chosen in ([], ["-k", check.OF_THE_ENGINE]):
        command = [*collect, *chosen, "tests/engine/test_engine_gpu.py"]
        plain = os.environ | {"PYTEST_ADDOPTS": ""}  # one more -v, and the names would be written in another way
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=plain).stdout
        found.append({line for line in listed.splitlines() if "::" in line})
    every, first = found
    assert first < every
    assert {"cut-bf16", "dcdgan-bf16"} <= {name.partition("[")[2].rstrip("]") for name in first}
    kept, rest = (check.pytest_command(rest=rest) for rest in (False, True))
    assert kept[kept.index("-k") + 1] == f"not engine_gpu or {check.OF_THE_ENGINE}"
    assert rest[rest.index("-k") + 1] == f"not ({check.OF_THE_ENGINE})"
    assert [word for word in rest if word.endswith(".py")] == [
        "tests/engine/test_engine_gpu.py",
        "tests/engine/test_recorded_run.py",
    ]


# --- what is measured --------------------------------------------------------------------------------------------


def test_the_parts_of_the_check_on_a_gpu(planned, monkeypatch):  # noqa: F811
    found = planned(short.steps, short)
    assert [(case.benchmark.removeprefix("step "), case.size["images"]) for case in found] == list(short.STEPS)
    for case in found:
        ours, theirs = case.providers
        assert (ours.name, ours.mode) == ("fastnce bf16", "captured")
        assert theirs.note == "stands in for the published step"
    monkeypatch.setattr(chain, "_chain_providers", lambda *_: iter(()))  # they would be built on the device
    monkeypatch.setattr(cases.Context, "free_bytes", lambda _: 2**36)
    cases_of_loss = planned(short.loss, short)
    assert [(case.benchmark, case.size["patches"], case.size["images"]) for case in cases_of_loss] == [
        ("chain, bf16", 256, 1),
        ("chain", 256, 1),
        ("infonce", 16384, 1),
        ("infonce", 65536, 1),
        ("chain, bf16", 256, 16),
        ("chain", 256, 16),
        ("infonce", 256, 1),
    ]
    assert "fastnce, unit rows" in {p.name for p in cases_of_loss[2].providers}
    assert [p.mode for case in planned(short.compiled, compiled) for p in case.providers] == [
        "captured",
        "compile, captured",
    ]


def test_every_stage_of_the_waterfall_is_captured(planned):  # noqa: F811
    monkeypatched = planned(lambda context: waterfall.fall("cut", 1, context), waterfall)
    assert [p.mode for p in monkeypatched[0].providers] == ["captured"] * 9 + ["eager"]
    apart = planned(lambda context: waterfall.fall("cut", 8, context), waterfall)
    assert [len(case.providers) for case in apart] == [1] * 10
