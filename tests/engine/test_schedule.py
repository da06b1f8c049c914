"""The schedules of the learning rate: against those of torch, stepped as the published code steps them."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.engine.distributed import Ranks, ranks_of_launcher
from fastnce.engine.loop import train
from fastnce.engine.options import SCHEDULES, OptimOptions, RunOptions
from fastnce.engine.schedule import Plateau, factor_of
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws, Group, Phase
from tests.ends import one_sentence, tiny
from tests.engine.test_cudagraph import WARM_UP, Tape, assert_same_state
from tests.engine.test_distributed import as_rank, finish, free_port
from tests.engine.test_engine import training_tensors
from tests.engine.test_progress import Data, Dot
from tests.logs import log_lines

LR = 2e-4


def published(policy: str, adam: torch.optim.Optimizer, n_epochs: int, decay: int, first: int, every: int):
    """The schedulers of the published `get_scheduler`, made when the run begins."""
    if policy == "linear":
        return lr_scheduler.LambdaLR(adam, lambda k: 1.0 - max(0, k + first - n_epochs) / float(decay + 1))
    if policy == "step":
        return lr_scheduler.StepLR(adam, step_size=every, gamma=0.1)
    if policy == "cosine":
        return lr_scheduler.CosineAnnealingLR(adam, T_max=n_epochs, eta_min=0)
    return lr_scheduler.ConstantLR(adam, factor=1.0)


@pytest.mark.parametrize("first", [1, 2, 5, 9])
@pytest.mark.parametrize(("n_epochs", "decay"), [(200, 200), (7, 3), (3, 8), (12, 0)])
@pytest.mark.parametrize("policy", [name for name in SCHEDULES if name != "plateau"])
def test_every_epoch_has_the_published_rate(policy, n_epochs, decay, first):
    """Epochs from `first` to the last one; the scheduler takes a step at the end of each."""
    options = OptimOptions(
        lr=LR, schedule=policy, n_epochs=n_epochs, n_epochs_decay=decay, first_epoch=first, decay_every=4
    )
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = published(policy, adam, n_epochs, decay, first, 4)
    for epoch in range(first, n_epochs + decay + 1):
        found = LR * factor_of(options, epoch - 1)
        assert found == pytest.approx(adam.param_groups[0]["lr"], rel=1e-9, abs=1e-19), epoch
        adam.step()
        scheduler.step()


def torch_plateau(losses: list[float]) -> list[float]:
    """The rate after each epoch by torch, with the published settings."""
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = lr_scheduler.ReduceLROnPlateau(adam, mode="min", factor=0.2, threshold=0.01, patience=5)
    rates = []
    for loss in losses:
        adam.step()
        scheduler.step(loss)
        rates.append(adam.param_groups[0]["lr"])
    return rates


def our_plateau(losses: list[float], steps: int = 3) -> list[float]:
    plateau = Plateau(LR, torch.device("cpu"))
    rates = []
    for loss in losses:
        for _ in range(steps):
            plateau.add([torch.tensor(loss)], torch.tensor(False))
        plateau.judge()
        rates.append(LR * plateau.factor())
    return rates


def test_a_plateau_is_torchs():
    """A loss that falls, stands still, falls by less than 1 %, and rises; the rate ends at its smallest."""
    generator = torch.Generator().manual_seed(3)
    falling = [4.0 * 0.98**epoch for epoch in range(15)]
    slowly = [falling[-1] * 0.9985**epoch for epoch in range(15)]
    noisy = [(2.0 + torch.rand((), generator=generator)).item() for _ in range(70)]
    losses = torch.tensor([*falling, *slowly, *noisy, *[3.0] * 30]).tolist()  # as float32 has them
    expected = torch_plateau(losses)
    assert len(set(expected)) > 7
    assert our_plateau(losses) == pytest.approx(expected, rel=1e-9)


def test_what_the_published_plateau_does():
    """Its measure is always 0, so the rate falls by 5 after the epochs 7, 13, 19 and so on."""
    rates = torch_plateau([0.0] * 30)
    falls = [epoch + 2 for epoch, (before, after) in enumerate(pairwise(rates)) if after < before]
    assert falls == [7, 13, 19, 25]
    assert our_plateau([0.0] * 30) == pytest.approx(rates, rel=1e-9)


def test_a_negative_loss_can_be_better():
    """1 % below the best is lower, also of a negative loss (WGAN's), where torch would call an equal one better."""
    plateau = Plateau(LR, torch.device("cpu"))
    for loss, waited in ((-2.0, 0), (-2.0, 1), (-2.01, 2), (-2.03, 0), (-1.0, 1)):
        plateau.add([torch.tensor(loss)], torch.tensor(False))
        plateau.judge()
        assert plateau.tensors["waited"].item() == waited, loss


def test_the_mean_of_an_epoch_is_of_its_good_steps():
    plateau = Plateau(LR, torch.device("cpu"))
    for loss, bad in ((3.0, False), (math.nan, True), (5.0, False), (1e9, True), (math.inf, False), (7.0, False)):
        plateau.add([torch.tensor(loss), torch.tensor(1.0)], torch.tensor(bad))
    assert plateau.tensors["mean"].item() == pytest.approx(6.0)
    assert plateau.tensors["count"].item() == 3
    plateau.judge()
    assert plateau.tensors["best"].item() == pytest.approx(6.0)
    plateau.add([torch.tensor(math.nan)], torch.tensor(True))
    before = {name: tensor.clone() for name, tensor in plateau.tensors.items()}
    assert plateau.judge() == ""  # an epoch without a good step is not judged
    assert {name: tensor.item() for name, tensor in plateau.tensors.items()} == {k: v.item() for k, v in before.items()}


# ---- runs ----


def go(folder: Path, optim: OptimOptions, steps: int = 0, epoch: int = 4, **run) -> Data:
    torch.manual_seed(0)
    data = Data(1, epoch)
    options = {"log_every": 1, "sample_every": 0, "monitor_every": 0, "save_every": 100} | run
    train(Dot(), data, optim, RunOptions(steps=steps, **options), folder, quiet=True)
    return data


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_rate_rises_step_by_step(tmp_path, monkeypatch):
    """Over one and a half epochs of four steps, then as the schedule says. The logged rate is the optimiser's."""
    used = []
    run = Step.run
    monkeypatch.setattr(Step, "run", lambda self, *args: used.append(float(self.groups["G"].lr)) or run(self, *args))
    optim = OptimOptions(lr=0.6, n_epochs=2, n_epochs_decay=1, warmup=1.5)
    for steps in (3, 0):  # it goes on where it was
        go(tmp_path, optim, steps)
    expected = [0.1, 0.2, 0.3, 0.4, 0.5, *[0.6] * 3, *[0.3] * 4]
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx(expected, rel=1e-6)
    assert used == pytest.approx(expected, rel=1e-6)


def test_a_run_begins_with_a_later_epoch(tmp_path):
    """Published `--epoch_count 3`: the epochs 3 to 5 with their rates, and smaller images after `n_epochs`."""
    optim = OptimOptions(lr=0.9, n_epochs=3, n_epochs_decay=2, first_epoch=3)
    asked = []
    for steps in (5, 0):
        asked += go(tmp_path, optim, steps, epoch=2).asked
    assert asked == [(4, False), (5, False), (6, True), (7, True), (8, True), (9, True)]
    found = rows(tmp_path)
    assert [row["epoch"] for row in found] == [3, 3, 4, 4, 5, 5]
    assert [row["step"] for row in found] == [row["pictures"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in found] == pytest.approx([0.9, 0.9, 0.6, 0.6, 0.3, 0.3])


def test_warm_up_and_steps_count_from_the_first_epoch(tmp_path):
    optim = OptimOptions(lr=0.8, n_epochs=9, n_epochs_decay=0, schedule="step", decay_every=2, first_epoch=5, warmup=1)
    go(tmp_path, optim, epoch=2)
    expected = [0.4, 0.8, 0.8, 0.8, *[0.08] * 4, *[0.008] * 2]
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx(expected, rel=1e-6)


PLATEAU = OptimOptions(lr=0.2, n_epochs=12, n_epochs_decay=0, schedule="plateau")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of twelve epochs of three steps, in which the rate is cut."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plateau, "PATIENCE", 1)
        go(folder, PLATEAU, epoch=3)
    return folder, training_tensors(folder)


def test_a_plateau_in_a_run(whole):
    folder, tensors = whole
    rates = [row["lr"] for row in rows(folder)]
    assert len(set(rates)) > 2
    for place in range(0, len(rates), 3):
        assert len(set(rates[place : place + 3])) == 1  # it changes between epochs only
    said = [line for line in log_lines(folder) if "the learning rate is" in line]
    assert len(said) == tensors["schedule/cuts"].item() >= len(set(rates)) - 1
    assert re.search(
        r"epoch \d+: the generators' loss, [\d.]+, has not fallen by 1 % below [\d.]+ in 2 epochs", said[0]
    )
    assert set(rows(folder)[0]) >= {"G", "lr"}
    assert not any("the loss of" in key for key in rows(folder)[0])  # what it follows is not logged a second time


@pytest.mark.parametrize("stop", [1, 3, 11, 12, 13])
def test_a_plateau_continues_bit_for_bit(stop, whole, tmp_path, monkeypatch):
    """Stopped within an epoch, at its end, and one step later."""
    monkeypatch.setattr(Plateau, "PATIENCE", 1)
    for steps in (stop, 0):
        go(tmp_path, PLATEAU, steps, epoch=3)
    found = training_tensors(tmp_path)
    assert found.keys() == whole[1].keys()
    for key, tensor in whole[1].items():
        assert torch.equal(tensor, found[key]), key


def test_a_schedule_can_change(tmp_path):
    """To a plateau, whose state begins then, and away from it. The place in the epochs is kept."""
    for steps, schedule in ((4, "linear"), (8, "plateau"), (10, "constant"), (12, "plateau"), (0, "step")):
        optim = OptimOptions(lr=0.1, n_epochs=4, n_epochs_decay=4, schedule=schedule, decay_every=2)
        go(tmp_path, optim, steps, epoch=2)
        stored = {key for key in training_tensors(tmp_path) if key.startswith("schedule/")}
        assert bool(stored) == (schedule == "plateau")
    expected = [0.1] * 12 + [0.1 * 0.1**3] * 4
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx(expected)


def test_a_change_by_name(folder, tmp_path, capsys):
    """Refused without --change. With it, the optimiser and the schedule are others from then on."""
    run = tmp_path / "run"
    assert main([*tiny(folder, run, "run.steps=1"), "--quiet"]) == 0
    words = ["optim.schedule=plateau", "optim.optimizer=adamw", "optim.weight_decay=0.1", "optim.warmup=1"]
    assert main([*tiny(folder, run, "run.steps=2", *words), "--quiet"]) == 2
    assert "optim.schedule: linear, now plateau" in one_sentence(capsys)
    assert main(["train", "--out", str(run), "--quiet", "run.steps=2", "--change", *words]) == 0
    assert training_tensors(run)["schedule/count"].item() == 1
    assert [row["lr"] for row in rows(run)] == pytest.approx([2e-4, 1e-4])  # the second of four steps of the warm-up
    assert main(["train", "--out", str(run), "--quiet", "run.steps=3", "--change", "optim.schedule=cosine"]) == 0
    assert "schedule/count" not in training_tensors(run)


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(*(torch.rand(2, 3, 4, 4, generator=generator) for _ in range(2)))


def some_steps(step: Step, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        step.run(batch_of(number), Draws())


def test_a_recorded_step_adds_to_the_plateau():
    torch.manual_seed(0)
    one, tape = Step(Dot(), PLATEAU), Tape()
    torch.manual_seed(0)
    other = Step(Dot(), PLATEAU, graph=tape)
    tape.step = other
    some_steps(one, WARM_UP + 4)
    some_steps(other, WARM_UP + 4)
    assert tape.replayed == 4
    assert one.state()["schedule/count"].item() == WARM_UP + 4
    assert_same_state(one, other)


def test_parts_and_a_traced_step_follow_the_same_loss():
    """What the compiler traces returns the same loss; parts of a batch have its mean."""
    torch.manual_seed(0)
    method = Dot()
    start = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    means = []
    for accumulate in (1, 2):
        method.load_state_dict(start)
        step = Step(method, OptimOptions(schedule="plateau", accumulate=accumulate))
        some_steps(step, 3)
        means.append(step.plateau.tensors["mean"].item())
    assert means[1] == pytest.approx(means[0], rel=1e-5)
    for group in step.groups.values():
        group.prepare()
    losses, _ = step._traced(batch_of(0), Draws())
    assert set(losses) == {"G", "the loss of G"}
    assert torch.equal(losses["G"], losses["the loss of G"])


class Two(Dot):
    """A discriminator, then two generators: the plateau follows the sum of the losses of the generators."""

    def __init__(self):
        super().__init__()
        self.second, self.judge = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 1, 1)

    def generators(self):
        return {"G": self.generator, "H": self.second}

    def groups(self):
        return {"D": Group((self.judge,)), "G": Group((self.generator,)), "H": Group((self.second,))}

    def phases(self):
        return (
            Phase(lambda *_: (self.judge.weight.sum() + 100.0, {"D": torch.zeros(())}), ("D",)),
            Phase(lambda *_: (self.generator.weight.sum() * 0 + 3.0, {"G": torch.zeros(())}), ("G",)),
            Phase(lambda *_: (self.second.weight.sum() * 0 + 4.0, {"H": torch.zeros(())}), ("H",)),
        )


def test_the_loss_is_that_of_all_generators():
    step = Step(Two(), PLATEAU)
    assert set(step.run(batch_of(0), Draws())) == {"D", "G", "H"}
    assert step.plateau.tensors["mean"].item() == 7.0


class Judge(Dot):
    def generators(self):
        return {"G": torch.nn.Conv2d(3, 3, 1)}


def test_a_plateau_needs_a_loss_that_trains_a_generator():
    with pytest.raises(ValueError, match=r"optim\.schedule=plateau follows the generators' loss, and no loss here"):
        Step(Judge(), PLATEAU)


def test_ranks_follow_one_loss():
    """Two ranks with other images have bit-equal states, those of one process with both batches."""

    def rank() -> int:
        with ranks_of_launcher("cpu") as ranks:
            torch.manual_seed(0)
            step = Step(Dot(), PLATEAU, ranks=ranks)
            some_steps(step, 2, 2 * ranks.rank)
            print(json.dumps([tensor.item().hex() for tensor in step.plateau.tensors.values()]))
        return 0

    port = free_port()
    ends = finish([as_rank(number, 2, port, rank) for number in range(2)])
    assert [code for code, _, _ in ends] == [0, 0], ends
    states = [[float.fromhex(text) for text in json.loads(out)] for _, out, _ in ends]
    assert states[0] == states[1]
    torch.manual_seed(0)
    alone = Step(Dot(), PLATEAU)
    for one, other in ((0, 2), (1, 3)):
        both = [torch.cat(pair) for pair in zip(batch_of(one), batch_of(other), strict=True)]
        alone.run(Batch(*both), Draws())
    assert states[0] == pytest.approx([tensor.item() for tensor in alone.plateau.tensors.values()], rel=1e-5)


def test_gradients_of_ranks_are_those_without_a_plateau(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat, *_, **__: flat.mul_(2))
    results = []
    for schedule in ("linear", "plateau"):
        torch.manual_seed(0)
        step = Step(Dot(), OptimOptions(schedule=schedule), ranks=Ranks(0, 2))
        some_steps(step, 2)
        results.append(step.generator_weights())
    for key, tensor in results[0].items():
        assert torch.equal(tensor, results[1][key])


# ---- options ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.schedule=cosine", "optim.n_epochs=0"], "optim.schedule=cosine falls over optim.n_epochs=0 epochs"),
        (["optim.first_epoch=401"], "optim.first_epoch=401 is after the last epoch, 400"),
        (["optim.schedule=plateu"], "did you mean 'plateau'"),
        (["optim.schedule=lambda"], 'optim.schedule must be one of "linear", "step", "plateau", "cosine", "constant"'),
        (["optim.optimizer=sgd"], 'optim.optimizer must be one of "adam", "adamw"'),
        (["optim.warmup=-1"], "optim.warmup must be a number from 0"),
        (["optim.weight_decay=-0.1"], "optim.weight_decay must be a number from 0"),
        (["optim.decay_every=0"], "optim.decay_every must be a whole number of at least 1"),
    ],
)
def test_what_is_refused(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve("cut", None, overrides)


def test_what_may_change_without_a_word():
    """Whatever changes the results needs --change; how many checkpoints are kept does not."""
    stored = resolve("cut").as_dict()
    for text, free in (("optim.schedule=step", False), ("optim.warmup=2", False), ("run.keep_epochs=5", True)):
        (change,) = resolve("cut", None, [text]).changes(stored)
        assert change.free == free, text
    for key in ("schedule", "decay_every", "warmup", "first_epoch", "optimizer", "weight_decay"):
        del stored["optim"][key]  # a run of a version without these options
    del stored["run"]["keep_epochs"]
    assert resolve("cut").changes(stored) == []
