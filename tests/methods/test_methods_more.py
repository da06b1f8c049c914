"""CycleGAN, DCLGAN, SimDCL, DCD-GAN, SinCUT: shared passes, pools, external negatives, checks, single images."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnce.commands import methods as table
from fastnce.data import save_image
from fastnce.data.folder import DataError
from fastnce.data.single import SinglePictureData
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws, NetworkOptions
from fastnce.methods.losses import channel_cycle_loss, frequency_cycle_loss
from fastnce.methods.pool import ImagePool
from fastnce.methods.presets import PRESETS
from fastnce.nce import PatchSampleF
from tests.vgg import with_vgg


def build(preset, *, network=None, **changes):
    """A small method of a preset, in float64."""
    options = with_vgg(PRESETS[preset].options())
    for name, value in {"patches": 16, "projection": 8, **changes}.items():
        if hasattr(options, name):
            setattr(options, name, value)
    sections = PRESETS[preset].sections.get("network", {})
    sizes = {"width": 4, "discriminator_width": 4, "resolution": 32, "init_type": "normal", "init_gain": 0.1}
    if preset == "sincut":
        sizes |= {"width": 1, "discriminator_width": 1}
        options.patches = changes.get("patches", 1)
    return PRESETS[preset].method(options, NetworkOptions(**{**sections, **sizes, **(network or {})})).double()


def pictures(images=1, side=32, channels=3):
    return Batch(*(torch.rand(2, images, channels, side, side, dtype=torch.float64) * 2 - 1))


def losses_and_gradients(method, batch, draws=None):
    """The loss of every phase and the gradients of its groups, without updates."""
    draws = draws or Draws()
    outputs = method.generate(batch, draws)
    found = {}
    for phase in method.phases():
        torch.manual_seed(3)
        loss, logged = phase.loss(batch, outputs, draws)
        weights = [p for g in phase.groups for m in method.groups()[g].modules for p in m.parameters()]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
        found |= {name: value.detach() for name, value in logged.items()}
        found[f"gradient of {phase.groups}"] = torch.cat([g.flatten() for g in gradients if g is not None])
    return found


def count_passes(method, batch, draws=None):
    """Count the images that pass whole generators ("G") and encoders alone ("E") in one step."""
    counts = Counter()

    def note(module, args, kwargs):
        encode_only = kwargs.get("encode_only", len(args) > 2 and args[2])
        counts["E" if encode_only else "G"] += len(args[0])

    hooks = [
        network.register_forward_pre_hook(note, with_kwargs=True)
        for name, network in method.networks().items()
        if name.startswith("G")
    ]
    Step(method, OptimOptions()).run(batch, draws or Draws())
    for hook in hooks:
        hook.remove()
    return counts["G"], counts["E"]


@pytest.mark.parametrize(
    ("preset", "flip", "passes"),
    [
        ("cut", False, (2, 2)),
        ("fastcut", False, (1, 1)),
        ("fastcut", True, (1, 2)),
        ("sincut", False, (2, 2)),
        ("cyclegan", False, (6, 0)),
        ("dclgan", False, (4, 2)),
        ("simdcl", False, (4, 2)),
        ("dcdgan-released", False, (4, 2)),
        ("dcdgan", False, (6, 0)),
    ],
)
def test_no_picture_goes_through_a_generator_twice(preset, flip, passes):
    method = build(preset, negatives="image") if preset != "sincut" else build(preset, patches=4)
    assert count_passes(method, pictures(), Draws(flip=flip)) == passes


@pytest.mark.parametrize("preset", ["cut", "fastcut", "sincut", "dclgan", "simdcl", "dcdgan-released", "dcdgan"])
def test_shared_passes_change_nothing(preset):
    images = 1 if preset == "simdcl" else 2
    method, batch = build(preset), pictures(images)
    shared = losses_and_gradients(method.eval(), batch)  # eval mode: SinCUT draws new noise otherwise
    method.options.reuse_key_features = False
    apart = losses_and_gradients(method, batch)
    assert shared.keys() == apart.keys()
    for name in shared:
        torch.testing.assert_close(shared[name], apart[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_batch_norm_keeps_passes_apart():
    method = build("dclgan", network={"norm": "batch"})
    method.generator_a.train()
    batch = pictures()
    torch.testing.assert_close(method.generate(batch, Draws())["fake_B"], method.generator_a(batch.a))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset):
    method = build(preset)
    batch = pictures(2 if preset == "sincut" else 1)  # SinCUT's negatives are other crops
    step = Step(method, OptimOptions(lr=1e-3))
    before = {key: tensor.clone() for key, tensor in step.state().items()}
    losses = step.run(batch, method.draw(random.Random(0)))
    assert all(value.isfinite() for value in losses.values())
    assert step.bad_steps == 0
    after = step.state()
    for network in method.networks():
        weights = [key for key in before if key.startswith(f"network/{network}/") and "filt" not in key]
        assert any(not torch.equal(before[key], after[key]) for key in weights), network
    with torch.no_grad():
        one = Batch(batch.a[:1], batch.b[:1])
        assert torch.equal(method.eval().pictures(one)["fake_B"], method.translate(one.a))


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("sincut", {}),
        ("cyclegan", {}),
        ("simdcl", {}),
        ("dcdgan", {"network": {"generator": "restorer"}, "external": "bank"}),
        ("cut", {"weighting": "monce", "selection": "attention"}),
        ("cut", {"weighting": "hdce", "symmetric": True}),
    ],
)
def test_16_bits_come_close(preset, changes):
    images = 1 if preset == "simdcl" else 2
    method, batch = build(preset, **changes).float().eval(), Batch(*(p.float() for p in pictures(images)))
    exact = losses_and_gradients(method, batch)
    with torch.autocast("cpu", torch.bfloat16):
        close = losses_and_gradients(method, batch)
    assert all(p.dtype == torch.float32 for p in method.parameters())
    for name, value in exact.items():
        assert close[name].dtype == torch.float32, name
        if "gradient" not in name:
            torch.testing.assert_close(close[name], value, rtol=0.1, atol=0.02, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert F.cosine_similarity(close[name], value, dim=0) > 0.9, name


class PublishedPool:
    """The published pool, one image after another, with given draws."""

    def __init__(self, size):
        self.size, self.kept = size, []

    def query(self, fakes, uniform):
        out = []
        for fake, (coin, place) in zip(fakes, uniform.tolist(), strict=True):
            if len(self.kept) < self.size:
                self.kept.append(fake.clone())
                out.append(fake)
            elif coin > 0.5:
                slot = int(place * self.size)
                out.append(self.kept[slot].clone())
                self.kept[slot] = fake.clone()
            else:
                out.append(fake)
        return torch.stack(out)


@pytest.mark.parametrize(("size", "images"), [(1, 1), (3, 1), (3, 4), (5, 2)])
def test_pool_is_the_published_one(size, images):
    pool, published = ImagePool(size), PublishedPool(size)
    for _ in range(12):
        fakes, uniform = torch.randn(images, 2, 3, 3), torch.rand(images, 2)
        assert torch.equal(pool(fakes, uniform), published.query(fakes, uniform))
    assert torch.equal(pool.pictures, torch.stack(published.kept))


def test_pool_draws_half_of_the_time():
    pool = ImagePool(8)
    pool(torch.zeros(8, 1, 2, 2))
    changed = sum(int((pool(torch.full((1, 1, 2, 2), float(i + 1))) != i + 1).any()) for i in range(400))
    assert 150 < changed < 250


def test_pool_is_kept_with_the_run():
    pool = ImagePool(4)
    for _ in range(3):
        pool(torch.randn(1, 3, 4, 4))
    other = ImagePool(4)
    other.load_state_dict(pool.state_dict())
    fakes, uniform = torch.randn(3, 3, 4, 4), torch.tensor([[0.9, 0.1], [0.9, 0.6], [0.2, 0.0]])
    assert torch.equal(pool(fakes, uniform), other(fakes, uniform))
    assert list(build("cyclegan").extra_state_modules()) == ["pool_A", "pool_B"]
    assert build("dclgan").extra_state_modules() == {}
    assert list(build("dclgan", external="bank").extra_state_modules()) == ["bank_A", "bank_B"]


def test_pool_never_keeps_what_is_not_finite():
    pool = ImagePool(2)
    pool(torch.full((1, 1, 2, 2), torch.nan))
    assert pool.count == 0
    pool(torch.ones(2, 1, 2, 2))
    pool(torch.full((8, 1, 2, 2), torch.inf))
    assert torch.equal(pool.pictures, torch.ones(2, 1, 2, 2))


def test_pool_gives_no_gradient_and_refuses_other_sizes():
    pool = ImagePool(2)
    assert not pool(torch.ones(1, 1, 2, 2, requires_grad=True)).requires_grad
    assert torch.equal(ImagePool(0)(torch.ones(1, 1, 2, 2)), torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="must be of one size"):
        pool(torch.ones(1, 1, 4, 4))


def test_cyclegan_updates_generators_first():
    method = build("cyclegan")
    assert [phase.groups for phase in method.phases()] == [("G",), ("D",)]


def test_dclgan_adams():
    step = Step(build("dclgan"), OptimOptions(lr=2e-4))
    assert (step.groups["F"].base_lr, step.groups["F"].adam.defaults["betas"]) == (1e-3, (0.9, 0.999))
    step = Step(build("dclgan-paper"), OptimOptions(lr=1e-4))
    assert (step.groups["F"].base_lr, step.groups["F"].adam.defaults["betas"]) == (1e-4, (0.5, 0.999))
    assert build("dclgan-paper").pool_a.size == 50


def contrast_of(method, *arguments) -> dict:
    """The logged values of a dual method's contrast."""
    found = method.options.lambda_nce * method.contrast(*arguments)
    return {"NCE1": found[0], "NCE2": found[1]}


def dual_contrast(method, batch, ids, external):
    """NCE1 and NCE2, computed one layer and one row at a time."""
    options = method.options
    g_a, g_b, f1, f2 = method.generator_a, method.generator_b, method.projector_a, method.projector_b
    fake_b, fake_a = g_a(batch.a), g_b(batch.b)
    layers, images = method.layers, len(batch.a)

    def codes(generator, projector, x, which):
        maps = generator(x, layers, encode_only=True)
        found = []
        for layer, (m, i) in enumerate(zip(maps, which, strict=True)):
            rows = projector.get_submodule(f"mlp_{layer}")(m.flatten(2).transpose(1, 2)[:, i])
            found.append(F.normalize(rows, dim=2))  # (images, patches, dim)
        return found

    k1, k2 = codes(g_a, f1, batch.a, ids[0]), codes(g_b, f2, batch.b, ids[1])
    q1, q2 = codes(g_b, f2, fake_b, ids[0]), codes(g_a, f1, fake_a, ids[1])
    totals = []
    for q, k, other in ((q1, k1, q2), (q2, k2, q1)):
        means = []
        for layer in range(len(layers)):
            rows = []
            for image in range(images):
                for i in range(q[layer].shape[1]):
                    query, positive = q[layer][image, i], k[layer][image, i]
                    if options.negatives == "image":
                        negatives = torch.cat([k[layer][image, :i], k[layer][image, i + 1 :]])
                        more = other[layer][image]
                    else:
                        everything = k[layer].flatten(0, 1)
                        place = image * q[layer].shape[1] + i
                        negatives = torch.cat([everything[:place], everything[place + 1 :]])
                        more = other[layer].flatten(0, 1)
                    if external:
                        negatives = torch.cat([negatives, more.detach()])
                    logits = torch.cat([positive[None], negatives]).detach() @ query / options.temperature
                    rows.append(-logits.log_softmax(0)[0])
            means.append(torch.stack(rows).mean())
        totals.append(options.lambda_nce * torch.stack(means).mean())
    return totals


@pytest.mark.parametrize("external", ["none", "branch"])
@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_dual_contrast_row_by_row(external, negatives):
    method = build("dclgan", patches=5, external=external, negatives=negatives, nce_layers=[4, 8])
    batch = pictures(2)
    ids = [[torch.randperm(1024)[:5], torch.randperm(256)[:5]] for _ in range(2)]
    draws = Draws(patch_ids=ids)
    outputs = method.generate(batch, draws)
    ours = contrast_of(method, batch, outputs, draws)
    plain = dual_contrast(method, batch, ids, external == "branch")
    weights = [*method.generator_a.parameters(), *method.projector_b.parameters()]
    for loss, expected in zip((ours["NCE1"], ours["NCE2"]), plain, strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    ours_slope = torch.autograd.grad(ours["NCE1"] + ours["NCE2"], weights, allow_unused=True)
    plain_slope = torch.autograd.grad(plain[0] + plain[1], weights, allow_unused=True)
    for a, b in zip(ours_slope, plain_slope, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_bank_holds_past_keys_of_its_domain():
    method = build("dcdgan", external="bank", bank_size=32, patches=16, nce_layers=[4, 8])
    batch = pictures()
    ids = [[torch.arange(16), torch.arange(16)] for _ in range(2)]
    draws = Draws(patch_ids=ids)
    contrast_of(method, batch, method.generate(batch, draws), draws)
    with torch.no_grad():
        maps = method.generator_a(batch.a, [4, 8], encode_only=True)
        rows, _ = PatchSampleF.forward(method.projector_a, maps, 16, ids[0])
    banks = method.bank_a.keys()
    for kept, code in zip(banks, rows, strict=True):
        torch.testing.assert_close(kept[:16], code, rtol=1e-12, atol=1e-12)
    first = banks[0].clone()
    found = contrast_of(method, batch, method.generate(batch, draws), draws)["NCE1"]
    method.options.external = "none"
    queries = F.normalize(rows[0], dim=1)
    assert first.shape == (32, 8)
    assert (queries @ first.T).amax() > 0.999  # the same image came before, so its codes are negatives now
    method.bank_a = method.bank_b = None
    assert found > contrast_of(method, batch, method.generate(batch, draws), draws)["NCE1"]


def test_dcdgan_adds_both_cycle_terms():
    method, batch = build("dcdgan", lambda_color=0.7, lambda_frequency=0.3), pictures(2)
    found = losses_and_gradients(method, batch)
    with torch.no_grad():
        rec_a = method.generator_b(method.generator_a(batch.a))
        rec_b = method.generator_a(method.generator_b(batch.b))
        color = [0.7 * channel_cycle_loss(rec_a, batch.a), 0.7 * channel_cycle_loss(rec_b, batch.b)]
        freq = [0.3 * frequency_cycle_loss(rec_a, batch.a), 0.3 * frequency_cycle_loss(rec_b, batch.b)]
    for name, value in zip(("color_A", "color_B", "freq_A", "freq_B"), color + freq, strict=True):
        torch.testing.assert_close(found[name], value)
    parts = ("G_A", "G_B", "NCE1", "NCE2", "idt_A", "idt_B", "color_A", "color_B", "freq_A", "freq_B")
    torch.testing.assert_close(found["G"], 0.5 * sum(found[name] for name in parts))


@pytest.mark.parametrize("change", [{"weighting": "monce"}, {"weighting": "hdce"}, {"symmetric": True}, {"patches": 0}])
def test_cut_with_variants(change):
    method, batch = build("cut", **change), pictures()
    plain = losses_and_gradients(build("cut"), batch)
    found = losses_and_gradients(method, batch)
    assert found["NCE"].isfinite()
    assert not torch.isclose(found["NCE"], plain["NCE"], rtol=1e-6)


def test_cut_with_attention_and_layer_temperatures():
    method = build("cut", selection="attention", temperatures=[0.07, 0.1, 0.2, 0.3, 0.4])
    assert method.head.temperatures == [0.07, 0.1, 0.2, 0.3, 0.4]
    batch = pictures()
    draws = Draws()
    keys = method.generate(batch, draws)["keys"]
    ids = method._patch_ids(keys, 2, draws)
    assert ids[-1].shape == (2, 16)
    assert not torch.equal(ids[-1][0], ids[-1][1])
    assert losses_and_gradients(method, batch)["NCE"].isfinite()


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("cut", {"nce_layers": [0, 99]}, "its layers are ascending positions from 0 to 31"),
        ("cut", {"nce_layers": [8, 4]}, "each larger than the one before"),
        ("cut", {"temperatures": [0.1]}, "empty or one per layer: 1 are given for 5"),
        ("cut", {"weighting": "moco"}, "or an import path such as mycode.py:Name, not 'moco'"),
        ("cut", {"selection": "entropy"}, "loss.selection must be one of"),
        ("cut", {"gan_mode": "wasserstein"}, "loss.gan_mode must be one of"),
        ("cyclegan", {"gan_mode": "wasserstein"}, "loss.gan_mode must be one of"),
        ("cut", {"negatives": "all"}, "loss.negatives must be one of"),
        ("cut", {"patches": -1}, "loss.patches must be a whole number from 0 to"),
        ("sincut", {"nce_idt": False}, "lambda_identity=1.0 compares y with G"),
        ("sincut", {"nce_layers": [0, 16]}, "positions from 0 to 5"),
        ("cyclegan", {"network": {"in_channels": 1}}, "the identity loss feeds B to G_A"),
        ("cyclegan", {"pool_size": -1}, "loss.pool_size must be a whole number from 0 to"),
        ("dclgan", {"network": {"out_channels": 1}}, "the identity loss feeds B to G_A"),
        ("dclgan", {"external": "bank", "bank_size": 0}, "loss.bank_size must be a whole number from 1 to .*, not 0"),
        ("dclgan", {"lambda_gan": 0, "lambda_nce": 0, "lambda_idt": 0}, "every term has weight 0"),
        ("cut", {"lambda_gan": 0, "lambda_nce": 0}, "every term has weight 0"),
        ("dclgan", {"external": "queue"}, 'loss.external must be one of "none", "branch", "bank"'),
        ("simdcl", {"patches": 2}, "loss.patches must be a whole number from 3 to"),
        ("dcdgan", {"network": {"generator": "restorer", "norm": "batch"}}, "neither batch norm nor dropout"),
    ],
)
def test_wrong_options_are_one_sentence(preset, changes, message):
    with pytest.raises(ValueError, match=message):
        build(preset, **changes)


@pytest.mark.parametrize(
    ("preset", "changes", "size", "message"),
    [
        ("cut", {}, (0, 32, 32), "data.batch must be at least 1, not 0"),
        ("cut", {}, (1, 66, 64), "G: both sides must be multiples of 4"),
        ("cut", {}, (1, 8, 8), "crops of 8x8 do not fit network D"),
        ("cut", {"network": {"generator": "unet_128"}, "nce_layers": [0, 1]}, (1, 64, 64), "multiples of 128"),
        ("cut", {"patches": 1}, (4, 32, 32), "nothing to contrast with loss.patches=1"),
        ("sincut", {}, (16, 64, 64), "takes crops of 32x32, not 64x64"),
        ("sincut", {}, (1, 32, 32), "nothing to contrast"),
        ("cyclegan", {}, (1, 4, 4), "do not fit network"),
        ("simdcl", {}, (2, 64, 64), "data.batch must be 1, not 2"),
        ("simdcl", {"patches": 100}, (1, 32, 32), "crops of 32x32 have only 64 locations at layer 12"),
        ("dcdgan", {"patches": 1, "external": "none"}, (1, 32, 32), "nothing to contrast"),
    ],
)
def test_wrong_sizes_are_one_sentence(preset, changes, size, message):
    method = build(preset, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        method.check(*size)
    assert "\n" not in str(caught.value)


def test_right_sizes_pass():
    for name in PRESETS:
        method = build(name)
        before = {key: tensor.clone() for key, tensor in method.state_dict().items()}
        method.check(1 if name == "simdcl" else 4, 32, 32)
        assert all(torch.equal(tensor, before[key]) for key, tensor in method.state_dict().items())
    build("cut").check(1, 64, 96)


def test_table_names_every_preset(capsys):
    assert table.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{printed}" for name in PRESETS)
    assert "G 11,378,179, F 560,384, D 2,764,737" in printed
    assert "G 3,068,404" in printed
    assert "D 5,885,473" in printed
    assert max(map(len, printed.splitlines())) <= table.COLUMNS


@pytest.fixture
def two_pictures(tmp_path):
    """One image per domain whose red and green encode the position of a pixel."""
    for domain, (height, width) in {"A": (150, 210), "B": (130, 180)}.items():
        y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
        x = torch.linspace(-1, 1, width)[None, :].expand(height, width)
        save_image(torch.stack([y, x, torch.zeros_like(x)]), tmp_path / f"train{domain}" / "only.png")
    return tmp_path


def test_single_picture_crops(two_pictures):
    data = SinglePictureData(two_pictures, crop_size=16, batch=8, seed=4)
    assert (data.size_a, data.size_b, data.epoch_size, data.steps_per_epoch) == (1, 1, 100_000, 12_500)
    a, b = data.batch(3)
    assert a.shape == b.shape == (8, 3, 16, 16)
    assert a.is_contiguous(memory_format=torch.channels_last)
    again, _ = SinglePictureData(two_pictures, crop_size=16, batch=8, seed=4).batch(3)
    assert torch.equal(a, again)
    assert not torch.equal(a, data.batch(4)[0])
    assert -1 <= a.min() < a.max() <= 1


def test_single_picture_keeps_both_promises(two_pictures):
    """One zoom per batch, and no place twice, as read from the colours of the crops."""
    data = SinglePictureData(two_pictures, crop_size=16, batch=8, seed=1)
    zooms = set()
    for step in range(25):
        for crops in data.batch(step):
            steps_y = crops[:, 0, 12, 8] - crops[:, 0, 4, 8]
            steps_x = (crops[:, 1, 8, 12] - crops[:, 1, 8, 4]).abs()  # they fall in mirrored crops
            assert steps_y.max() - steps_y.min() < 0.03
            assert steps_x.max() - steps_x.min() < 0.03
            zooms.add(round(float(steps_y.mean()), 2))
            places = crops[:, :2].mean(dim=(2, 3))
            apart = (places[:, None] - places[None]).abs()
            size = torch.stack([steps_y.mean(), steps_x.mean()]) * 2  # of a crop, in units of the colour ramp
            overlap = (apart < 0.9 * size).all(dim=2)
            assert overlap.sum() == 8, "two crops of a batch show the same place"
    assert len(zooms) > 10


def test_single_picture_zooms_less_where_a_batch_would_not_fit(two_pictures):
    data = SinglePictureData(two_pictures, crop_size=30, batch=20)
    for step in range(20):
        assert data.batch(step)[0].shape == (20, 3, 30, 30)
    assert data.zoomed(150, 210, 1.0, 1.0) == (150, 210)
    height, width = data.zoomed(150, 210, 0.0, 0.0)
    assert (height // 30) * (width // 30) >= 20
    assert height < 150
    free = SinglePictureData(two_pictures, crop_size=16, batch=1)
    assert free.zoomed(150, 210, 0.0, 0.5) == (50, 140)


def test_single_picture_ranks_share_one_batch(two_pictures):
    whole, _ = SinglePictureData(two_pictures, crop_size=16, batch=8).batch(5)
    shares = [SinglePictureData(two_pictures, crop_size=16, batch=4, rank=r, world=2).batch(5)[0] for r in (0, 1)]
    assert torch.equal(whole[0::2], shares[0])
    assert torch.equal(whole[1::2], shares[1])


def test_single_picture_mistakes(two_pictures):
    with pytest.raises(DataError, match="separate crops of 64x64, a batch needs 16"):
        SinglePictureData(two_pictures)
    with pytest.raises(DataError, match="batch=0 should be at least 1"):
        SinglePictureData(two_pictures, batch=0)
    save_image(torch.zeros(3, 64, 64), two_pictures / "trainB" / "second.png")
    with pytest.raises(DataError, match="trainB holds 2 pictures"):
        SinglePictureData(two_pictures, crop_size=16)


def test_single_picture_digest_and_samples(two_pictures):
    data = SinglePictureData(two_pictures, crop_size=16)
    a, b = data.samples(4)
    assert a.shape == (1, 3, 148, 208)
    assert b.shape == (1, 3, 128, 180)
    digest = data.digest()
    save_image(torch.zeros(3, 150, 210), two_pictures / "trainA" / "only.png")
    assert SinglePictureData(two_pictures, crop_size=16).digest() != digest


def test_sincut_learns_from_two_pictures_and_translates_the_whole(shared):
    torch.manual_seed(1)
    data = SinglePictureData(shared / "data" / "sincut", crop_size=64, batch=2)
    method = build("sincut", lambda_identity=20.0, network={"resolution": 64}).float()
    method.check(2, 64, 64)
    step = Step(method, OptimOptions(lr=4e-3, beta1=0.0, beta2=0.99))
    identity = []
    for i in range(16):
        losses = step.run(Batch(*data.batch(i)), Draws())
        identity.append(float(losses["idt"]))
    assert step.bad_steps == 0
    assert sum(identity[-5:]) < sum(identity[:5])
    _, b = data.samples(1)
    with torch.no_grad():
        translated = method.eval().translate(b)
    assert translated.shape == b.shape == (1, 3, 768, 1024)
    assert translated.isfinite().all()


def test_networks_are_modules_by_published_name():
    names = {name: list(build(name).networks()) for name in ("cyclegan", "dclgan", "simdcl")}
    assert names["cyclegan"] == ["G_A", "G_B", "D_A", "D_B"]
    assert names["dclgan"] == ["G_A", "G_B", "D_A", "D_B", "F1", "F2"]
    assert names["simdcl"][-4:] == ["F3", "F4", "F5", "F6"]
    assert all(isinstance(network, nn.Module) for network in build("simdcl").networks().values())
