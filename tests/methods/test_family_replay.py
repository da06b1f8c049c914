"""Recordings that experiments/record_family.py made from the released code of four papers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws, NetworkOptions
from fastnce.methods.presets import PRESETS
from tests.replay import LOSS_NAMES, NETWORK_NAMES, WEIGHTS, Recording, parse_argv, take

FOLDER = Path(__file__).parent / "recordings"
RESOLUTION = 2.0**-19
NAMES = LOSS_NAMES | {
    "dce_idt": "nce_idt",
    "lambda_HDCE": "lambda_nce",
    "lambda_SRC": "lambda_src",
    "patch_nums": "patches",
    "patch_size": "patch_size",
    "learned_attn": "learned",
    "augment": "jitter",
    "QS_mode": "attention",
    "use_curriculum": "curriculum",
    "HDCE_gamma": "gamma",
    "HDCE_gamma_min": "gamma_min",
}
PRESET = {"cut": "hneg-src", "negcut": "negcut", "qs": "qsattn", "sc": "fsesim"}


def build(r: Recording, **changes):
    """The method with the recorded options and weights, in float64, and its step."""
    argv = parse_argv(r.meta["argv"])
    epochs = int(argv.pop("n_epochs")), int(argv.pop("n_epochs_decay"))
    argv.pop("name")
    preset = PRESET[argv.pop("model")]
    sections = PRESETS[preset].sections
    options = take(argv, PRESETS[preset].options(), NAMES)
    for name, value in changes.items():
        setattr(options, name, value)
    network = take(argv, NetworkOptions(**sections.get("network", {})), NETWORK_NAMES)
    assert not argv
    optim = OptimOptions(**sections.get("optim", {}))
    method = PRESETS[preset].method(options, network).double()
    return method, Step(method, optim), sum(epochs)


def calls(r: Recording, step: int, layers: int) -> list[list[torch.Tensor]]:
    """The drawn locations: [call][layer]."""
    ids = [r.tensor(f"step{step}/ids/{n}").long() for n in range(sum(f"step{step}/ids/" in key for key in r.arrays))]
    return [ids[first : first + layers] for first in range(0, len(ids), layers)]


def compare(r: Recording, method, step: Step, epochs: int, drawn_layers: int) -> None:
    networks = method.networks()
    for name, network in networks.items():
        network.load_state_dict(r.under(f"init/net{name}/"), strict=False)
        assert {key for key, _ in network.named_parameters()} == r.under(f"init/net{name}/").keys()
    recorded = [(group["lr"], group["betas"], group["parameters"]) for group in r.meta["optimizers"]]
    ours = [
        (group.base_lr, list(group.adam.defaults["betas"]), sum(p.numel() for p in group.parameters))
        for group in step.groups.values()
    ]
    recorded = [group for group in recorded if group[0]]  # LSeSim gives VGG16 a learning rate of 0
    assert ours == recorded
    for i, losses in enumerate(r.meta["losses"]):
        method.begin_epoch(i + 1, epochs)
        found = step.run(
            Batch(r.tensor(f"step{i}/A"), r.tensor(f"step{i}/B")), Draws(patch_ids=calls(r, i, drawn_layers))
        )
        assert found.keys() >= losses.keys()
        for name, value in losses.items():
            r.check_number(f"step {i} {name}", float(found[name]), value)
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            change = (parameter.detach() - r.tensor(f"init/net{name}/{key}")) / r.meta["lr"]
            stored = torch.from_numpy(r.arrays[f"final_change/net{name}/{key}"]).double() * RESOLUTION
            if key.endswith("weight"):  # a bias before instance norm has no gradient
                assert stored.abs().max() > 0.1, f"{name} {key} did not change in the recording"
            r._note(f"{name} {key}", float((change - stored).abs().max()) / WEIGHTS)
    assert r.checks > 50
    assert r.worst <= 1.0, f"{r.where}: {r.worst:.3g} times its tolerance"


@pytest.mark.parametrize("case", ["hneg_src", "hneg_src_default"])
def test_hneg_src(case):
    r = Recording(FOLDER / f"{case}.npz")
    method, step, epochs = build(r)
    compare(r, method, step, epochs, drawn_layers=5)


def test_negcut():
    r = Recording(FOLDER / "negcut.npz")
    method, step, epochs = build(r)
    noise = [r.tensor(f"step{i}/noise16/{n}").double() / 16 for i in range(2) for n in range(20)]
    # recorded for x, then for y, layer by layer; the method draws both at once
    order = [
        torch.cat([noise[first + layer], noise[first + 5 + layer]]) for first in range(0, 40, 10) for layer in range(5)
    ]
    drawn = iter(order)
    method.negative.draw = lambda images, count, like: next(drawn)
    compare(r, method, step, epochs, drawn_layers=5)
    assert next(drawn, None) is None


@pytest.mark.parametrize("mode", ["global", "local", "local_global"])
def test_qsattn(mode):
    r = Recording(FOLDER / f"qsattn_{mode}.npz")
    method, step, epochs = build(r)
    assert method.options.attention == mode
    compare(r, method, step, epochs, drawn_layers=3)


@pytest.mark.parametrize("case", ["fsesim", "lsesim"])
def test_lsesim(case, tmp_path):
    r = Recording(FOLDER / f"{case}.npz")
    torch.save(r.under("init/netPre/"), tmp_path / "vgg.pth")
    method, step, epochs = build(r, vgg_weights=str(tmp_path / "vgg.pth"))
    assert method.options.learned is (case == "lsesim")
    augmented = iter(
        [r.tensor(f"step{i}/{domain}_aug") for i in range(2) for domain in "AB"] if case == "lsesim" else []
    )
    method.jitter = lambda pictures: next(augmented)
    compare(r, method, step, epochs, drawn_layers=3)
    assert next(augmented, None) is None
