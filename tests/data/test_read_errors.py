"""Pictures that disappear or break while a run reads them: the run is saved, and the error names the file."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.data import DataError
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.step import Step
from fastnce.engine.validate import Validation
from fastnce.evaluate.pairs import find_pairs
from fastnce.translate.translator import Translator
from tests.ends import one_sentence, tiny, write

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path) -> Path:
    names = [f"train{side}/{n}.png" for side in "AB" for n in range(3)]
    return write(tmp_path / "set", *names, *(f"test/{side}/{n}.png" for side in ("rain", "norain") for n in range(3)))


def after_step(monkeypatch, step: int, action) -> None:
    real, done = Step.run, []

    def run(self, *arguments):
        losses = real(self, *arguments)
        done.append(1)
        if len(done) == step:
            action()
        return losses

    monkeypatch.setattr(Step, "run", run)


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text()


def saved(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoints(run / "checkpoints").load()[0]


@pytest.mark.parametrize("damage", ["removed", "emptied"])
def test_a_picture_that_disappears_before_the_learning_rate_decays(damage, pictures, tmp_path, monkeypatch, capsys):
    """The second half of training reads pictures of another size, which are decoded when it begins."""
    halves = ["optim.n_epochs=1", "optim.n_epochs_decay=1"]
    victim, kept, run = pictures / "trainA" / "1.png", tmp_path / "kept.png", tmp_path / "run"
    shutil.copy2(victim, kept)
    after_step(monkeypatch, 2, victim.unlink if damage == "removed" else lambda: victim.write_bytes(b""))
    assert main(tiny(pictures, run, *halves)) == 2
    printed = capsys.readouterr()
    assert str(victim) in printed.err
    assert "Traceback" not in printed.err
    assert "stopped after step 3 and saved\n" in printed.out
    assert log_of(run).endswith(printed.err.removeprefix("fastnce: "))
    assert (run / "checkpoints" / "latest").read_text() == "step-00000003"
    shutil.copy2(kept, victim)
    assert main(tiny(pictures, run, *halves)) == 0
    assert main(tiny(pictures, tmp_path / "whole", *halves)) == 0
    one, other = saved(run), saved(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_a_missing_truth_ends_the_run_after_saving(pictures, tmp_path, monkeypatch, capsys):
    victim, run = pictures / "test" / "norain" / "1.png", tmp_path / "run"
    after_step(monkeypatch, 2, victim.unlink)
    assert main(tiny(pictures, run, "run.validate_every=2", "run.steps=4")) == 2
    assert one_sentence(capsys) == f"fastnce: there is no file {victim}\n"
    ends = [line.partition("  ")[2] for line in log_of(run).splitlines()[-2:]]  # after the times
    assert ends == ["stopped after step 2 and saved", f"there is no file {victim}"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000002"


def test_a_missing_truth_is_skipped(pictures, tmp_path, monkeypatch, capsys):
    victim, run = pictures / "test" / "norain" / "1.png", tmp_path / "run"
    after_step(monkeypatch, 3, victim.unlink)
    assert main(tiny(pictures, run, "run.validate_every=2", "run.steps=6", "data.skip_bad=true")) == 0
    assert capsys.readouterr().err == ""
    words = f"the held-out pair 1 is left out from now on: there is no file {victim}\n"
    assert log_of(run).count(words) == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "held_out_psnr_y" in row] == [0, 2, 4, 6]
    found = Checkpoints(run / "checkpoints").best()
    assert found is not None
    assert found[1]["step"] in (4, 6)  # figures on three pairs are not comparable


def psnr(pairs) -> float:
    """PSNR of RGB by its formula, the mean over pairs."""
    values = []
    for pair in pairs:
        a, b = (np.asarray(Image.open(path), np.float64) for path in (pair.rainy, pair.clean))
        values.append(10 * math.log10(255**2 / np.mean((a - b) ** 2)))
    return sum(values) / len(values)


@pytest.mark.parametrize("half", ["rainy", "clean"])
def test_measuring_without_a_pair(half, pictures):
    pairs = find_pairs(pictures)
    validation = Validation(pairs, 3, CPU, Translator, skip_bad=True)
    before, whole = validation.digest(), psnr(pairs)
    validation.measure_inputs()
    assert validation.inputs["psnr_rgb"] == pytest.approx(whole, abs=1e-4)
    validation.best = 99.0
    getattr(pairs[0], half).write_bytes(b"no picture")
    left = psnr(pairs[1:])
    assert abs(left - whole) > 1e-3
    assert validation._measure(lambda rainy: rainy)["psnr_rgb"] == pytest.approx(left, abs=1e-4)
    assert validation.inputs["psnr_rgb"] == pytest.approx(left, abs=1e-4)
    assert validation.best == -math.inf
    assert validation.digest() != before
    first, second = validation.take_messages()
    assert first.startswith(f"the held-out pair 0 is left out from now on: {getattr(pairs[0], half)} ")
    assert second == "a new best checkpoint is looked for, on the pairs that are left"
    assert validation.take_messages() == []
    for pair in pairs[1:]:
        pair.clean.unlink()
    with pytest.raises(DataError, match="none of the 2 held-out pairs can be read"):
        validation._measure(None)


def test_a_pair_that_disappears_after_it_was_measured(pictures, tmp_path, monkeypatch):
    """A checkpoint names the pairs without reading them again."""
    victim, run = pictures / "test" / "norain" / "1.png", tmp_path / "run"
    real = Validation.measure

    def measure(self, method):
        better = real(self, method)
        victim.unlink()
        return better

    monkeypatch.setattr(Validation, "measure", measure)
    assert main(tiny(pictures, run, "run.validate_every=2", "run.steps=2")) == 0
    assert (run / "checkpoints" / "best").read_text() == "step-00000002"


def test_samples_are_read_when_the_run_begins(pictures, tmp_path, monkeypatch):
    shutil.copytree(pictures / "trainA", pictures / "testA")
    shutil.copytree(pictures / "trainB", pictures / "testB")
    after_step(monkeypatch, 1, lambda: (pictures / "testA" / "0.png").write_bytes(b""))
    assert main(tiny(pictures, tmp_path / "run", "run.steps=2", "run.sample_every=2", "run.samples=1")) == 0
    Image.open(tmp_path / "run" / "samples" / "step-00000002.png").load()


def test_a_truncated_cache_is_detected(pictures, tmp_path, monkeypatch, capsys):
    """It loses one byte, within a page: the system would kill a process that reads a missing page."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    command = tiny(pictures, run, "run.steps=4", f"data.cache_dir={cache}")

    def cut() -> None:
        (path,) = cache.glob("trainB*.bin")
        os.truncate(path, path.stat().st_size - 1)

    with monkeypatch.context() as patch:
        after_step(patch, 2, cut)
        assert main(command) == 2
    (path,) = cache.glob("trainB*.bin")
    assert one_sentence(capsys) == f"fastnce: {path} was truncated while it was read; the next start builds it again\n"
    assert (run / "checkpoints" / "latest").read_text() == "step-00000002"
    assert main(command) == 0
