"""`benchmarks/check.py` keeps all results if a stage fails or hangs, and prints the summary last."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import check, outcomes, run, watch
from experiments import parity
from fastnce.commands.main import main as fastnce
from tests.programs import run_program

ROOT = Path(__file__).resolve().parents[2]

PARTS = """
from benchmarks.cases import Row

def good(context):
    yield Row("good", "x", "eager", p50_ms=1.0)

def broken(context):
    yield Row("broken", "x", "eager", p50_ms=2.0)
    raise RuntimeError("went wrong")
"""


def python(program: str):
    return lambda options: [sys.executable, "-c", program.replace("WORK", repr(str(options.work)))]


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """Run the given stages and return (exit code, results, folder)."""
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


def test_a_stage_that_fails_or_hangs_does_not_affect_others(checked, tmp_path, capsys):
    child = tmp_path / "child"
    hangs = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid)); print('began', flush=True); time.sleep(600)\n"
    )
    part = {name: run.Part(name, "check_parts", name, 1) for name in ("good", "broken")}
    code, results, out = checked(
        check.Stage("fails", 20, command=python("print('its last line'); raise SystemExit(3)")),
        check.Stage("hangs", 4, command=python(hangs)),
        check.Stage("broken", 20, part["broken"]),
        check.Stage("good", 20, part["good"]),
    )
    assert code == 0
    assert [row["benchmark"] for row in results["rows"]] == ["broken", "good"]
    troubles = {stage["name"]: stage["trouble"] for stage in results["stages"]}
    assert list(troubles) == ["fails", "hangs", "broken", "good"]
    assert troubles["fails"] == "exit code 3: its last line"
    assert "stopped at its limit" in troubles["hangs"]
    assert "went wrong" in troubles["broken"]
    assert troubles["good"] == ""
    process = Path("/proc", child.read_text(), "stat")  # the child ended with its group
    assert not process.exists() or process.read_text().rpartition(")")[2].split()[0] == "Z"
    logs = (out / "logs.txt").read_text()
    assert "its last line" in logs
    assert "began" in logs
    printed = capsys.readouterr().out.splitlines()
    assert printed == (out / "summary.txt").read_text().splitlines()
    assert any(line.startswith("hangs") for line in printed)
    assert len(list(out.iterdir())) <= 8


def test_results_are_on_the_disk_after_every_stage(checked, tmp_path):
    """An abort of the check loses only later stages."""
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


def test_a_fault_of_the_program_does_not_affect_other_stages(checked, monkeypatch):
    def broken(options):
        raise OSError("no space left")

    code, results, _ = checked(
        check.Stage("broken", 20, command=broken), check.Stage("good", 20, run.Part("good", "check_parts", "good", 1))
    )
    assert code == 0
    assert [stage["trouble"] for stage in results["stages"]] == ["OSError: no space left", ""]
    assert len(results["rows"]) == 1


def test_the_second_program_records_the_machine_and_writes_eight_files(checked, tmp_path, monkeypatch):
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


def test_stages_after_the_time_limit_are_reported(checked):
    code, results, _ = checked(
        check.Stage("first", 20, command=python("pass")),
        check.Stage("second", 20, command=python("pass")),
        minutes=check.LAST_SECONDS / 60 + 0.001,
    )
    assert code == 0
    assert {stage["trouble"] for stage in results["stages"]} == {"not started: the time is over"}


def test_the_stages_leave_time_for_start_and_summary():
    for plan, minutes in ((check.FIRST, check.MINUTES), (check.SECOND, check.MINUTES_SECOND)):
        assert sum(stage.seconds for stage in plan) + check.LAST_SECONDS <= 60 * minutes
    assert 60 * check.MINUTES <= 590
    assert check.FIRST[-1].name == "compiled"  # the compiler uses all the time that it gets
    for stage in check.FIRST:
        assert stage.part is None or stage.part in [run.MACHINE, *run.SHORT, *run.PARTS]  # parts are looked up by name


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--out", "x", "--only", "nothing"],
        ["--out", "file"],
        *(["--out", "x", "--minutes", n] for n in ("0", "-1")),
    ],
)
def test_a_wrong_command_is_an_error_message(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit) as stopped:
        check.main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_missing_inputs_are_warnings(checked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "FIRST", [check.Stage("good", 20, command=python("pass"))])
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.xz").write_bytes(b"\xfd7zXZ\0\0\4")
    published = ["--published", str(tmp_path / "none"), str(tmp_path / "empty")]
    more = ["--cache", str(tmp_path / "cut.xz"), "--data", str(tmp_path / "none"), *published]
    assert check.main(["--out", str(tmp_path / "out"), "--quick", "--device", "cpu", *more]) == 0
    assert capsys.readouterr().err.count("warning: ") == 4
    assert json.loads((tmp_path / "out" / "results.json").read_text())["stages"][0]["trouble"] == ""


def test_list_prints_the_stages(capsys):
    assert check.main(["--list"]) == 0
    *stages, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in stages] == [stage.name for stage in check.FIRST]
    assert total.split() == ["515", "s", "of", "570"]


@pytest.mark.slow
def test_a_quick_run_measures_on_a_cpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = ["benchmarks/check.py", "--out", tmp_path, "--quick", "--device", "cpu"]
    command += ["--only", "ceilings", "loss", "--minutes", "4"]
    finished = run_program(command, environment=environment, anew=["benchmarks"], seconds=300)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [stage["trouble"] for stage in results["stages"]] == ["", ""], finished.stderr
    assert {row["benchmark"] for row in results["rows"]} == {"chain", "infonce"}
    assert all(row["p50_ms"] > 0 for row in results["rows"])
    assert results["machine"]["ceilings"]["copy_bytes_per_s"] > 0
    assert str(ROOT) not in json.dumps(results)
    for text in ("our own version, no checkout", "P1 chain", "chain 1x16, ms: ours"):
        assert text in finished.stdout


# --- the second program ------------------------------------------------------------------------------------------


def test_the_training_of_the_second_program_is_a_valid_command(tmp_path, capsys):
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


def test_the_parity_of_the_second_program_is_an_experiment(tmp_path, capsys, monkeypatch):
    command = check._parity(SimpleNamespace(data=tmp_path, slower=1.0, out=tmp_path))
    program = Path(command[1])
    assert program == ROOT / "experiments" / "parity.py"
    assert program.is_file()
    seen = []
    monkeypatch.setattr(parity, "run_all", lambda args: seen.append(args) or 0)
    assert parity.main(command[2:]) == 0
    assert (seen[0].data, seen[0].out, seen[0].steps) == (tmp_path, tmp_path / "parity", 2000)
