"""Options that several methods share: mirrored steps, a pool for CUT, negatives of all ranks, unequal channels."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastnce.config import resolve
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws
from fastnce.methods.losses import channel_cycle_loss
from tests.methods.test_methods_more import (
    build,
    contrast_of,
    count_passes,
    dual_contrast,
    losses_and_gradients,
    pictures,
)

SMALL = {"generator": "resnet_4blocks", "discriminator": "n_layers", "discriminator_layers": 1}
DUAL = {"network": SMALL, "nce_layers": [4, 8], "patches": 5}


def test_half_of_the_steps_of_a_dual_method_are_mirrored():
    method = build("dclgan", **DUAL, flip_equivariance=True)
    flips = [method.draw(random.Random(i)).flip for i in range(200)]
    assert 70 < sum(flips) < 130
    method.options.flip_equivariance = False
    assert not any(method.draw(random.Random(i)).flip for i in range(20))


@pytest.mark.parametrize("external", ["none", "branch"])
def test_the_contrast_of_mirrored_images_row_by_row(external):
    """Queries are the features of the translation of the mirrored image, mirrored back; keys those of the image."""
    method = build("dclgan", **DUAL, external=external)
    batch = pictures(2)
    ids = [[torch.randperm(1024)[:5], torch.randperm(256)[:5]] for _ in range(2)]
    outputs = method.generate(batch, draws := Draws(True, ids))
    ours = contrast_of(method, batch, outputs, draws)

    def mirrored(generator) -> Callable[..., object]:
        def call(x, layers=(), encode_only=False):
            if not encode_only:
                return generator(x.flip(3))
            found = generator(x, layers, encode_only=True)
            return found if any(x is real for real in batch) else [feature.flip(3) for feature in found]

        return call

    plain = type("Plain", (), {"layers": method.layers, "options": method.options})()
    plain.generator_a, plain.generator_b = mirrored(method.generator_a), mirrored(method.generator_b)
    plain.projector_a, plain.projector_b = method.projector_a, method.projector_b
    wanted = dual_contrast(plain, batch, ids, external == "branch")
    for name, expected in zip(("NCE1", "NCE2"), wanted, strict=True):
        torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-10)
    straight = contrast_of(method, batch, method.generate(batch, Draws()), Draws(False, ids))
    assert not torch.isclose(straight["NCE1"], ours["NCE1"])


@pytest.mark.parametrize(("preset", "passes"), [("dclgan", (4, 4)), ("dcdgan", (6, 2))])
def test_a_mirrored_step_encodes_the_keys_apart_and_nothing_twice(preset, passes):
    changes = DUAL if preset == "dclgan" else DUAL | {"patches": 4}
    method = build(preset, **changes, flip_equivariance=True)
    assert count_passes(method, pictures(), Draws(flip=True)) == passes


@pytest.mark.parametrize("preset", ["dclgan", "simdcl", "dcdgan"])
def test_shared_passes_change_nothing_in_a_mirrored_step(preset):
    method, batch = build(preset, **DUAL), pictures(1)
    shared = losses_and_gradients(method, batch, Draws(flip=True))
    method.options.reuse_key_features = False
    apart = losses_and_gradients(method, batch, Draws(flip=True))
    for name in shared:
        torch.testing.assert_close(shared[name], apart[name], rtol=1e-12, atol=1e-12)


def test_identity_and_cycles_of_a_mirrored_step():
    """The identity loss takes the images as they are; the cycle of the mirrored image ends there."""
    method, batch = build("dcdgan", **DUAL, lambda_color=0.7), pictures(1)
    found = losses_and_gradients(method, batch, Draws(flip=True))
    with torch.no_grad():
        cycle = method.generator_b(method.generator_a(batch.a.flip(3)))
        identity = method.generator_a(batch.b)
    torch.testing.assert_close(found["color_A"], 0.7 * channel_cycle_loss(cycle, batch.a.flip(3)))
    torch.testing.assert_close(found["idt_A"], F.l1_loss(identity, batch.b))


def test_cut_judges_from_its_pool():
    """Once the pool is full, D sees a past fake or the latest; G always answers for the latest."""
    method = build("cut", network=SMALL, nce_layers=[4, 8], pool_size=1)
    batches = [pictures(1) for _ in range(8)]
    made = [method.generate(batch, Draws()) for batch in batches]
    seen: list[torch.Tensor] = []
    method.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    past = 0
    for i, (batch, outputs) in enumerate(zip(batches, made, strict=True)):
        seen.clear()
        method.d_loss(batch, outputs, Draws())
        method.g_loss(batch, outputs, Draws())
        (judged, real), latest = seen[0], seen[1][0]
        assert torch.equal(real[None], batch.b)
        assert torch.equal(latest[None], outputs["fake_B"])
        assert any(torch.equal(judged[None], one["fake_B"]) for one in made[: i + 1])
        past += not torch.equal(judged, latest)
    assert past > 0


def test_the_pool_of_cut_is_part_of_the_run():
    steps = [Step(build("cut", network=SMALL, nce_layers=[4, 8], pool_size=2), OptimOptions()) for _ in range(2)]
    for _ in range(3):
        steps[0].run(pictures(1), Draws())
    steps[1].load_state(steps[0].state())
    assert steps[1].method.pool.count == 2
    assert torch.equal(steps[1].method.pool.pictures, steps[0].method.pool.pictures)
    assert build("cut", network=SMALL).extra_state_modules() == {}


def test_the_pool_of_cut_needs_one_size():
    sizes = {(32, 32): "images of 32x32", (40, 32): "images of 32x40"}
    one = {(32, 32): "images of 32x32"}
    method = build("fastcut", network=SMALL, nce_layers=[4, 8], pool_size=2)
    with pytest.raises(ValueError, match=r"loss\.pool_size=2 remembers fakes of one size"):
        method.check_sizes(1, sizes, one, "resize")
    method.check_sizes(1, one, sizes, "resize")  # the fakes have A's size


def test_old_runs_have_no_pool_and_no_augmentation():
    for preset in ("cut", "fastcut", "sincut", "cyclegan", "dclgan", "simdcl", "dcdgan"):
        config = resolve(preset)
        stored = config.as_dict()
        new = {"augment", "gather_negatives", "flip_equivariance", "saturating"} | (
            {"pool_size"} if "cut" in preset else set()
        )
        stored["loss"] = {key: value for key, value in stored["loss"].items() if key not in new}
        assert config.changes(stored) == []


@pytest.mark.parametrize("preset", ["cut", "cyclegan", "dclgan"])
@pytest.mark.parametrize("saturating", [False, True])
def test_the_hinge_of_the_generators(preset, saturating):
    """DCLGAN's code has the discriminator's hinge for the generator too, in every model; else it is -mean(D)."""
    changes = {"gan_mode": "hinge", "saturating": saturating, "lambda_identity": 0.0, "lambda_idt": 0.0}
    method, batch = build(preset, **DUAL, **changes), pictures(1)
    outputs = method.generate(batch, Draws())
    judge, name = (method.discriminator, "G_GAN") if preset == "cut" else (method.discriminator_a, "G_A")
    judged = judge(outputs["fake_B"])
    wanted = (1 - judged).clamp_min(0).mean() if saturating else -judged.mean()
    torch.testing.assert_close(method.g_loss(batch, outputs, Draws())[1][name], wanted)


class Half:
    """What the other of two ranks hands over: recorded from its own call, which exchanges as much."""

    def __init__(self):
        self.sent: list[torch.Tensor] = []

    def record(self, tensor):
        self.sent.append(tensor.detach())
        return torch.zeros(1, *tensor.shape, dtype=tensor.dtype)

    def __call__(self, tensor):
        return self.sent.pop(0)[None]


@pytest.mark.parametrize(("preset", "external"), [("dclgan", "none"), ("dcdgan", "branch"), ("dcdgan", "none")])
@pytest.mark.parametrize("cosine", [True, False])
def test_gathered_negatives_are_those_of_the_whole_batch(preset, external, cosine):
    """Two ranks with a part of the batch each: the mean of their losses is the loss of the whole batch."""
    changes = {"negatives": "batch", "external": external, "cosine": cosine, "gather_negatives": True}
    method, batch = build(preset, **DUAL, **changes), pictures(4)
    ids = [[torch.randperm(1024)[:5], torch.randperm(256)[:5]] for _ in range(2)]

    def contrast(images: Batch):
        draws = Draws(patch_ids=ids)
        losses = contrast_of(method, images, method.generate(images, draws), draws)
        weights = [p for net in (method.generator_a, method.projector_b) for p in net.parameters() if p.dim() > 1]
        slopes = torch.autograd.grad(losses["NCE1"] + losses["NCE2"], weights, allow_unused=True)
        return torch.stack([losses["NCE1"], losses["NCE2"]]).detach(), [s for s in slopes if s is not None]

    whole, slopes = contrast(batch)
    parts = [Batch(*(images[rank::2] for images in batch)) for rank in range(2)]
    found = []
    for rank, part in enumerate(parts):
        half = Half()
        method.share_keys(half.record)
        contrast(parts[1 - rank])
        method.share_keys(half)
        found.append(contrast(part))
        assert not half.sent  # one exchange
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, whole, rtol=1e-10, atol=1e-12)
    for whole_slope, one, other in zip(slopes, found[0][1], found[1][1], strict=True):
        torch.testing.assert_close((one + other) / 2, whole_slope, rtol=1e-8, atol=1e-11)


def test_simdcl_gathers_too():
    """Each rank has one image; the negatives are those of two, as in DCLGAN with a batch of two."""
    method = build("simdcl", **DUAL, gather_negatives=True, lambda_sim=0.0)
    batch, draws = pictures(2), Draws(patch_ids=[[torch.arange(5)] * 2 for _ in range(4)])
    values = []
    for rank in range(2):
        half, parts = Half(), [Batch(*(images[i : i + 1] for images in batch)) for i in (1 - rank, rank)]
        for others, part in zip((half.record, half), parts, strict=True):
            method.share_keys(others)
            losses = contrast_of(method, part, method.generate(part, draws), draws)
        values.append(losses["NCE1"])
    dual = build("dclgan", **DUAL, lambda_nce=1.0)
    dual.load_state_dict({k: v for k, v in method.state_dict().items() if not k.startswith("mappings")})
    ids = Draws(patch_ids=[[torch.arange(5)] * 2] * 2)
    torch.testing.assert_close(sum(values) / 2, contrast_of(dual, batch, dual.generate(batch, ids), ids)["NCE1"])


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("dclgan", {"negatives": "image"}, "it needs loss.negatives=batch and loss.weighting=none"),
        ("dclgan", {"weighting": "monce"}, "it needs loss.negatives=batch and loss.weighting=none"),
        ("dcdgan", {}, "it needs loss.negatives=batch and loss.weighting=none"),
        ("dclgan", {"external": "bank"}, "cannot be combined with loss.external=bank"),
    ],
)
def test_gathering_that_makes_no_sense_is_one_sentence(preset, changes, message):
    with pytest.raises(ValueError, match=message):
        build(preset, **DUAL, **changes, gather_negatives=True)


UNEQUAL = {"cyclegan": {"lambda_identity": 0.0, "pool_size": 2}, "dclgan": {"lambda_idt": 0.0}}
UNEQUAL |= {"simdcl": {"lambda_idt": 0.0}, "dcdgan": {"lambda_idt": 0.0, "external": "branch"}}
UNEQUAL["cut"] = {"nce_idt": False, "lambda_nce": 0.0}


@pytest.mark.parametrize("preset", UNEQUAL)
@pytest.mark.parametrize("channels", [(1, 3), (3, 1)])
def test_unequal_channels_train(preset, channels):
    network = {**SMALL, "in_channels": channels[0], "out_channels": channels[1]}
    method = build(preset, **{**DUAL, "network": network, **UNEQUAL[preset], "augment": "color,cutout"})
    method.check(1, 32, 32)
    batch = Batch(*(pictures(1, channels=count)[0] for count in channels))
    losses = Step(method, OptimOptions(lr=1e-3)).run(batch, Draws())
    assert all(value.isfinite() for value in losses.values())
    assert method.pictures(batch)["fake_B"].shape[1] == channels[1]


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("cyclegan", {}, r"must be equal, or loss\.lambda_identity=0"),
        ("dclgan", {}, r"must be equal, or loss\.lambda_idt=0"),
        ("dcdgan", {}, r"must be equal, or loss\.lambda_idt=0"),
        ("dcdgan", {"lambda_idt": 0.0, "lambda_rendered": 1.0}, r"must be equal, or loss\.lambda_rendered=0"),
        ("cut", {}, r"must be equal, or loss\.nce_idt=false"),
        ("cut", {"nce_idt": False}, r"must be equal, or loss\.lambda_nce=0"),
        ("dclgan", {"lambda_idt": 0.0, "network": {"generator": "restorer", "norm": "none"}}, "equal"),
    ],
)
def test_terms_that_need_equal_channels_say_so(preset, changes, message):
    network = {**SMALL, "in_channels": 1, **changes.pop("network", {})}
    with pytest.raises(ValueError, match=message):
        build(preset, **{**DUAL, "network": network, **changes})
