"""WGAN-GP's penalty in every method with a GAN: its formula, its images, and steps that use it."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
import torch._dynamo.config

from fastnce.engine.compiled import TRACES_GRADIENTS, Compiled
from fastnce.engine.monitor import Monitor
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws
from fastnce.methods.presets import PRESETS
from fastnce.networks import set_implementation
from tests.methods.test_methods_more import build, pictures

DISCRIMINATOR = {"discriminator": "n_layers", "discriminator_layers": 1}
METHODS = {
    "cut": {},
    "hneg-src": {},
    "negcut": {},
    "qsattn": {},
    "sincut": {},
    "cyclegan": {"pool_size": 0},
    "dclgan": {},
    "simdcl": {"nce_layers": [4, 8, 12, 14]},
    "dcdgan": {},
}


def method_of(preset, **changes):
    small = {} if preset == "sincut" else {"generator": "resnet_4blocks", **DISCRIMINATOR}
    layers = {} if preset in ("sincut", "cyclegan", "simdcl") else {"nce_layers": [0, 4, 8]}
    network = {**small, **changes.pop("network", {})}
    return build(preset, network=network, **{**METHODS[preset], **layers, "gan_mode": "wgangp", **changes})


def judges(method, batch, outputs):
    """(discriminator, real, fake) of a method, in the order of its loss."""
    nets = method.networks()
    if "D" in nets:
        return [(nets["D"], batch.b, outputs["fake_B"])]
    return [(nets["D_A"], batch.b, outputs["fake_B"]), (nets["D_B"], batch.a, outputs["fake_A"])]


def by_hand(discriminator, real, fake, mix):
    """10 * mean over images of (|d sum D / d picture| - 1)^2 at mix * real + (1 - mix) * fake, image by image."""
    terms = []
    for x, y, share in zip(real.detach(), fake.detach(), mix.tolist(), strict=True):
        between = (share * x + (1 - share) * y)[None].requires_grad_()
        judged = discriminator(between)
        (slope,) = torch.autograd.grad(judged, between, torch.ones_like(judged), create_graph=True)
        terms.append((slope.pow(2).sum().sqrt() - 1) ** 2)
    return 10.0 * sum(terms) / len(terms)


def test_every_method_with_a_gan_is_here():
    classes = {PRESETS[name].method for name in METHODS}
    classes.add(PRESETS["lsesim"].method)  # its penalty has a weight of its own
    assert {preset.method for preset in PRESETS.values() if hasattr(preset.options(), "gan_mode")} == classes


@pytest.mark.parametrize("preset", METHODS)
def test_the_loss_is_half_of_the_published_one(preset):
    """Half of D(fake) - D(real) + 10 * penalty; SinCUT adds R1, as in its other modes."""
    method = method_of(preset)
    images = 1 if preset == "simdcl" else 2
    batch = pictures(images)
    outputs = method.generate(batch, Draws())
    torch.manual_seed(5)
    loss, logged = method.d_loss(batch, outputs, Draws())
    sides = judges(method, batch, outputs)
    torch.manual_seed(5)
    mixes = [torch.rand(images, dtype=torch.float64) for _ in sides]
    wanted = 0.0
    for (discriminator, real, fake), mix in zip(sides, mixes, strict=True):
        apart = discriminator(fake.detach()).mean() - discriminator(real).mean()
        wanted = wanted + 0.5 * (apart + by_hand(discriminator, real, fake, mix))
    if preset == "sincut":
        leaf = batch.b.clone().requires_grad_()
        (slope,) = torch.autograd.grad(method.discriminator(leaf).sum(), leaf, create_graph=True)
        wanted = wanted + 0.5 * slope.pow(2).sum() / images
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    weights = [p for discriminator, _, _ in sides for p in discriminator.parameters() if p.dim() == 4]
    for ours, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert len([name for name in logged if name.endswith("_GP")]) == len(sides)


def test_the_penalty_of_lsesim_is_whole_and_counts_in_every_mode():
    network = {"generator": "resnet_4blocks", **DISCRIMINATOR}
    method, batch = build("lsesim", network=network, lambda_gradient=3.0, pool_size=0), pictures(2)
    outputs = method.generate(batch, Draws())
    torch.manual_seed(5)
    loss, logged = method.d_loss(batch, outputs, Draws())
    torch.manual_seed(5)
    wanted = 0.3 * by_hand(method.discriminator, batch.b, outputs["fake_B"], torch.rand(2, dtype=torch.float64))
    torch.testing.assert_close(logged["D_Gradient"], wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, 0.5 * (logged["D_real"] + logged["D_fake"]) + wanted)


@pytest.mark.parametrize("preset", ["cut", "sincut", "cyclegan"])
@pytest.mark.parametrize("changes", [{"lambda_gp": 0.0}, {"gan_mode": "lsgan"}])
def test_no_penalty_where_none_is_asked_for(preset, changes):
    method, batch = method_of(preset, **changes), pictures(2)
    outputs = method.generate(batch, Draws())
    before = torch.get_rng_state()
    assert not [name for name in method.d_loss(batch, outputs, Draws())[1] if name.endswith("_GP")]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fakes_of_the_pool_are_mixed():
    """Each mixed image lies between the real one and the fake that D judges, which is not the latest fake."""
    method = method_of("cyclegan", pool_size=4)
    seen: list[torch.Tensor] = []
    method.discriminator_a.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    for seed in range(4):  # the pool is full after two steps
        torch.manual_seed(seed)
        batch = pictures(2)
        outputs = method.generate(batch, Draws())
        seen.clear()
        method.d_loss(batch, outputs, Draws())
    both, mixed = seen
    real, judged = both[:2], both[2:]
    assert not torch.equal(judged, outputs["fake_B"])
    shares = [((m - j) * (r - j)).sum() / (r - j).square().sum() for m, r, j in zip(mixed, real, judged, strict=True)]
    for share, m, r, j in zip(shares, mixed, real, judged, strict=True):
        assert 0 <= share <= 1
        torch.testing.assert_close(m, share * r + (1 - share) * j)
    assert shares[0] != shares[1]


@pytest.mark.parametrize("preset", ["cut", "cyclegan"])
def test_two_sizes_are_one_sentence(preset):
    method = method_of(preset, **({"nce_idt": False} if preset == "cut" else {"lambda_identity": 0.0}))
    batch = Batch(pictures(1, 32).a, pictures(1, 40).b)
    outputs = method.generate(batch, Draws())
    with pytest.raises(ValueError, match="real and fake must have the same shape"):
        method.d_loss(batch, outputs, Draws())


@pytest.mark.parametrize("preset", METHODS)
def test_a_step_is_finite_and_repeats(preset):
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        method = method_of(preset).float()
        step = Step(method, OptimOptions(lr=1e-3))
        for i in range(2):
            torch.manual_seed(i)
            batch = Batch(*(p.float() for p in pictures(1 if preset == "simdcl" else 2)))
            losses = step.run(batch, method.draw(random.Random(i)))
        runs.append({name: loss.item() for name, loss in losses.items()})
        assert step.bad_steps.item() == 0
    assert runs[0] == runs[1]
    assert all(abs(value) < 1e4 for value in runs[0].values())


PENALTIES = {"cut": {}, "sincut": {"gan_mode": "nonsaturating", "network": DISCRIMINATOR}}


@pytest.mark.skipif(not hasattr(torch._dynamo.config, TRACES_GRADIENTS), reason="this PyTorch does not trace gradients")
@pytest.mark.parametrize("preset", PENALTIES)
def test_a_compiler_does_not_leave_the_second_derivative_out(preset):
    """The first derivative of the layers' kernels is an operator without a derivative."""
    method = method_of(preset, **PENALTIES[preset]).float()
    set_implementation(method.discriminator, "triton")
    batch = Batch(*(p.float() for p in pictures(1, 16)))
    weights = [p for p in method.discriminator.parameters() if p.dim() == 4]

    def gradients(real, fake):
        return torch.autograd.grad(method.d_loss(Batch(real, real), {"fake_B": fake}, Draws())[0], weights)

    with torch._dynamo.config.patch({TRACES_GRADIENTS: True}), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        found = Compiled(lambda *pair: gradients(*pair), "aot_eager")(*batch)
    torch.manual_seed(0)
    for ours, theirs in zip(found, gradients(*batch), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    assert sum("differentiates the discriminator twice" in str(w.message) for w in said) == 1


def test_a_critic_near_0_has_not_won():
    """A critic's loss is a difference of means: 0 means that it cannot distinguish real from fake."""
    losses = {"D_real": 0.001, "D_fake": 0.0, "D_GP": 0.1, "G": 1.0}
    critic = Monitor(method_of("cut").discriminator_losses())
    assert not [said for _ in range(10) for said in critic.judge(losses)]
    watched = Monitor(method_of("cut", gan_mode="lsgan").discriminator_losses())
    assert [said for _ in range(10) for said in watched.judge(losses)]
