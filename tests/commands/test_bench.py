"""`fastnce bench` runs, reports its figures, and reports cases that failed. No times are asserted."""

import errno
import json
import os

import pytest
import torch

from fastnce.commands import bench
from fastnce.commands import main as cli
from fastnce.common import timing
from tests.ends import largest_file, one_sentence


def test_the_table_has_every_case_and_the_ceilings(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--quick", "--device", "cpu", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    stored = json.loads(file.read_text())
    assert [line["work"] for line in stored["lines"]] == [
        "InfoNCE, 64 rows", "chain, 32x32", "CUT step, 32x32, B=1", "data, 32x32, B=8"
    ]  # fmt: skip
    for line in stored["lines"]:
        assert line["work"] in printed
        assert line["milliseconds"] > 0
        assert line["rate"] > 0
        assert line["floor_milliseconds"] is None or line["floor_milliseconds"] > 0
    assert stored["ceilings"]["copy_bytes_per_s"] > 0
    assert {"matmul_float32_flop_per_s", "matmul_bfloat16_flop_per_s"} <= set(stored["ceilings"])
    assert "no accelerator: measuring small sizes on the CPU" in printed
    assert "x the rate of the step above" in printed


def test_a_failed_case_is_reported_and_the_others_run(monkeypatch, capsys):
    def broken(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(bench, "_chain", broken)
    monkeypatch.setattr(bench, "_step", broken)
    assert bench.main(["--quick", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("failed: MemoryError: too large") == 2
    assert "pairs from a cache" in printed


def test_no_case_starts_after_the_time_limit(monkeypatch):
    monkeypatch.setattr(bench, "BUDGET", -1.0)
    monkeypatch.setattr(bench, "ceilings", lambda device, quick: {"copy_bytes_per_s": 1e9})
    lines, _ = bench.run(torch.device("cpu"), quick=True, say=lambda _: None)
    assert len(lines) == 4
    assert all(line.note == "not run: no time left" and line.milliseconds is None for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--device", "nothing"], "--device nothing: "), (["--size", "3"], "unrecognized arguments: --size 3 ")],
)
def test_a_wrong_command_is_one_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastnce: {said}")


def test_ceilings_of_a_cpu():
    found = timing.ceilings(torch.device("cpu"), quick=True)
    assert all(value > 0 for value in found.values())
    assert "launch_eager_s" not in found


def test_figures_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    file = tmp_path / "bench.json"
    file.write_text("old")
    monkeypatch.setattr(bench, "run", lambda *_: ([bench.Line("a case", 1.0)], {}))
    with largest_file(100):
        assert cli.main(["bench", "--device", "cpu", "--json", str(file)]) == 2
    assert one_sentence(capsys) == f"fastnce: {file}: {os.strerror(errno.EFBIG)}\n"
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    with pytest.raises(SystemExit):  # before anything is measured
        bench.main(["--device", "cpu", "--json", str(tmp_path / "absent" / "bench.json")])
    assert "there is no folder" in capsys.readouterr().err
