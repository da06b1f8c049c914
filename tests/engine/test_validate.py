"""Held-out pairs during training: the measures, the checkpoint `best`, and an unchanged training."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.distributed import Ranks
from fastnce.engine.held_out import find_validation
from fastnce.engine.loop import train
from fastnce.engine.stored import follow, load_generators
from fastnce.engine.validate import Validation
from fastnce.evaluate.metrics import Metric
from fastnce.evaluate.pairs import find_pairs
from fastnce.methods import CUT, CUTOptions, NetworkOptions
from fastnce.training import train_run
from fastnce.translate.load import load_translator
from fastnce.translate.translator import Translator
from tests.logs import log_lines

pytestmark = pytest.mark.usefixtures("few_blocks")

SMALL = [
    "network.generator=restorer",
    "network.width=4",
    "network.discriminator=n_layers",
    "network.discriminator_layers=1",
    "network.discriminator_width=4",
    "loss.nce_layers=4,8",
    "loss.patches=8",
    "loss.projection=8",
    "data.load_size=20",
    "data.crop_size=16",
    "run.device=cpu",
    "run.threads=1",
    "run.log_every=2",
    "run.sample_every=0",
    "run.save_every=100",
    "optim.lr=3e-3",
]


def noise(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def rainy_set(tmp_path: Path) -> Path:
    """Unpaired training images, and three test pairs whose sides are no multiples of 4."""
    root = tmp_path / "set"
    for name, count in (("trainA", 3), ("trainB", 3), ("test/rain", 3), ("test/norain", 3)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(22, 25, 3, seed=i + 10 * len(name))).save(root / name / f"{i}.png")
    return root


def config(root: Path, *overrides: str, method: str = "dcdgan"):
    made = resolve(method, None, [*SMALL, *overrides])
    made.data.dir = str(root)
    return made


def lines(run: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def training_tensors(run: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(run / "checkpoints").load()
    assert found is not None
    return found[0]


def test_values_are_those_of_evaluate(rainy_set, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "scores.json"
    train_run(config(rainy_set, "run.steps=4", "run.validate_every=2", "optim.ema=0.5"), run)
    said = capsys.readouterr().out
    assert "held out: 3 pairs" in said
    assert "step 2: held out" in said
    found = lines(run, "held_out_psnr_y")
    assert list(found) == [0, 2, 4]
    arguments = ["evaluate", str(run), "--data", str(rainy_set), "--json", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    scores = json.loads(out.read_text())
    assert found[0] == pytest.approx(scores["inputs"]["psnr_y"], abs=1e-9)
    assert found[4] == pytest.approx(scores["mean"]["psnr_y"], abs=1e-4)  # the averaged weights
    assert lines(run, "held_out_ssim_y")[4] == pytest.approx(scores["mean"]["ssim_y"], abs=1e-6)
    assert abs(found[4] - found[0]) > 1e-3  # the model was measured, not the inputs
    assert "dB (" in log_lines(run)[-2]  # the last progress line


def test_weights_that_a_run_begins_with_are_measured(rainy_set, tmp_path):
    """So that one sees whether training on improves a model; no checkpoint has them, so none of them is the best."""
    train_run(config(rainy_set, "run.steps=2", "run.validate_every=2"), tmp_path / "first", quiet=True)
    wanted = lines(tmp_path / "first", "held_out_psnr_y")[2]
    more = [f"run.start_from={tmp_path / 'first'}", "run.validate_every=1", "optim.lr=0.05"]
    train_run(config(rainy_set, "run.steps=1", *more), tmp_path / "next", quiet=True)
    (said,) = [line for line in log_lines(tmp_path / "next") if line.startswith("before the first step: held out ")]
    assert f" {wanted:.2f} dB (" in said
    found = lines(tmp_path / "next", "held_out_psnr_y")
    assert found[0] == lines(tmp_path / "first", "held_out_psnr_y")[0]  # the inputs
    assert found[1] != pytest.approx(wanted, abs=1e-3)
    assert (tmp_path / "next/checkpoints/best").exists()
    train_run(config(rainy_set, "run.steps=2", *more), tmp_path / "next", quiet=True)
    assert sum("before the first step" in line for line in log_lines(tmp_path / "next")) == 1


def test_training_does_not_notice(rainy_set, tmp_path):
    results = []
    for name, extra in (("without", []), ("with", ["run.validate_every=1", "run.monitor_every=1"])):
        train_run(config(rainy_set, "run.steps=3", "optim.ema=0.5", *extra), tmp_path / name, quiet=True)
        results.append(training_tensors(tmp_path / name))
    assert results[0].keys() == results[1].keys()
    for key, tensor in results[0].items():
        assert torch.equal(tensor, results[1][key]), key


def test_interrupted_and_continued(rainy_set, tmp_path):
    extra = ["run.validate_every=2", "data.rain=0.5", "loss.lambda_rendered=1"]
    train_run(config(rainy_set, "run.steps=4", *extra), tmp_path / "whole", quiet=True)
    for steps in (3, 4):
        train_run(config(rainy_set, f"run.steps={steps}", *extra), tmp_path / "parts", quiet=True)
    whole, parts = (training_tensors(tmp_path / name) for name in ("whole", "parts"))
    for key, tensor in whole.items():
        assert torch.equal(tensor, parts[key]), key
    one, other = (lines(tmp_path / name, "held_out_psnr_y") for name in ("whole", "parts"))
    assert one == {step: value for step, value in other.items() if step != 3}  # the last step is measured too
    assert [Checkpoints(tmp_path / n / "checkpoints").best() is not None for n in ("whole", "parts")] == [True, True]


class Scripted(Validation):
    """Validation with values from a list."""

    values: ClassVar = [20.0, 23.0, 21.0, 22.0, 19.0, 24.0]

    def __init__(self):
        super().__init__([], 3, torch.device("cpu"), Translator)

    def digest(self) -> str:
        return "scripted"

    def measure_inputs(self) -> str:
        self.inputs = dict.fromkeys(("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"), 18.0)
        self.taken = 0
        return "held out: nothing"

    def _measure(self, translate):
        value = self.values.pop(0)
        return {"psnr_y": value, "ssim_y": 0.5, "psnr_rgb": value, "ssim_rgb": 0.5}


class Pictures:
    steps_per_epoch = 100

    def batch(self, step: int, *, decaying: bool = False):
        torch.manual_seed(step)
        return torch.rand(1, 3, 16, 16) * 2 - 1, torch.rand(1, 3, 16, 16) * 2 - 1

    def samples(self, count: int):
        return self.batch(0)

    def digest(self) -> str:
        return "pictures"


def go(folder: Path, validation: Validation, steps: int) -> None:
    made = config(folder, f"run.steps={steps}", "run.validate_every=1", "run.save_every=1", "run.keep=2", method="cut")
    method = CUT(CUTOptions(nce_layers=[4, 8], patches=8, projection=8), made.network)
    train(method, Pictures(), made.optim, made.run, folder, quiet=True, validation=validation)


def test_best_is_kept_and_survives(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "values", list(Scripted.values))
    go(tmp_path, Scripted(), 4)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in checkpoints.steps()] == ["step-00000002", "step-00000003", "step-00000004"]
    best = checkpoints.best()
    assert best is not None
    assert best[0].name == "step-00000002"
    assert best[1]["validation"]["psnr_y"] == 23.0
    assert follow(tmp_path / "checkpoints" / "best") == best[0]
    assert follow(tmp_path / "checkpoints" / "latest").name == "step-00000004"
    go(tmp_path, Scripted(), 5)  # 19 is no new best, although it is the first value of this process
    assert checkpoints.best()[0].name == "step-00000002"
    go(tmp_path, Scripted(), 6)
    assert checkpoints.best()[0].name == "step-00000006"
    assert [p.name for p in checkpoints.steps()] == ["step-00000005", "step-00000006"]


def test_other_pictures_begin_a_new_best(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "values", [23.0, 20.0])
    go(tmp_path, Scripted(), 1)
    monkeypatch.setattr(Scripted, "digest", lambda self: "other")
    go(tmp_path, Scripted(), 2)
    assert Checkpoints(tmp_path / "checkpoints").best()[0].name == "step-00000002"
    assert "was measured on other pictures" in (tmp_path / "log.txt").read_text()


def test_a_damaged_best_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "values", [23.0])
    go(tmp_path, Scripted(), 1)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", log=said.append)
    (checkpoints.steps()[0] / "generator.safetensors").write_bytes(b"broken")
    assert checkpoints.best() is None
    assert "no best checkpoint any more" in said[0]
    checkpoints.steps()[0].rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="names step-00000001, which is not there"):
        follow(tmp_path / "checkpoints" / "best")


def test_best_translates(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "values", [23.0, 22.0])
    validation = Scripted()
    made = config(tmp_path, "run.steps=2", "run.validate_every=1", method="cut")
    method = CUT(CUTOptions(nce_layers=[4, 8], patches=8, projection=8), made.network)
    run = {"config": made.as_dict(), "quiet": True, "validation": validation}
    train(method, Pictures(), made.optim, made.run, tmp_path, **run)
    picture = torch.rand(1, 3, 18, 21) * 2 - 1
    weights = load_generators(tmp_path / "checkpoints" / "step-00000001")["G"]
    generator = NetworkOptions(generator="restorer", width=4).build_generator()
    generator.load_state_dict(weights)
    best, latest = (load_translator(tmp_path / "checkpoints" / n)(picture) for n in ("best", "latest"))
    assert torch.equal(load_translator(tmp_path / "checkpoints" / "step-00000001")(picture), best)
    assert not torch.equal(best, latest)


def test_which_pairs(rainy_set, tmp_path):
    everything = find_pairs(rainy_set)
    assert find_validation(str(rainy_set), "") == everything
    assert [p.name for p in find_validation(str(rainy_set), "", 2)] == ["0", "1"]
    assert find_validation(str(tmp_path), str(rainy_set / "test"), 5) == everything
    assert find_validation(str(rainy_set / "trainA"), "") == []
    with pytest.raises(ValueError, match="not a paired test set"):
        find_validation(str(rainy_set), str(rainy_set / "trainA"))
    with pytest.raises(ValueError, match="at least 0"):
        find_validation(str(rainy_set), "", -1)


def test_no_pairs_is_said(rainy_set, tmp_path, capsys):
    (rainy_set / "test").rename(tmp_path / "moved")
    train_run(config(rainy_set, "run.steps=1", "run.validate_every=1"), tmp_path / "run")
    assert "nothing is validated" in capsys.readouterr().out


def test_ranks_share_the_pairs(rainy_set):
    """Two ranks measure different pairs, which together are all pairs."""
    pairs = find_pairs(rainy_set)
    alone = Validation(pairs, 3, torch.device("cpu"), Translator)
    alone.measure_inputs()
    tables = []

    class Half(Ranks):
        def together(self, device):
            return nullcontext()

        def mean(self, values):
            tables.append(values)
            return sum(tables) / 2

    for rank in (0, 1):  # the second one adds the values of the first
        shared = Validation(pairs, 3, torch.device("cpu"), Translator, Half(rank, 2))
        shared.measure_inputs()
    assert shared.inputs == pytest.approx(alone.inputs)
    assert [(table != 0).any(dim=1).tolist() for table in tables] == [[True, False, True], [False, True, False]]


def test_five_channels_are_refused(rainy_set):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        Validation(find_pairs(rainy_set), 5, torch.device("cpu"), Translator)


def distance(output, truth):
    return (output - truth).abs().mean()


@pytest.mark.parametrize(
    ("path", "values", "best", "sentence"),
    [
        ("mine.py:distance", {"run.best": "mine.py:distance", "distance": 2.0}, -2.0, ""),
        ("mine.py:distance", {"run.metric": "mine.py:distance", "distance": 2.0}, -2.0, ""),  # before its new name
        ("mine.py:distance", {"distance": 2.0}, -2.0, ""),  # a checkpoint of an older version
        (
            "mine.py:distance",
            {"run.best": "other.py:distance", "distance": 2.0},
            None,
            "measured by other.py:distance",
        ),
        ("mine.py:distance", {"distance": float("-inf")}, None, "the best checkpoint's distance is not finite"),
        ("mine.py:distance", {}, None, "was not measured by distance"),
    ],
)
def test_which_best_value_continues(rainy_set, path, values, best, sentence):
    metric = Metric("distance", distance, False, path)
    validation = Validation(find_pairs(rainy_set), 3, torch.device("cpu"), Translator, metric=metric)
    message = validation.resume({"pairs": validation.digest(), "psnr_y": 20.0, **values})
    assert validation.best == (float("-inf") if best is None else best)
    assert sentence in message
    assert bool(message) == bool(sentence)


def test_an_infinite_psnr_may_be_best(rainy_set):
    """The images are equal then."""
    validation = Validation(find_pairs(rainy_set), 3, torch.device("cpu"), Translator)
    assert validation.resume({"pairs": validation.digest(), "psnr_y": float("inf")}) == ""
    assert validation.best == float("inf")


def test_another_ranks_value_that_is_not_a_number_is_said(rainy_set):
    class Rank(Ranks):
        def together(self, device):
            return nullcontext()

        def mean(self, values):
            values[1, :], values[1, -2] = 1.0, float("nan")  # of the other rank
            return values / 2

        def most(self, values, device):
            return list(values)

    pairs = find_pairs(rainy_set)
    metric = Metric("distance", distance, False, "mine.py:distance")
    validation = Validation(pairs, 3, torch.device("cpu"), Translator, Rank(0, 2), metric=metric)
    for sentences in (1, 0):  # once per run
        validation.measure_inputs()
        messages = validation.take_messages()
        assert len(messages) == sentences
        assert all(text.startswith(f"run.best: distance is not a number on {pairs[1].name}: ") for text in messages)
