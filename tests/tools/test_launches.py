"""The launch table, the journal and the results."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from fastnce.engine import cudagraph
from tools.standin import __main__, cases, expected, install, launches, matrix, results

ROOT = Path(__file__).resolve().parents[2]


def outcome(case: str, **more) -> matrix.Outcome:
    return matrix.Outcome(case, matrix.PASSED, 1.5, "tree", launches={"triton nce_kernel": 2}, **more)


def test_tables_are_read_as_they_were_written(tmp_path):
    tables = {
        "cut/bf16/eager": Counter({"triton nce_kernel": 1, "torch fill, long": 3}),
        "cut/fp32/eager": Counter({"triton nce_kernel": 2}),
        "sincut/fp16/whole": Counter({"triton inductor pointwise": 40}),
    }
    launches.write(tables, tmp_path / "table.csv")
    found = launches.read(tmp_path / "table.csv")
    assert {name: +table for name, table in found.items()} == tables
    assert launches.read(tmp_path / "absent.csv") == {}
    again = tmp_path / "again.csv"
    launches.write(found, again)
    assert again.read_text() == (tmp_path / "table.csv").read_text()


def test_differences_name_old_and_new_counts():
    old, new = Counter({"a": 2, "b": 1, "c": 3}), Counter({"a": 2, "b": 4, "d": 1})
    assert launches.differences(old, new) == [
        "b: 1 launches in the table, 4 now",
        "c: 3 launches in the table, 0 now",
        "d: 0 launches in the table, 1 now",
    ]
    assert launches.differences(old, Counter(old)) == []
    assert launches.differences(Counter(), new) == ["the case is not in the launch table: --write adds it"]


def test_the_committed_table_has_every_case():
    tables = launches.read()
    assert set(tables) == {case.name for case in cases.CASES if expected.is_recorded(case.name)}
    unrecorded = [case for case in cases.CASES if not expected.is_recorded(case.name)]
    assert {case.form for case in unrecorded} <= {"parts", "whole"}
    late = ("negcut/", "fsesim/", "lsesim/", "dclgan+")  # all other cases are recorded, except whole ones
    assert {case.form for case in unrecorded if not case.name.startswith(late)} <= {"whole"}
    for name, table in tables.items():
        assert sum(table.values()) > 100, name
        assert any(kernel.startswith("triton ") and "inductor" not in kernel for kernel in +table), name
        assert any("inductor" in kernel for kernel in +table) == (not name.endswith("/eager")), name


def test_a_journal_continues_with_the_outcomes_of_the_same_tree(tmp_path, monkeypatch):
    ran = []

    def run_case(case, folder, tree):
        ran.append(case.name)
        return matrix.Outcome(case.name, matrix.PASSED, 1.0, tree, launches={"triton nce_kernel": 2})

    monkeypatch.setattr(matrix, "run_case", run_case)
    monkeypatch.setattr(matrix, "digest_of_tree", lambda: "one")
    two, reports = cases.select(["cut/bf16/eager", "cut/fp32/eager"]), []
    tables = {case.name: Counter({"triton nce_kernel": 2}) for case in two}
    matrix.run(two[:1], tmp_path, tables, False, lambda found, now: None)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"case": "cut/fp32/ea')  # the process was ended here
    found = matrix.run(two, tmp_path, tables, False, lambda found, now: reports.append(now))
    assert ran == ["cut/bf16/eager", "cut/fp32/eager"]
    assert reports == [False, True]
    assert [each.outcome for each in found] == [matrix.PASSED] * 2
    matrix.run(two, tmp_path, tables, True, lambda found, now: None)
    assert len(ran) == 4
    monkeypatch.setattr(matrix, "digest_of_tree", lambda: "other")
    matrix.run(two, tmp_path, tables, False, lambda found, now: None)
    assert len(ran) == 6


def test_a_case_with_other_launches_fails_and_the_journal_keeps_what_ran():
    found = outcome("cut/bf16/eager")
    matrix.compare(found, Counter({"triton nce_kernel": 3}))
    assert found.outcome == matrix.FAILED
    assert found.problems == ["triton nce_kernel: 3 launches in the table, 2 now"]
    found = outcome("cut/bf16/eager")
    matrix.compare(found, Counter({"triton nce_kernel": 2}))
    assert (found.outcome, found.problems) == (matrix.PASSED, [])
    matrix.compare(found, Counter())
    assert found.problems == ["the case is not in the launch table: --write adds it"]


def test_a_case_without_a_record_is_not_compared_until_it_has_one(monkeypatch):
    monkeypatch.setattr(expected, "UNRECORDED", ("dclgan/*/whole",))
    found = outcome("dclgan/bf16/whole")
    matrix.compare(found, Counter())
    assert found.outcome == matrix.PASSED
    matrix.compare(found, Counter({"triton nce_kernel": 3}))
    assert found.outcome == matrix.FAILED


def test_a_case_that_must_fall_back_does_so_or_fails(monkeypatch):
    signs = ["the compiler refused the whole step", "a warning: the step is compiled in parts, not whole: NameError"]
    listed = expected.Fallback("cut/*/whole", (expected.WHOLE, expected.IN_PARTS), "a reason")
    monkeypatch.setattr(expected, "FALLBACKS", (listed,))
    found = outcome("cut/bf16/whole", problems=[*signs])
    matrix.compare(found, None)
    assert (found.outcome, found.problems, found.falls_back) == (matrix.PASSED, [], "a reason")
    found = outcome("cut/bf16/whole", problems=[*signs, "not captured"])
    matrix.compare(found, None)
    assert (found.outcome, found.problems) == (matrix.FAILED, ["not captured"])
    found = outcome("cut/bf16/whole")
    matrix.compare(found, None)
    assert found.outcome == matrix.FAILED
    assert found.problems == [f"expected.py lists it (a reason), but it lacks: {expected.WHOLE}; {expected.IN_PARTS}"]
    found = outcome("dclgan/bf16/whole", problems=[*signs])
    matrix.compare(found, None)
    assert (found.outcome, found.problems) == (matrix.FAILED, signs)


def test_a_process_that_crashes_runs_again_and_one_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "python", lambda folder: Path("/bin/sh"))
    case = cases.CASES[0]
    script = tmp_path / "case.sh"

    def run(text: str) -> matrix.Outcome:
        script.write_text(text)
        monkeypatch.setattr(matrix, "COMMAND", (str(script),))
        return matrix.run_case(case, tmp_path, "tree")

    crashed = run(f"echo x >> {tmp_path}/count; kill -ABRT $$")
    assert crashed.outcome == matrix.FAILED
    assert crashed.problems == ["the process was ended by signal 6; try 2 of 2"]
    assert (tmp_path / "count").read_text().split() == ["x", "x"]
    refused = run(f"echo 'ValueError: no file {tmp_path}/name.txt'; exit 1")
    assert refused.problems == ["exit code 1: ValueError: no file name.txt"]
    monkeypatch.setattr(cases, "MINUTES", dict.fromkeys(cases.MINUTES, 0.01))
    hung = run("sleep 60")
    assert hung.problems == ["the time limit of 0.6 s was reached"]
    assert hung.seconds < 30


def test_results_have_versions_and_no_folder_of_the_machine(tmp_path):
    seconds = [9.0, 8.0, 0.03, 0.04, 0.05, 0.06, 0.001, 0.001]  # two kinds of steps
    rows = [
        outcome("fastcut/bf16/eager", torch="2.11.0", triton="3.6.0", step_seconds=seconds, captures=2),
        outcome("cut/fp32/eager"),
    ]
    rows[1].outcome, rows[1].problems = matrix.FAILED, ["one", "two"]
    results.write(rows, tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    counts = {"cases": 2, "cases in the matrix": len(cases.CASES), "passed": 1, "failed": 1, "fall back": 0}
    assert found["summary"] == counts | {"seconds": 3.0}
    assert found["machine"]["torch"] == "2.11.0"
    assert results.WARM_UP == cudagraph.WARM_UP
    assert [(row["first_step_s"], row["step_ms"]) for row in found["rows"]] == [(9.0, 45.0), (None, None)]
    assert found["machine"]["packages"] == install.pinned()
    with (tmp_path / "results.csv").open(newline="") as text:
        assert [row["problems"] for row in csv.DictReader(text)] == ["", "one | two"]
    assert str(ROOT) not in (tmp_path / "results.json").read_text()


def test_a_difference_is_the_exit_code(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(install, "install", lambda folder: None)
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "check_rules", lambda folder: [])

    def run(selected, folder, tables, fresh, report):
        found = [outcome(case.name) for case in selected]
        matrix.compare(found[0], Counter({"triton nce_kernel": 3}))
        for each in found:
            report(each, True)
        return found

    monkeypatch.setattr(matrix, "run", run)
    assert __main__.main(["--only", "cut/*/eager"]) == 1
    printed = capsys.readouterr().out
    assert "triton nce_kernel: 3 launches in the table, 2 now" in printed
    assert f"2 of 3 cases passed (of {len(cases.CASES)} in the matrix)\n  failed: cut/bf16/eager" in printed
    monkeypatch.setattr(matrix, "check_rules", lambda folder: ["a rule is not enforced"])
    assert __main__.main(["--only", "cut/*/eager"]) == 1
    assert "a rule is not enforced" in capsys.readouterr().err


def test_results_of_the_repository_have_no_folder_of_a_machine():
    for file in (ROOT / "benchmarks" / "results").glob("capture-*/*"):
        assert not re.search(r"/(root|home|tmp|work|opt)/", file.read_text()), file.name


@pytest.mark.parametrize("missing", ["gcc", "readelf"])
def test_a_missing_program_is_one_sentence_and_exit_code_2(monkeypatch, capsys, missing, tmp_path):
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    monkeypatch.setattr(install.shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    assert __main__.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("make capture needs gcc, readelf and c++filt, but")
    assert missing in error
    assert len(error.strip().splitlines()) == 1


def test_the_pins_are_exact_and_name_the_cuda_builds():
    pins = install.pinned()
    assert (pins["torch"], pins["triton"]) == ("2.11.0", "3.6.0")
    assert set(install.HEADERS) < set(pins)
    assert all(re.fullmatch(r"[\d.]+", version) for version in pins.values())
