"""Runs that continue: with what is stored in them, and with another configuration by --change."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from fastnce.commands import train
from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.history import read_history
from fastnce.engine.step import Step
from fastnce.training import train_run
from fastnce.training.checks import check_same_run
from fastnce.training.continuing import continue_config
from tests.engine.test_engine import SMALL, small_config, training_tensors
from tests.logs import log_lines

pytestmark = pytest.mark.usefixtures("few_blocks")

SCHEDULE = ["optim.n_epochs=2", "optim.n_epochs_decay=1", "run.save_every=100"]


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Path:
    """A run of five steps: an epoch has four."""
    run = tmp_path_factory.mktemp("made") / "run"
    train_run(small_config(folder, *SCHEDULE, "run.steps=5"), run, quiet=True)
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def files(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def changes(run: Path) -> list[tuple[int, list[str]]]:
    return [(event["step"], event["changes"]) for event in read_history(run) if event["event"] == "change"]


def stored(run: Path) -> dict:
    found = Checkpoints(run / "checkpoints").state()
    assert found is not None
    return found[0]["config"]


def plain(folder: Path, run: Path, *more: str) -> list[str]:
    return ["train", "fastcut", "--data", str(folder), "--out", str(run), "--quiet", *SMALL, *SCHEDULE, *more]


def last_rate(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["lr"]


def test_out_alone_continues_bit_for_bit(folder, run, tmp_path):
    assert main(["train", "--out", str(run), "--quiet", "run.steps=7"]) == 0
    other = tmp_path / "other"
    train_run(small_config(folder, *SCHEDULE, "run.steps=7"), other, quiet=True)
    ours, wanted = training_tensors(run), training_tensors(other)
    assert all(torch.equal(ours[key], tensor) for key, tensor in wanted.items())
    assert changes(run) == []


def test_out_alone_takes_no_other_values(run, capsys):
    before = files(run)
    for words, sentence in (
        (["optim.lr=1e-4"], "was trained with optim.lr=0.0002: to continue it with another value, write --change "),
        (["run.seed=3"], "--change run.seed=3"),
        (["data.batch=2"], "--change data.batch=2"),
        (["loss.nce_layers=0,4"], "--change loss.nce_layers=0,4"),
    ):
        assert main(["train", "--out", str(run), "run.steps=6", *words]) == 2
        message = capsys.readouterr().err
        assert sentence in message
        assert message.count("\n") == 1
    assert files(run) == before


def test_what_is_missing_is_one_sentence(tmp_path, capsys):
    for words, sentence in (
        ([], "fastnce train needs METHOD, --data DIR and --out RUN, such as: fastnce train fastcut --data DIR"),
        (["data.batch=2"], "fastnce train needs METHOD, --data DIR and --out RUN"),
        (["--out", str(tmp_path / "no")], "holds no run to continue: name METHOD and --data DIR to begin one"),
        (["cut", "--change", "optim.lr=1e-4"], "--change continues a run with other values: add --out RUN"),
        (
            ["cut", "--out", str(tmp_path / "no"), "--change", "optim.lr=1e-4"],
            "holds no run to continue: leave out --change, and write optim.lr=1e-4 instead",
        ),
    ):
        assert main(["train", *words]) == 2
        message = capsys.readouterr().err
        assert sentence in message
        assert message.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_a_changed_rate_is_used_and_recorded(folder, run, capsys, monkeypatch):
    rates = []
    step = Step.run
    monkeypatch.setattr(Step, "run", lambda self, *args: rates.append(float(self.groups["G"].lr)) or step(self, *args))
    assert main(plain(folder, run, "run.steps=7", "--change", "optim.lr=1e-4", "loss.lambda_nce=5")) == 0
    assert rates == pytest.approx([1e-4, 1e-4])
    wanted = ["loss.lambda_nce: 10.0, now 5.0", "optim.lr: 0.0002, now 0.0001"]
    assert changes(run) == [(5, wanted)]
    assert {f"changed from step 5 on: {change}" for change in wanted} <= set(log_lines(run))
    assert (stored(run)["optim"]["lr"], stored(run)["loss"]["lambda_nce"]) == (1e-4, 5.0)
    assert resolve("fastcut", run / "config.toml").optim.lr == 1e-4
    capsys.readouterr()
    before = files(run)
    assert main(plain(folder, run, "run.steps=8")) == 2  # a later plain command says the changed keys
    message = capsys.readouterr().err
    assert "add loss.lambda_nce=5.0 optim.lr=0.0001 to continue it as it was" in message
    assert "or --change loss.lambda_nce=10.0 optim.lr=0.0002 to change it from here on" in message
    assert files(run) == before
    assert main(plain(folder, run, "run.steps=8", "loss.lambda_nce=5.0", "optim.lr=0.0001")) == 0
    assert rates[2:] == pytest.approx([1e-4])


def test_the_schedule_ends_elsewhere_and_the_place_is_kept(run):
    assert main(["train", "--out", str(run), "--quiet", "run.steps=0", "--change", "optim.n_epochs=1"]) == 0
    assert "epoch 2/2 step 8/8" in "\n".join(log_lines(run))
    assert last_rate(run) == pytest.approx(1e-4)  # the second epoch is now one of decay
    assert main(["train", "--out", str(run), "--quiet", "--change", "optim.n_epochs=3"]) == 0
    assert "epoch 4/4 step 16/16" in "\n".join(log_lines(run))
    assert [step for step, _ in changes(run)] == [5, 8]


def test_batch_and_ranks_change_and_the_pictures_count_on(run, monkeypatch):
    assert main(["train", "--out", str(run), "--quiet", "run.steps=0", "--change", "data.batch=2"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # 5 pictures are seen, the place is 1 in epoch 2: rounded down to a whole step of 2; then 2 steps an epoch
    assert [(row["step"], row["pictures"]) for row in rows[5:]] == [(6, 7), (7, 9), (8, 11), (9, 13)]
    assert changes(run) == [(5, ["data.batch: 1, now 2"])]
    assert stored(run)["run"]["change_batch"] is False  # only this command allowed it
    assert main(["train", "--out", str(run), "--quiet"]) == 0
    config, keys = continue_config(run, ["data.batch=1"])
    with pytest.raises(ValueError, match="was trained in steps of 2 pictures"):
        check_same_run(config, run, 4)
    assert check_same_run(config, run, 4, keys) is not None  # other ranks, too


def test_what_cannot_change_is_refused_and_nothing_is_written(folder, run, capsys):
    before = files(run)
    for change, sentence in (
        (["network.width=8"], "--change network.width: the weights of"),
        (["network.norm=batch"], "--change network.norm: the weights of"),
        (["method=cut"], "--change method=cut: the method of a run cannot change"),
        (["loss.projection=16", "optim.lr=1e-4"], "--change loss.projection: "),
        (["optim.lr=1e-4", "loss.nce_layers=0,4,8"], "--change loss.nce_layers: "),
        (["optim.ema=0.9"], "--change optim.ema: "),
        (["optim.lrr=1"], "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["optim.lr=-1"], "optim.lr must be a number from"),
        (["optim.lr"], "optim.lr needs a value"),
        (["data.crop_size=30"], "must have sides that are multiples of 4"),
        (["data.dir=nowhere"], "nowhere"),
        (["data.preprocess=zoom_and_patch"], ""),
    ):
        for command in (["train", "--out", str(run)], plain(folder, run)):
            assert main([*command, "run.steps=9", "--change", *change]) == 2, change
            message = capsys.readouterr().err
            assert sentence in message
            assert message.count("\n") == 1
    assert files(run) == before
    assert main(["train", "--out", str(run), "run.steps=9", "--change", "optim.ema=0.9"]) == 2
    message = capsys.readouterr().err
    assert "cannot continue with 0.9 after 0.0, because its state does not fit (average/G/" in message
    assert message.strip().endswith(f"begin a new run with run.start_from={run}")


def test_pools_keep_their_size_of_pictures(folder, tmp_path, capsys):
    small = [one for one in SMALL if not one.startswith("loss.")]
    run = tmp_path / "run"
    words = ["train", "cyclegan", "--data", str(folder), "--out", str(run), "--quiet", *small, "loss.pool_size=2"]
    assert main([*words, "run.steps=1"]) == 0
    before = files(run)
    continued = ["train", "--out", str(run), "--quiet", "run.steps=2"]
    assert main([*continued, "--change", "data.crop_size=36"]) == 2
    assert "--change data.crop_size: " in (message := capsys.readouterr().err)
    assert "pool_A keeps pictures of 32x32" in message
    assert main([*continued, "--change", "loss.pool_size=0"]) == 2
    assert "--change loss.pool_size: " in capsys.readouterr().err
    assert files(run) == before
    assert main([*continued, "--change", "data.load_size=40"]) == 0


def test_another_size_of_crops_works_without_pools(run):
    assert main(["train", "--out", str(run), "--quiet", "run.steps=6", "--change", "data.crop_size=36"]) == 0
    assert stored(run)["data"]["crop_size"] == 36


def test_other_pictures_are_refused_with_the_key(folder, run, tmp_path, capsys):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "trainA" / "0.png").unlink()
    before = files(run)
    assert main(["train", "--out", str(run), "run.steps=6", "--change", f"data.dir={other}"]) == 2
    assert "other pictures than data.dir gives now, or files were added" in capsys.readouterr().err
    assert files(run) == before


def test_a_change_that_reaches_no_checkpoint_changes_nothing(folder, run, monkeypatch):
    """The process is killed in its first step: the same commands work as before."""

    def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    before = {path: data for path, data in files(run).items() if "checkpoints" in path.parts}
    child = os.fork()
    if child == 0:
        Step.run = killed
        main(["train", "--out", str(run), "--quiet", "run.steps=6", "--change", "optim.lr=1e-4"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {path: data for path, data in files(run).items() if "checkpoints" in path.parts} == before
    assert [step for step, _ in changes(run)] == [5]
    assert main(plain(folder, run, "run.steps=6")) == 0
    assert stored(run)["optim"]["lr"] == 2e-4


def test_a_change_of_a_finished_run_is_not_recorded(run, capsys):
    before = (run / "config.toml").read_bytes()
    assert main(["train", "--out", str(run), "--change", "optim.lr=1e-4"]) == 0
    assert "nothing changes, because no step is left to do: optim.lr: 0.0002, now 0.0001" in capsys.readouterr().out
    assert changes(run) == []
    assert (run / "config.toml").read_bytes() == before


def test_a_dry_run_shows_the_changed_configuration(run, capsys):
    before = files(run)
    assert main(["train", "--out", str(run), "--change", "optim.lr=1e-4", "--dry-run"]) == 0
    assert "\nlr = 0.0001 " in capsys.readouterr().out
    assert main(["train", "--out", str(run), "--change", "loss.projection=9", "--dry-run"]) == 2
    assert files(run) == before


def test_the_order_of_words_does_not_count(folder, run):
    assert main(["train", "run.steps=6", "--quiet", "--change", "optim.lr=1e-4", "--out", str(run)]) == 0
    assert main(["train", "--change", "optim.lr=3e-4", "--change", "run.seed=2", "--out", str(run), "run.steps=7"]) == 0
    assert [changed for _, changed in changes(run)] == [
        ["optim.lr: 0.0002, now 0.0001"],
        ["optim.lr: 0.0001, now 0.0003", "run.seed: 0, now 2"],
    ]


def test_a_moved_data_folder_is_said_with_data(folder, run, tmp_path):
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert main(["train", "--out", str(run), "--data", str(moved), "--quiet", "run.steps=6"]) == 0
    assert stored(run)["data"]["dir"] == str(moved)


def test_continue_config_takes_python_values(run):
    config, keys = continue_config(run, {"optim.lr": 1e-3, "loss.nce_layers": (0, 4, 8, 12)}, {"run.steps": 6})
    assert keys == ["optim.lr", "loss.nce_layers"]
    assert train_run(config, run, quiet=True, changes=keys) == 6
    assert changes(run) == [(5, ["optim.lr: 0.0002, now 0.001"])]


def test_several_processes_get_the_change_and_errors_are_said_once(folder, run, capsys, monkeypatch):
    """The launcher checks first; what it starts gets the same words."""
    started = []
    monkeypatch.setattr(train, "start", lambda number, words: started.append((number, words)) or 0)
    words = ["train", "--out", str(run), "run.steps=7", "--change", "data.batch=1"]
    assert main([*words, "--nproc", "2"]) == 0
    assert started == [(2, words)]
    for more, sentence in (
        (["--out", str(run), "--change", "loss.projection=9", "data.batch=1"], "--change loss.projection: "),
        (["--out", str(run)], "was trained in steps of 1 picture a domain"),
        ([*plain(folder, run.with_name("new"), "run.start_from=nowhere")[1:]], "nowhere: no such run or file"),
    ):
        assert main(["train", *more, "--nproc", "2"]) == 2
        assert sentence in capsys.readouterr().err
    assert len(started) == 1
    assert not run.with_name("new").exists()
