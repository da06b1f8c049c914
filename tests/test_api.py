"""The command line in Python: train, load, translate and evaluate; callbacks; threads."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import fastnce
from tests.ends import TINY

VALUES = {name: value for name, _, value in (text.partition("=") for text in TINY)} | {"loss.nce_layers": "[0, 4]"}


def options(**more) -> dict:
    """TINY as Python values."""
    found = {}
    for name, text in {**VALUES, **{key.replace("__", "."): value for key, value in more.items()}}.items():
        try:
            found[name] = json.loads(text) if isinstance(text, str) else text
        except ValueError:
            found[name] = text
    return found


def train(folder, out, **more) -> fastnce.Run:
    callbacks = more.pop("callbacks", [])
    return fastnce.train("fastcut", data=folder, out=out, quiet=True, callbacks=callbacks, **options(**more))


class Recorder(fastnce.Callback):
    def __init__(self):
        self.calls = []

    def begin(self, run):
        self.calls.append(("begin", run.step, run.total))
        self.run = run

    def log(self, step, values):
        self.calls.append(("log", step))
        self.values = values

    def samples(self, step, pictures):
        self.calls.append(("samples", step))
        self.pictures = pictures

    def saved(self, step, folder, best):
        assert (folder / "state.json").exists()
        self.calls.append(("saved", step))

    def end(self, step, state, reason):
        self.calls.append(("end", step, state, reason))


def test_three_lines(folder, tmp_path):
    run = train(folder, tmp_path / "run", run__steps=2, run__sample_every=2)
    assert run.steps == 2
    picture = Image.open(folder / "testA" / "0.png")
    made = run.load().translate(picture)
    assert made.size == picture.size
    assert np.array_equal(np.asarray(fastnce.load(run).translate(picture)), np.asarray(made))
    assert [row["step"] for row in run.metrics if "G" in row] == [1, 2]
    assert [event["event"] for event in run.history] == ["start", "end"]
    assert "report.html</a>" in run._repr_html_()


def test_evaluate_is_a_function_and_a_package(folder, tmp_path):
    from fastnce.evaluate import psnr
    from fastnce.evaluate.quality import to_levels

    pairs = tmp_path / "pairs"
    for side in ("rain", "norain"):
        (pairs / side).mkdir(parents=True)
        for seed, name in enumerate(("a", "b")):
            levels = np.random.default_rng(seed + (side == "rain")).integers(0, 256, (32, 36, 3), np.uint8)
            Image.fromarray(levels).save(pairs / side / f"{name}.png")
    model = fastnce.load(train(folder, tmp_path / "run", run__steps=1))
    report = fastnce.evaluate(model, pairs)
    rain, clean = (fastnce.data.load_image(pairs / side / "a.png")[None] for side in ("rain", "norain"))
    assert report.pictures[0]["psnr_rgb"] == pytest.approx(
        float(psnr(to_levels(model(rain)), to_levels(clean))), abs=1e-4
    )
    assert fastnce.evaluate(None, pairs).mean["psnr_rgb"] == report.inputs["psnr_rgb"]
    run = train(folder, tmp_path / "other", run__steps=3, run__validate_every=1, data__validate=str(pairs))
    both = fastnce.evaluate(run, pairs, checkpoint="both")
    alone = [fastnce.evaluate(run, pairs, checkpoint=one).mean for one in ("last", "best")]
    assert both.mean == alone[0]
    assert (both.best or both).mean == alone[1]
    with pytest.raises(ValueError, match="checkpoint must be one of best, last, both"):
        fastnce.evaluate(run, pairs, checkpoint="newest")


def test_callbacks_are_told_of_everything(folder, tmp_path):
    seen, lines = Recorder(), []
    train(
        folder,
        tmp_path / "run",
        callbacks=[seen, lambda step, values: lines.append((step, values["G"]))],
        run__steps=3,
        run__sample_every=2,
        run__save_every=2,
    )
    assert seen.calls == [
        ("begin", 0, 3),
        ("log", 1),
        ("log", 2),
        ("samples", 2),
        ("saved", 2),
        ("log", 3),
        ("samples", 3),
        ("saved", 3),
        ("end", 3, "finished", ""),
    ]
    assert [step for step, _ in lines] == [1, 2, 3]
    assert {"G", "lr", "epoch", "pictures", "images_per_second"} <= set(seen.values)
    assert seen.run.config["method"] == "fastcut"
    assert seen.run.versions["torch"] == torch.__version__
    assert all(p.dtype == torch.float32 and p.abs().max() <= 1 for p in seen.pictures.values())
    assert {"A", "fake_B"} <= set(seen.pictures)


@pytest.mark.parametrize("when", ["begin", "log", "samples", "saved"])
def test_a_callback_stops_a_run_cleanly(when, folder, tmp_path):
    def stop(self, *arguments):
        raise fastnce.StopTraining("good enough")

    seen = Recorder()
    stopper = type("Stopper", (fastnce.Callback,), {when: stop})()
    more = {"run__steps": 4, "run__sample_every": 1, "run__save_every": 1}
    run = train(folder, tmp_path / "run", callbacks=[stopper, seen], **more)
    steps = 0 if when == "begin" else 1
    assert run.steps == steps
    assert seen.calls[-1] == ("end", steps, "stopped", "good enough")
    assert run.history[-1]["state"] == "stopped"
    whole = train(folder, tmp_path / "whole", **more)
    assert train(folder, tmp_path / "run", **more).steps == 4  # the same call continues
    for a, b in zip(run.load().generator.parameters(), whole.load().generator.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_error_of_a_callback_ends_the_run_after_saving(folder, tmp_path):
    def fails(step, values):
        if step == 2:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train(folder, tmp_path / "run", callbacks=[fails], run__steps=4)
    run = fastnce.Run(tmp_path / "run", 2)
    assert (run.folder / "checkpoints" / "step-00000002" / "state.json").exists()
    assert run.history[-1] == run.history[-1] | {"event": "end", "step": 2, "state": "failed"}
    assert "mine" in run.history[-1]["reason"]


def test_an_optional_callback_that_fails_is_one_warning(folder, tmp_path):
    class Tracker(fastnce.Callback):
        optional = True
        calls = 0

        def log(self, step, values):
            self.calls += 1
            raise OSError("the server is gone")

    tracker, seen = Tracker(), Recorder()
    run = train(folder, tmp_path / "run", callbacks=[tracker, seen], run__steps=3)
    assert run.steps == 3
    assert tracker.calls == 1
    warnings = [event for event in run.history if event["event"] == "warning"]
    assert [event["text"] for event in warnings] == [
        "Tracker fails (OSError: the server is gone): training goes on without it"
    ]
    assert [call for call in seen.calls if call[0] == "log"] == [("log", 1), ("log", 2), ("log", 3)]


class Meddler(fastnce.Callback):
    """Changes everything that it gets, and what a process has only once."""

    def begin(self, run):
        run.config["method"] = "another"
        run.config["data"].clear()
        self.meddle()

    def log(self, step, values):
        values.clear()
        self.meddle()

    def samples(self, step, pictures):
        for picture in pictures.values():
            picture.fill_(7)
        pictures.clear()
        self.meddle()

    def meddle(self):
        torch.manual_seed(1)
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.set_grad_enabled(False)


def test_a_callback_changes_nothing(folder, tmp_path):
    more = {"run__steps": 3, "run__sample_every": 1}
    before = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    seen, plain = Recorder(), train(folder, tmp_path / "plain", **more)
    run = train(folder, tmp_path / "run", callbacks=[Meddler(), seen], **more)
    assert (torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()) == before
    assert seen.run.config["method"] == "fastcut"
    assert seen.run.config["data"]["batch"] == 1
    assert "G" in seen.values
    assert all(picture.abs().max() <= 1 for picture in seen.pictures.values())
    first, second = (one.load().generator.state_dict() for one in (plain, run))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert run.samples[-1].read_bytes() == plain.samples[-1].read_bytes()


@pytest.mark.parametrize("optional", [False, True])
def test_sys_exit_in_a_callback_is_an_error_like_others(optional, folder, tmp_path):
    def leave(self, step, values):
        raise SystemExit("mine")

    callback = type("Leaver", (fastnce.Callback,), {"log": leave, "optional": optional})()
    if optional:
        assert train(folder, tmp_path / "run", callbacks=[callback], run__steps=2).steps == 2
        return
    with pytest.raises(ValueError, match=r"Leaver.log ended the run by sys.exit\('mine'\)"):
        train(folder, tmp_path / "run", callbacks=[callback], run__steps=2)
    assert (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").exists()
    assert fastnce.Run(tmp_path / "run", 1).history[-1]["state"] == "failed"


def test_an_interrupt_in_a_callback_stops_the_run(folder, tmp_path):
    def interrupt(step, values):
        raise KeyboardInterrupt

    run = train(folder, tmp_path / "run", callbacks=[interrupt], run__steps=3)
    assert run.steps == 1
    assert run.history[-1]["reason"] == "KeyboardInterrupt in _Function"


def test_an_error_at_the_end_leaves_a_finished_run(folder, tmp_path):
    def fail(self, *arguments):
        raise KeyError("late")

    with pytest.raises(KeyError, match="late"):
        train(folder, tmp_path / "run", callbacks=[type("Late", (fastnce.Callback,), {"end": fail})()], run__steps=1)
    ends = [event["state"] for event in fastnce.Run(tmp_path / "run", 1).history if event["event"] == "end"]
    assert ends == ["finished"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"data": 5}, "data must be a path, not 5"),
        ({"out": 5}, "out must be a path, not 5"),
        ({"out": ""}, 'fastnce.train needs out="RUN", the folder of the run'),
        ({"config": 5}, "config must be a path, not 5"),
        ({"data.dir": 5}, "data.dir must be a path, not 5"),
        ({"change": 5}, 'change must be a dict such as {"optim.lr": 1e-4}, not 5'),
        ({"callbacks": 5}, "callbacks must be a list of callbacks, not 5"),
        ({"callbacks": [5]}, "callbacks must be instances of fastnce.Callback or functions (step, values), not 5"),
    ],
)
def test_arguments_of_another_type_are_one_sentence(arguments, sentence, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fastnce.train(**{"method": "fastcut", "data": "DATA", "out": tmp_path / "run", **arguments})
    assert str(caught.value) == sentence
    assert not (tmp_path / "run").exists()


def test_what_is_no_callback_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="callbacks must be instances of fastnce.Callback or functions"):
        train(folder, tmp_path / "run", callbacks=[fastnce.Callback], run__steps=1)
    assert not (tmp_path / "run").exists()


def test_two_runs_of_one_process_equal_two_processes_and_leave_no_trace(folder, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    runs = [train(folder, tmp_path / name, run__steps=2, run__threads=2) for name in ("a", "b")]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.rand(3), expected)
    first, second = (run.load().generator.state_dict() for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_thread_may_train_and_a_second_training_is_refused(folder, tmp_path):
    """Trainings draw from one random number generator, so they would change each other."""
    began, go_on = threading.Event(), threading.Event()
    found = {}

    def wait(step, values):
        began.set()
        assert go_on.wait(60)

    thread = threading.Thread(
        target=lambda: found.update(run=train(folder, tmp_path / "a", callbacks=[wait], run__steps=1))
    )
    thread.start()
    try:
        assert began.wait(60)
        with pytest.raises(ValueError, match="a training runs in this process already"):
            train(folder, tmp_path / "b", run__steps=1)
    finally:
        go_on.set()
        thread.join(60)
    assert found["run"].steps == 1
    assert train(folder, tmp_path / "b", run__steps=1).steps == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data.batches": 4}, "unknown key 'data.batches'; did you mean 'data.batch'?"),
        ({"data.batch": "four"}, "data.batch must be a whole number"),
        ({"batch": 4}, "unknown key 'batch'; did you mean 'data.batch'?"),
        ({"data.dir": "elsewhere"}, "data=DATA and data.dir=elsewhere differ: give one of them"),
    ],
)
def test_mistakes_are_one_sentence(change, sentence, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fastnce.train("fastcut", data="DATA", out=tmp_path / "run", **change)
    assert str(caught.value).startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_a_run_continues_from_its_folder_alone_and_with_changes(folder, tmp_path):
    train(folder, tmp_path / "run", run__steps=1)
    assert fastnce.train(out=tmp_path / "run", quiet=True, **{"run.steps": 2}).steps == 2
    run = fastnce.train(out=tmp_path / "run", quiet=True, change={"optim.lr": 1e-4}, **{"run.steps": 3})
    assert run.steps == 3
    (change,) = [event for event in run.history if event["event"] == "change"]
    assert change["changes"] == ["optim.lr: 0.0002, now 0.0001"]
    assert run.metrics[-1]["lr"] == 1e-4
    with pytest.raises(ValueError, match="holds no run to continue"):
        fastnce.train(out=tmp_path / "none")


def test_folders_are_needed(tmp_path):
    with pytest.raises(ValueError, match='needs data="DIR"'):
        fastnce.train("fastcut", out=tmp_path / "run")
    with pytest.raises(ValueError, match='needs out="RUN"'):
        fastnce.train("fastcut", data=tmp_path)
