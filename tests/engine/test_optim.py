"""The optimisers on given gradients: torch's Adam and AdamW with decay, updates that are skipped, and their state."""

from __future__ import annotations

import pytest
import torch

from fastnce.engine.bad_steps import Updates
from fastnce.engine.optim import ParameterGroup
from fastnce.engine.options import OptimOptions
from fastnce.engine.schedule import Plateau
from fastnce.engine.step import Step
from fastnce.methods import Draws, Phase
from fastnce.nce import PatchNCEHead
from tests.engine.test_cudagraph import WARM_UP, AsksTheHost, Tape, assert_same_state
from tests.engine.test_progress import Dot
from tests.engine.test_schedule import batch_of

KINDS = [("adam", 0.0), ("adam", 0.1), ("adamw", 0.0), ("adamw", 0.1), ("adamw", 3.0)]
GOOD, BAD = torch.tensor(False), torch.tensor(True)


def group_of(layer: torch.nn.Module, kind: str, decay: float) -> ParameterGroup:
    group = ParameterGroup((layer,), 1e-2, (0.5, 0.999), decay, kind == "adamw")
    group.prepare()
    return group


@pytest.mark.parametrize("traced", [False, True], ids=["fused", "traced"])
@pytest.mark.parametrize(("kind", "decay"), KINDS)
def test_an_update_is_torchs(kind, decay, traced):
    """In float64, with a rate that changes, a loss that is scaled, and bad steps, which neither update nor decay."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(5, 3).double()
    theirs = torch.nn.Linear(5, 3).double()
    theirs.load_state_dict(ours.state_dict())
    group = group_of(ours, kind, decay)
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    optimizer = optimizer(theirs.parameters(), lr=1e-2, betas=(0.5, 0.999), weight_decay=decay, foreach=False)
    update = group.update_traced if traced else group.update
    scale = torch.tensor(1024.0)
    for i in range(8):
        gradients = [torch.randn_like(p) for p in ours.parameters()]
        group.set_factor(0.8**i)
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.8**i
        if i in (0, 4):
            broken = [torch.full_like(g, float("nan")) for g in gradients]
            before = [p.detach().clone() for p in ours.parameters()]
            update(tuple(broken), BAD, scale)
            assert all(map(torch.equal, before, ours.parameters()))
        update(tuple(g * scale for g in gradients), GOOD, scale)
        for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("traced", [False, True], ids=["fused", "traced"])
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_a_parameter_without_a_gradient_does_not_decay(kind, traced):
    layer = torch.nn.Linear(5, 3)
    group = group_of(layer, kind, 0.5)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    (group.update_traced if traced else group.update)((torch.ones_like(weight), None), GOOD)
    assert torch.equal(layer.bias, bias)
    assert not torch.equal(layer.weight, weight)


@pytest.mark.parametrize("traced", [False, True], ids=["fused", "traced"])
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_a_learned_temperature_does_not_decay(kind, traced):
    """It moves as without decay, and the weights of F as torch moves them with decay."""
    torch.manual_seed(0)
    heads = [PatchNCEHead([3], dim=4, learn_temperature=True) for _ in range(3)]
    for head in heads[1:]:
        head.load_state_dict(heads[0].state_dict())
    decayed, free, theirs = heads
    ours, plain = group_of(decayed, kind, 0.5), group_of(free, kind, 0.0)
    library = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    optimizer = library(theirs.parameters(), lr=1e-2, betas=(0.5, 0.999), weight_decay=0.5)
    for _ in range(3):
        gradients = tuple(torch.randn_like(p) for p in decayed.parameters())
        for group in (ours, plain):
            (group.update_traced if traced else group.update)(gradients, GOOD)
        for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    name = "learned_temperature.log_scale"
    one, other, wanted = (dict(head.named_parameters()) for head in heads)
    assert torch.equal(one.pop(name), other[name])
    assert not torch.allclose(wanted.pop(name), other[name])
    for key, parameter in one.items():
        torch.testing.assert_close(parameter, wanted[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_a_traced_update_with_decay_asks_nothing_of_the_host(kind):
    layer = torch.nn.Linear(5, 3)
    group = group_of(layer, kind, 0.1)
    gradients = tuple(torch.randn_like(p) for p in layer.parameters())
    scale = torch.tensor(1024.0)
    with AsksTheHost() as watch:
        group.update_traced(gradients, GOOD, scale)
    assert watch.count > 10
    assert not watch.found


def test_a_plateau_adds_without_the_host():
    """Once per step, and recorded with it. (It is read once per epoch.)"""
    plateau, losses = Plateau(1e-3, torch.device("cpu")), [torch.tensor(2.0), torch.tensor(3.0)]
    with AsksTheHost() as watch:
        plateau.add(losses, GOOD)
    assert watch.count > 3
    assert not watch.found


def options(kind: str) -> OptimOptions:
    return OptimOptions(lr=0.01, optimizer=kind, weight_decay=0.3, schedule="plateau")


def steps(step: Step, count: int, first: int = 0) -> Step:
    for number in range(first, first + count):
        step.run(batch_of(number), Draws())
    return step


def made(kind: str, **how) -> Step:
    torch.manual_seed(0)
    return Step(Dot(), options(kind), **how)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_a_recorded_step_decays(kind):
    tape = Tape()
    tape.step = recorded = made(kind, graph=tape)
    assert_same_state(steps(made(kind), WARM_UP + 3), steps(recorded, WARM_UP + 3))
    assert tape.replayed == 3


def test_a_checkpoint_of_adamw():
    """Its state continues bit for bit, and fits Adam's, so that a run can change between the two."""
    whole, half = steps(made("adamw"), 6), steps(made("adamw"), 3)
    state = {key: tensor.clone() for key, tensor in half.state().items()}
    resumed = made("adamw")
    resumed.load_state(state)
    assert_same_state(steps(resumed, 3, 3), whole)
    other = made("adam")
    other.load_state(state)
    steps(other, 3, 3)
    assert not torch.equal(other.method.generator.weight, whole.method.generator.weight)


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_gradients_are_checked_as_they_are(value):
    """Expanded, strided and missing ones too; none is changed. A later sound phase does not hide an earlier bad one."""
    layer = torch.nn.Linear(3, 2)
    groups = {name: ParameterGroup((layer,), 1e-2, (0.5, 0.999)) for name in ("first", "second")}
    phases = [Phase(torch.nn.Module(), (name,), apart=True) for name in groups]  # type: ignore[arg-type]
    before = [p.detach().clone() for p in layer.parameters()]
    updates = Updates(groups, None, torch.ones(()))
    expanded, strided = torch.tensor(value).expand(2, 3), torch.full((4,), 2.0)[::2]
    updates.add(phases[0], (expanded, strided))
    updates.add(phases[1], (torch.ones(2, 3).t().contiguous().t(), None))
    bad = updates.apply()
    assert bad.item() == float(value != 1.0)
    assert strided.tolist() == [2.0, 2.0]
    assert torch.equal(expanded[1], torch.tensor([value] * 3)) or value != value
    steps = [group.adam.state[p]["step"].item() for group in groups.values() for p in group.parameters]
    assert steps == ([1.0, 1.0, 1.0, 0.0] if value == 1.0 else [0.0] * 4)
    assert all(torch.equal(p, b) != (value == 1.0) for p, b in zip(layer.parameters(), before, strict=True))
