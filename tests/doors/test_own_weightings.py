"""A user's own weighting by import path, and the messages for wrong ones."""

import json

import pytest
import torch

from fastnce.methods.weighting import find_weighting
from tests.doors.own_code import SMALL, refused, train


@pytest.mark.parametrize("method", ["fastcut", "dclgan", "dcdgan"])
def test_a_weighting_and_its_options(folder, here, method):
    short = ["loss.nce_layers=0,4", "run.steps=1", "run.log_every=1"]
    losses = []
    for i, power in enumerate(("0.0", "0.5", "0.5")):
        settings = [*short, "loss.weighting=mine.py:weight", f"loss.weighting_options=power={power}"]
        assert train(folder, here, method, *settings, out=f"run{i}") == 0
        losses.append((here / f"run{i}" / "metrics.jsonl").read_text().splitlines()[0])
    assert train(folder, here, method, *short, out="plain") == 0
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
