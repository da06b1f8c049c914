"""A step with a gradient that is not finite, in any phase, leaves every bit of the state unchanged."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor, nn

from fastnce.engine.compiled import TRACES_GRADIENTS
from fastnce.engine.cudagraph import WARM_UP
from fastnce.engine.options import OptimOptions
from fastnce.engine.snapshot import Snapshot
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws, Group, Method, Phase
from fastnce.methods.pool import ImagePool
from fastnce.nce import NegativeBank
from tests.engine.test_cudagraph import Tape
from tests.methods.test_methods_more import build

SIDE = 16
RESNET = {"generator": "resnet_4blocks", "discriminator": "n_layers", "discriminator_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "cut": {"network": {**RESNET, "norm": "batch"}, "nce_layers": [0, 4]},
    "cyclegan": {"network": RESNET, "pool_size": 3},
    "dclgan": {"network": RESNET, "nce_layers": [0, 4], "pool_size": 3},
    "dcdgan": {"network": RESNET, "nce_layers": [0, 4], "external": "bank", "bank_size": 40},
    "sincut": {"network": {"resolution": SIDE}, "patches": 4},
}


@dataclass
class Poison:
    """A factor of the loss of phase `number`; with a group's name, a summand of one gradient of that group."""

    number: int
    group: str
    value: Tensor

    def set(self, on: bool) -> None:
        self.value.fill_(float("inf") if on else float(not self.group))


class Small(Method):
    """A method that compiles quickly: D judges a pool of fakes, G has a batch norm and a bank of past fakes."""

    def __init__(self, order: str):
        super().__init__()
        self.generator = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.discriminator = nn.Conv2d(3, 1, 3)
        self.pool, self.bank, self.order = ImagePool(2), NegativeBank(5, [3]), order

    def generators(self):
        return {"G": self.generator}

    def discriminators(self):
        return {"D": self.discriminator}

    def extra_state_modules(self):
        return {"pool": self.pool, "bank": self.bank}

    def groups(self):
        return {name: Group((network,)) for name, network in self.networks().items()}

    def phases(self):
        if self.order == "D, G":
            return Phase(self.d_loss, ("D",)), Phase(self.g_loss, ("G",))
        return Phase(self.g_loss, ("G",)), Phase(self.d_loss, ("D",), apart=True)

    def prepare(self, batch):
        self.pool.prepare(batch.a, 3)

    def generate(self, batch, draws):
        return {"fake": self.generator(batch.a)}

    def d_loss(self, batch, outputs, draws):
        judged = self.discriminator(self.pool(outputs["fake"])), self.discriminator(batch.b)
        loss = judged[0].square().mean() + (judged[1] - 1).square().mean()
        return loss, {"D": loss}

    def g_loss(self, batch, outputs, draws):
        codes = outputs["fake"].mean((2, 3))
        past = self.bank.keys()[0].clone()
        self.bank.enqueue([codes.detach()])
        loss = (codes @ past.t()).mean() - self.discriminator(outputs["fake"]).mean()
        return loss, {"G": loss}


def method_of(case: str) -> Method:
    torch.manual_seed(1)
    return build(case, **CASES[case]).float() if case in CASES else Small(case)


def poisoned(case: str, precision: str = "fp32", **options: Any) -> tuple[Step, list[Poison]]:
    """A step, and a `Poison` for each of its phases and groups."""
    method = method_of(case)
    phases, poisons = list(method.phases()), []

    def changed(loss, places):
        def call(batch, outputs, draws):
            total, logged = loss(batch, outputs, draws)
            for poison, parameter in places:
                total = total * poison.value if parameter is None else total + poison.value * parameter.sum()
            return total, logged

        return call

    for number, phase in enumerate(phases):
        places = [(Poison(number, "", torch.tensor(1.0)), None)]
        for group in phase.groups[1:]:  # the gradient of this group alone
            parameter = next(method.groups()[group].modules[-1].parameters())
            places.append((Poison(number, group, torch.tensor(0.0)), parameter))
        poisons += [poison for poison, _ in places]
        phases[number] = phase._replace(loss=changed(phase.loss, places))
    method.phases = lambda: tuple(phases)
    step = Step(method, OptimOptions(ema=0.9), precision, **options)
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(16.0)
    return step, poisons


def pictures(seed: int) -> Batch:
    numbers = torch.Generator().manual_seed(seed)
    return Batch(*(torch.rand(2, 2, 3, SIDE, SIDE, generator=numbers) * 2 - 1))


def run(step: Step, number: int) -> dict[str, Tensor]:
    torch.manual_seed(100 + number)
    return step.run(pictures(number), Draws())


def bits(step: Step) -> dict[str, bytes]:
    """Copies of everything that the next step depends on."""
    tensors = step.state() | {f"buffer/{name}": buffer for name, buffer in step.method.named_buffers()}
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}


MAY_CHANGE = {"bad_steps", "loss_scale/scale", "loss_scale/good"}


def check_bad_steps(step: Step, poisons: list[Poison], numbers) -> None:
    """Each poison in turn; afterwards, the step continues as if there had been none."""
    before = bits(step)
    for count, poison in enumerate(poisons, start=1):
        scale = None if step.loss_scale is None else step.loss_scale.scale.item()
        poison.set(True)
        run(step, next(numbers))
        poison.set(False)
        after = bits(step)
        assert after.keys() == before.keys()
        assert {name for name in after if after[name] != before[name]} <= MAY_CHANGE, poison
        assert step.bad_steps.item() == count, poison
        if scale is not None:
            assert step.loss_scale.scale.item() == scale / 2
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(16.0)


def check_good_step(step: Step, clean: Step, number: int) -> None:
    for one in (step, clean):
        run(one, number)
    if step.loss_scale is not None:
        clean.loss_scale.good.copy_(step.loss_scale.good)  # the steps since the scale was halved
    assert step.bad_steps.item() == 0
    assert bits(step) == bits(clean)


@pytest.mark.parametrize(("preset", "precision"), [*((preset, "fp32") for preset in CASES), ("cut", "fp16")])
def test_a_bad_step_changes_nothing(preset, precision):
    (step, poisons), (clean, _) = (poisoned(preset, precision) for _ in range(2))
    for number in range(2):
        check_good_step(step, clean, number)
    before = bits(step)
    check_bad_steps(step, poisons, itertools.count(10))
    check_good_step(step, clean, 2)
    changed = {name for name, value in bits(step).items() if value != before[name]}
    for kind in ("network/G", "network/D", "adam/G/", "adam/D/", "average/G"):
        assert any(name.startswith(kind) for name in changed), kind
    for state in {"cut": ["running_var"], "cyclegan": ["pool_A/pictures"], "dcdgan": ["bank_B/rows_1"]}.get(preset, []):
        assert any(state in name for name in changed), state


def test_the_very_first_step_may_be_bad():
    (step, poisons), (clean, _) = (poisoned("cut") for _ in range(2))
    poisons[-1].set(True)
    run(step, 5)
    poisons[-1].set(False)
    check_good_step(step, clean, 0)


def test_a_bad_part_makes_the_step_bad():
    """A batch in two parts: only the second is not finite, and the first may already be in the pool."""
    (step, poisons), (clean, _) = (poisoned_in_parts() for _ in range(2))
    check_good_step(step, clean, 0)
    check_bad_steps(step, poisons, itertools.count(10))
    before = bits(step)
    batch = pictures(20)
    batch.a[1, 0, 0, 0] = float("nan")
    step.run(batch, Draws())
    after = bits(step)
    assert {name for name in after if after[name] != before[name]} == {"bad_steps"}
    check_good_step(step, clean, 1)


def poisoned_in_parts() -> tuple[Step, list[Poison]]:
    step, poisons = poisoned("cyclegan")
    step.options.accumulate = 2
    return step, poisons


@pytest.mark.parametrize("case", ["D, G", "cyclegan"])
def test_a_bad_step_that_is_replayed(case):
    tape = Tape()
    precision = "fp16" if case == "D, G" else "fp32"
    (step, poisons), (clean, _) = poisoned(case, precision, graph=tape), poisoned(case, precision)
    tape.step = step
    for number in range(WARM_UP + 1):
        check_good_step(step, clean, number)
    check_bad_steps(step, poisons, itertools.count(10))
    check_good_step(step, clean, WARM_UP + 1)
    assert (tape.recorded, tape.replayed) == (1, len(poisons) + 2)


@pytest.mark.skipif(not hasattr(torch._dynamo.config, TRACES_GRADIENTS), reason="this PyTorch does not trace gradients")
@pytest.mark.parametrize("order", ["D, G", "G, D"])
def test_a_bad_step_that_is_compiled(order, one_block):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*uncompiled|.*not whole")
        twins = [poisoned(order, compile="whole", backend="aot_eager") for _ in range(2)]
        (step, poisons), (clean, _) = twins
        for number in range(3):
            check_good_step(step, clean, number)
        check_bad_steps(step, poisons, itertools.count(10))
        check_good_step(step, clean, 3)


@pytest.mark.parametrize("case", [*CASES, "D, G", "G, D"])
def test_a_good_step_is_the_plain_one(case):
    """Bit-equal to each phase's gradients followed at once by its update, with PyTorch's Adam."""
    step = Step(method_of(case), OptimOptions(ema=0.9))
    method = method_of(case)
    groups = {
        name: [p for module in group.modules for p in module.parameters()] for name, group in method.groups().items()
    }
    adams = {
        name: torch.optim.Adam(
            groups[name], lr=torch.tensor(group.lr or 2e-4), betas=group.betas or (0.5, 0.999), fused=True
        )
        for name, group in method.groups().items()
    }
    averages = {name: p.detach().clone() for name, p in method.named_parameters() if name.startswith("generator")}
    for number in range(2):
        run(step, number)
        torch.manual_seed(100 + number)
        batch = pictures(number)
        method.prepare(batch)
        outputs = method.generate(batch, Draws())
        for phase in method.phases():
            for name, parameters in groups.items():
                for parameter in parameters:
                    parameter.requires_grad_(name in phase.groups)
            loss, _ = phase.loss(batch, outputs, Draws())
            parameters = [p for name in phase.groups for p in groups[name]]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                # fused Adam ignores strides
                parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient).detach()
            for name in phase.groups:
                adams[name].step()
            for parameter in method.parameters():
                parameter.requires_grad_(True)
        for name, average in averages.items():
            average.lerp_(method.get_parameter(name).detach(), 1 - 0.9)
    for name, tensor in (*method.named_parameters(), *method.named_buffers()):
        assert torch.equal(step.method.state_dict(keep_vars=True)[name], tensor), name
    modules = {id(module): name for name, module in step.method.named_modules()}
    found = {
        f"{modules[id(average.network)]}.{key}": tensor
        for average in step.averages.values()
        for key, tensor in average.average.items()
    }
    for name, average in averages.items():
        assert torch.equal(found[name], average), name


def test_what_is_kept_is_restore_bit_for_bit():
    """Tensors of any dtype and layout, changed in between."""
    hostile = [0.0, -0.0, float("inf"), float("nan"), 1e-40, 3e38]
    for bad in (False, True):
        tensors = [
            torch.randn(5, 3, 4, 4).contiguous(memory_format=torch.channels_last),
            torch.randn(2, 3).bfloat16(),
            torch.tensor([-0.0, 1e-40, 7.0, float("inf"), -2.0, 1.0]),
            torch.randn(7, dtype=torch.float64),
            torch.tensor(2**62 + 1),
            torch.arange(3, dtype=torch.int32),
        ]
        start = [t.clone() for t in tensors]
        before = Snapshot(tensors)
        tensors[0].neg_()
        tensors[1].fill_(float("nan"))
        tensors[2].copy_(torch.tensor(hostile))
        tensors[3].mul_(float("inf"))
        tensors[4].fill_(-5)
        tensors[5].add_(9)
        changed = [t.clone() for t in tensors]
        before.restore(torch.tensor(bad))
        for tensor, wanted in zip(tensors, start if bad else changed, strict=True):
            as_bits = [t.contiguous().flatten().view(torch.uint8) for t in (tensor, wanted)]
            assert torch.equal(*as_bits)
