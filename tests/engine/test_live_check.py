"""`run.check_every` stops a run whose kernels disagree with plain PyTorch, and changes nothing otherwise.

`dispatch.is_default` is replaced, so that the kernels run in Triton's interpreter, as on an accelerator.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from fastnce.kernels import common, nce, norm_whole
from fastnce.kernels.planned import forget_plans
from torch import nn

from fastnce.common import dispatch, first_use, verdicts
from fastnce.engine.live_check import LiveCheck
from fastnce.engine.loop import TrainingFailed, train
from fastnce.engine.options import OptimOptions, RunOptions
from fastnce.engine.rehearsal import rehearse
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws, Group, Method, Phase
from fastnce.nce import PatchNCEHead
from fastnce.networks.layers import InstanceNorm, LastConvolution, ReflectionPad
from fastnce.networks.runs import run_all
from tests.engine.test_compiled import SIDE, method_of
from tests.engine.test_cudagraph import Tape
from tests.engine.test_engine import Toy, training_tensors

interpreted = pytest.mark.skipif(not common.INTERPRET.value, reason="made for Triton's interpreter")


@pytest.fixture
def accelerated(monkeypatch, tmp_path):
    """The CPU counts as an accelerator whose kernels are checked; verdicts are kept in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "is_default", lambda device: True)
    first_use.forget()
    yield
    first_use.forget()


def unchecked(monkeypatch) -> None:
    monkeypatch.setenv("FASTNCE_CHECK_KERNELS", "0")


class Pictures(Toy):
    def batch(self, step, *, decaying=False):
        generator = torch.Generator().manual_seed(step)
        return tuple(torch.rand(2, 1, 3, SIDE, SIDE, generator=generator) * 2 - 1)


PRESETS = {
    "cut": {},
    "cut with monce": {"weighting": "monce"},
    "dclgan": {"external": "bank", "bank_size": 24},
    "dcdgan": {},
    "cyclegan": {},
}


def method_named(name: str) -> nn.Module:
    return method_of(name.split()[0], PRESETS[name])


class Small(Method):
    """A generator with three kinds of layers, and the loss of a head: few launches, for the interpreter."""

    options: Any = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.G = nn.Sequential(
            nn.Conv2d(3, 4, 1), InstanceNorm(4), nn.ReLU(), ReflectionPad(1), LastConvolution(4, 3, 3)
        )
        self.F = PatchNCEHead([3], dim=8, patches=8)

    def generators(self):
        return {"G": self.G}

    def projectors(self):
        return {"F": self.F}

    def groups(self):
        return {"all": Group((self.G, self.F))}

    def phases(self):
        return (Phase(self.loss, ("all",)),)

    def translate(self, a):
        return run_all(list(self.G), a)

    def generate(self, batch, draws):
        return {"fake": self.translate(batch.a)}

    def loss(self, batch, outputs, draws):
        loss = self.F([outputs["fake"]], [batch.a])
        return loss, {"NCE": loss}


class SmallPictures(Pictures):
    def batch(self, step, *, decaying=False):
        return tuple(images[:, :, :9, :8] for images in super().batch(step))


def begin(run, steps: int, **options) -> int:
    settings = {"sample_every": 0, "monitor_every": 0, "save_every": 2} | options
    return train(Small(), SmallPictures(), OptimOptions(), RunOptions(steps=steps, **settings), run, quiet=True)


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def a_batch(seed: int = 5) -> Batch:
    return Batch(*Pictures().batch(seed))


def small_batch(seed: int = 5) -> Batch:
    return Batch(*SmallPictures().batch(seed))


# ---- a rehearsal changes nothing ----


@pytest.mark.parametrize("name", PRESETS)
def test_a_rehearsal_changes_nothing_that_a_step_depends_on(name):
    steps = [Step(method_named(name), OptimOptions()) for _ in range(2)]
    for number in range(3):
        for step in steps:
            torch.manual_seed(number)
            draws = step.method.draw(random.Random(number))
            if step is steps[1]:
                rehearse(step, a_batch(number), draws)
            step.run(a_batch(number), draws)
        assert equal(*(step.state() for step in steps)), number


def test_buffers_that_a_forward_pass_replaces_come_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

    method = method_named("cut")
    method.extra = Counts()
    kept, generate = method.extra.count, method.generate

    def counting(batch, draws):
        method.extra.count = method.extra.count + 1
        method.extra.register_buffer("more", torch.ones(2))
        return generate(batch, draws)

    method.generate = counting
    rehearse(Step(method, OptimOptions()), a_batch(), Draws())
    assert method.extra.count is kept
    assert kept.item() == 0
    assert list(dict(method.extra.named_buffers())) == ["count"]


# ---- comparisons ----


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), [("cut", "bf16"), ("dclgan", "fp32")])
def test_right_kernels_agree_on_live_data(name, precision, accelerated, monkeypatch):
    """Every kernel of the step is compared, and the step afterwards is the one without a comparison."""
    unchecked(monkeypatch)
    step = Step(method_named(name), OptimOptions(), precision)
    torch.manual_seed(1)
    live = LiveCheck()
    with live:
        rehearse(step, a_batch(), step.method.draw(random.Random(0)))
    assert live.found is None
    assert live.compared > 10
    assert live.families >= {"instance_norm", "activate", "reflection_pad", "few_outputs_convolution"}
    assert live.families & {"PatchNCEHead", "patch_nce_layers", "patch_nce"}


@interpreted
@pytest.mark.parametrize("options", [{"compile": "false"}, {"compile": "true"}], ids=str)
def test_a_run_with_comparisons_is_bit_equal(tmp_path, accelerated, options, monkeypatch):
    monkeypatch.setattr("fastnce.engine.loop.Step", lambda *a, **o: Step(*a, **o, backend="aot_eager"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(uncompiled|wrong).*")
        assert begin(tmp_path / "plain", 4, **options) == 4
        assert begin(tmp_path / "compared", 4, check_every=2, **options) == 4
        begin(tmp_path / "resumed", 2, check_every=2, **options)
        begin(tmp_path / "resumed", 4, check_every=2, **options)
    one, other, resumed = (training_tensors(tmp_path / name) for name in ("plain", "compared", "resumed"))
    assert equal(one, other)
    assert equal(one, resumed)


@interpreted
def test_recorded_steps_with_comparisons_are_bit_equal(accelerated):
    states = []
    for compares in (False, True):
        tape = Tape()
        tape.step = step = Step(Small(), OptimOptions(), graph=tape)
        for number in range(5):
            torch.manual_seed(number)
            if compares and number % 2 == 0:
                assert step.compare(small_batch(number), Draws()) is None
            step.run(small_batch(number), Draws())
        assert tape.replayed == 2
        states.append(step.state())
    assert equal(*states)


@interpreted
def test_a_kernel_that_becomes_wrong_stops_the_run(tmp_path, accelerated, monkeypatch):
    """The third step finds it: nothing is saved after the checkpoint of step 2, which stays whole."""
    right = norm_whole.forward
    calls = []

    def wrong_later(tile, x, residual, out, statistics, eps, form):
        calls.append(len(calls))
        right(tile, x, residual, out, statistics, 1.0 if wrong else eps, form)

    wrong = False
    monkeypatch.setattr(norm_whole, "forward", wrong_later)
    begin(tmp_path / "run", 2, check_every=2)
    before = training_tensors(tmp_path / "run")
    wrong = True
    forget_plans()
    unchecked(monkeypatch)
    expected = (
        r"^at step 3 the kernels of instance_norm \(call \d+\) disagree with plain PyTorch: the output has an error of "
        r".*e-\d+, the limit is .*e-\d+: .* in place of .*; nothing is saved, and checkpoints after step 0 may be "
        r"wrong; please report this with the output of `fastnce doctor`$"
    )
    with pytest.raises(TrainingFailed, match=expected):
        begin(tmp_path / "run", 4, check_every=2)
    assert equal(training_tensors(tmp_path / "run"), before)


@interpreted
def test_a_wrong_loss_is_named_with_both_values(accelerated, monkeypatch):
    unchecked(monkeypatch)
    step = Step(Small(), OptimOptions())
    right = nce.mean_by_direction
    monkeypatch.setattr(nce, "mean_by_direction", lambda *a: right(*a) * 1.5)
    found = step.compare(small_batch(), Draws())
    assert found is not None
    sentence = found.sentence(7)
    assert sentence.startswith("at step 7 the kernels of PatchNCEHead (call ")
    ours, theirs = (float(part) for part in sentence.rpartition(": ")[2].split(" in place of "))
    assert ours == pytest.approx(1.5 * theirs, rel=1e-3)


def test_nothing_is_compared_on_a_cpu(tmp_path, capsys):
    settings = {"sample_every": 0, "monitor_every": 0}
    train(method_named("cut"), Pictures(), OptimOptions(), RunOptions(steps=1, check_every=1, **settings), tmp_path)
    said = "run.check_every compares nothing: plain PyTorch computes on the CPU, and no kernels run there"
    assert capsys.readouterr().out.count(said) == 1


# ---- the first use in a step ----


@interpreted
def test_a_compiled_step_checks_its_kernels_before_it_compiles(accelerated, monkeypatch):
    """A kernel that is wrong on the device is replaced in the compiled step too."""
    torch._dynamo.reset()  # compiled code keeps the choice that was known when it was compiled
    checked = []
    find = first_use.find_fault

    def counted(use, device, dtype):
        assert not torch.compiler.is_compiling()
        checked.append(use.family)
        return find(use, device, dtype)

    monkeypatch.setattr(first_use, "find_fault", counted)
    right = nce.mean_by_direction
    monkeypatch.setattr(nce, "mean_by_direction", lambda *a: right(*a) * 1.5)
    step = Step(Small(), OptimOptions(), compile=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(3)
        losses = step.run(small_batch(), Draws())
    assert [str(w.message) for w in caught if "wrong" in str(w.message)] != []
    assert set(checked) >= {"draw_ids", "PatchNCEHead", "instance_norm", "few_outputs_convolution"}
    count = len(checked)
    step.run(small_batch(), Draws())
    assert len(checked) == count
    eager = Step(Small(), OptimOptions())
    torch.manual_seed(3)
    for name, loss in eager.run(small_batch(), Draws()).items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-5)


@interpreted
def test_the_run_option_switches_the_check_off(tmp_path, accelerated, monkeypatch):
    monkeypatch.setattr(first_use, "find_fault", lambda *_: pytest.fail("checked"))
    begin(tmp_path / "run", 1, check_kernels=False)
    assert not verdicts.path().exists()
