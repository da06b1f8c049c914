"""The roles of networks and logged losses: of the published methods, and of other names in a whole run."""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnce.engine.loop import train
from fastnce.engine.options import OptimOptions, RunOptions
from fastnce.engine.step import Step
from fastnce.engine.stored import load_generators, read_state
from fastnce.methods import Batch, Group, Method, Phase
from fastnce.methods.presets import PRESETS
from tests.methods.test_methods_more import build, pictures

ONE_WAY = {"generators": ["G"], "discriminators": ["D"], "projectors": ["F"]}
TWO_WAY = {"generators": ["G_A", "G_B"], "discriminators": ["D_A", "D_B"]}
ROLES = {
    "cut": ONE_WAY,
    "hneg-src": ONE_WAY,
    "negcut": {**ONE_WAY, "projectors": ["F", "N", "F_"]},
    "qsattn": ONE_WAY,
    "lsesim": ONE_WAY,
    "sincut": ONE_WAY,
    "cyclegan": {**TWO_WAY, "projectors": []},
    "dclgan": {**TWO_WAY, "projectors": ["F1", "F2"]},
    "simdcl": {**TWO_WAY, "projectors": ["F1", "F2", "F3", "F4", "F5", "F6"]},
    "dcdgan": {**TWO_WAY, "projectors": ["F1", "F2"]},
}
STORED = {name: ["G", "F", "D"] for name in ("cut", "hneg-src", "qsattn", "sincut")}
STORED["negcut"] = ["G", "F", "N", "F_", "D"]
"""The order of `networks()` where it differs from the order of the roles."""
CHANGES = {"simdcl": {"nce_layers": [4, 8, 12, 14]}, "dcdgan": {"lambda_rendered": 1.0}}
CHANGES |= {name: {"nce_layers": [0, 4, 8]} for name in ("cut", "hneg-src", "negcut", "qsattn", "dclgan")}
CHANGES["hneg-src"] |= {"nce_idt": True}
CHANGES["lsesim"] = {"lambda_identity": 1.0}
IDENTITY = {
    "cut": {"NCE_Y"},
    "hneg-src": {"HDCE_Y"},
    "negcut": {"NCE_Y"},
    "qsattn": {"NCE_Y"},
    "lsesim": {"idt_B"},
    "sincut": {"NCE_Y", "idt"},
    "dcdgan": {"idt_A", "idt_B", "rendered"},
}


def method_of(preset: str, **changes) -> Method:
    network = {} if preset == "sincut" else {"generator": "resnet_4blocks"}
    return build(preset, network=network, **CHANGES.get(preset, {}), **changes)


def test_every_method_is_here():
    assert {preset.method for preset in PRESETS.values()} == {PRESETS[name].method for name in ROLES}


@pytest.mark.parametrize("preset", ROLES)
def test_each_network_has_one_role(preset):
    method = method_of(preset)
    roles = {role: list(getattr(method, role)()) for role in ROLES[preset]}
    assert roles == ROLES[preset]
    assert list(method.networks()) == STORED.get(preset, [name for names in roles.values() for name in names])
    for role in roles:
        for name, network in getattr(method, role)().items():
            assert network is method.networks()[name]


@pytest.mark.parametrize("preset", ROLES)
def test_named_losses_are_logged(preset):
    method = method_of(preset).float()
    torch.manual_seed(0)
    batch = Batch(*(p.float() for p in pictures(2 if preset == "sincut" else 1)))
    logged = Step(method, OptimOptions()).run(batch, method.draw(random.Random(0)))
    watched = method.discriminator_losses()
    assert list(watched) == ROLES[preset]["discriminators"]
    assert logged.keys() >= {name for names in watched.values() for name in names}
    assert logged.keys() >= set(method.identity_losses()) == IDENTITY.get(preset, {"idt_A", "idt_B"})


@pytest.mark.parametrize("preset", ROLES)
def test_critics_are_not_watched(preset):
    assert method_of(preset, gan_mode="wgangp").discriminator_losses() == {}


class OwnNames(Method):
    """A generator, a discriminator and a projector with other names than the published ones."""

    options = None

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(3, 2, 1)

    def generators(self):
        return {"restore": self.a}

    def discriminators(self):
        return {"critic": self.b}

    def projectors(self):
        return {"map": self.c}

    def discriminator_losses(self):
        return {"critic": ("real",)}

    def identity_losses(self):
        return ("same",)

    def groups(self):
        return {name: Group((network,)) for name, network in self.networks().items()}

    def phases(self):
        return Phase(self.judge, ("critic",)), Phase(self.make, ("restore", "map"))

    def generate(self, batch, draws):
        return {"made": self.a(batch.a)}

    def judge(self, batch, outputs, draws):
        loss = self.b(outputs["made"].detach()).float().square().mean()
        return loss, {"real": loss * 0}

    def make(self, batch, outputs, draws):
        same = F.mse_loss(self.c(outputs["made"]), self.c(batch.b)) - self.b(outputs["made"]).float().mean()
        return same, {"same": same}

    def translate(self, a):
        return self.a(a)


class Squares:
    steps_per_epoch = 6

    def batch(self, step, *, decaying=False):
        return torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, 3, 4, 4)

    def samples(self, count):
        return torch.rand(count, 3, 4, 4), torch.rand(count, 3, 4, 4)

    def digest(self):
        return "squares"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_of_own_names(precision, tmp_path):
    torch.manual_seed(0)
    method = OwnNames()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    optim = OptimOptions(n_epochs=1, n_epochs_decay=0, ema=0.9)
    settings = {"log_every": 1, "monitor_every": 1, "sample_every": 6, "samples": 2, "save_every": 0}
    run = RunOptions(device="cpu", precision=precision, compile="false", **settings)
    assert train(method, Squares(), optim, run, tmp_path, batch_size=2, quiet=True) == 6
    assert all(
        not torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items() if "weight" in name
    )
    checkpoint = tmp_path / "checkpoints" / "step-00000006"
    assert read_state(checkpoint)["generators"] == ["restore"]
    weights = load_generators(checkpoint)["restore"]
    assert weights.keys() == method.a.state_dict().keys()
    assert not torch.equal(weights["weight"], method.a.weight)  # averaged weights
    assert "the loss of critic stays at 0" in (tmp_path / "log.txt").read_text()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["warnings"] >= 1
    assert (tmp_path / "samples" / "step-00000006.png").exists()
