"""`fastnce runs`: what is known of each run, of every version and with every damage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from fastnce.commands.main import main
from fastnce.common.locking import hold, in_use
from fastnce.engine.history import NAME, event
from fastnce.engine.state_file import sealed
from fastnce.training import train_run
from fastnce.training.listing import describe, find_runs
from tests.engine.test_engine import small_config

SCHEDULE = ["optim.n_epochs=1", "optim.n_epochs_decay=1"]  # eight steps


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("made") / "run"
    train_run(small_config(folder, *SCHEDULE, "run.steps=2"), run, quiet=True)
    return run


@pytest.fixture
def root(made, tmp_path) -> Path:
    """Two runs, one of them two folders down."""
    shutil.copytree(made, tmp_path / "runs" / "first")
    shutil.copytree(made, tmp_path / "runs" / "more" / "second")
    return tmp_path / "runs"


def write_history(run: Path, *events: str) -> None:
    (run / NAME).write_text("".join(f"{line}\n" for line in events))


def change_state(run: Path, **changes) -> None:
    (file,) = run.glob("checkpoints/step-*/state.json")
    state = json.loads(file.read_text())
    for key in ("format", "digest"):
        del state[key]
    file.write_text(sealed({**state, **changes}))


def listed(capsys, *words: object) -> list[dict]:
    assert main(["runs", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_table(root, capsys):
    assert main(["runs", str(root)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "method", "step", "best"]
    assert [row.split()[:4] for row in rows] == [
        ["first", "fastcut", "2/2", "finished"],
        [str(Path("more") / "second"), "fastcut", "2/2", "finished"],
    ]
    assert len({row.index("finished") for row in [*rows]} | {head.index("state")}) == 1


def test_a_real_run_that_is_changed_and_then_stopped(folder, root, capsys):
    run = root / "first"
    continued = ["train", "--out", str(run), "--quiet", "run.minutes=0.000001"]
    assert main([*continued, "run.steps=6", "--change", "optim.lr=1e-4"]) == 0
    first = listed(capsys, root)[0]
    assert first["changes"] == ["optim.lr: 0.0002, now 0.0001"]
    assert first["changed_at"] == 2
    assert (first["step"], first["total"], first["state"]) == (first["step"], 6, "stopped")
    assert "minutes are over" in first["reason"]
    main(["runs", str(root)])
    assert "optim.lr: 0.0002, now 0.0001 (step 2)" in capsys.readouterr().out


def test_states_from_the_history(root):
    run = root / "first"
    start, end = event("start", 0, total=8), lambda state, reason="": event("end", 2, state=state, reason=reason)
    for events, state, reason in (
        ([start, end("finished")], "finished", ""),
        ([start, end("stopped", "Ctrl-C")], "stopped", "Ctrl-C"),
        ([start, end("failed", "too hot")], "failed", "too hot"),
        ([start], "killed", ""),
        ([start, end("finished"), start], "killed", ""),
        ([start, end("failed", "x"), event("change", 2, changes=["a"]), start, end("finished")], "finished", ""),
        ([event("from", 0, lines=[])], "finished", ""),  # from run.steps
    ):
        write_history(run, *events)
        found = describe(run)
        assert (found.state, found.reason) == (state, reason), events
        assert found.total == (8 if start in events else 2)


def test_a_run_in_training_is_named_by_its_process(root):
    run = root / "first"
    write_history(run, event("start", 0, total=8))
    (run / "metrics.jsonl").write_text('{"step": 2}\n{"step": 5}\n{"step":')
    with hold(run, "fastnce train"):
        found = describe(run)
        assert (found.state, found.step) == ("running", 5)
        assert found.reason.startswith(f"process {os.getpid()} on ")
        held = (run / ".fastnce-lock").read_text()
    assert (describe(run).state, describe(run).step) == ("killed", 2)
    facts = json.loads(held)
    (run / ".fastnce-lock").write_text(json.dumps({**facts, "born": "0" * 8}))  # its process has ended
    assert in_use(run) is None
    assert describe(run).state == "killed"
    (run / ".fastnce-lock").write_text(json.dumps({**facts, "machine": "f" * 8, "host": "another"}))
    assert describe(run).reason.endswith("on another")


def test_runs_without_a_history(root):
    run = root / "first"
    (run / NAME).unlink()
    assert (describe(run).state, describe(run).total) == ("finished", 2)  # run.steps=2
    state = json.loads(next(run.glob("checkpoints/step-*/state.json")).read_text())
    config = state["config"]
    config["run"]["steps"] = 0
    change_state(run, config=config)
    assert (describe(run).state, describe(run).total) == ("stopped", None)
    change_state(run, config=config, progress={**state["progress"], "epoch": 2, "pictures": 0})
    assert (describe(run).state, describe(run).total) == ("finished", 2)


def test_the_best_value_is_that_of_the_measure_that_decides(root, capsys):
    run = root / "first"
    (run / "checkpoints" / "best").write_text("step-00000002")
    assert describe(run).best is None  # it was not validated
    state = json.loads(next(run.glob("checkpoints/step-*/state.json")).read_text())
    config = state["config"]
    values = {"pairs": "digest", "psnr_y": 21.5, "ssim_y": 0.75}
    del config["run"]["best"], config["run"]["metrics"]
    sets = {"pairs": "digest", "kid": 0.5, "seconds": 3.0, "fid": 90.0}
    for changed, measured, name, value in (
        ({"best": "ssim_y"}, values, "ssim_y", 0.75),
        ({"best": "my.py:ssim_y"}, values, "ssim_y", 0.75),
        ({"best": "auto", "metrics": "fid,kid"}, sets, "fid", 90.0),
        ({"best": "kid", "metrics": "fid"}, sets, "kid", 0.5),
        ({"metric": "ssim_y"}, values, "ssim_y", 0.75),  # of an earlier version
        ({}, values, "psnr_y", 21.5),
        ({"best": "auto", "metrics": "fid"}, values, "psnr_y", 21.5),
    ):
        change_state(run, config={**config, "run": {**config["run"], **changed}}, validation=measured)
        found = describe(run)
        assert (found.measure, found.best, found.best_step) == (name, value, 2)
    main(["runs", str(root)])
    assert "psnr_y 21.5 at 2" in capsys.readouterr().out


def test_tensors_are_not_read(root):
    for file in root.rglob("*.safetensors"):
        file.write_bytes(b"anything")
    assert [describe(run).state for run in find_runs(root)] == ["finished", "finished"]


def test_damage_is_listed(root, capsys):
    run = root / "first"
    (state,) = run.glob("checkpoints/step-*/state.json")
    whole = state.read_bytes()
    for damage in (b"", b"[]", b"{", whole[:-40], whole.replace(b'"step": 2', b'"step": 3'), b"\xff" * 10, b"null"):
        state.write_bytes(damage)
        first, second = listed(capsys, root)
        assert (first["name"], first["state"], first["method"]) == ("first", "damaged", "fastcut")
        assert first["reason"].startswith("step-00000002: ")
        assert second["state"] == "finished"
    state.unlink()
    assert describe(run).state == "damaged"
    state.write_bytes(whole)
    (state.parent / "training.safetensors").unlink()
    assert "training.safetensors: No such file" in describe(run).reason


def test_odd_files_raise_nothing(root):
    run = root / "first"
    for text in ("", "x\n", '{"event": "start", "total": "many"}\n', '{"event": "change", "changes": 3}\n', "[1]\n"):
        (run / NAME).write_text(text)
        assert main(["runs", str(root)]) == 0
        assert describe(run).state in ("killed", "finished", "damaged"), text
    (run / "checkpoints" / "best").write_text("step-00000099")
    assert describe(run).state == "damaged"
    (run / "checkpoints" / "best").write_bytes(b"\xff\xfe")
    assert "should hold the name of a checkpoint" in describe(run).reason
    shutil.rmtree(run / "checkpoints")
    (run / NAME).unlink()
    assert (describe(run).state, describe(run).method) == ("empty", "fastcut")
    (run / "config.toml").write_text("[")
    assert (describe(run).state, describe(run).method) == ("empty", "")


def test_links_and_other_folders(root, capsys):
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "more" / "up").symlink_to("..", target_is_directory=True)
    (root / "again").symlink_to(root / "first", target_is_directory=True)
    (root / "broken").symlink_to(root / "nowhere")
    (root / "pictures" / "trainA").mkdir(parents=True)
    (root / "pictures" / "config.toml").write_text("")
    shutil.copytree(root / "more" / "second", root / "first" / "inner")
    assert [run["name"] for run in listed(capsys, root)] == [
        "first",
        str(Path("first/inner")),
        str(Path("more/second")),
    ]
    shutil.move(root / "first", root.parent / "away")  # a run that is reached by a link alone
    (root / "again").unlink()
    (root / "again").symlink_to(root.parent / "away")
    assert [run["name"] for run in listed(capsys, root)] == [
        "again",
        str(Path("again/inner")),
        str(Path("more/second")),
    ]


def test_the_folder_itself_and_nothing(root, tmp_path, capsys, monkeypatch):
    assert [run["name"] for run in listed(capsys, root / "first")] == ["first"]
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"no runs below {tmp_path / 'empty'}\n"
    assert listed(capsys, tmp_path / "empty") == []
    monkeypatch.chdir(tmp_path)  # the default is ./runs
    assert len(listed(capsys)) == 2
    assert main(["runs", str(root / "first" / "log.txt")]) == 2
    assert main(["runs", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.endswith("no: no such folder\n")
