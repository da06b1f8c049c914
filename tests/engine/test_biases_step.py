"""A step without the biases that norms cancel: its launches, its updates and its checkpoints."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import waterfall
from benchmarks.step import with_all_biases
from fastnce.engine.accumulate import Mean
from fastnce.engine.optim import ParameterGroup
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Draws
from fastnce.methods.presets import PRESETS
from fastnce.networks import InstanceNorm, leave_out_biases
from fastnce.networks.resnet import ResnetBlock
from tests.engine.test_engine import random_batch, small_method, smaller_method
from tests.methods.test_methods_more import build, pictures
from tests.networks.test_biases import Convolutions, resnet_biases, with_large_biases

aten = torch.ops.aten

TAPPED = {"G/model.4.bias", "G/model.8.bias"}


def left_out_in_cut(step: Step) -> set[str]:
    """Names in `Step.state` of the biases that `small_method` or `smaller_method` leaves out."""
    blocks = sum(isinstance(module, ResnetBlock) for module in step.method.generator.modules())
    assert blocks
    generator = {f"G/{name}" for name in resnet_biases(1, 13 + blocks, 17 + blocks, blocks=blocks)}
    normed = sum(isinstance(module, InstanceNorm) for module in step.method.discriminator.modules())
    assert normed in (1, 3)
    return generator | {f"D/model.{i}.bias" for i in (3, 7, 11)[:normed]}


FORMS = {
    "at once": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "in parts": {"options": OptimOptions(accumulate=2)},
    "blocks computed again": {"recompute": True},
    "compiled": {"compile": True, "backend": "aot_eager"},
    "one graph": {"compile": "whole", "backend": "aot_eager"},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_optimiser_leaves_them_where_they_are(form, one_block):
    """Neither these biases nor their averages move; every other bias does."""
    torch._dynamo.reset()
    options = {"options": OptimOptions(), **FORMS[form]}
    options["options"].ema = 0.5
    method = smaller_method(nce_idt=False) if "compile" in options else small_method()
    step = Step(with_large_biases(method), **options)
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(256.0)
    before = {key: tensor.clone() for key, tensor in step.state().items()}
    for _ in range(2):
        losses = step.run(random_batch(2), Draws())
        assert all(torch.isfinite(loss) for loss in losses.values())
    assert step.whole is None or step.whole.usable
    after, left_out = step.state(), left_out_in_cut(step)
    biases = {k.removeprefix("network/") for k in before if k.startswith(("network/G", "network/D")) and "bias" in k}
    assert left_out | TAPPED < biases
    for name in biases:
        stays = name in left_out
        assert torch.equal(after[f"network/{name}"], before[f"network/{name}"]) == stays, name
        group, key = name.split("/")
        moments = [after[f"adam/{group}/0.{key}/{part}"] for part in ("step", "exp_avg", "exp_avg_sq")]
        assert [bool(moment.any()) for moment in moments] == [not stays] * 3, name
        if group == "G":
            assert torch.equal(after[f"average/{name}"], before[f"average/{name}"]) == stays, name


@pytest.mark.parametrize("preset", ["cut", "fastcut", "cyclegan", "dclgan", "simdcl", "dcdgan-released", "dcdgan"])
def test_every_method_learns_the_same(preset):
    """The same weights after two steps with and without the biases, in float64, to 1e-5 of the learning rate.

    The biases that are left out stay. If they are used, noise of 1e-14 in their gradients, against Adam's eps of 1e-8,
    moves them.
    """
    methods = [build(preset), build(preset)]
    methods[1].load_state_dict(methods[0].state_dict())
    leave_out_biases(methods[1], False)
    steps = [Step(method, OptimOptions()) for method in methods]
    start = {key: tensor.clone() for key, tensor in steps[0].state().items()}
    for i in range(2):
        batch, draws = pictures(), methods[0].draw(random.Random(i))
        for step in steps:
            torch.manual_seed(i)
            random.seed(i)
            step.run(batch, draws)
    one, other = (step.state() for step in steps)
    assert one.keys() == other.keys()
    unmoved = {id(p) for g in steps[0].groups.values() for p in g.parameters if not g.adam.state[p]["step"]}
    found = 0
    for name, network in methods[0].networks().items():
        for key, parameter in network.named_parameters():
            entry = f"network/{name}/{key}"
            if id(parameter) in unmoved and key.endswith("bias"):
                assert torch.equal(parameter, start[entry])
                found += 1
            else:
                torch.testing.assert_close(other[entry], one[entry], rtol=0, atol=2e-9, msg=entry)
    assert found >= 14


def test_no_kernel_is_launched_for_them():
    """CUT has 2 passes of G, 1 of its encoder and 2 of D. Only biases that no norm cancels are added."""
    step = Step(small_method(), OptimOptions())
    step.run(random_batch(), Draws())
    with Convolutions() as count:
        step.run(random_batch(), Draws())
    # D's first and last, twice; G's last and both tapped ones; the tapped ones of the encoder's pass
    assert (count.added, count.reduced) == (2 * 2 + 3 + 2, 2 + 3 + 2)
    leave_out_biases(step.method, False)
    with Convolutions() as count:
        step.run(random_batch(), Draws())
    assert count.added == count.convolutions - step_blurs(step)


def step_blurs(step: Step) -> int:
    """The convolutions without bias: the blurs of G (2 for downsampling), of its encoder, and of D, twice."""
    return 2 + 2 + 2 * 3


def test_checkpoints_of_both_kinds_resume():
    """A checkpoint written with these biases in use resumes without them, and vice versa; moments are kept."""
    methods = [small_method().double() for _ in range(4)]
    for method in methods[1:]:
        method.load_state_dict(methods[0].state_dict())
    steps = [Step(method, OptimOptions()) for method in methods]
    old, new, old_to_new, new_to_old = steps
    for step in (old, new_to_old):
        leave_out_biases(step.method, False)
    batches = [random_batch(dtype=torch.float64) for _ in range(4)]

    def run(step, batch_numbers):
        for i in batch_numbers:
            torch.manual_seed(i)
            step.run(batches[i], Draws())

    for step in (old, new):
        run(step, (0, 1))
    kept = {key: tensor.clone() for key, tensor in old.state().items()}
    assert kept.keys() == new.state().keys()
    old_to_new.load_state(kept)
    new_to_old.load_state(new.state())
    for step in steps:
        run(step, (2, 3))
    left_out = left_out_in_cut(old)
    for step in steps[1:]:
        for key, tensor in step.state().items():
            if key.startswith("network/") and key.removeprefix("network/") not in left_out:  # they drift on noise
                torch.testing.assert_close(tensor, old.state()[key], rtol=0, atol=2e-9, msg=key)
    for name in left_out:
        assert torch.equal(old_to_new.state()[f"network/{name}"], kept[f"network/{name}"])
        group, key = name.split("/")
        for part in ("step", "exp_avg", "exp_avg_sq"):
            entry = f"adam/{group}/0.{key}/{part}"
            assert torch.equal(old_to_new.state()[entry], kept[entry])
            assert (part != "step") or (kept[entry] == 2 and new_to_old.state()[entry] == 2)


def test_a_checkpoint_without_their_moments_resumes():
    """If the checkpoint lacks moments of a parameter, they are made once it has a gradient."""
    step, other = Step(small_method(), OptimOptions()), Step(small_method(), OptimOptions())
    step.run(random_batch(), Draws())
    names = {name.split("/")[1] for name in left_out_in_cut(step)}
    other.load_state({k: t for k, t in step.state().items() if not any(f"/0.{name}/" in k for name in names)})
    other.run(random_batch(), Draws())
    leave_out_biases(other.method, False)
    other.run(random_batch(), Draws())
    assert other.state()["adam/G/0.model.1.bias/step"] == 1


def test_parameters_without_gradient_cost_the_optimiser_nothing():
    modules = (nn.Linear(3, 3), nn.Linear(3, 3))
    group = ParameterGroup(modules, 1e-3, (0.5, 0.999))
    slopes = (torch.ones(3, 3), None, torch.ones(3, 3), torch.ones(3))
    mean = Mean(2)
    for _ in range(2):
        mean.add(slopes, {})
    seen: list[int] = []

    class Adams(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is aten._fused_adam_.tensor_lr:
                seen.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    before = modules[0].bias.detach().clone()
    assert mean.gradients is not None
    with Adams():
        group.update(tuple(mean.gradients), torch.tensor(False))
    assert seen == [3]
    assert torch.equal(modules[0].bias, before)
    assert group.state().keys() == {f"{n}/{k}" for n in group.names for k in ("step", "exp_avg", "exp_avg_sq")}
    assert not any(group.state()[f"0.bias/{key}"].any() for key in ("step", "exp_avg", "exp_avg_sq"))


def test_steps_use_it_and_benchmarks_switch_it():
    def switched(method) -> set[bool]:
        return {m.leaves_out_biases for m in method.modules() if isinstance(m, InstanceNorm)}

    for preset in PRESETS:
        assert switched(build(preset)) <= {True}
    step = Step(small_method(), OptimOptions())
    assert switched(step.method) == {True}
    with_all_biases(step)
    assert switched(step.method) == {False}
    for stage in waterfall.stages(cuda=True):
        waterfall.switch(step, stage)
        assert switched(step.method) == {stage.no_cancelled_biases}
