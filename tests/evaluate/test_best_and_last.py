"""`fastnce evaluate RUN` measures the last and the best checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastnce.commands.main import main
from fastnce.training import train_run
from tests.engine.test_validate import config
from tests.engine.test_validate_sets import draw
from tests.evaluate.test_evaluate import error_of

pytestmark = pytest.mark.usefixtures("few_blocks")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A test set, and a run of three steps with a checkpoint of each."""
    root = tmp_path_factory.mktemp("best and last")
    data = draw(root / "set", {"trainA": 2, "trainB": 2, "test/rain": 2, "test/norain": 2})
    saved = ["run.validate_every=1", "run.save_every=1", "run.keep=9", "run.steps=3", "optim.lr=0.02"]
    train_run(config(data, *saved, method="fastcut"), root / "run", quiet=True)
    return data, root / "run"


def measured(model: Path, data: Path, out: Path, *more: str) -> dict:
    assert main(["evaluate", str(model), "--data", str(data), "--json", str(out), "--device", "cpu", *more]) == 0
    return json.loads(out.read_text())


def name_best(run: Path, step: int) -> None:
    (run / "checkpoints" / "best").write_text(f"step-{step:08d}\n")


def test_both_are_measured_where_they_differ(trained, tmp_path, capsys):
    data, run = trained
    name_best(run, 1)
    one, three = (measured(run / f"checkpoints/step-0000000{n}", data, tmp_path / "one.json") for n in (1, 3))
    assert "checkpoint" not in one  # a checkpoint by its name is that one alone
    capsys.readouterr()
    found = measured(run, data, tmp_path / "both.json", "--csv", str(tmp_path / "m.csv"))
    assert (found["checkpoint"], found["step"], found["best"]["step"]) == ("last", 3, 1)
    for key in ("mean", "inputs", "pictures"):
        assert found[key] == three[key]
    assert (found["best"]["mean"], found["best"]["pictures"]) == (one["mean"], one["pictures"])
    assert one["mean"] != three["mean"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"last (step 3):  2 pictures: Y {three['mean']['psnr_y']:.2f} dB")
    assert lines[1].startswith(f"best (step 1):  2 pictures: Y {one['mean']['psnr_y']:.2f} dB")
    assert f"{three['mean']['psnr_y']:.6f}" in (tmp_path / "m.csv").read_text().splitlines()[-1]  # of the last
    for which, wanted, step in (("last", three, 3), ("best", one, 1)):
        found = measured(run, data, tmp_path / "m.json", "--checkpoint", which)
        assert (found["checkpoint"], found["step"], found["mean"]) == (which, step, wanted["mean"])
        assert "best" not in found


def test_one_that_is_both_is_measured_once(trained, tmp_path, capsys):
    data, run = trained
    name_best(run, 3)
    capsys.readouterr()
    found = measured(run, data, tmp_path / "m.json")
    assert (found["checkpoint"], found["step"]) == ("best and last", 3)
    assert "best" not in found
    assert capsys.readouterr().out.count("best and last (step 3):  2 pictures") == 1


def test_a_damaged_best_checkpoint(trained, tmp_path, capsys):
    data, run = trained
    name_best(run, 7)
    capsys.readouterr()
    assert measured(run, data, tmp_path / "m.json")["checkpoint"] == "last"
    assert "only the last checkpoint is measured: " in "".join(capsys.readouterr())
    asked = ["--data", str(data), "--device", "cpu", "--checkpoint"]
    assert "step-00000007, which is not there any more" in error_of(capsys, str(run), *asked, "both")
    name_best(run, 3)


def test_what_cannot_be_chosen(trained, tmp_path, capsys):
    data, run = trained
    asked = ["--data", str(data), "--device", "cpu", "--checkpoint", "best"]
    one = str(run / "checkpoints" / "step-00000001")
    assert "chooses between the checkpoints of a run" in error_of(capsys, one, *asked)
    assert "has no effect with --inputs-only" in error_of(capsys, "--inputs-only", *asked)
    (run / "checkpoints" / "best").unlink()
    assert "has no best checkpoint, because nothing was validated" in error_of(capsys, str(run), *asked)
    assert "checkpoint" not in measured(run, data, tmp_path / "m.json")
