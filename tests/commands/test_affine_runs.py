"""Runs with `network.norm_affine`: trained, continued, exported, translated, and begun with files of other projects."""

from __future__ import annotations

import json

import pytest
import torch

import fastnce
from fastnce.commands.main import main
from fastnce.config.build import plan
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import read_weights
from fastnce.training.starting import plan_start
from tests.engine.test_checkpoints import reseal
from tests.engine.test_checkpoints import step as step_folder
from tests.engine.test_engine import SMALL, small_config, training_tensors

pytestmark = pytest.mark.usefixtures("few_blocks")

AFFINE = "network.norm_affine=true"


def norms(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The weights of norms, which are the weights with one dimension."""
    return {key: t for key, t in tensors.items() if key.startswith(kind) and key.endswith(".weight") and t.dim() == 1}


@pytest.mark.parametrize(("method", "count"), [("cut", 7 + 3), ("cyclegan", 2 * 10), ("dcdgan", 2 * 10)])
def test_a_step_trains_every_norm(method, count, folder, tmp_path):
    command = ["train", method, "--data", str(folder), "--out", str(tmp_path / "run"), "--quiet"]
    layers = ["loss.nce_layers=4,8"] if method == "dcdgan" else []
    layers += ["run.precision=bf16"] if method == "cut" else []
    small = [option for option in SMALL if method != "cyclegan" or not option.startswith("loss.")]
    assert main([*command, *small, *layers, AFFINE, "run.steps=1"]) == 0
    trained = norms(training_tensors(tmp_path / "run"), "network/")
    assert len(trained) == count
    for key, weight in trained.items():
        assert bool((weight != 1).any()), key


def test_a_run_is_continued_bit_for_bit_and_exported(folder, tmp_path):
    """With averaged weights, parts of batches and recomputed blocks, none of which changes what is exported."""

    def run(name: str, steps: int, *more: str) -> dict[str, torch.Tensor]:
        command = ["train", "fastcut", "--data", str(folder), "--out", str(tmp_path / name), "--quiet", *SMALL]
        assert main([*command, AFFINE, "optim.ema=0.9", "data.batch=2", f"run.steps={steps}", *more]) == 0
        return training_tensors(tmp_path / name)

    whole = run("whole", 2)
    run("parts", 1)
    found = run("parts", 2)
    assert found.keys() == whole.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())
    assert norms(whole, "average/G/").keys()
    other = run("other", 2, "optim.accumulate=2", "run.checkpoint_activations=true")
    for key, weight in norms(whole, "network/").items():
        torch.testing.assert_close(other[key], weight, rtol=1e-3, atol=1e-4)

    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "files")]) == 0
    file = tmp_path / "files" / "latest_net_G.pth"
    image = torch.rand(1, 3, 33, 38) * 2 - 1
    assert torch.equal(fastnce.load(file)(image), fastnce.load(tmp_path / "whole")(image))
    averaged = norms({f"average/G/{key}": t for key, t in read_weights(file).items()}, "average/")
    assert all(torch.equal(weight, whole[key]) for key, weight in averaged.items())


def test_files_of_other_projects_begin_a_run(folder, tmp_path):
    """Blocks may be named `block`. Without the option, the report says which option the file needs."""
    theirs = ResnetGenerator(width=4, blocks=1, antialias=False, norm_affine=True)
    state = {key.replace(".conv_block.", ".block."): t + 0.5 for key, t in theirs.state_dict().items()}
    torch.save(state, tmp_path / "G_A2B_epoch33.pth")
    begin = [f"run.start_from={tmp_path / 'G_A2B_epoch33.pth'}", "run.start_networks=G"]
    strided = ["network.antialias=false", "network.antialias_up=false"]
    config = small_config(folder, *begin, *strided, AFFINE)
    start = plan_start(config, plan(config))
    assert start.lines[0] == f"G: {len(state)} of {len(state)} tensors"
    assert torch.equal(start.weights["G"]["model.10.conv_block.1.weight"], state["model.10.block.1.weight"])
    config = small_config(folder, *begin, *strided)
    line = plan_start(config, plan(config)).lines[0]
    assert line.endswith("its instance norms have a weight and a bias, which network.norm_affine=true fits")


def test_runs_without_the_key_continue(folder, tmp_path, capsys):
    """A run of an earlier version has no such key, and its norms no weights."""
    run = tmp_path / "run"
    command = ["train", "fastcut", "--data", str(folder), "--out", str(run), "--quiet", *SMALL]
    assert main([*command, "run.steps=1"]) == 0
    assert not norms(training_tensors(run), "network/G")
    place = step_folder(run, 1)
    config = json.loads((place / "state.json").read_text())["config"]
    assert config["network"].pop("norm_affine") is False
    reseal(place, config=config)
    assert main([*command, "run.steps=2"]) == 0
    assert main([*command, "run.steps=3", AFFINE]) == 2
    assert "network.norm_affine: False, now True" in capsys.readouterr().err
    assert fastnce.load(run)(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 16, 16)


def test_what_does_not_fit_is_one_sentence(folder, tmp_path, capsys):
    command = ["train", "fastcut", "--data", str(folder), "--out", str(tmp_path / "run"), *SMALL, AFFINE]
    assert main([*command, "network.norm=batch"]) == 2
    assert main([*command, "network.generator=restorer"]) == 2
    first, second = capsys.readouterr().err.strip().split("\n")
    assert "network.norm_affine=true is for instance norm, not for norm=batch" in first
    assert "network.norm_affine=true does not fit network.generator=restorer" in second
    assert not (tmp_path / "run").exists()
