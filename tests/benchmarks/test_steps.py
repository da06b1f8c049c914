"""Cases of whole steps: their stages, their order, and steps that leave their form."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import cases, compiled, run, step, waterfall

CPU = torch.device("cpu")


def test_each_stage_of_the_waterfall_adds_one_switch():
    for loss_has_switch in (True, False):
        stages = waterfall.stages(cuda=True, loss=loss_has_switch)
        for before, after in itertools.pairwise(stages):
            changed = {name for name, value in vars(after).items() if value != getattr(before, name)} - {"name"}
            assert len(changed) == 1, (before, after)
        assert len({stage.loss for stage in stages}) == 1 + loss_has_switch
    assert {stage.precision for stage in waterfall.stages(cuda=False)} == {"fp32", "bf16"}


class FakeRecorder:
    """A recorder whose graphs do nothing."""

    fails = False

    def warm(self, function):
        return function()

    def record(self, function):
        if self.fails:
            raise RuntimeError("no memory for it")
        return object(), function()

    def replay(self, graph):
        pass

    def close(self, graphs):
        pass


@pytest.fixture
def small_step():
    context = cases.Context(CPU, quick=True)
    recorder = FakeRecorder()
    made = step.OurStep("cut", context, "fp32", {"graph": recorder}, patches=16)
    return made, recorder, step.pictures(1, 32, CPU)


def test_a_step_that_is_captured_again_is_noted(small_step, monkeypatch):
    made, recorder, pictures = small_step
    made(*pictures)
    made(*pictures)
    assert made.check() == ""
    with step.library_flags(benchmark=not torch.backends.cudnn.benchmark):
        with pytest.warns(UserWarning, match="anew"):
            made(*pictures)
        assert made.check() == "not captured"
        for _ in range(step.WARM_UP):
            made(*pictures)
        assert made.check() == "captured again while it was timed"
    recorder.fails = True
    for _ in range(step.WARM_UP):  # with the former flag
        made(*pictures)
    with pytest.warns(UserWarning, match="uncaptured"):
        made(*pictures)
    assert made.check() == "capture failed: no memory for it"


def test_compiled_steps_come_last_and_the_goals_first(planned):
    assert run.PARTS[-1].name == "compiled"
    steps = [case for part in (step.cut, step.dual, step.fastcut) for case in planned(part, step)]
    assert [(case.benchmark, case.size["images"]) for case in steps] == [
        ("step cut", 1),
        ("step cut", 8),
        ("step dclgan", 1),
        ("step dcdgan-released", 1),
        ("step dclgan", 4),
        ("step dcdgan", 1),
        ("step fastcut", 1),
    ]
    stages = planned(waterfall.waterfall, waterfall)
    assert not any("compile" in provider.mode for case in steps + stages for provider in case.providers)
    tried = planned(waterfall.cudnn, waterfall)
    assert [case.size["images"] for case in tried] == [1, 8]
    assert all(provider.call._flags["benchmark"] for case in tried for provider in case.providers)
    assert not any(provider.call._flags["benchmark"] for case in stages for provider in case.providers)
    for case in steps:
        first, second, *rest = case.providers
        assert (first.mode, first.energy, second.energy) == ("captured", True, True)
        assert second.note == "stands in for the published step"
        assert not any(provider.energy for provider in rest)
    by_compiler = planned(compiled.compiled, compiled)
    assert [(case.benchmark, case.size["images"]) for case in by_compiler] == [
        ("compiled step cut", 1),
        ("compiled step fastcut", 1),
        ("compiled step cut", 8),
    ]
    modes = [provider.mode for provider in by_compiler[0].providers]
    assert modes == ["captured", "compile whole, captured", "compile, captured"]
