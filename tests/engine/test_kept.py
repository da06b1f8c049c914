"""Checkpoints at the ends of epochs that are kept for good (`run.keep_epochs`)."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.engine import checkpoint
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.options import OptimOptions
from fastnce.engine.stored import follow, kept_epoch, kept_epochs
from fastnce.training.listing import describe
from fastnce.translate.chosen import of_epoch
from tests.ends import one_sentence, tiny
from tests.engine.test_engine import training_tensors
from tests.engine.test_schedule import go
from tests.logs import log_lines

OPTIM = OptimOptions(n_epochs=4, n_epochs_decay=4)


def pointers(run: Path) -> dict[str, str]:
    files = (run / "checkpoints").glob("epoch-*")
    return {file.name: file.read_text() for file in files}


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in Checkpoints(run / "checkpoints").steps()]


def test_they_outlive_the_others(tmp_path):
    """Eight epochs of two steps; every second one is kept, and the two newest of all."""
    go(tmp_path, OPTIM, epoch=2, keep_epochs=2, save_every=3)
    assert pointers(tmp_path) == {f"epoch-{n}": f"step-{2 * n:08d}" for n in (2, 4, 6, 8)}
    assert steps(tmp_path) == [4, 8, 12, 15, 16]
    assert kept_epochs(tmp_path) == [2, 4, 6, 8]
    assert describe(tmp_path, "run").kept == [2, 4, 6, 8]
    assert follow(tmp_path / "checkpoints" / "epoch-4").name == "step-00000008"


def test_they_are_the_states_after_these_epochs(tmp_path):
    """A run that ends after epoch 4 has the same tensors. Keeping changes nothing else."""
    go(tmp_path / "kept", OPTIM, epoch=1, keep_epochs=4)
    go(tmp_path / "whole", OPTIM, epoch=1)
    assert steps(tmp_path / "whole") == [8]
    go(tmp_path / "half", OPTIM, 4, epoch=1)
    end, other = training_tensors(tmp_path / "kept"), training_tensors(tmp_path / "whole")
    assert all(torch.equal(tensor, other[key]) for key, tensor in end.items())
    shutil.rmtree(tmp_path / "kept" / "checkpoints" / "step-00000008")
    found, expected = training_tensors(tmp_path / "kept"), training_tensors(tmp_path / "half")
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_epochs_are_counted_as_in_the_schedule(tmp_path):
    """Published: `epoch % save_epoch_freq == 0`, where the epochs begin with `--epoch_count`."""
    go(tmp_path, OptimOptions(n_epochs=7, n_epochs_decay=0, first_epoch=4), epoch=2, keep_epochs=3)
    assert pointers(tmp_path) == {"epoch-6": "step-00000006"}


def test_a_continued_run_keeps_what_it_has(tmp_path):
    """Also with another interval, or with none."""
    for end, every in ((5, 2), (7, 3), (0, 0)):
        go(tmp_path, OPTIM, end, epoch=1, keep_epochs=every, save_every=1)
    assert set(pointers(tmp_path)) == {"epoch-2", "epoch-4", "epoch-6"}
    assert steps(tmp_path) == [2, 4, 6, 7, 8]


def test_a_full_disk_and_another_try(tmp_path, monkeypatch):
    """A pointer that cannot be written is written later; its checkpoint is not removed in between."""
    real, broken = checkpoint.write_whole, True

    def write(path, content):
        if broken and path.name == "epoch-1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, content)

    monkeypatch.setattr(checkpoint, "write_whole", write)
    said = []
    store = Checkpoints(tmp_path, log=said.append)
    tensors = {"G/w": torch.ones(3)}
    store.save(1, tensors, tensors, {}, epoch=1)
    for step in (2, 3, 4):
        store.save(step, tensors, tensors, {})
    assert [path.name[-1] for path in store.steps()] == ["1", "3", "4"]
    assert said[0] == f"{tmp_path / 'epoch-1'}: No space left on device; step-00000001 is saved all the same"
    broken = False
    store.save(5, tensors, tensors, {})
    assert (tmp_path / "epoch-1").read_text() == "step-00000001"
    assert [path.name[-1] for path in store.steps()] == ["1", "4", "5"]


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    real = checkpoint.save_file

    def save(tensors, path):
        if save.fails:
            save.fails -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensors, path)

    save.fails = 1
    monkeypatch.setattr(checkpoint, "save_file", save)
    go(tmp_path, OPTIM, 9, epoch=3, keep_epochs=1)
    assert set(pointers(tmp_path)) == {"epoch-2", "epoch-3"}
    assert any("step-00000003: no checkpoint of" in line for line in log_lines(tmp_path))


def test_a_process_that_ended_before_the_pointer(tmp_path):
    """The checkpoint of an epoch is whole, and its pointer is missing: the next start writes it."""
    go(tmp_path, OPTIM, 2, epoch=1, keep_epochs=2)
    (tmp_path / "checkpoints" / "epoch-2").unlink()
    go(tmp_path, OPTIM, 5, epoch=1, keep_epochs=2, save_every=1)
    assert set(pointers(tmp_path)) == {"epoch-2", "epoch-4"}
    assert steps(tmp_path) == [2, 4, 5]


def test_removed_by_the_user(tmp_path):
    """The run goes on; whoever asks for it is told what is left."""
    go(tmp_path, OPTIM, 3, epoch=1, keep_epochs=1)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    assert kept_epochs(tmp_path) == [1, 3]
    with pytest.raises(ValueError, match="epoch-2 names step-00000002, which is not there any more"):
        follow(tmp_path / "checkpoints" / "epoch-2")
    go(tmp_path, OPTIM, epoch=1, keep_epochs=1)
    assert kept_epochs(tmp_path) == [1, 3, 4, 5, 6, 7, 8]


def test_names_of_pointers():
    names = (
        "epoch-1",
        "epoch-200",
        "epoch-0",
        "epoch-01",
        "epoch-",
        "epoch--1",
        "epoch-1.pth",
        "best",
        "step-00000001",
    )
    assert [kept_epoch(Path(name)) for name in names] == [1, 200, *[None] * 7]


def test_pointers_that_name_nothing(tmp_path):
    go(tmp_path, OPTIM, 3, epoch=3, keep_epochs=1)
    for text in ("", "../step-00000003", "latest", "epoch-1", "\0"):
        (tmp_path / "checkpoints" / "epoch-7").write_text(text)
        assert kept_epochs(tmp_path) == [1]
        with pytest.raises(ValueError, match="should hold the name of a checkpoint beside it"):
            follow(tmp_path / "checkpoints" / "epoch-7")
        go(tmp_path, OPTIM, 4, epoch=3, keep_epochs=1)  # it is in no one's way


def test_translating_with_an_epoch(folder, tmp_path, capsys):
    """`--epoch 1`, as in the published test.py, and the path of the pointer; the weights differ from the last ones."""
    run, picture = tmp_path / "run", str(folder / "testA" / "0.png")
    more = ["run.keep_epochs=1", "optim.n_epochs=2", "optim.n_epochs_decay=0", "optim.lr=0.05", "run.log_every=0"]
    assert main([*tiny(folder, run, *more), "--quiet"]) == 0
    outs = {}
    for name, words in {
        "last": [str(run)],
        "1": [str(run), "--epoch", "1"],
        "2": [str(run), "--epoch", "2"],
        "path": [str(run / "checkpoints" / "epoch-1")],
    }.items():
        out = tmp_path / f"{name}.png"
        assert main(["translate", *words, picture, "--out", str(out), "--device", "cpu"]) == 0
        outs[name] = Image.open(out).tobytes()
    assert outs["1"] == outs["path"] != outs["2"] == outs["last"]
    capsys.readouterr()
    for words, message in (
        ([str(run), "--epoch", "3"], f"{run} has no checkpoint of epoch 3: it has 1, 2"),
        ([str(run / "checkpoints" / "epoch-3")], f"{run} has no checkpoint of epoch 3: it has 1, 2"),
        ([picture, "--epoch", "1"], f"--epoch 1 chooses a checkpoint of a run, and {picture} is none"),
    ):
        assert main(["translate", *words, picture, "--out", str(tmp_path / "x.png"), "--device", "cpu"]) == 2
        assert message in one_sentence(capsys)
    assert not (tmp_path / "x.png").exists()


def test_a_run_that_keeps_none(tmp_path):
    go(tmp_path, OPTIM, 3, epoch=3)
    with pytest.raises(ValueError, match=r"has no checkpoint of epoch 1: it keeps none \(run\.keep_epochs=20 keeps"):
        of_epoch(tmp_path, 1)
