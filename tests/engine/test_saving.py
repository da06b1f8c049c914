"""Is a run's last state on the disk? Checkpoints that cannot be written, and errors between and within steps."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fastnce.commands.main import main
from fastnce.engine import checkpoint
from fastnce.engine.checkpoint import Checkpoints, NotSaved
from fastnce.engine.distributed import RankLost, Ranks, fails_everywhere
from fastnce.engine.loop import _Run as Run
from fastnce.engine.saving import Saving, TrainingFailed
from fastnce.engine.step import Step
from tests.ends import FULL, NO_ROOM, largest_file, one_sentence, tiny
from tests.engine.test_distributed import as_rank, finish, free_port
from tests.engine.test_lines import ERRORS
from tests.engine.test_validate import Scripted, go
from tests.logs import log_lines

pytestmark = pytest.mark.usefixtures("few_blocks")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def disk(monkeypatch):
    """The error of the disk for each checkpoint, by its number; None lets it be written."""
    answers: dict[int, Exception] = {}
    real, calls = checkpoint.save_file, []

    def save_file(tensors, path):
        if str(path).endswith("generator.safetensors"):
            calls.append(path)
        error = answers.get(len(calls), answers.get(0))
        if error is None:
            return real(tensors, path)
        Path(path).write_bytes(b"part of it")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    return answers


def steps(run: Path) -> list[int]:
    return [json.loads((path / "state.json").read_text())["step"] for path in Checkpoints(run / "checkpoints").steps()]


def log_of(run: Path) -> list[str]:
    return log_lines(run)


FAULTS = [OSError(code, os.strerror(code)) for code in ERRORS]
FAULTS += [SafetensorError(f"Error while serializing: I/O error: {NO_ROOM} (os error 28)")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault)[:20])
def test_a_checkpoint_that_cannot_be_written_is_one_error(fault, disk, tmp_path):
    store = Checkpoints(tmp_path / "c")
    tensors = {"G/w": torch.ones(3)}
    store.save(1, tensors, tensors, {})
    disk[0] = fault
    with pytest.raises(NotSaved) as caught:
        store.save(2, tensors, tensors, {})
    reason = NO_ROOM if isinstance(fault, SafetensorError) else fault.strerror
    sentence = f"{tmp_path / 'c' / 'step-00000002'}: no checkpoint of 24 bytes ({reason}); the older ones are untouched"
    assert caught.value.strerror == sentence
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["latest", "step-00000001"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "c").touch()
    with pytest.raises(NotSaved, match=os.strerror(errno.EEXIST)):
        Checkpoints(tmp_path / "c").save(1, {}, {}, {})


@pytest.mark.parametrize("quiet", [False, True])
def test_a_schedule_that_ends_on_a_full_disk(quiet, folder, tmp_path, capsys, disk):
    """Exit code 1, naming what is left. With room again, the same command ends like an undisturbed run."""
    run, command = tmp_path / "run", tiny(folder, tmp_path / "run", "run.save_every=1", "run.steps=4")
    command += ["--quiet"] if quiet else []
    disk.update({place: OSError(errno.ENOSPC, NO_ROOM) for place in (1, 3, 4, 5)})
    assert main(command) == 1
    told = capsys.readouterr()
    names = [str(run / "checkpoints" / f"step-0000000{step}") for step in (2, 4)]
    assert told.err.startswith(f"fastnce: {names[1]}: no checkpoint of ")
    assert told.err.endswith(
        f"; so the last state, of step 4, is lost: {names[0]} is the newest whole one, of step 2\n"
    )
    assert told.err.count("\n") == 1
    assert log_of(run)[-1] == told.err.removeprefix("fastnce: ").rstrip("\n")
    assert sum("training goes on" in line for line in log_of(run)) == 2  # after steps 1 and 3
    assert ("training goes on" in told.out) != quiet
    assert steps(run) == [2]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    disk.clear()
    assert main(command) == 0
    assert steps(run) == [3, 4]
    if not quiet:
        assert main(tiny(folder, tmp_path / "other", "run.steps=4")) == 0
        one, other = (Checkpoints(path / "checkpoints").load()[0] for path in (run, tmp_path / "other"))
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_the_last_state_is_tried_once_more(tmp_path, monkeypatch, disk):
    """After the last step, when `best` is saved too."""
    monkeypatch.setattr(Scripted, "values", [20.0, 25.0])
    disk[2] = OSError(errno.EIO, "")
    go(tmp_path, Scripted(), 2)
    assert steps(tmp_path) == [1, 2]
    assert Checkpoints(tmp_path / "checkpoints").best()[0].name == "step-00000002"


def test_a_limit_of_the_system_for_every_file(folder, tmp_path, capsys):
    """RLIMIT_FSIZE is too small for checkpoints and, after a while, for the log."""
    run = tmp_path / "run"
    assert main(tiny(folder, run, "run.steps=2")) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "checkpoints" in path.parts}
    metrics, room = run / "metrics.jsonl", 2 * (run / "config.toml").stat().st_size
    metrics.write_text('{"step": 2}\n' * ((room - 800) // 12))
    with largest_file(room):
        assert main(tiny(folder, run, "run.steps=8", "run.save_every=1")) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert os.strerror(errno.EFBIG) in told.err
    assert "the last state, of step 8, is lost" in told.err
    assert f"{metrics}: {os.strerror(errno.EFBIG)}; training goes on" in told.out
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((run / "checkpoints").iterdir())) == 2
    found = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert metrics.read_text().endswith("\n")
    assert found[-1] > 2
    assert [step for step in found if step > 2] == list(range(3, found[-1] + 1))
    assert found[-1] < 8


def test_a_signal_on_a_full_disk_does_not_say_saved(folder, tmp_path, capsys, disk, monkeypatch):
    disk[0] = OSError(errno.ENOSPC, NO_ROOM)
    real, begun = Step.run, []

    def run(step, *arguments):
        begun.append(step)
        if begun.count(step) == 2:  # before the first step, nothing would be lost
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, *arguments)

    monkeypatch.setattr(Step, "run", run)
    assert main(tiny(folder, tmp_path / "run", "run.steps=5")) == 1
    assert "the last state, of step 2, is lost: there is no other" in one_sentence(capsys)
    assert "saved" not in (tmp_path / "run" / "log.txt").read_text()
    disk.clear()
    assert main(tiny(folder, tmp_path / "run", "run.steps=5")) == 0
    assert log_of(tmp_path / "run")[-1] == "SIGTERM: stopped after step 2 and saved; the same command continues"


def test_a_pointer_that_cannot_be_written_loses_nothing(tmp_path, monkeypatch):
    said: list[str] = []
    store = Checkpoints(tmp_path, keep=2, log=said.append)
    tensors = {"G/w": torch.ones(3)}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_whole", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, NO_ROOM)))
        store.save(1, tensors, tensors, {}, best=True)
        assert said == [f"{tmp_path / n}: {NO_ROOM}; step-00000001 is saved all the same" for n in ("latest", "best")]
        for step in (2, 3):
            store.save(step, tensors, tensors, {})
        assert [path.name for path in store.steps()] == ["step-00000001", "step-00000002", "step-00000003"]
    store.save(4, tensors, tensors, {})
    assert (tmp_path / "best").read_text() == "step-00000001"
    assert (tmp_path / "latest").read_text() == "step-00000004"
    assert [path.name for path in store.steps()] == ["step-00000001", "step-00000003", "step-00000004"]


def test_a_best_that_was_not_saved_does_not_count(tmp_path, monkeypatch, disk):
    monkeypatch.setattr(Scripted, "values", [20.0, 25.0, 23.0])
    disk[2] = OSError(errno.ENOSPC, NO_ROOM)
    go(tmp_path, Scripted(), 3)
    assert Checkpoints(tmp_path / "checkpoints").best()[0].name == "step-00000003"


# ---- errors in the middle ----


def failing_at(monkeypatch, owner: type, name: str, error: Exception, call: int) -> None:
    real, calls = getattr(owner, name), []

    def replaced(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, replaced)


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), MemoryError("much"), OSError(errno.EIO, "x", "y")])
def test_an_error_between_steps_is_saved_before(error, folder, tmp_path, monkeypatch, capsys):
    failing_at(monkeypatch, Run, "_report", error, call=3)
    run = tmp_path / "run"
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="a fault of ours"):
            main(tiny(folder, run, "run.steps=5"))
        assert log_of(run)[-1] == "RuntimeError: a fault of ours"
    else:
        code = 2 if isinstance(error, OSError) else 1
        assert main(tiny(folder, run, "run.steps=5")) == code
        assert log_of(run)[-1] == one_sentence(capsys).removeprefix("fastnce: ").rstrip("\n") or code == 2
    assert log_of(run)[-2] == "stopped after step 3 and saved"
    assert steps(run) == [3]


def test_an_error_in_a_step_saves_nothing(folder, tmp_path, monkeypatch):
    """Some of the step's updates may have been made."""
    failing_at(monkeypatch, Step, "_differentiate", RuntimeError("a fault of ours"), call=2 * 2)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(tiny(folder, tmp_path / "run", "run.steps=5"))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1  # of the first step
    assert steps(tmp_path / "run") == []
    assert log_of(tmp_path / "run")[-1] == "RuntimeError: a fault of ours"


def test_ranks_that_have_drifted_are_not_saved(folder, tmp_path, monkeypatch):
    failing_at(monkeypatch, Ranks, "check_drift", RuntimeError("drifted apart"), call=1)
    with pytest.raises(RuntimeError, match="drifted apart"):
        main(tiny(folder, tmp_path / "run", "run.steps=5", "run.save_every=2"))
    assert steps(tmp_path / "run") == []


def test_an_error_on_a_full_disk_tells_both(folder, tmp_path, monkeypatch, capsys, disk):
    failing_at(monkeypatch, Run, "_report", OSError(errno.EIO, "an error", "a picture"), call=3)
    disk[3] = OSError(errno.ENOSPC, NO_ROOM)
    assert main(tiny(folder, tmp_path / "run", "run.steps=5", "run.save_every=1")) == 1
    message = one_sentence(capsys)
    assert "a picture" in message
    assert "the last state, of step 3, is lost" in message


# ---- several ranks ----


def test_ranks_fail_together(monkeypatch):
    """The error of one rank, by the failure that the other one reports: (a mistake of the user, another error)."""
    theirs = [0.0, 0.0]

    def all_reduce(flags, op):
        flags.copy_(torch.maximum(flags, torch.tensor(theirs)))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    ranks, device = Ranks(1, 2), torch.device("cpu")

    def raised(error: Exception | None) -> Exception | None:
        try:
            with ranks.together(device):
                if error is not None:
                    raise error
        except Exception as found:
            return found
        return None

    mistake, fault = OSError(errno.EIO, "an error", "a file"), RuntimeError("a fault")
    assert raised(None) is None
    assert [raised(mistake), raised(fault)] == [mistake, fault]
    theirs[:] = [1.0, 0.0]
    assert type(raised(None)) is ValueError
    assert raised(fault) is fault
    theirs[:] = [0.0, 1.0]
    lost = raised(None)
    assert type(lost) is RankLost
    assert [fails_everywhere(found) for found in (mistake, fault, lost, OSError())] == [True, True, True, False]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("gone")))
    assert raised(mistake) is mistake  # not the error of the exchange


def test_a_rank_that_does_not_write_asks_the_first_one(tmp_path):
    """Both ranks communicate equally often: else one would wait forever."""
    asked = []

    class Second(Ranks):
        def most(self, values, device):
            asked.extend(values)
            return [1.0]

        def check_drift(self, modules):
            asked.append("drift")

    saving = Saving(lambda done: None, Checkpoints(tmp_path), [], Second(1, 2), torch.device("cpu"), print)
    saving.resumed(3)
    with pytest.raises(TrainingFailed, match="the first rank cannot save, and says why; so the last state, of step 3"):
        saving.end()
    assert asked == [0, "drift", 0]
    saving.after(RankLost("gone"))
    assert len(asked) == 3  # there is no other rank
    lost = RankLost("another rank has failed in `together`")
    lost.__dict__["everywhere"] = True
    saving.after(lost)
    assert len(asked) == 6


def test_two_ranks_end_alike_on_a_full_disk(folder, tmp_path):
    command = tiny(folder, tmp_path / "run", "run.steps=3", "run.save_every=1")
    assert main([*command, "data.batch=2", "run.steps=1"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}

    def limited() -> int:
        with largest_file(16384):  # room for config.toml
            return main(command)

    port = free_port()
    processes = [as_rank(rank, 2, port, limited) for rank in range(2)]
    (code, out, err), (other, _, their) = finish(processes)
    assert (code, other) == (1, 1), err + their
    assert "training goes on" in out
    assert "the last state, of step 3, is lost" in err
    assert "the first rank cannot save, and says why; so the last state, of step 3, is lost" in their
    after = {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
    assert after == before


# ---- a terminal that is gone ----


def test_training_outlives_a_closed_pipe(folder, tmp_path):
    """`| head -2`: log.txt is complete, and the exit code is that of a finished run."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "fastnce", *tiny(folder, run, "run.steps=4", f"data.cache_dir={tmp_path / 'c'}")]
    script = '{ "$@"; echo $? >"$CODE"; } 2>&1 | head -n 2'
    environment = {**os.environ, "CODE": str(tmp_path / "code"), "PYTHONUNBUFFERED": "1"}
    found = subprocess.run(
        ["sh", "-c", script, "sh", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.stdout.count("\n") == 2
    assert (tmp_path / "code").read_text() == "0\n"
    assert steps(run) == [4]
    assert [line for line in log_of(run) if " step 4/4 " in line]


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("code", [0, 1])
def test_a_stdout_that_is_full_changes_no_exit_code(code, folder, tmp_path, monkeypatch, capsys, disk):
    disk.update({0: OSError(errno.ENOSPC, NO_ROOM)} if code else {})
    with monkeypatch.context() as patch, FULL.open("w") as full:
        patch.setattr(sys, "stdout", full)
        assert main(tiny(folder, tmp_path / "run", "run.steps=2")) == code
    assert capsys.readouterr().err.count("\n") == code
    assert steps(tmp_path / "run") == ([] if code else [2])
