"""A user's own weighting, data set and metric by import path, and the messages for wrong ones."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastnce.commands.main import main
from fastnce.methods.weighting import find_weighting
from tests.doors.own_code import SMALL, refused, train


@pytest.mark.parametrize("method", ["fastcut", "dclgan", "dcdgan"])
def test_a_weighting_and_its_options(folder, here, method):
    layers = "loss.nce_layers=0,4"
    losses = []
    for i, power in enumerate(("0.0", "0.5", "0.5")):
        settings = [layers, "loss.weighting=mine.py:weight", f"loss.weighting_options=power={power}", "run.log_every=1"]
        assert train(folder, here, method, *settings, out=f"run{i}") == 0
        losses.append((here / f"run{i}" / "metrics.jsonl").read_text().splitlines()[0])
    assert train(folder, here, method, layers, "run.log_every=1", out="plain") == 0
    first = [json.loads(line) for line in losses]
    plain = json.loads((here / "plain" / "metrics.jsonl").read_text().splitlines()[0])
    key = "NCE" if method == "fastcut" else "NCE1"
    assert first[1][key] == first[2][key] != first[0][key]
    assert first[0][key] == pytest.approx(plain[key], rel=1e-6)


def test_named_weightings_have_options():
    rows = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    for name, options in (("monce", "eps=0.5,iterations=3,hard=false"), ("hdce", "gamma=0.5")):
        plain, weighted = find_weighting(name)(rows, rows, 1), find_weighting(name, options)(rows, rows, 1)
        one, other = (next(t for t in w if isinstance(t, torch.Tensor)) for w in (plain, weighted))
        assert not torch.allclose(one, other)
    assert find_weighting("none") is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["loss.weighting=moco"], 'loss.weighting must be one of "none", "monce", "hdce", or an import path'),
        (["loss.weighting_options=eps=1"], "loss.weighting_options=eps=1 needs a loss.weighting, such as monce"),
        (
            ["loss.weighting=monce", "loss.weighting_options=epz=1"],
            "monce has no option 'epz=1'; its options: eps, iter",
        ),
        (["loss.weighting=monce", "loss.weighting_options=eps=-1"], "loss.weighting=monce: eps must be from 0.0001"),
        (["loss.weighting=monce", "loss.weighting_options=eps=soft"], "eps must be of type float, not 'soft'"),
        (["loss.weighting=mine.py:no_weights"], "must return fastnce.nce.Weights, not Tensor"),
        (
            ["loss.weighting=mine.py:wrong_shape"],
            "pair_weight must be (groups, rows, rows), here (2, 4, 4), not (3, 3)",
        ),
        (["loss.weighting=mine.py:broken"], "fails on queries and keys of 8 rows in 2 groups: RuntimeError"),
        (["loss.weighting=mine.py:NOT_CALLABLE"], "must be a function (queries, keys, groups) -> fastnce.nce.Weights"),
        (["loss.weighting=mine.py:missing"], "mine.py has no missing; it defines"),
    ],
)
@pytest.mark.parametrize("method", ["cut", "dclgan"])
def test_wrong_weightings_are_refused(folder, here, capsys, method, settings, sentence):
    arguments = ["train", method, "--data", str(folder), "--out", str(here / "run"), *SMALL, "loss.nce_layers=0,4"]
    assert sentence in refused(capsys, *arguments, *settings)
    assert not (here / "run").exists()


def test_a_data_set_trains_and_continues(here, capsys):
    def go(steps, out):
        options = [*SMALL, "data.dataset=mine.py:Data", "loss.nce_layers=0,4", f"run.steps={steps}"]
        return main(["train", "fastcut", "--out", str(here / out), *options])

    assert go(2, "run") == go(4, "run") == go(4, "whole") == 0
    one, other = (load_file(here / run / "checkpoints/step-00000004/training.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert main(["cache", "fastcut", "data.dataset=mine.py:Data"]) == 0
    assert "nothing is cached: data.dataset=mine.py:Data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Silent", "data.dataset=mine.py:Silent lacks digest: see fastnce.engine.contracts.DataSet"),
        ("OneDomain", "batch must return A and B, two float tensors (1, 3, height, width), not a Tensor"),
        ("OddSize", "images of 31x32 from data.dataset do not fit"),
        ("Judge", "fails: TypeError"),
    ],
)
def test_wrong_data_sets_are_refused(here, capsys, name, sentence):
    options = [*SMALL, f"data.dataset=mine.py:{name}", "loss.nce_layers=0,4"]
    assert sentence in refused(capsys, "train", "fastcut", "--out", str(here / "run"), *options)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with two held-out pairs."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pairs")
    generator = torch.Generator().manual_seed(0)
    for side in ("rain", "norain"):
        (root / side).mkdir()
        for i in range(2):
            pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / side / f"{i}.png")
    return root


@pytest.mark.parametrize("metric", ["mine.py:darkness", "l1", "ssim_rgb"])
def test_a_metric_decides_which_checkpoint_is_best(folder, here, pairs, metric):
    settings = [f"data.validate={pairs}", "run.validate_every=1", "run.keep=9", "loss.nce_layers=0,4", "run.steps=4"]
    assert train(folder, here, "fastcut", *settings, f"run.metric={metric}", "optim.lr=0.02") == 0
    lines = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    name = metric.rpartition(":")[2]
    values = {line["step"]: line[f"held_out_{name}"] for line in lines if line["step"] and f"held_out_{name}" in line}
    assert sorted(values) == [1, 2, 3, 4]
    choose = max if metric == "ssim_rgb" else min
    best = (here / "run" / "checkpoints" / "best").read_text().strip()
    assert int(best.removeprefix("step-")) == choose(values, key=values.get)


def test_l1_is_in_levels():
    from fastnce.evaluate.metrics import l1

    assert l1(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)) == pytest.approx(0.5 * 255 / 2)


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        ("lpips", 'run.metric must be one of "psnr_y"'),
        ("mine.py:numberless", "run.metric: numberless fails on two images (1, 3, 64, 64): "),
        ("mine.py:NOT_CALLABLE", "must be a function (output, truth) -> number"),
    ],
)
def test_wrong_metrics_are_refused(folder, here, pairs, capsys, metric, sentence):
    options = [*SMALL, "loss.nce_layers=0,4", f"data.validate={pairs}", "run.validate_every=1", f"run.metric={metric}"]
    arguments = ["train", "fastcut", "--data", str(folder), "--out", str(here / "run"), *options]
    assert sentence in refused(capsys, *arguments)
