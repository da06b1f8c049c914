"""The report as a file: what it shows, what it never does, when it is written while training."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch

from fastnce.commands.main import main
from fastnce.common.locking import hold, in_use
from fastnce.engine.callbacks import Callbacks, RunInfo
from fastnce.watch import ReportCallback, charts, write_report
from fastnce.watch import report as module
from fastnce.watch.reading import read_facts, stored_config
from fastnce.watch.series import Metrics
from tests.watch.made import Page, checkpoint, grid, lines, run, training


@pytest.fixture
def finished(tmp_path) -> Path:
    return run(tmp_path / "mine", "optim.lr=1e-4", "data.batch=4")


def test_a_finished_run(finished):
    page = Page(write_report([finished]))
    assert page.html.startswith("<!doctype html>")
    head = page.texts["header"]
    assert "mine" in head
    assert "finished" in head
    assert "cyclegan · cuda:7 · begun" in head
    assert re.search(r"Steps 40 +of 40", head)
    assert "3:00" in head  # one minute, then two
    assert re.search(r"Best PSNR on Y \(dB\) 30 +at step 20", head)
    assert "Last checkpoint step 40" in head
    assert "Step 9 the outputs hardly differ" in page.texts["warnings"]
    history = page.texts["history"]
    assert "The run stops: 1 minute is over" in history
    assert "optim.lr: 0.0002, now 0.0001" in history
    assert "The run is finished" in history
    assert "Imaginary 9000" in page.texts["machine"]
    assert "9.9.9" in page.texts["machine"]
    assert "fastnce train cyclegan" in page.texts["machine"]


def test_times_have_their_zone(finished, monkeypatch):
    for zone, text in (("UTC0", "2026-11-27 18:00 UTC"), ("XST-5:30", "2026-11-27 23:30 UTC+05:30")):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        try:
            page = Page(write_report([finished]))
        finally:
            monkeypatch.undo()
            time.tzset()
        assert f"begun {text} Steps" in page.texts["header"]
        assert f"differ {text} " in f"{page.texts['warnings']} "
        assert f"{text} 0 The run starts" in page.texts["history"]
        assert re.search(rf"Written \S+ \S+ {re.escape(text.split()[-1])} by", page.texts["footer"])


def test_the_newest_value_is_not_the_mean_of_a_span(tmp_path):
    folder = run(tmp_path / "long")
    lines(folder / "metrics.jsonl", [{"step": step, "G_GAN": step / 3, "NCE": 1.0} for step in range(41, 5_001)])
    lines(folder / "metrics.jsonl", [{"step": 5_001, "NCE": "nan"}])
    (found,) = Page(write_report([folder])).data["runs"]
    assert found["curves"]["G_GAN"]["newest"] == 1666.67
    assert found["curves"]["G_GAN"]["y"][-1] < 1666
    assert found["curves"]["NCE"]["newest"] is None


def test_what_differs_from_the_preset_is_marked(finished):
    page = write_report([finished]).read_text()
    marks = {name: kind for kind, name in re.findall(r'<tr class="(\w+)"><th scope="row"><code>([\w.]+)</code>', page)}
    assert {name for name, kind in marks.items() if kind == "changed"} == {"optim.lr", "data.batch"}
    assert "run.log_every" in marks
    assert "<td><code>0.0001</code></td><td><code>0.0002</code></td>" in page


def test_validation_of_inputs_best_and_last(finished):
    page = Page(write_report([finished]))
    text = page.texts["validation"]
    assert re.search(r"Measure +Inputs +Best, step 20 +Last, step 40", text)
    assert re.search(r"PSNR on Y \(dB\) +20 +30 +28 ", text)
    (found,) = page.data["runs"]
    assert found["best"] == 20
    assert found["inputs"]["held_out_psnr_y"] == 20
    assert found["curves"]["held_out_psnr_y"]["x"] == [10, 20, 30, 40]  # without the inputs, which are no step
    assert found["curves"]["held_out_psnr_y"]["y"] == [29, 30, 29, 28]


def test_the_curves(finished):
    data = Page(write_report([finished])).data
    assert data["groups"]["losses"] == ["G_GAN", "NCE"]
    assert data["groups"]["speed"] == ["images_per_second", "lr"]  # warnings are 0 throughout
    (found,) = data["runs"]
    assert found["curves"]["G_GAN"]["x"] == list(range(1, 41))
    assert found["curves"]["G_GAN"]["y"][:3] == [1, 0.5, 0.333333]
    assert found["changes"] == [20]
    steps, epochs = found["axes"]["epoch"]
    assert dict(zip(steps, epochs, strict=True))[20] == 2  # two epochs of ten steps are done
    assert (steps[0], epochs[0]) == (0, 0)
    assert (steps[-1], epochs[-1]) == (40, 4)
    steps, pictures = found["axes"]["pictures"]
    assert (steps[-1], pictures[-1]) == (40, 160)


def test_samples_with_both_directions(finished):
    data = Page(write_report([finished])).data
    (found,) = data["runs"]
    assert [sample["step"] for sample in found["samples"]] == [10, 20, 30, 40]
    assert [sorted(row) for row in found["samples"][0]["rows"]] == [["A", "B", "fake_A", "fake_B"]] * 2
    assert len(data["images"]) == 4 + 4 * 4
    assert all(image.startswith("data:image/") for image in data["images"])


def test_epochs_of_older_runs_count_from_0(tmp_path):
    for first in (0, 1):
        lines(tmp_path / f"{first}.jsonl", training(range(1, 31), first_epoch=first))
    old, new = (Metrics(tmp_path / f"{first}.jsonl") for first in (0, 1))
    old.update()
    new.update()
    assert charts.epochs(old) == charts.epochs(new)
    assert charts.epochs(Metrics(tmp_path / "none")) is None


def test_an_older_run(tmp_path):
    """No history, no layout of the grids, no config.toml, epochs from 0."""
    folder = tmp_path / "old"
    grid(folder / "samples" / "step-00000010.png", 1, text=None)
    lines(folder / "metrics.jsonl", training(range(1, 11), first_epoch=0))
    (folder / "log.txt").write_text("step 1\nwarning: the loss of D stays at 0: try\nstep 2\n")
    page = Page(write_report([folder]))
    assert "state not recorded" in page.texts["header"]
    assert "the loss of D stays at 0" in page.texts["warnings"]
    assert list(page.data["runs"][0]["samples"][0]["rows"][0]) == [""]
    assert "no configuration" in page.texts["configuration"]
    assert "history" not in page.texts
    assert "machine" not in page.texts


def test_a_run_without_a_line(tmp_path):
    (tmp_path / "config.toml").write_text('method = "cut"\n')
    page = Page(write_report([tmp_path]))
    assert "Steps 0" in page.texts["header"]
    assert page.data["groups"] == {"validation": [], "losses": [], "speed": []}


@pytest.mark.parametrize("state", ["finished", "stopped", "failed", "killed"])
def test_states(tmp_path, state):
    facts = read_facts(run(tmp_path / "run", state=state))
    assert facts.state == state


def test_a_run_in_progress(finished):
    assert in_use(finished) is None
    with hold(finished, "fastnce train"):
        assert read_facts(finished).state == "running"
        assert f"process {os.getpid()}" in read_facts(finished).reason
    assert read_facts(finished).state == "finished"


def test_a_lock_that_a_killed_process_left(finished):
    with hold(finished, "fastnce train"):
        left = json.loads((finished / ".fastnce-lock").read_text())
    left |= {"pid": 2**22 + 1}  # above the largest process number
    (finished / ".fastnce-lock").write_text(json.dumps(left))
    assert in_use(finished) is None
    assert read_facts(finished).state == "finished"


NASTY = "</script><script>alert(1)</script><!--<b>"


def test_texts_from_files_cannot_break_the_page(tmp_path):
    folder = run(tmp_path / NASTY.replace("/", ""))
    lines(folder / "metrics.jsonl", [{"step": 41, NASTY: 1.0, f"held_out_{NASTY}": 2.0}])
    events = [{"event": "warning", "step": 41, "text": NASTY}, {"event": "change", "step": 41, "changes": [NASTY]}]
    start = {
        "event": "start",
        "step": 1,
        "device": NASTY,
        "machine": {NASTY: NASTY},
        "versions": {},
        "command": [NASTY],
    }
    lines(
        folder / "history.jsonl", [*events, start, {"event": NASTY}, {"event": "end", "state": NASTY, "reason": NASTY}]
    )
    with (folder / "config.toml").open("a") as file:
        file.write(f'[other]\n"{NASTY}" = "{NASTY}"\n')
    grid(folder / "samples" / "step-00000041.png", 1, names=(NASTY, "x"))
    for folders in ([folder], [folder, run(tmp_path / "plain")]):
        page = Page(write_report(folders, tmp_path / "page.html"))
        assert len(page.scripts) == 2  # the data and the page's own
        assert page.html.count("</script>") == 2
        assert "alert(1)" not in page.scripts[1]
        assert "<!--" not in page.html
        assert NASTY in page.data["groups"]["losses"]


def test_odd_events_and_configurations(tmp_path):
    folder = run(tmp_path / "run")
    lines(folder / "history.jsonl", [{"event": "start", "time": 5, "total": "many", "machine": [1], "command": "x"}])
    lines(folder / "history.jsonl", [{"event": 3, "step": "x"}, {"event": "change", "changes": 7}, {}])
    with (folder / "history.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n" + json.dumps({"event": "odd\u2028name"}, ensure_ascii=False) + "\n")
    (folder / "config.toml").write_text(
        'method = "no-such-method"\ndata = 3\n[loss]\nx = 2026-11-27\n[optim]\nlr = 1\n'
    )
    page = Page(write_report([folder]))
    assert "no-such-method" in page.texts["header"]
    assert "odd name" in page.texts["history"]
    assert "optim.lr" in page.texts["configuration"]
    (folder / "config.toml").write_text("no TOML")
    assert stored_config(folder) == {}


def test_a_users_own_method_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')\n")
    folder = run(tmp_path / "run")
    text = (folder / "config.toml").read_text().replace('method = "cyclegan"', 'method = "mine.py:Mine"')
    (folder / "config.toml").write_text(text.replace("lr = 0.0002", "lr = 0.5"))
    monkeypatch.chdir(tmp_path)
    page = write_report([folder]).read_text()
    assert "mine.py:Mine" in page
    assert '<tr class="changed"><th scope="row"><code>optim.lr</code>' in page


def test_comparison(tmp_path, finished):
    other = run(tmp_path / "other", "optim.lr=1e-4", "data.batch=2", state="failed", steps=30)
    out = write_report([finished, other], tmp_path / "both.html")
    page = Page(out)
    assert "2 runs" in page.texts["header"]
    assert "failed" in page.texts["header"]
    assert [one["name"] for one in page.data["runs"]] == ["mine", "other"]
    assert page.data["runs"][1]["curves"]["NCE"]["x"][-1] == 30
    keys = page.texts["keys"]
    assert re.search(r"data.batch +4 +2", keys)
    assert "optim.lr" not in keys
    assert re.search(r"mine +30 +28 ", page.texts["validation"])
    assert re.search(r"Inputs +20 +20 ", page.texts["validation"])
    assert len([attributes for _, attributes in page.tags if "data-run" in attributes]) == 2


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [run(tmp_path / part / "same") for part in ("a", "b")]
    page = Page(write_report(folders, tmp_path / "both.html"))
    assert [one["name"] for one in page.data["runs"]] == [str(folder) for folder in folders]


def test_the_command(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = run(tmp_path / "other")
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out == f"written to {finished / 'report.html'}\n"
    assert main(["report", str(finished), str(other)]) == 0
    assert (tmp_path / "compare.html").is_file()
    assert main(["report", str(finished), "--out", "x.html"]) == 0
    assert Page(tmp_path / "x.html").data["runs"][0]["name"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}/nowhere"], "nowhere does not exist: name the folder of a run"),
        (["{tmp}/notes.html"], "notes.html is a file: name the folder of a run"),
        (["{tmp}/empty"], "empty is no run: it has none of metrics.jsonl"),
        (["{tmp}/mine", "--out", "{tmp}/notes.html"], "notes.html exists and is no report of fastnce"),
        (["{tmp}/mine", "--out", "{tmp}/empty"], "empty is a folder, and the report is a file: name another place"),
        (["{tmp}/mine", "--out", "{tmp}/no/x.html"], "does not exist"),
        (["{tmp}/mine"] * 21, "a report shows 1 to 20 runs, not 21"),
    ],
)
def test_refused(finished, tmp_path, capsys, arguments, sentence):
    (tmp_path / "notes.html").write_text("<!doctype html>my own notes")
    (tmp_path / "empty").mkdir()
    assert main(["report", *(text.format(tmp=tmp_path) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert (tmp_path / "notes.html").read_text() == "<!doctype html>my own notes"
    assert not (finished / "report.html").exists()


def test_a_pipe_in_place_of_the_report_is_refused(finished, tmp_path):
    """Opening it would wait forever, also during a training."""
    os.mkfifo(tmp_path / "pipe.html")
    with pytest.raises(ValueError, match="pipe.html is no regular file"):
        write_report([finished], tmp_path / "pipe.html")


def test_a_report_is_replaced(finished):
    first = write_report([finished]).read_text()
    lines(finished / "metrics.jsonl", training(range(41, 51)))
    assert write_report([finished]).read_text() != first


def test_pages_of_long_runs_stay_small(tmp_path):
    """Long curves with many names; the pictures have a budget of their own."""
    folder = tmp_path / "long"
    folder.mkdir()
    checkpoint(folder, 5, None, "latest")
    names = [f"loss_{i}" for i in range(60)]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 3_001):
            file.write(
                json.dumps({"step": step, **{name: step * 1.2345678 + i for i, name in enumerate(names)}}) + "\n"
            )
    lines(folder / "history.jsonl", [{"event": "warning", "step": i, "text": "x" * 5_000} for i in range(3_000)])
    size = write_report([folder]).stat().st_size
    assert size + module.PICTURES < 5_000_000


def info(folder: Path) -> RunInfo:
    return RunInfo(folder, {}, 0, 100, "cpu", 1)


class Clock:
    """Counts the seconds that it is told."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_while_training(finished, monkeypatch):
    clock, pages = Clock(), []
    original = module._write

    def slow(out, runs):
        pages.append(clock.seconds)
        clock.seconds += 2.0
        original(out, runs)

    monkeypatch.setattr(module, "_write", slow)
    callback = ReportCallback(every=60, now=clock)
    callback.begin(info(finished))
    assert "running" in Page(finished / "report.html").texts["header"]
    for second in range(3, 450):
        clock.seconds = max(clock.seconds, float(second))
        callback.log(second, {"NCE": 1.0})
        callback.samples(second, {"A": torch.zeros(1, 3, 4, 4)})
        callback.warn(second, "it warns")
        callback.saved(second, finished, False)
    assert pages == [0.0, 202.0, 404.0]  # 2 seconds each, and 200 between two of them
    callback.end(40, "stopped", "Ctrl-C")
    page = Page(finished / "report.html")
    assert "stopped" in page.texts["header"]
    assert "Ctrl-C" in page.texts["header"]
    assert re.search(r"Steps 40 +of 100", page.texts["header"])


def test_fast_reports_are_a_minute_apart(finished):
    clock = Clock()
    callback = ReportCallback(now=clock)
    callback.begin(info(finished))
    lines(finished / "metrics.jsonl", training(range(41, 43)))
    clock.seconds = 59.0
    callback.log(42, {})
    assert Page(finished / "report.html").data["runs"][0]["curves"]["NCE"]["x"][-1] == 40
    clock.seconds = 60.0
    callback.log(42, {})
    assert Page(finished / "report.html").data["runs"][0]["curves"]["NCE"]["x"][-1] == 42


def test_a_report_that_fails_is_one_sentence(finished):
    (finished / "report.html").write_text("my own page")
    said: list[str] = []
    callbacks = Callbacks([ReportCallback()], said.append)
    callbacks.begin(info(finished))
    callbacks.log(1, {})
    callbacks.end(1, "finished", "")
    assert len(said) == 1
    assert "is no report of fastnce" in said[0]
    assert "training goes on without it" in said[0]
    assert (finished / "report.html").read_text() == "my own page"
