"""A run continued with another batch size: epochs, learning rate, end and images against tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnce.commands.main import main
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.distributed import Ranks
from fastnce.engine.loop import train
from fastnce.engine.options import OptimOptions, RunOptions
from fastnce.engine.state_file import sealed
from fastnce.methods import Group, Method, Phase
from fastnce.training import train_run
from fastnce.training.checks import check_same_run
from tests.engine.test_engine import SMALL, small_config, training_tensors
from tests.logs import log_lines

pytestmark = pytest.mark.usefixtures("few_blocks")


class Dot(Method):
    """The smallest method: one 1x1 convolution and one loss."""

    options = None

    def __init__(self):
        super().__init__()
        self.generator = nn.Conv2d(3, 3, 1)

    def generators(self):
        return {"G": self.generator}

    def groups(self):
        return {"G": Group((self.generator,))}

    def phases(self):
        return (Phase(self.loss, ("G",)),)

    def generate(self, batch, draws):
        return {"fake_B": self.generator(batch.a)}

    def loss(self, batch, outputs, draws):
        loss = F.l1_loss(outputs["fake_B"], batch.b)
        return loss, {"G": loss}


class Data:
    """Epochs of so many images; records the steps that it is asked for."""

    def __init__(self, batch: int, epoch: int = 4):
        self.size, self.steps_per_epoch = batch, max(1, epoch // batch)
        self.asked: list[tuple[int, bool]] = []

    def batch(self, step, *, decaying=False):
        self.asked.append((step, decaying))
        return torch.full((self.size, 3, 4, 4), 0.5), torch.zeros(self.size, 3, 4, 4)

    def samples(self, count):
        raise AssertionError("nobody asked for samples")

    def digest(self):
        return "the same"


OPTIM = OptimOptions(lr=0.9, n_epochs=2, n_epochs_decay=2)
RATES = {0: 0.9, 1: 0.9, 2: 0.6, 3: 0.3}  # by epoch: full in n_epochs, then falling by lr / (n_epochs_decay + 1)


@pytest.fixture
def together(monkeypatch):
    """Exchanges between ranks return their input, so that one rank of several can run alone."""
    for name in ("broadcast", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)


def go(folder: Path, ranks: int, batch: int, steps: int = 0, epoch: int = 4, **changes) -> tuple[Data, int]:
    """Train up to a step with so many ranks and images per rank; returns the data and the steps done."""
    run = RunOptions(steps=steps, log_every=1, sample_every=0, monitor_every=0, save_every=100, **changes)
    data = Data(batch, epoch)
    data.steps_per_epoch = max(1, epoch // (batch * ranks))
    done = train(Dot(), data, OPTIM, run, folder, batch_size=batch, ranks=Ranks(0, ranks), quiet=True)
    return data, done


# (ranks, pictures each, up to step) one after another, an epoch is 4 pictures, 4 epochs; then of each step its epoch,
# the data set's step that it reads, and the pictures seen. All by hand.
TABLES = {
    "as it began": (
        [(1, 1, 6), (1, 1, 0)],
        [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
    ),
    "shared otherwise": (
        [(2, 1, 3), (1, 2, 5), (2, 1, 0)],
        [0, 0, 1, 1, 2, 2, 3, 3],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [2, 4, 6, 8, 10, 12, 14, 16],
    ),
    "two ranks, then one": (
        [(2, 1, 5), (1, 1, 0)],
        [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3],
        [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15],
        [2, 4, 6, 8, 10, 11, 12, 13, 14, 15, 16],
    ),
    "one rank, then two, in the middle of a step": (
        [(1, 1, 7), (2, 1, 0)],
        [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3],
        [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7],
        [1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 17],
    ),
    "a batch larger than the epoch": (
        [(1, 1, 3), (4, 2, 0)],
        [0, 0, 0, 0, 1, 2, 3],
        [0, 1, 2, 0, 1, 2, 3],
        [1, 2, 3, 11, 19, 27, 35],
    ),
    "there and back": (
        [(1, 2, 1), (1, 1, 4), (1, 4, 5), (1, 2, 0)],
        [0, 0, 0, 1, 1, 2, 2, 3, 3],
        [0, 2, 3, 4, 1, 4, 5, 6, 7],
        [2, 3, 4, 5, 9, 11, 13, 15, 17],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_schedule_goes_on_where_it_was(name, tmp_path, together):
    stages, epochs, places, pictures = TABLES[name]
    asked = []
    for ranks, batch, steps in stages:
        data, done = go(tmp_path, ranks, batch, steps, change_batch=True)
        asked += data.asked
    assert done == len(epochs)
    assert asked == [(place, epoch >= 2) for place, epoch in zip(places, epochs, strict=True)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(epochs) + 1))
    assert [row["epoch"] for row in rows] == [epoch + 1 for epoch in epochs]
    assert [row["pictures"] for row in rows] == pictures
    assert [row["lr"] for row in rows] == pytest.approx([RATES[epoch] for epoch in epochs])
    lines = re.findall(r"epoch (\d)/4 step (\d+)/(\d+)", (tmp_path / "log.txt").read_text())
    last = [line for line in lines if int(line[1]) > max([0, *(steps for _, _, steps in stages)])]
    assert {int(end) for _, _, end in last} == {len(epochs)}


def test_the_epochs_rest_is_dropped_with_any_batch(tmp_path):
    """5 images in steps of 2: the fifth is left out, and the place never leads beyond the epoch."""
    go(tmp_path, 1, 1, 4, epoch=5)
    data, done = go(tmp_path, 1, 2, epoch=5, change_batch=True)
    assert [step for step, _ in data.asked] == [2, 3, 4, 5, 6, 7]  # four of five are seen: the next epoch begins
    assert done == 10


def test_the_rate_of_the_optimiser_is_the_schedules(tmp_path, monkeypatch):
    """The rate that is used, not only logged: Adam's first step has the length of the rate."""
    from fastnce.engine.step import Step

    rates = []
    run = Step.run
    monkeypatch.setattr(Step, "run", lambda self, *args: rates.append(float(self.groups["G"].lr)) or run(self, *args))
    go(tmp_path, 1, 2, 5)
    go(tmp_path, 1, 1, change_batch=True)
    assert rates == pytest.approx([RATES[epoch] for epoch in (0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3)])


def test_another_batch_is_refused_and_nothing_changes(tmp_path, together):
    go(tmp_path, 2, 1, 5)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "checkpoints").rglob("*")) if path.is_file()}
    for ranks, batch, ways in (
        (
            1,
            1,
            "continue with --nproc 2 data.batch=1, or --nproc 1 data.batch=2, or allow it with run.change_batch=true",
        ),
        (2, 2, "continue with --nproc 2 data.batch=1, or allow it"),
        (3, 1, "continue with --nproc 2 data.batch=1, or allow it"),
    ):
        with pytest.raises(ValueError, match="was trained in steps of 2 pictures a domain") as caught:
            go(tmp_path, ranks, batch)
        assert ways in str(caught.value)
        assert "\n" not in str(caught.value)
    after = {path: path.read_bytes() for path in sorted((tmp_path / "checkpoints").rglob("*")) if path.is_file()}
    assert after == before
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_finished_run_says_so(tmp_path, together):
    go(tmp_path, 1, 1, 3)
    assert go(tmp_path, 1, 1, 2)[1] == 3
    assert "nothing is left to do: run.steps=2 is done" in (tmp_path / "log.txt").read_text()
    assert go(tmp_path, 2, 1, change_batch=True)[1] == 10  # 3 steps, then 7 of two images
    log = (tmp_path / "log.txt").read_text()
    assert "steps of 2 pictures a domain from here on, of 1 before: epoch 1 goes on where it was" in log
    data, done = go(tmp_path, 2, 1)
    assert (done, data.asked) == (10, [])
    last = log_lines(tmp_path)[-1]
    assert last.startswith("nothing is left to do: 4 epochs are done")
    assert last.endswith("is at step 10")
    for batch in (1, 4):  # a finished run stays finished with any batch size
        assert go(tmp_path, 1, batch, change_batch=True)[1] == 10


def forget(run: Path) -> None:
    """Change checkpoints to those of earlier versions."""
    for path in (run / "checkpoints").glob("step-*/state.json"):
        state = json.loads(path.read_text())
        for key in ("progress", "format", "digest", "finite", "sound"):
            del state[key]
        path.write_text(json.dumps(state))


def test_older_checkpoints_are_read_as_before(tmp_path):
    go(tmp_path, 1, 1, 5)
    forget(tmp_path)
    data, done = go(tmp_path, 1, 1, 7)
    assert (data.asked, done) == ([(5, False), (6, False)], 7)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["pictures"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    go(tmp_path, 1, 1, 12)
    forget(tmp_path)
    for change in (False, True):  # 8 steps of two images are the whole schedule
        with pytest.raises(ValueError, match=r"at step 12, beyond the 8 of the schedule: it had a smaller batch"):
            go(tmp_path, 1, 2, change_batch=change)


def command(folder: Path, run: Path, *more: str) -> list[str]:
    return ["train", "fastcut", "--data", str(folder), "--out", str(run), "--quiet", *SMALL, *more]


def test_the_command_refuses_before_anything_is_written(folder, tmp_path, capsys):
    """Also if several processes would be started: none is."""
    run = tmp_path / "run"
    assert main(command(folder, run, "run.steps=1")) == 0
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    for more in (["data.batch=2"], ["--nproc", "2"], ["data.batch=2", "--nproc", "3"]):
        capsys.readouterr()
        assert main(command(folder, run, "run.steps=2", *more)) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "trained in steps of 1 picture a domain (--nproc 1 data.batch=1)" in message
        assert "continue with --nproc 1 data.batch=1, or allow it with run.change_batch=true" in message
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    assert main(command(folder, run, "run.steps=2", "data.batch=2", "run.change_batch=true")) == 0
    assert main(command(folder, run, "run.steps=2", "data.batch=2")) == 0
    assert "nothing is left to do: run.steps=2 is done" in (run / "log.txt").read_text()


def split(run: Path, ranks: int, batch: int) -> None:
    """Change checkpoints to those of so many ranks, whose weights are those of one process."""
    for path in (run / "checkpoints").glob("step-*/state.json"):
        state = json.loads(path.read_text())
        assert state["progress"]["batch"] == ranks * batch
        state["progress"]["ranks"], state["config"]["data"]["batch"] = ranks, batch
        del state["format"], state["digest"]
        path.write_text(sealed(state))


def test_a_batch_that_is_split_otherwise_is_the_same_run(folder, tmp_path):
    """Bit for bit, also if the batch is computed in parts."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["data.batch=2", "optim.n_epochs=1", "optim.n_epochs_decay=1"]
    train_run(small_config(folder, *options), whole, quiet=True)
    train_run(small_config(folder, *options, "run.steps=1"), parts, quiet=True)
    split(parts, 2, 1)
    check_same_run(small_config(folder, "data.batch=1", *options[1:]), parts, 2)
    train_run(small_config(folder, *options, "run.steps=2"), parts, quiet=True)
    split(parts, 2, 1)
    train_run(small_config(folder, *options), parts, quiet=True)
    one, other = training_tensors(whole), training_tensors(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    train_run(small_config(folder, *options, "optim.accumulate=2"), parts, quiet=True)  # finished, so not refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("loss.negatives=batch", "loss.negatives=batch contrasts pictures of the whole batch"),
        ("network.norm=batch", "batch norm takes its statistics over the whole batch"),
        ("loss.gather_negatives=true", ""),
    ],
)
def test_where_the_share_of_a_process_counts(change, reason, folder, tmp_path, monkeypatch):
    changes = ["data.batch=2", change] + (["loss.negatives=batch"] if "gather" in change else [])
    config = small_config(folder, *changes)
    monkeypatch.setattr(Checkpoints, "state", lambda self: (state, tmp_path))
    state = {"config": config.as_dict(), "progress": {"batch": 4, "ranks": 2, "epoch": 0, "pictures": 0, "seen": 0}}
    check_same_run(config, tmp_path, 2)
    config.data.batch = 4
    if reason:
        with pytest.raises(ValueError, match=f"would share them otherwise, which changes the run: {reason}") as caught:
            check_same_run(config, tmp_path, 1)
        assert "continue with --nproc 2 data.batch=2, or allow it" in str(caught.value)
        config.run.change_batch = True
    check_same_run(config, tmp_path, 1)


def test_a_damaged_checkpoint_is_passed_over_by_the_command(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command(folder, run, "run.steps=2", "run.save_every=1")) == 0
    newest = run / "checkpoints" / "step-00000002" / "state.json"
    newest.write_text("{")
    assert main(command(folder, run, "run.steps=3")) == 0
    assert "step-00000002 is damaged (state.json is no JSON" in (run / "log.txt").read_text()
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == ["step-00000001", "step-00000002", "step-00000003"]  # two complete ones, and the damaged one
    for path in (run / "checkpoints").glob("step-*/state.json"):
        path.write_text("{}")
    written = (run / "config.toml").stat().st_mtime_ns
    assert main(command(folder, run, "run.steps=4")) == 2
    assert "every checkpoint is damaged" in capsys.readouterr().err
    assert (run / "config.toml").stat().st_mtime_ns == written
