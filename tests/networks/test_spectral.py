"""Spectral norm: the paper's formula, one power iteration per step, and steps, files and runs that have it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.config
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.config.build import plan
from fastnce.engine.options import OptimOptions
from fastnce.engine.rehearsal import rehearse
from fastnce.engine.step import Step
from fastnce.methods import CUT, CUTOptions, Draws, NetworkOptions
from fastnce.networks.build import build_discriminator
from fastnce.networks.published import load_weights, network_from_weights, read_weights, save_published
from fastnce.networks.spectral import ORIGINAL, VECTORS, fitted, once_per_step
from fastnce.training.checks import check_plan
from fastnce.training.starting import plan_start
from tests.engine.test_cudagraph import assert_same_state, taped
from tests.engine.test_engine import SMALL, random_batch, small_config, training_tensors

SPECTRAL = ["network.spectral_norm=true", "network.discriminator=n_layers", "network.discriminator_layers=1"]


def judge(**options) -> nn.Module:
    options = {"norm": "none", "layers": 2, "init_type": "normal", "init_gain": 0.3, "spectral_norm": True} | options
    return build_discriminator("n_layers", 3, 3, **options)


def spectral_method(seed: int = 1, **options) -> CUT:
    torch.manual_seed(seed)
    network = NetworkOptions(
        generator="resnet_4blocks",
        width=3,
        discriminator="n_layers",
        discriminator_layers=1,
        discriminator_width=3,
        discriminator_norm="none",
        spectral_norm=True,
        init_gain=0.3,
    )
    return CUT(CUTOptions(nce_layers=[0, 4], patches=8, projection=4, nce_idt=False, **options), network)


def vectors(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: t.clone() for key, t in network.state_dict().items() if key.endswith(VECTORS)}


def iterated(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """u and v after one iteration: u = Wv / |Wv|, then v = W'u / |W'u| (Miyato et al., Algorithm 1)."""
    found = {}
    for key, weight in state.items():
        if key.endswith(ORIGINAL):
            layer, matrix = key.removesuffix(ORIGINAL), weight.flatten(1)
            u = matrix @ state[layer + VECTORS[1]]
            found[layer + VECTORS[0]] = u / u.norm()
            v = matrix.T @ found[layer + VECTORS[0]]
            found[layer + VECTORS[1]] = v / v.norm()
    return found


def assert_vectors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert len(found) == 6
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(("name", "convolutions"), [("basic", 5), ("n_layers", 4), ("pixel", 3), ("patch", 4)])
def test_every_convolution_has_gain_one(name, convolutions):
    """Scores are those of weights that are divided by their largest singular value, found without iterations."""
    network = build_discriminator(name, 3, 3, layers=2, norm="none", init_gain=0.3, spectral_norm=True).double()
    plain = build_discriminator(name, 3, 3, layers=2, norm="none", init_gain=0.3).double()
    iteration = once_per_step([network])
    for _ in range(300):
        iteration.run()
    state = {key.replace(ORIGINAL, ".weight"): t for key, t in network.state_dict().items()}
    gains = []
    for key, module in plain.named_modules():
        if isinstance(module, nn.Conv2d):
            gains.append(torch.linalg.matrix_norm(state[f"{key}.weight"].flatten(1), 2))
            state[f"{key}.weight"] = state[f"{key}.weight"] / gains[-1]
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    assert len(gains) == convolutions
    assert min(abs(float(gain) - 1) for gain in gains) > 1e-2
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(network(x), plain(x), rtol=1e-7, atol=1e-9)


def test_gradients_are_those_of_the_library():
    """Also through the change of the gain, and twice, as WGAN-GP differentiates."""
    network = judge(layers=1).double()
    theirs = nn.Sequential(*copy.deepcopy(judge(layers=1, spectral_norm=False).double()).model)
    for module in theirs:
        if isinstance(module, nn.Conv2d):
            spectral_norm(module)
    theirs.load_state_dict({key.removeprefix("model."): t for key, t in network.state_dict().items()})
    once_per_step([network])
    network.train()
    theirs.eval()  # keeps u and v
    found = []
    for net in (network, theirs):
        x = torch.linspace(-1, 1, 3 * 16 * 16, dtype=torch.float64).reshape(1, 3, 16, 16).cos().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), list(net.parameters())))
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["lsgan", "wgangp"])
def test_a_step_iterates_once_whatever_it_computes(mode):
    """With a rehearsal before it, and with a batch in parts, u and v follow the weights by one iteration."""
    for parts in (1, 2):
        method = spectral_method(gan_mode=mode)
        step = Step(method, OptimOptions(accumulate=parts))
        for _ in range(2):
            state = {key: t.clone() for key, t in method.discriminator.state_dict().items()}
            batch = random_batch(2)
            rehearse(step, batch, Draws())
            assert all(torch.equal(t, state[key]) for key, t in method.discriminator.state_dict().items())
            step.run(batch, Draws())
            assert_vectors(vectors(method.discriminator), iterated(state))
            moved = [key for key, t in method.discriminator.named_parameters() if not torch.equal(t, state[key])]
            assert len(moved) == len(list(method.discriminator.parameters()))


def test_parts_are_the_whole_batch():
    steps = [Step(spectral_method().double(), OptimOptions(accumulate=parts)) for parts in (1, 2)]
    for _ in range(3):
        batch, ids = random_batch(4, torch.float64), [[torch.randperm(38 * 38)[:8], torch.randperm(32 * 32)[:8]]]
        expected, found = (step.run(batch, Draws(patch_ids=ids)) for step in steps)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_a_step_that_is_not_finite_changes_no_vector():
    method = spectral_method()
    step = Step(method, OptimOptions())
    step.run(random_batch(), Draws())
    before, broken = vectors(method.discriminator), random_batch()
    broken.a[0, 0, 0, 0] = float("nan")
    step.run(broken, Draws())
    assert step.bad_steps.item() == 1
    assert all(torch.equal(t, before[key]) for key, t in vectors(method.discriminator).items())


def test_recorded_and_resumed_steps_are_the_steps():
    """Bit for bit: a recorded step, and one that continues from a stored state."""
    plain, (recorded, tape) = Step(spectral_method(), OptimOptions(ema=0.9)), taped(spectral_method(), ema=0.9)
    batches = [random_batch() for _ in range(7)]
    resumed = Step(spectral_method(seed=2), OptimOptions(ema=0.9))
    for number, batch in enumerate(batches):
        if number == 4:
            resumed.load_state({key: tensor.clone() for key, tensor in plain.state().items()})
        for step in (plain, recorded, *([resumed] if number >= 4 else [])):
            torch.manual_seed(number)
            step.run(batch, Draws())
        assert_same_state(plain, recorded)
    assert tape.replayed > 2
    assert_same_state(plain, resumed)
    assert {key.rpartition(".")[2] for key in plain.state() if key.startswith("network/D/")} >= {"_u", "_v", "original"}


def test_a_compiler_traces_it_as_one_graph():
    torch._dynamo.reset()
    network = judge(layers=1)
    once_per_step([network])
    compiled = torch.compile(lambda x: network(x).square().mean(), backend="aot_eager", fullgraph=True)
    x, before, found = torch.randn(1, 3, 16, 16), vectors(network), []
    for judged in (lambda x: network(x).square().mean(), compiled):
        found.append(torch.autograd.grad(judged(x), list(network.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(t, before[key]) for key, t in vectors(network).items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_learn_about_the_same(precision):
    """Adam's first moments are the gradients; the convolution's own rounding is as large."""
    steps = [Step(spectral_method(), OptimOptions(), name) for name in ("fp32", precision)]
    batch = random_batch()
    for step in steps:
        if step.loss_scale is not None:
            step.loss_scale.scale.fill_(128)  # as after the first steps
        torch.manual_seed(1)
        step.run(batch, Draws())
        assert step.bad_steps.item() == 0
    one, other = (step.groups["D"].state() for step in steps)
    for key, tensor in one.items():
        if key.endswith("exp_avg") and tensor.dim() == 4:
            assert (other[key].float() - tensor).norm() <= 0.05 * tensor.norm(), key


def test_a_copy_is_independent():
    network = judge()
    once_per_step([network])
    copied = copy.deepcopy(network)
    once_per_step([copied]).run()
    assert not all(torch.equal(t, vectors(network)[key]) for key, t in vectors(copied).items())
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(network(x), copied(x))


@torch.no_grad()
def test_files_hold_the_weights_that_the_convolutions_use(tmp_path):
    """The published code has no spectral norm, so it reads the same scores out of plain weights."""
    network = judge(norm="instance").eval()
    (path,) = save_published({"D": network}, tmp_path)
    state = read_weights(path)
    assert state.keys() == judge(norm="instance", spectral_norm=False).state_dict().keys()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(network_from_weights(state)(x), network(x), rtol=1e-5, atol=1e-6)
    again = judge(norm="instance").eval()
    load_weights(again, {key: tensor.half() for key, tensor in state.items()})
    load_weights(again, state)
    torch.testing.assert_close(again(x), network(x), rtol=1e-4, atol=1e-5)  # their gain is 1 already
    plain = judge(norm="instance", spectral_norm=False).eval()
    load_weights(plain, network.state_dict())
    torch.testing.assert_close(plain(x), network(x), rtol=1e-5, atol=1e-6)
    assert fitted(state, plain).keys() == state.keys()


def test_a_run_is_continued_exported_and_started_from(folder, tmp_path):
    arguments = ["train", "fastcut", "--data", str(folder), "--quiet", *SMALL, *SPECTRAL]
    found = []
    for steps in (1, 2):
        assert main([*arguments, "--out", str(tmp_path / "one"), f"run.steps={steps}"]) == 0
        tensors = training_tensors(tmp_path / "one")
        found.append({key.removeprefix("network/D/"): t for key, t in tensors.items() if key.startswith("network/D/")})
    assert_vectors({key: t for key, t in found[1].items() if key.endswith(VECTORS)}, iterated(found[0]))
    assert main(["export", str(tmp_path / "one"), "--out", str(tmp_path / "files")]) == 0
    assert not [key for key in read_weights(tmp_path / "files" / "latest_net_D.pth") if "parametrizations" in key]
    for source, spectral in (("one", "false"), ("one", "true"), ("files", "true"), ("files", "false")):
        begin = f"run.start_from={tmp_path / source}", "run.start_networks=D"
        config = small_config(folder, *SPECTRAL, *begin, f"network.spectral_norm={spectral}")
        start = plan_start(config, plan(config))
        count = 13 if spectral == "true" else 7
        assert f"D: {count} of {count} tensors" in start.lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["network.discriminator=stylegan2"],
            "network.spectral_norm=true does not fit network.discriminator=stylegan2",
        ),
        (["network.discriminator=tilestylegan2"], "which scales its weights itself: choose basic, n_layers, pixel or"),
        (["network.discriminator=FILE:Net"], "call torch.nn.utils.parametrizations.spectral_norm yourself"),
    ],
)
def test_other_discriminators_are_refused(options, message, folder, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\nclass Net(nn.Conv2d):\n    def __init__(s, i, w): super().__init__(i, 1, 4)\n"
    )
    options = [option.replace("FILE", str(file)) for option in options]
    arguments = ["train", "fastcut", "--data", str(folder), "--out", str(tmp_path / "run"), *SMALL]
    assert main([*arguments, "network.spectral_norm=true", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_judge_without_it_has_no_iteration():
    assert once_per_step([judge(spectral_norm=False)]).layers == []
    own = nn.Sequential(spectral_norm(nn.Conv2d(3, 1, 4)))  # a user's own iterates as the library does
    assert once_per_step([own]).layers == []
    assert own[0].parametrizations.weight[0].n_power_iterations == 1


def test_instance_norm_behind_spectral_norm_is_a_warning(recwarn):
    check_plan(resolve("cut", None, ["network.spectral_norm=true", "network.discriminator_norm=none"]))
    check_plan(resolve("cut", None, []))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"little effect .* set network\.discriminator_norm=none"):
        check_plan(resolve("cut", None, ["network.spectral_norm=true"]))
