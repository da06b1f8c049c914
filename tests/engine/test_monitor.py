"""Each sign of a failing training is provoked and detected; healthy runs give no warning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastnce.config import resolve
from fastnce.engine import monitor
from fastnce.engine.monitor import Alarm, Monitor, response
from fastnce.methods.base import Batch, Method
from fastnce.training import train_run
from tests.engine.test_engine import SMALL

pytestmark = pytest.mark.usefixtures("few_blocks")


class Scripted(Method):
    """Translates by a function that the test changes."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(1))

    def translate(self, a: Tensor) -> Tensor:
        return self.function(a)


def samples(images: int = 4, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(*(torch.rand(images, 3, size, size, generator=generator) * 2 - 1 for _ in range(2)))


def test_an_alarm_is_said_once_until_it_recovers():
    alarm = Alarm("it burns: fetch water", patience=2)
    said = [alarm.read(bad == "x") for bad in "x.xxxx.x...xx"]
    places = {i: sentence for i, sentence in enumerate(said) if sentence}
    assert places == {
        3: "warning: it burns: fetch water",
        9: "recovered: it burns no longer",
        12: "warning: it burns: fetch water",
    }


def test_response_is_the_share_of_the_spread():
    inputs = list(samples().a.split(1))
    assert response(inputs, inputs) == pytest.approx(1)
    assert response([x / 4 + 0.3 for x in inputs], inputs) == pytest.approx(0.25)
    assert response([torch.ones_like(x) for x in inputs], inputs) == 0


def test_a_collapsed_generator_is_seen():
    watch, one = Monitor(pictures=samples()), torch.rand(1, 3, 16, 16)
    method = Scripted(lambda a: a)
    assert [watch.look(method) for _ in range(3)] == [[], [], []]
    assert watch.response == pytest.approx(1)
    method.function = lambda a: one + 0.01 * a  # nearly the same image for every input
    first, second, third = (watch.look(method) for _ in range(3))
    assert first == third == []
    assert len(second) == 1
    assert "outputs hardly depend on the input" in second[0]
    assert watch.short() == "WARNING: output ignores input"
    assert watch.metrics()["warnings"] == 1
    assert watch.metrics()["response"] == pytest.approx(0.01, rel=1e-3)
    method.function = lambda a: a.flip(3)  # not the identity, but it depends on the input
    assert [len(watch.look(method)) for _ in range(3)] == [0, 1, 0]
    assert watch.short() == ""


def test_outputs_that_are_not_numbers_are_seen():
    watch = Monitor(pictures=samples())
    method = Scripted(lambda a: a * float("nan"))
    assert [len(watch.look(method)) for _ in range(3)] == [0, 1, 0]


def test_identity_that_falls_is_seen():
    watch = Monitor(identity=("idt_A",), pictures=samples())
    watch.judge({"idt_A": 0.1})
    method = Scripted(lambda a: a * 0.8)
    for _ in range(3):
        assert watch.look(method) == []
    assert watch.identity == pytest.approx(24.8, abs=0.1)
    method.function = lambda a: a * 0.5 + 0.2
    said = [sentence for _ in range(3) for sentence in watch.look(method)]
    assert len(said) == 1
    assert "identity fell by more than 3 dB" in said[0]
    assert watch.short() == "WARNING: identity falls"
    method.function = lambda a: a * 0.8
    assert [sentence[:9] for _ in range(3) for sentence in watch.look(method)] == ["recovered"]


def test_a_generator_may_leave_the_identity_that_it_started_as():
    """A fall from infinite to 27 dB, and any fall in methods without an identity loss."""
    watch = Monitor(identity=("idt_A",), pictures=samples())
    watch.judge({"idt_A": 0.1})
    method = Scripted(lambda a: a)
    watch.look(method)
    method.function = lambda a: a * 0.85
    assert [watch.look(method) for _ in range(4)] == [[], [], [], []]
    assert 26 < watch.identity < 27.5
    free = Monitor(identity=("idt_A",), pictures=samples())
    free.judge({"NCE": 1.0})
    free.look(Scripted(lambda a: a))
    assert [free.look(Scripted(lambda a: -a)) for _ in range(4)] == [[], [], [], []]


TWO, ONE = {"D_A": ("D_A",), "D_B": ("D_B",)}, {"D": ("D_real", "D_fake")}


@pytest.mark.parametrize(
    ("discriminators", "losses"),
    [
        (TWO, {"D_A": 0.0, "D_B": 0.9}),
        (ONE, {"D_real": 0.0, "D_fake": 0.001}),
        ({"critic": ("of_real",)}, {"of_real": 0.0, "D_A": 0.0}),
    ],
)
def test_a_discriminator_that_has_won_is_seen(discriminators, losses):
    watch = Monitor(discriminators)
    said = [watch.judge(losses) for _ in range(8)]
    assert [len(sentences) for sentences in said] == [0, 0, 0, 0, 1, 0, 0, 0]
    name = next(iter(discriminators))
    assert f"the loss of {name} stays at 0" in said[4][0]
    assert watch.short() == f"WARNING: {name} at 0"
    healthy = dict.fromkeys(losses, 0.5)
    assert [len(watch.judge(healthy)) for _ in range(6)] == [0, 0, 0, 0, 1, 0]


def test_a_discriminator_that_wins_now_and_then_is_no_matter():
    watch = Monitor(TWO)
    for value in (0.0, 0.0, 0.0, 0.0, 0.3) * 4:
        assert watch.judge({"D_A": value, "D_B": -0.5}) == []  # below 0: the loss of a critic, which has no lower limit


def test_one_sample_is_not_compared():
    watch = Monitor(pictures=samples(images=1))
    assert [watch.look(Scripted(lambda a: torch.zeros_like(a))) for _ in range(4)] == [[], [], [], []]
    assert "response" not in watch.metrics()


def run_of(folder: Path, out: Path, *overrides: str) -> tuple[list[dict], str]:
    made = resolve("dclgan", None, [*SMALL, "loss.nce_layers=4,8", *overrides])
    made.data.dir = str(folder)
    train_run(made, out, quiet=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows, (out / "log.txt").read_text()


def test_a_healthy_run_is_quiet(folder, tmp_path):
    rows, text = run_of(folder, tmp_path / "run", "run.steps=8", "run.monitor_every=1", "network.generator=restorer")
    assert "warning" not in text.lower()
    assert all(row["warnings"] == 0 for row in rows)
    assert 0.5 < rows[-1]["response"] < 2
    assert rows[-1]["identity_psnr"] > 20


def test_a_run_says_it_in_its_log(folder, tmp_path):
    """A new published network returns the same grey for every image, which looks like a collapse at first."""
    rows, text = run_of(folder, tmp_path / "run", "run.steps=3", "run.monitor_every=1")
    assert text.count("warning: the outputs hardly depend on the input") == 1
    assert "| WARNING: output ignores input" in text
    assert [row["warnings"] for row in rows] == [0, 1, 1]
    assert rows[-1]["response"] < monitor.RESPONSE_LEAST
