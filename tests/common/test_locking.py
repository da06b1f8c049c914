"""Folder locks: a second process gets an error that names the first, and a lock ends with its process."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fastnce.commands.main import main
from fastnce.common.locking import NAME, InUse, hold
from fastnce.common.writing import is_dead, owner, partial_name, sweep
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published
from tests.ends import left, one_sentence, write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["flock", "file"])
def kind(request, monkeypatch):
    """Run the test on a disk with `flock` and on one without."""
    if request.param == "file":

        def missing(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", missing)
    return request.param


class Holder:
    """A process that holds a folder's lock until it is killed."""

    def __init__(self, folder: Path, **options):
        ours, theirs = FORK.Pipe()
        self.process = FORK.Process(target=self._hold, args=(folder, options, theirs), daemon=True)
        self.process.start()
        assert ours.poll(20)
        ours.recv()

    @staticmethod
    def _hold(folder, options, pipe):
        with hold(folder, "fastnce train", **options):
            pipe.send("held")
            time.sleep(60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def test_the_error_names_the_holder(kind, tmp_path):
    with Holder(tmp_path / "run") as other:
        with pytest.raises(InUse) as caught, hold(tmp_path / "run", "fastnce train", "take another --out"):
            pass
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / 'run'} is in use by fastnce train (process {other.process.pid} on ")
        assert message.endswith(": wait until it ends, stop it, or take another --out")
        assert ("is no longer there: then remove" in message) == (kind == "file")
        with hold(tmp_path / "run", "fastnce export", name=".fastnce-export-lock"):
            pass
    with hold(tmp_path / "run", "fastnce train"):  # the other process was killed with -9
        pass
    assert left(tmp_path) == []


def test_a_folder_made_for_the_lock_is_removed_if_empty(kind, tmp_path):
    with hold(tmp_path / "a" / "b", "x"):
        pass
    assert not (tmp_path / "a").exists()
    with hold(tmp_path / "a" / "b", "x"):
        (tmp_path / "a" / "file").touch()
    assert left(tmp_path) == ["a/file"]


def test_a_lock_file_of_another_machine_holds_on_a_disk_without_flock(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "not supported")))
    file = tmp_path / f"{NAME}-owner"
    machine, pid, born = owner()
    facts = {"what": "fastnce train", "pid": pid, "host": "far", "since": "then", "machine": "0" * 8, "born": born}
    file.write_text(json.dumps(facts))
    with pytest.raises(InUse, match=rf"process {pid} on far, since then, or is no longer there: then remove .*-owner"):
        hold(tmp_path, "x").__enter__()
    file.write_text("")  # may be about to be written
    with pytest.raises(InUse, match="in use by another process"):
        hold(tmp_path, "x").__enter__()
    os.utime(file, (0, 0))
    with hold(tmp_path, "x"):
        pass
    file.write_text(json.dumps(facts | {"machine": machine, "born": "0" * 8}))  # another process has the number now
    with hold(tmp_path, "x"):
        pass
    file.write_text("[" * 100_000)
    os.utime(file, (0, 0))
    with hold(tmp_path, "x"):
        pass
    assert left(tmp_path) == []


def test_a_lock_without_content_holds(tmp_path, monkeypatch):
    """A full disk still takes a file name, but no content."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        held = hold(tmp_path, "x")
        held.__enter__()
    with pytest.raises(InUse, match="in use by another process"):
        hold(tmp_path, "y").__enter__()
    held.__exit__(None, None, None)


@pytest.mark.parametrize("place", ["_is_named", "_signed"])
def test_a_signal_during_locking_leaves_no_lock(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(f"fastnce.common.locking.{place}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), hold(tmp_path / "a", "x"):
            pass
    with hold(tmp_path / "a", "x"):  # the lock is free
        pass
    assert left(tmp_path) == []


@pytest.mark.parametrize("kind", [(Path, "unlink"), (Path, "rmdir"), (os, "close")], ids=lambda kind: kind[1])
def test_a_signal_during_release_leaves_no_lock(kind, tmp_path, monkeypatch):
    original, interruptions = getattr(*kind), []

    def interrupted(*arguments):
        if not interruptions:
            interruptions.append(True)
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), hold(tmp_path / "a", "x"):
        patch.setattr(*kind, interrupted)
    assert interruptions
    assert left(tmp_path) == []
    with hold(tmp_path / "a", "x"):  # the lock is free
        pass


def count(folder: Path, times: int) -> None:
    sentences: list[str] = []
    for _ in range(times):
        with hold(folder, "count", wait=sentences.append):
            number = int((folder / "number").read_text())
            time.sleep(0.001)
            (folder / "number").write_text(str(number + 1))


def test_one_process_at_a_time(kind, tmp_path, monkeypatch):
    """Six processes increment a counter 60 times, each under the lock."""
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 40))
    (tmp_path / "number").write_text("0")
    others = [FORK.Process(target=count, args=(tmp_path, 10)) for _ in range(6)]
    for process in others:
        process.start()
    for process in others:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "number").read_text() == "60"
    assert left(tmp_path) == ["number"]


# ---- commands ----


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    data = write(tmp_path / "data", "trainA/1.png", "trainB/1.png")
    run = tmp_path / "run"
    arguments = ["train", "fastcut", "--data", str(data), "--out", str(run), "run.device=cpu"]
    with Holder(run):
        before = left(run)
        assert main(arguments) == 2
        assert f"{run} is in use by fastnce train (process " in one_sentence(capsys)
        assert main([*arguments, "--nproc", "2"]) == 2  # before any process is started
        assert "in use by fastnce train" in one_sentence(capsys)
        assert left(run) == before


def test_commands_that_write_folders_lock_them(tmp_path, capsys):
    pictures = write(tmp_path / "pairs", *(f"{side}/{n}.png" for n in (1, 2) for side in ("rain", "norain")))
    out = tmp_path / "out"
    with Holder(out):
        assert main(["unpair", str(pictures), "--out", str(out)]) == 2
        assert "in use by fastnce train" in one_sentence(capsys)
        assert main(["rain", str(pictures), "--out", str(out)]) == 2
        assert "in use by fastnce train" in one_sentence(capsys)
        save_published({"G": ResnetGenerator(width=2, blocks=1)}, out)  # a run may be exported while it trains
    with Holder(out, name=".fastnce-export-lock"), pytest.raises(InUse):
        save_published({"G": ResnetGenerator(width=2, blocks=1)}, out)


# ---- files of killed processes ----


def killed_name(suffix: str = "") -> str:
    """A temporary name of a process that has ended."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=lambda: theirs.send(partial_name(suffix)))
    process.start()
    name = ours.recv()
    process.join()
    return name


def test_sweep_removes_only_files_of_dead_processes(tmp_path):
    dead, alive, foreign = killed_name(".png"), partial_name(".png"), f".fastnce-00000000-1-00000000-{'a' * 8}.png"
    other = [".fastnce-lock", ".fastnce-cache", ".fastnce-notes.png", ".hidden.png", "a.png"]
    for name in (dead, alive, foreign, *other):
        (tmp_path / name).write_text("x")
    folder = tmp_path / killed_name()
    write(folder, "b/c.png")
    assert sorted(sweep(tmp_path)) == sorted([tmp_path / dead, folder])
    assert left(tmp_path) == sorted([alive, foreign, *other])
    assert sweep(tmp_path, held=True) == [tmp_path / foreign]
    assert left(tmp_path) == sorted([alive, *other])
    assert sweep(tmp_path / "missing") == []


def test_a_process_is_dead_or_alive_or_unknown():
    machine, pid, born = owner()
    assert is_dead(machine, pid, born) is False
    assert is_dead(machine, pid, "0" * 8) is True
    assert is_dead("0" * 8, pid, born) is None
    assert is_dead(machine, os.getppid(), "0" * 8) is True
    assert is_dead(machine, 2**40, born) in (True, None)
    child = FORK.Process(target=time.sleep, args=(60,))
    child.start()
    with suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert is_dead(machine, child.pid, born) is True


def test_the_next_start_removes_files_of_killed_processes(tmp_path):
    photos = write(tmp_path / "photos", "a.png", "sub/b.png")
    (model,) = save_published({"G": ResnetGenerator(width=2, blocks=1)}, tmp_path / "published")
    pairs = write(tmp_path / "pairs", *(f"{side}/{n}.png" for n in (1, 2) for side in ("rain", "norain")))
    out = tmp_path / "out"
    commands = {
        "translate": (["translate", str(model), str(photos), "--out", str(out)], [out, out / "sub"]),
        "rain": (["rain", str(photos), "--out", str(out)], [out]),
        "unpair": (["unpair", str(pairs), "--out", str(out)], [out]),
        "evaluate": (["evaluate", "--inputs-only", "--data", str(pairs), "--json", str(out / "x.json")], [out]),
    }
    for arguments, folders in commands.values():
        names = [folder / killed_name(".png") for folder in folders]
        for name in names:
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_text("half")
        assert main(arguments) == 0
        assert not any(name.exists() for name in names)
