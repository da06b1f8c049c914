"""The kernels compile for every architecture, do not spill, fit, and use the matrix unit.

No device is needed. Triton's interpreter must be off, so they are compiled in a separate process.

benchmarks/results/aot.csv has all builds of this checkout's kernels by the Triton of constraints.txt. One of 64 is
compiled again. Another Triton compiles the cases of everyday training.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastnce.kernels import configs

from benchmarks import aot, aot_record

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks/results/aot.csv"
COMMAND = "python -m benchmarks.aot --recorded benchmarks/results/aot.csv --out benchmarks/results"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture():
    result = run("-m", "benchmarks.aot", "--quick", "--recorded", RECORD, "--again", "64")
    *builds, summary = result.stdout.splitlines() or [""]
    faults = [line for line in builds if not line.endswith(" ok")]
    assert not faults, "\n".join(faults)
    assert result.returncode == 0, result.stderr[-3000:]
    count, new, left_out, _ = map(int, re.findall(r"\d+", summary))
    assert count == len(builds)
    for arch in configs.ARCHITECTURES:
        built = {name for line in builds if line.startswith(f"{arch} ") for name in line.split()}
        assert {"nce_kernel", "project_kernel", "merge_kernel", "draw_kernel"} <= built, arch
    if aot_record.compiler_key() in aot_record.compilers(RECORD):
        assert not new + left_out, f"{new + left_out} builds are not on record: {COMMAND}"


CHANGES = """
from dataclasses import replace
from benchmarks.aot import compile_all
from benchmarks.aot_record import Lookup
from fastnce.kernels import sample

def build(known, again=0):
    [found] = compile_all(("sm_90",), "draw", lookup=Lookup(known, again))
    return found

first = build({})
wrong = {first.key: replace(first.usage(), registers=999)}
print(first.registers, build(wrong).registers, build(wrong, again=1).fault())
kernel = sample.draw_kernel
kernel.starting_line_number += 5
print(build(wrong).registers)
kernel._unsafe_update_src(kernel.src.replace("0x7FFFFFFF", "0x3FFFFFFF"))
changed = build(wrong)
print(changed.registers, changed.key == first.key)
"""


@pytest.mark.parametrize("part", [("--case", "draw"), ("--quick",), ("--arch", "sm_90")])
def test_a_table_does_not_lose_its_other_builds(part, tmp_path, monkeypatch, capsys):
    (tmp_path / "aot.csv").write_text("all builds")
    monkeypatch.setattr(sys, "argv", ["aot", *part, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        aot.main()
    assert ended.value.code == 2
    assert "would lose its other builds" in capsys.readouterr().err
    assert (tmp_path / "aot.csv").read_text() == "all builds"


@pytest.mark.slow
def test_a_build_is_taken_from_the_record_only_while_the_kernel_is_the_same():
    found, moved, changed = run("-c", CHANGES).stdout.splitlines()
    real, recorded, fault = found.split(" ", 2)
    assert int(real) < 256
    assert recorded == moved == "999"
    assert "registers=999" in fault
    assert changed == f"{real} False"


HEAD = b"key,kernel,registers,spill_bytes,shared_bytes,matrix_instructions\n"


@pytest.mark.parametrize("text", [b"a,b\n1,2\n", HEAD + b"x,y,1\n", HEAD + b"x,y,1,2,3,z\n", b"\xff"])
def test_another_table_is_no_record(text, tmp_path):
    (tmp_path / "aot.csv").write_bytes(text)
    with pytest.raises(ValueError, match="is no table that --out has written"):
        aot_record.read(tmp_path / "aot.csv")
