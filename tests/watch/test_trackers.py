"""Trackers without their libraries: order, threads, failures, continued runs, and the option `run.track`."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.engine.callbacks import Callbacks, RunInfo
from fastnce.engine.checks import check_trackers, track_names
from fastnce.engine.options import TRACKERS
from fastnce.training import train_run
from fastnce.watch.tensorboard import TensorBoardTracker
from fastnce.watch.trackers import make_trackers
from fastnce.watch.tracking import Tracker, flat, strip
from tests.engine.test_engine import SMALL, small_config
from tests.logs import log_lines


class Recorder(Tracker):
    """Keeps what it is told. `fails` names the call that raises `error`; `gate` stops every call until it is set."""

    name = "recorder"
    fails = ""
    error: BaseException = RuntimeError("the server says no")

    def __init__(self, **options):
        super().__init__(**options)
        self.told: list[tuple] = []
        self.gate = threading.Event()
        self.gate.set()

    def _tell(self, name: str, *values) -> None:
        self.gate.wait()
        if name == self.fails:
            raise self.error
        self.told.append((name, *values))

    def open(self, run):
        self._tell("open", run.step, dict(self.stored))
        self.stored = {"id": self.stored.get("id", f"{self.name}-{run.step}")}

    def scalars(self, step, values):
        self._tell("scalars", step, values)

    def pictures(self, step, strips):
        self._tell("pictures", step, strips)

    def text(self, step, sentence):
        self._tell("text", step, sentence)

    def close(self, state):
        self._tell("close", state)


def info(folder: Path, step: int = 0) -> RunInfo:
    folder.mkdir(exist_ok=True)
    return RunInfo(folder, resolve("cut").as_dict(), step, 10, "cpu", 1)


def watched(*trackers: Tracker) -> tuple[Callbacks, list[str]]:
    said: list[str] = []
    return Callbacks(trackers, say=said.append), said


def test_everything_arrives_in_order(tmp_path):
    tracker = Recorder()
    callbacks, said = watched(tracker)
    callbacks.log(0, {"held_out_psnr_y": 20.0})  # the inputs are measured before the run begins
    callbacks.begin(info(tmp_path / "mine"))
    callbacks.log(1, {"G": 1.5, "lr": 2e-4})
    callbacks.step = 1
    callbacks.warn("a discriminator has won")
    callbacks.end(1, "stopped", "Ctrl-C")
    callbacks.warn("comes after the end")
    assert tracker.told == [
        ("open", 0, {}),
        ("scalars", 0, {"held_out_psnr_y": 20.0}),
        ("scalars", 1, {"G": 1.5, "lr": 2e-4}),
        ("text", 1, "a discriminator has won"),
        ("close", "stopped"),
    ]
    assert said == []


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_a_name_are_side_by_side(tmp_path, channels):
    tracker = Recorder()
    callbacks, _ = watched(tracker)
    callbacks.begin(info(tmp_path / "mine"))
    pictures = torch.full((2, channels, 4, 6), -1.0)
    pictures[1] = 1
    pictures[0, :, 0, 0] = 3  # out of range
    callbacks.samples(5, {"fake_B": pictures})
    callbacks.end(5, "finished", "")
    (name, step, strips) = tracker.told[1]
    assert (name, step, list(strips)) == ("pictures", 5, ["fake_B"])
    found = strips["fake_B"]
    assert (found.shape, found.dtype) == ((4, 12, 3), np.uint8)
    wanted = np.zeros((4, 12, 3), np.uint8)
    wanted[:, 6:] = wanted[0, 0] = 255
    assert np.array_equal(found, wanted)


def test_the_first_three_channels_are_colours():
    pictures = torch.tensor([-1.0, 0.0, 1.0, 0.5]).reshape(1, 4, 1, 1)
    assert strip(pictures).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("call", ["open", "scalars", "text", "close"])
def test_a_failing_tracker_is_one_warning(tmp_path, call):
    bad, good = Recorder(), Recorder()
    bad.fails = call
    callbacks, said = watched(bad, good)
    callbacks.begin(info(tmp_path / "mine"))
    for step in range(1, 4):
        callbacks.log(step, {"G": 1.0})
        callbacks.step = step
        callbacks.warn("a sentence")
    callbacks.end(3, "finished", "")
    assert said == ["Recorder fails (RuntimeError: the server says no): training goes on without it"]
    assert [step for name, step, *_ in good.told if name == "scalars"] == [1, 2, 3]
    assert good.told[-1] == ("close", "finished")
    if call in ("scalars", "text"):
        assert bad.told[-1] == ("close", "failed")  # what it has is kept


def test_a_library_that_exits_does_not_end_the_run(tmp_path):
    tracker = Recorder()
    tracker.fails, tracker.error = "open", SystemExit(3)
    callbacks, said = watched(tracker)
    callbacks.begin(info(tmp_path / "mine"))
    assert said == ["Recorder fails (RuntimeError: SystemExit: 3): training goes on without it"]


def test_a_server_that_never_answers_holds_nothing_up(tmp_path):
    """The gate is shut until the end of the test: a run that waited for the tracker would not get there."""
    tracker = Recorder()
    tracker.opening = tracker.closing = 0.05
    tracker.gate.clear()
    callbacks, said = watched(tracker)
    callbacks.begin(info(tmp_path / "mine"))
    callbacks.log(1, {"G": 1.0})
    assert said == []
    callbacks.end(1, "finished", "")
    assert said == [
        "Recorder fails (TimeoutError: recorder has not taken everything after 0.05 s): training goes on without it"
    ]
    assert tracker.told == []
    tracker.gate.set()


def test_a_tracker_that_opens_late_gets_everything(tmp_path):
    tracker = Recorder()
    tracker.opening = 0.05
    tracker.gate.clear()
    callbacks, said = watched(tracker)
    callbacks.begin(info(tmp_path / "mine"))
    callbacks.log(1, {"G": 1.0})
    tracker.gate.set()
    callbacks.end(1, "finished", "")
    assert [name for name, *_ in tracker.told] == ["open", "scalars", "close"]
    assert said == []


def test_calls_do_not_pile_up(tmp_path):
    tracker = Recorder()
    tracker.opening, tracker.waiting = 0.05, 3
    tracker.gate.clear()
    callbacks, said = watched(tracker)
    callbacks.begin(info(tmp_path / "mine"))
    for step in range(1, 8):
        callbacks.log(step, {"G": 1.0})
    tracker.gate.set()
    assert said == [
        "Recorder fails (TimeoutError: recorder is too slow, 3 calls wait for it): training goes on without it"
    ]


@pytest.mark.parametrize("late", [False, True])
def test_a_hint_is_said_once(tmp_path, late):
    """Also by a tracker that opens late, and where the hint is a warning that comes back to the tracker."""

    class Hinting(Recorder):
        def open(self, run):
            super().open(run)
            self.hint = "log in first"

    said: list[str] = []
    tracker = Hinting(say=lambda sentence: (said.append(sentence), callbacks.warn(sentence)))
    callbacks, _ = watched(tracker)
    if late:
        tracker.opening = 0.05
        tracker.gate.clear()
    callbacks.begin(info(tmp_path / "mine"))
    assert said == ([] if late else ["log in first"])
    tracker.gate.set()
    assert tracker._opened.wait(60)
    for step in (1, 2):
        callbacks.log(step, {"G": 1.0})
    callbacks.end(2, "finished", "")
    assert said == ["log in first"]
    assert [name for name, *_ in tracker.told].count("text") == 1


class Second(Recorder):
    name = "second"


def sent(tracker: Recorder) -> list[int]:
    return [step for name, step, *_ in tracker.told if name in ("scalars", "pictures")]


def part(folder: Path, trackers: list[Recorder], start: int, stop: int) -> None:
    """The steps from `start` to `stop` of a run, with its metrics.jsonl."""
    callbacks, said = watched(*trackers)
    callbacks.begin(info(folder, start))
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step in range(start + 1, stop + 1):
            callbacks.log(step, {"G": 1.0})
            callbacks.samples(step, {"A": torch.zeros(1, 3, 4, 4)})
            file.write(json.dumps({"step": step, "G": 1.0}) + "\n")
    callbacks.end(stop, "stopped", "")
    assert said == []


def test_a_continued_run_continues_and_repeats_no_step(tmp_path):
    folder = tmp_path / "mine"
    part(folder, [Recorder(), Second()], 0, 4)
    assert json.loads((folder / "trackers.json").read_text()) == {
        "recorder": {"id": "recorder-0"},
        "second": {"id": "second-0"},
    }
    later = [Recorder(), Second()]
    part(folder, later, 2, 6)  # the checkpoint was of step 2
    for tracker in later:
        assert tracker.told[0] == ("open", 2, {"id": f"{tracker.name}-0"})
        assert sent(tracker) == [5, 5, 6, 6]


def test_a_tracker_added_later_gets_every_step(tmp_path):
    part(tmp_path / "mine", [Recorder()], 0, 4)
    added = Second()
    part(tmp_path / "mine", [added], 2, 4)
    assert added.told[0] == ("open", 2, {})
    assert sent(added) == [3, 3, 4, 4]


def test_a_run_that_begins_anew_is_a_new_one(tmp_path):
    part(tmp_path / "mine", [Recorder()], 0, 3)
    again = Recorder()
    part(tmp_path / "mine", [again], 0, 2)
    assert again.told[0] == ("open", 0, {})
    assert sent(again) == [1, 1, 2, 2]


@pytest.mark.parametrize("content", ["", "[1]", '{"recorder": 3}', "\0"])
def test_a_damaged_file_begins_a_new_run(tmp_path, content):
    folder, tracker = tmp_path / "mine", Recorder()
    folder.mkdir()
    (folder / "trackers.json").write_text(content)
    part(folder, [tracker], 2, 3)
    assert tracker.told[0] == ("open", 2, {})
    assert json.loads((folder / "trackers.json").read_text()) == {"recorder": {"id": "recorder-2"}}


def test_a_flat_configuration():
    found = flat(resolve("cut", None, ["data.batch=4"]).as_dict())
    assert (found["method"], found["data.batch"], found["data.flip"]) == ("cut", 4, True)
    assert found["loss.nce_layers"] == "[0, 4, 8, 12, 16]"
    assert all(isinstance(value, bool | int | float | str) for value in found.values())


def test_names_of_trackers():
    assert track_names("") == track_names(" ") == []
    assert track_names("mlflow, tensorboard,mlflow") == ["mlflow", "tensorboard"]
    assert [tracker.name for tracker in make_trackers(",".join(TRACKERS))] == list(TRACKERS)
    assert all(tracker.optional for tracker in make_trackers("wandb"))


@pytest.mark.parametrize(("track", "named"), [("tensorbord", "'tensorbord'"), ("wandb,", "''"), ("a b", "'a b'")])
def test_unknown_trackers_are_refused(track, named):
    with pytest.raises(ValueError, match="write some of tensorboard, wandb, trackio, mlflow, separated by") as caught:
        resolve("cut", None, [f"run.track={track}"])
    assert f"unknown tracker {named}" in str(caught.value)


def test_the_option_of_earlier_versions(tmp_path):
    with pytest.raises(ValueError, match="^run.tensorboard is replaced: write run.track=tensorboard, or leave it out$"):
        resolve("cut", None, ["run.tensorboard=true"])
    file = tmp_path / "config.toml"
    file.write_text("[run]\ntensorboard = true\n")
    with pytest.raises(ValueError, match="^--config .*config.toml: run.tensorboard is replaced: write run.track="):
        resolve("cut", file)
    file.write_text("[run]\ntensorboard = false\nkeep = 3\n")  # config.toml of a run has every key
    assert resolve("cut", file).run.keep == 3


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed(folder, tmp_path, capsys, monkeypatch, name):
    """A folder of that name, such as the one that wandb makes, is not the library."""
    (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here")])  # nothing else can be found
    for module in [one for one in sys.modules if one.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ValueError, match=f"run.track={name} needs {name}, which is not installed: pip install {name}$"):
        check_trackers(name)
    out = tmp_path / "run"
    arguments = ["train", "fastcut", "--data", str(folder), "--out", str(out), *SMALL, f"run.track={name}"]
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.err == f"fastnce: run.track={name} needs {name}, which is not installed: pip install {name}\n"
    assert not out.exists()


def test_a_training_goes_on_without_a_failing_tracker(folder, tmp_path, monkeypatch, capsys):
    def fail(self, run):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, "open", fail)
    monkeypatch.setattr("fastnce.training.checks.check_trackers", lambda track: None)
    out = tmp_path / "run"
    assert train_run(small_config(folder, "run.steps=2", "run.track=tensorboard"), out) == 2
    sentence = "TensorBoardTracker fails (OSError: [Errno 28] No space left on device): training goes on without it"
    assert log_lines(out).count(sentence) == 1
    assert capsys.readouterr().out.count(sentence) == 1
