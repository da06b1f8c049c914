"""The networks and norms that the published options offer beside the defaults: sizes, precision, steps, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.engine.options import OptimOptions
from fastnce.engine.recompute import recompute_blocks
from fastnce.engine.step import Step
from fastnce.methods import CUT, CUTOptions, Draws, NetworkOptions
from fastnce.networks import MUNITGenerator, PatchGAN, TilePatchGAN, set_implementation
from fastnce.networks.build import DISCRIMINATORS, GENERATORS, build_discriminator, build_generator
from fastnce.translate.load import load_translator
from tests.engine.test_engine import SMALL, random_batch
from tests.methods.test_methods_more import build

SPARE = {"width": 2, "resolution": 16, "init_type": "normal"}
"""A narrow network of any kind."""


@torch.no_grad()
@pytest.mark.parametrize("channels", [(1, 3), (3, 1)])
@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "restorer"])  # which adds to its input
def test_every_generator_takes_unequal_channels(name, channels):
    network = build_generator(name, *channels, **{**SPARE, "width": 1}).eval()
    side = max(16, getattr(network, "smallest", 1))
    assert network.out_channels == channels[1]
    y = network(torch.randn(1, channels[0], side, side))
    assert y.shape == (1, channels[1], side, side)
    assert y.std() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_every_discriminator_takes_any_channels(name):
    for channels in (1, 5):
        scores = build_discriminator(name, channels, **SPARE)(
            torch.randn(2, channels, 16, 16).repeat(1, 1, *TIMES[name])
        )
        assert scores.shape[:2] == (2, 1)
        assert scores.std() > 0


TIMES = {name: (3, 3) if name in ("basic", "n_layers") else (1, 1) for name in DISCRIMINATORS}
"""A PatchGAN needs more than 16 pixels."""


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_the_discriminator_has_its_own_norm(norm):
    options = NetworkOptions(norm="instance", discriminator_norm=norm, width=2, discriminator_width=2)
    keys = options.build_discriminator(3).state_dict().keys()
    assert keys == build_discriminator("basic", 3, 2, norm=norm).state_dict().keys()
    assert (
        options.build_generator().state_dict().keys() == build_generator("resnet_9blocks", width=2).state_dict().keys()
    )
    assert options.build_discriminator(3).pictures_independent == (norm != "batch")
    same = NetworkOptions(norm=norm, width=2, discriminator_width=2)
    assert same.build_discriminator(3).state_dict().keys() == keys


def test_batch_norm_in_the_discriminator_alone_judges_real_and_fake_apart():
    """As published: the statistics are those of one kind of images. The same weights otherwise, in every loss."""
    network = {"generator": "resnet_4blocks", "norm": "instance", "discriminator_norm": "batch"}
    method = build("cut", network=network, nce_layers=[0, 4])
    assert method.generator.features_repeat
    batch = random_batch(2, torch.float64)
    outputs = method.generate(batch, Draws())
    judge = copy.deepcopy(method.discriminator)
    _, losses = method.d_loss(batch, outputs, Draws())
    fake, real = judge(outputs["fake_B"].detach()), judge(batch.b)
    torch.testing.assert_close(losses["D_fake"], fake.square().mean())
    torch.testing.assert_close(losses["D_real"], (real - 1).square().mean())
    for key, tensor in judge.state_dict().items():
        torch.testing.assert_close(method.discriminator.state_dict()[key], tensor)
    with pytest.raises(ValueError, match=r"network.discriminator_norm=instance does not"):
        Step(method, OptimOptions(accumulate=2))


def test_the_sentence_about_batch_norm_names_the_generators_option():
    method = build("cut", network={"generator": "resnet_4blocks", "norm": "batch"}, nce_layers=[0, 4])
    assert "(network.norm=instance does not)" in method.whole_batch()


@torch.no_grad()
def test_tiles_are_judged_apart_and_lie_where_they_are():
    network = build_discriminator("patch", 3, 2, init_gain=0.5, init_type="normal").double()
    plain = PatchGAN(3, 2, 2).double()
    plain.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    scores = network(x)
    assert scores.shape == (2, 1, 4, 6)
    for row in range(2):
        for column in range(3):
            tile = plain(x[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16])
            found = scores[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(found, tile, rtol=1e-10, atol=1e-12)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(last), scores, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="tiles of 16x16: 24x32 does not fit"):
        network(torch.zeros(1, 3, 24, 32, dtype=torch.float64))
    assert isinstance(network, TilePatchGAN)


@pytest.mark.parametrize(("downsampling", "factor"), [(0, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("name", ["stylegan2", "smallstylegan2"])
def test_halvings_of_stylegan2(name, downsampling, factor):
    network = build_generator(name, width=1, resolution=16, stylegan2_downsampling=downsampling).eval()
    assert network.factor == factor
    layers = range(2 + downsampling + (3 if name == "stylegan2" else 1))
    features = network(torch.randn(1, 3, 3 * factor, 5 * factor), list(layers), encode_only=True)
    assert [f.shape[1] for f in features] == network.feature_channels(list(layers))
    assert features[-1].shape[2:] == (3, 5)
    with pytest.raises(ValueError, match=f"from 0 to {layers[-1]},"):
        network.feature_channels([0, layers[-1] + 1])


def test_the_small_generator_has_no_noise():
    """Its noise weights are in the published files, and no loss depends on them."""
    x = torch.randn(1, 3, 8, 8)
    for name, same in (("smallstylegan2", True), ("stylegan2", False)):
        network = build_generator(name, width=1, resolution=16).train()
        weights = [p for key, p in network.named_parameters() if key.endswith(".noise.weight")]
        assert len(weights) == 1
        nn.init.ones_(weights[0])
        assert torch.equal(network(x), network(x)) == same
        (slope,) = torch.autograd.grad(network(x).sum(), weights, allow_unused=True)
        assert (slope is None) == same


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ({"generator": "resnet_cat"}, [0, 1, 2, 3]),
        ({"generator": "smallstylegan2", "discriminator": "tilestylegan2"}, [0, 2, 3]),
        ({"generator": "stylegan2", "stylegan2_downsampling": 2, "discriminator": "patch"}, [0, 3, 5]),
    ],
    ids=lambda value: value.get("generator") if isinstance(value, dict) else "",
)
def test_steps_with_these_networks(network, layers):
    """Every weight that has a gradient changes; a second step from a stored state is the same, bit for bit."""
    sizes = {"width": 1, "discriminator_width": 1, "resolution": 32}
    torch.manual_seed(3)
    methods = [CUT(CUTOptions(nce_layers=layers, patches=8, projection=4), NetworkOptions(**sizes, **network))] * 2
    methods[1] = copy.deepcopy(methods[0])
    steps = [Step(method, OptimOptions(lr=0.01)) for method in methods]
    batches = [random_batch(2) for _ in range(2)]
    before = {key: p.detach().clone() for key, p in methods[0].generator.named_parameters()}
    steps[0].run(batches[0], Draws())
    still = [key for key, p in methods[0].generator.named_parameters() if torch.equal(p, before[key])]
    cancelled = ".noise.weight" if "stylegan2" in network["generator"] else ".conv.bias"
    assert all(key.endswith(cancelled) for key in still)
    steps[1].load_state({key: tensor.clone() for key, tensor in steps[0].state().items()})
    for step in steps:
        torch.manual_seed(4)
        step.run(batches[1], Draws())
    one, other = (step.state() for step in steps)
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_resnet_cat_in_16_bits_and_recomputed():
    network = build_generator("resnet_cat", **SPARE).train()
    x = torch.randn(2, 3, 16, 16)
    exact = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough, features = network(x, [0, 3])
    assert rough.dtype == torch.float32
    assert [f.dtype for f in features] == [torch.bfloat16] * 2
    assert 0 < (rough - exact).norm() < 0.1 * exact.norm()
    weights = [p for key, p in network.named_parameters() if key.endswith("weight")]
    plain = torch.autograd.grad(exact.square().sum(), weights)
    method = CUT(CUTOptions(nce_layers=[0, 3]), NetworkOptions("resnet_cat", "pixel", width=2, discriminator_width=2))
    method.generator = network
    assert recompute_blocks(method) == 8
    again = torch.autograd.grad(network(x).square().sum(), weights)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_resnet_cat_by_kernels():
    """The kernels, in Triton's interpreter where there is no GPU, compute what PyTorch's layers do."""
    found = []
    network = build_generator("resnet_cat", width=2, init_type="normal", init_gain=0.3)
    network.enc_content.model[3] = network.enc_content.model[3].model[0]
    network.dec.model[0] = nn.Identity()
    x = torch.randn(1, 3, 8, 8)
    for implementation in ("eager", "triton"):
        set_implementation(network, implementation)
        found.append(network(x).detach())
    assert found[0].std() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["network.generator=resnet_cat", "network.norm=batch"],
            'generator "resnet_cat" has instance norm and no dropout',
        ),
        (["network.generator=resnet_cat", "network.dropout=true"], 'generator "resnet_cat" has instance norm'),
        (["network.generator=resnet_cat"], "loss.nce_layers=[0, 4, 8, 12] does not fit network.generator"),
        (["network.generator=smallstylegan2", "network.norm=batch"], '"smallstylegan2" has neither batch norm nor'),
        (
            ["network.generator=stylegan2", "network.resolution=32", "network.stylegan2_downsampling=4"],
            "network.stylegan2_downsampling=4 leaves maps of less than 4x4 at network.resolution=32: it must",
        ),
        (["network.stylegan2_downsampling=-1"], "network.stylegan2_downsampling must be a whole number from 0 to 10"),
        (["network.discriminator=patch", "data.crop_size=28"], "both sides must be multiples of 16"),
        (["network.discriminator_norm=layer"], "network.discriminator_norm must be"),
    ],
)
def test_what_does_not_fit_is_one_sentence(options, message, folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "fastcut", "--data", str(folder), "--out", str(out), *SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_runs_from_before_these_options_continue():
    config = resolve("cut", None, ["network.norm=batch"])
    stored = config.as_dict()
    for key in ("discriminator_norm", "spectral_norm", "stylegan2_downsampling"):
        del stored["network"][key]
    assert config.changes(stored) == []
    changed = resolve("cut", None, ["network.norm=batch", "network.discriminator_norm=none"])
    assert changed.differences(stored) == ["network.discriminator_norm: , now none"]


def test_a_run_with_resnet_cat_is_exported_and_translates(folder, tmp_path):
    run, more = tmp_path / "run", ["network.generator=resnet_cat", "loss.nce_layers=0,1,2", "network.width=2"]
    more += ["network.discriminator=patch", "network.discriminator_norm=none", "run.steps=1", "--quiet"]
    assert main(["train", "fastcut", "--data", str(folder), "--out", str(run), *SMALL, *more]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "files")]) == 0
    translators = [load_translator(path) for path in (run, tmp_path / "files" / "latest_net_G.pth")]
    x = torch.rand(1, 3, 18, 22) * 2 - 1
    assert torch.equal(translators[0](x), translators[1](x))
    assert isinstance(translators[1].generator, MUNITGenerator)
