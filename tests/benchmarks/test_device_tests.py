"""The tests that run on a GPU: which files and tests each half has, and how their outcomes are kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import device_tests, outcomes
from tests.conftest import plain_environment
from tests.programs import run_program

ROOT = Path(__file__).resolve().parents[2]


def test_outcomes_survive_a_crash_of_pytest(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'one is not two'\n"
        "def test_skipped(): pytest.skip('not here')\n"
        "@pytest.fixture\ndef broken(): raise ValueError('no fixture')\n"
        "def test_without_its_fixture(broken): pass\n"
        "def test_that_crashes(): os._exit(9)\n"
    )
    file = tmp_path / "outcomes.jsonl"
    environment = plain_environment() | {outcomes.FILE: str(file), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.outcomes", "-p", "no:cacheprovider", str(tmp_path)]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120).returncode == 9
    found = {line["name"].split("::")[1]: (line["outcome"], line["why"]) for line in outcomes.read(file)}
    assert found["test_right"] == ("passed", "")
    assert found["test_wrong"][0] == "failed"
    assert "one is not two" in found["test_wrong"][1]
    assert found["test_skipped"][0] == "skipped"
    assert found["test_without_its_fixture"][0] == "failed"
    assert "no fixture" in found["test_without_its_fixture"][1]
    assert "test_that_crashes" not in found


@pytest.mark.parametrize("files", [device_tests.FIRST_TESTS, device_tests.SECOND_TESTS], ids=["first", "second"])
def test_every_file_exists_and_has_gpu_tests(files):
    for name in files:
        text = (ROOT / name).read_text()
        assert "mark.gpu" in text, name


def test_every_file_with_gpu_tests_of_kernels_and_engine_is_run():
    named = {*device_tests.FIRST_TESTS, *device_tests.SECOND_TESTS}
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*_gpu.py")}
    assert found <= named


def test_each_test_of_the_engine_is_in_one_half():
    collect = ["-m", "pytest", "--collect-only", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider"]
    found = []
    for selected in ([], ["-k", device_tests.ENGINE_FIRST]):
        command = [*collect, *selected, "tests/engine/test_engine_gpu.py"]
        # (an additional -v would change the format of the names)
        listed = run_program(command, environment=plain_environment() | {"PYTEST_ADDOPTS": ""}).stdout
        found.append({line for line in listed.splitlines() if "::" in line})
    every, first = found
    assert first < every
    assert {"cut-bf16", "dcdgan-bf16"} <= {name.partition("[")[2].rstrip("]") for name in first}
    commands = [device_tests.pytest_command(second=second) for second in (False, True)]
    selected = [command[command.index("-k") + 1] for command in commands]
    assert selected == [f"not engine_gpu or {device_tests.ENGINE_FIRST}", f"not ({device_tests.ENGINE_FIRST})"]
    assert commands[0][-len(device_tests.FIRST_TESTS) :] == list(device_tests.FIRST_TESTS)
    assert commands[1][-len(device_tests.SECOND_TESTS) :] == list(device_tests.SECOND_TESTS)
