"""Validation by FID, KID and measures of single images, with and without pairs, and measures that fail."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.held_out import find_unpaired
from fastnce.engine.state_file import read
from fastnce.engine.validate import Validation
from fastnce.evaluate import networks
from fastnce.evaluate.distribution import FEATURES, Inception
from fastnce.evaluate.metrics import Metric, find_measures
from fastnce.training import train_run
from fastnce.translate.translator import Translator
from tests.engine.test_distributed import finish, free_port, start
from tests.engine.test_validate import SMALL, config, lines

pytestmark = pytest.mark.usefixtures("few_blocks")


def draw(root: Path, counts: dict[str, int]) -> Path:
    """Noise that is brighter in some folders than in others."""
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng(10 * place + i)
            pixels = rng.integers(20 * place, 100 + 30 * place, (22, 25, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


OWN = """
calls = []

def level(output, truth):
    calls.append(0)
    if len(calls) > {count}:
        raise OSError("a file is gone")
    return output.mean()
"""


@pytest.fixture
def two_sets(tmp_path: Path) -> Path:
    """Training images, and test images of other numbers in testA and testB."""
    return draw(tmp_path / "set", {"trainA": 2, "trainB": 2, "testA": 3, "testB": 2})


@pytest.fixture
def with_pairs(tmp_path: Path) -> Path:
    return draw(tmp_path / "set", {"trainA": 2, "trainB": 2, "test/rain": 2, "test/norain": 2})


def sets(inception: Path, *more: str) -> list[str]:
    return ["run.validate_every=2", f"run.feature_weights={inception}", *more]


def evaluated(run: Path, data: Path, inception: Path, *more: str) -> dict:
    out = run.parent / "scores.json"
    weights = ["--fid", "--feature-extractor-weights-path", str(inception), "--device", "cpu"]
    assert main(["evaluate", str(run), "--data", str(data), "--json", str(out), *weights, *more]) == 0
    return json.loads(out.read_text())


def test_sets_without_pairs(two_sets, tmp_path, inception, capsys):
    """FID between the translations of testA and testB; it decides, because PSNR needs pairs."""
    run = tmp_path / "run"
    train_run(config(two_sets, "run.steps=4", *sets(inception, "run.metrics=fid,kid"), method="fastcut"), run)
    said = capsys.readouterr().out
    fid, kid = lines(run, "held_out_fid"), lines(run, "held_out_kid")
    assert list(fid) == list(kid) == [0, 2, 4]
    assert f"held out: 3 pictures of testA, and 2 of testB; the inputs have fid {fid[0]:.4g}, kid {kid[0]:.4g}" in said
    assert f"step 2: held out fid {fid[2]:.4g} (inputs {fid[0]:.4g}), kid" in said
    best = 2 if fid[2] <= fid[4] else 4
    assert Checkpoints(run / "checkpoints").best()[1]["step"] == best
    assert read(run / f"checkpoints/step-{best:08d}/state.json", best)["validation"]["fid"] == fid[best]
    scores = evaluated(run, two_sets, inception, "--checkpoint", "last")
    assert scores["mean"]["fid"] == pytest.approx(fid[4], rel=1e-4)
    assert scores["mean"]["kid"] == pytest.approx(kid[4], rel=1e-2, abs=1e-6)
    assert abs(fid[4] - fid[0]) > 1e-3 * fid[0]  # the outputs were measured, not the inputs
    assert "held_out_psnr_y" not in (run / "metrics.jsonl").read_text()


def test_pairs_are_compared_with_their_truths(with_pairs, tmp_path, inception):
    run = tmp_path / "run"
    train_run(config(with_pairs, "run.steps=2", *sets(inception, "run.best=fid"), method="fastcut"), run)
    fid = lines(run, "held_out_fid")
    assert list(fid) == list(lines(run, "held_out_psnr_y")) == [0, 2]
    scores = evaluated(run, with_pairs, inception)
    assert scores["mean"]["fid"] == pytest.approx(fid[2], rel=1e-4)
    assert scores["mean"]["psnr_y"] == pytest.approx(lines(run, "held_out_psnr_y")[2], abs=1e-4)


def test_distances_without_a_download(two_sets, tmp_path):
    """The kernel distance decides; `fastnce evaluate` finds the same values."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="EfficientNet-Lite0 (extra features) is not installed")
    run, names = tmp_path / "run", ("frechet_lite0", "kernel_lite0")
    options = ["run.steps=2", "run.validate_every=2", "run.best=kernel_lite0", "run.metrics=frechet_lite0"]
    train_run(config(two_sets, *options, method="fastcut"), run, quiet=True)
    values = {name: lines(run, f"held_out_{name}") for name in names}
    assert all(list(found) == [0, 2] for found in values.values())
    assert Checkpoints(run / "checkpoints").best()[1]["validation"]["kernel_lite0"] == values["kernel_lite0"][2]
    out = tmp_path / "scores.json"
    command = ["evaluate", str(run), "--data", str(two_sets), "--features", "--device", "cpu", "--json", str(out)]
    assert main(command) == 0
    scores = json.loads(out.read_text())["mean"]
    assert scores == {name: pytest.approx(values[name][2], rel=1e-4) for name in names}


def test_the_lower_value_is_the_best_and_continues(two_sets, tmp_path, monkeypatch):
    """With scripted values; they decide alone, and the best one survives a new process."""
    values = [9.0, 5.0, 3.0, 4.0, 9.0, 3.5, 2.0]  # the inputs' first, in each process

    class Nothing:
        def __init__(self, *args):
            pass

        width = FEATURES
        measures: ClassVar = {"fid": lambda features, reference: values.pop(0)}

        def features(self, picture):
            return torch.zeros(FEATURES, dtype=torch.float64)

    monkeypatch.setattr(networks, "Inception", Nothing)
    extra = ["run.validate_every=1", "run.best=fid"]
    for steps, best in ((3, 2), (4, 2), (5, 5)):
        train_run(config(two_sets, f"run.steps={steps}", *extra, method="fastcut"), tmp_path / "run", quiet=True)
        assert Checkpoints(tmp_path / "run/checkpoints").best()[1]["step"] == best
        if steps == 4:
            values.insert(0, 9.0)
    assert values == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_ranks_measure_as_one(two_sets, tmp_path, inception):
    command = [
        "train",
        "fastcut",
        "--data",
        str(two_sets),
        *SMALL,
        *sets(inception, "run.metrics=fid,kid", "run.steps=2"),
    ]
    assert main([*command, "--out", str(tmp_path / "one"), "data.batch=2", "--quiet"]) == 0
    port = free_port()
    for code, _, err in finish([start(rank, 2, port, *command, "--out", str(tmp_path / "two")) for rank in range(2)]):
        assert code == 0, err
    for name in ("held_out_fid", "held_out_kid"):
        one, other = (lines(tmp_path / run, name) for run in ("one", "two"))
        assert list(one) == list(other) == [0, 2]
        assert one[0] == pytest.approx(other[0], rel=1e-6)
        assert one[2] == pytest.approx(other[2], rel=1e-3)  # gradients are summed in another order
    assert Checkpoints(tmp_path / "two/checkpoints").best() is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_measure_that_fails_on_another_rank(with_pairs, tmp_path, monkeypatch):
    """Each rank measures one of two pairs, after the check of the function."""
    monkeypatch.chdir(tmp_path)
    code = OWN.format(count=2).replace("if len", 'if os.environ["RANK"] == "1" and len')
    Path("own.py").write_text(f"import os\n{code}")
    settings = ["run.validate_every=1", "run.best=own.py:level", "run.steps=2"]
    command = ["train", "fastcut", "--data", str(with_pairs), *SMALL, *settings, "--out", "run"]
    port = free_port()
    for code, _, err in finish([start(rank, 2, port, *command) for rank in range(2)]):
        assert code == 0, err
    assert list(lines(Path("run"), "held_out_level")) == [0]
    assert Path("run/log.txt").read_text().count("run.best: level fails on another rank: ") == 1


def test_a_failing_network_does_not_end_the_training(two_sets, tmp_path, inception, monkeypatch, capsys):
    calls, features = [], Inception.features

    def failing(self, picture):
        calls.append(0)
        if len(calls) > 8:  # 3 + 2 of the inputs and the reference, 3 of the first validation
            raise RuntimeError("the memory is full\nand more")
        return features(self, picture)

    monkeypatch.setattr(Inception, "features", failing)
    run = tmp_path / "run"
    every = sets(inception, "run.metrics=fid", "run.validate_every=1", "run.keep=9")
    train_run(config(two_sets, "run.steps=4", *every, method="fastcut"), run)
    assert list(lines(run, "held_out_fid")) == [0, 1]
    log = (run / "log.txt").read_text()
    assert log.count("run.best: fid fails: RuntimeError: the memory is full: from now on no best checkpoint is") == 1
    assert log.count("fid fails") == 1
    assert Checkpoints(run / "checkpoints").best()[1]["step"] == 1
    assert Checkpoints(run / "checkpoints").state()[0]["step"] == 4
    assert len(calls) == 9


@pytest.mark.parametrize("key", ["run.best", "run.metrics"])
def test_an_own_measure_that_fails_is_left_out(with_pairs, tmp_path, monkeypatch, key):
    """One call is the check before training, two measure the inputs, two the first step."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN.format(count=5))
    run = tmp_path / "run"
    train_run(config(with_pairs, "run.steps=3", "run.validate_every=1", "run.keep=9", f"{key}=own.py:level"), run)
    assert list(lines(run, "held_out_level")) == [0, 1]
    assert list(lines(run, "held_out_psnr_y")) == [0, 1, 2, 3]
    log = (run / "log.txt").read_text()
    assert log.count(f"{key}: level fails on two images (1, 3, 22, 25): OSError: a file is gone: ") == 1
    assert ("it is not measured any more" in log) == (key == "run.metrics")
    assert ("no best checkpoint is looked for" in log) == (key == "run.best")
    if key == "run.best":
        assert Checkpoints(run / "checkpoints").best()[1]["step"] == 1
    assert "level" not in read(run / "checkpoints/step-00000003/state.json", 3).get("validation", {})


def test_a_measure_that_fails_at_once(with_pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN.format(count=1))
    run = tmp_path / "run"
    train_run(config(with_pairs, "run.steps=1", "run.validate_every=1", "run.best=own.py:level"), run)
    assert lines(run, "held_out_level") == {}
    assert Checkpoints(run / "checkpoints").best() is None


def test_an_unreadable_reference(two_sets, inception):
    def measured(skip_bad):
        items, reference = find_unpaired(str(two_sets))
        Image.new("RGB", (25, 22)).save(two_sets / "testB/2.png")
        reference.append(two_sets / "testB/2.png")
        Path(reference[0]).write_bytes(b"broken")
        measures = find_measures("fid", "", weights=str(inception))
        found = Validation(
            *(items, 3, torch.device("cpu"), Translator, None, skip_bad, measures.best, (), measures.networks),
            reference,
        )
        found.measure_inputs()
        return found

    with pytest.raises(ValueError, match=r"0\.png is not a picture"):
        measured(False)
    found = measured(True)
    assert "left out of the reference: " in found.take_messages()[0]
    assert found.inputs["fid"] > 0


def test_how_many_of_each(two_sets):
    items, files = find_unpaired(str(two_sets), 2)
    assert [item.name for item in items] == ["0.png", "1.png"]
    assert [file.name for file in files] == ["0.png", "1.png"]
    digests = []
    for reference in (files, files[:1]):
        metric = Metric("niqe", lambda output: 1.0, False, needs="nothing")
        digests.append(
            Validation(items, 3, torch.device("cpu"), Translator, metric=metric, reference=reference).digest()
        )
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["run.best=psnr_y"],
            "run.best=psnr_y compares pairs, and testA and testB are none: take fid, kid, kernel_lite0 or ",
        ),
        (["run.metrics=l1"], "run.metrics=l1 compares pairs"),
        (["run.best=fid", "run.validate_pictures=1"], "at least two pictures of each set, not 1 and 1"),
        (["run.best=fid", "run.validate_every=0"], "run.best=fid measures nothing, because run.validate_every=0"),
        (["run.metrics=fid,fid"], "two measures have the name fid"),
        (["run.metric=fid"], "run.metric is called run.best now: write run.best=fid"),
    ],
)
def test_what_cannot_be_measured_is_refused(two_sets, tmp_path, inception, capsys, settings, sentence):
    options = [*SMALL, *sets(inception), *settings, "run.steps=1"]
    assert main(["train", "fastcut", "--data", str(two_sets), "--out", str(tmp_path / "run"), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_weights_are_named_before_training(two_sets, tmp_path, inception, monkeypatch, capsys):
    options = [*SMALL, "run.validate_every=2", "run.best=fid", "run.steps=1"]
    command = ["train", "fastcut", "--data", str(two_sets), "--out", str(tmp_path / "run"), *options]
    assert main([*command, "run.feature_weights=nowhere.pth"]) == 2
    assert "there is no file nowhere.pth" in capsys.readouterr().err

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    assert main(command) == 2
    assert "FID and KID need the file weights-inception-2015-12-05-6726825d.pth" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_to_measure(two_sets, tmp_path, inception, capsys):
    """The defaults say so and train; a named measure is refused."""
    plain = ["train", "fastcut", "--data", str(two_sets), *SMALL, "run.steps=1", "run.validate_every=1"]
    assert main([*plain, "--out", str(tmp_path / "one")]) == 0
    said = capsys.readouterr().out
    assert f"nothing is validated: {two_sets}/testA and testB are not paired; run.metrics=fid or kernel_lite0" in said
    (two_sets / "testB").rename(tmp_path / "moved")
    weights = [f"run.feature_weights={inception}", "run.metrics=fid"]
    assert main([*plain, *weights, "--out", str(tmp_path / "two")]) == 2
    assert "fid has nothing to measure" in capsys.readouterr().err


def test_the_old_name_in_a_file(tmp_path):
    """The default of the old key was psnr_y, which `auto` means for pairs."""
    from fastnce.config import resolve

    for old, new in (("l1", "l1"), ("psnr_y", "auto")):
        (tmp_path / "config.toml").write_text(f'[run]\nmetric = "{old}"\n')
        assert resolve("fastcut", tmp_path / "config.toml").run.best == new
    (tmp_path / "config.toml").write_text('[run]\nmetric = "l1"\nbest = "fid"\n')
    assert resolve("fastcut", tmp_path / "config.toml").run.best == "fid"
