"""A user's own metric by import path, and the messages for wrong ones."""

import json

import pytest
import torch

from fastnce.commands.main import main
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.state_file import read
from fastnce.evaluate.metrics import find_metric, measured
from tests.doors.own_code import CODE, SMALL, refused, train

MORE = '''

def _level(output):
    return output.mean()


def psnr_y(output, truth):
    return _level(output)


psnr_rgb = ssim_y = ssim_rgb = seconds = pairs = psnr_y


def sometimes(output, truth):
    """Not a number on one of the two images."""
    return float("nan") if truth.mean() > THRESHOLD else _level(output)


def never(output, truth):
    return torch.tensor(float("nan"))


def unlimited(output, truth):
    return float("inf")


class Distance(nn.Module):
    lower_is_better = True

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))

    def forward(self, output, truth):
        return (self.layer(output) - self.layer(truth)).abs().mean()


distance = Distance()
scale = nn.Parameter(torch.ones(1))


def learnt(output, truth):
    return (scale * output.mul_(0.5) - truth.sub_(1)).square().mean()


def gray(output, truth):
    assert output.shape[1] == 1
    return _level(output)
'''


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with two held-out pairs. The truth of 1.png is the brighter one."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pairs")
    generator = torch.Generator().manual_seed(0)
    for side in ("rain", "norain"):
        (root / side).mkdir()
        for i in range(2):
            pixels = torch.randint(64 * i, 192 + 64 * i, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / side / f"{i}.png")
    return root


@pytest.fixture
def own(here):
    """The working folder; its mine.py and other.py have the functions of `MORE` too."""
    for name in ("mine.py", "other.py"):
        (here / name).write_text(CODE + MORE + "\n\nTHRESHOLD = 0\n")
    return here


def validated(pairs, metric, *settings):
    every = ["run.validate_every=1", "run.keep=9", "loss.nce_layers=0,4", "run.steps=4"]
    return [f"data.validate={pairs}", *every, f"run.best={metric}", *settings]


def stored(here, step):
    return read(here / f"run/checkpoints/step-{step:08d}/state.json", step)["validation"]


@pytest.mark.parametrize("metric", ["mine.py:darkness", "l1", "ssim_rgb"])
def test_a_metric_decides_which_checkpoint_is_best(folder, here, pairs, metric):
    assert train(folder, here, "fastcut", *validated(pairs, metric, "optim.lr=0.02")) == 0
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


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        ("sharpness", "run.best: "),
        ("mine.py:numberless", "run.best: numberless fails on two images (1, 3, 64, 64): "),
        ("mine.py:NOT_CALLABLE", "must be a function (output, truth) -> number"),
        ("mine.py:Distance", "must be a function (output, truth) -> number, or an instance of this class"),
        ("mine.py:missing", "mine.py has no missing; it defines"),
        ("nowhere.py:distance", "there is no file nowhere.py"),
        *(
            (f"mine.py:{name}", f"run.best=mine.py:{name}: the name {name} is taken by another column")
            for name in ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "seconds", "pairs")
        ),
    ],
)
def test_wrong_metrics_are_refused(folder, own, pairs, capsys, metric, sentence, dry):
    """A dry run refuses them without held-out pairs."""
    checked = ["--dry-run"] if dry else [f"data.validate={pairs}", "run.validate_every=1"]
    options = [*SMALL, "loss.nce_layers=0,4", f"run.best={metric}", *checked]
    assert sentence in refused(capsys, "train", "fastcut", "--data", str(folder), "--out", str(own / "run"), *options)
    assert not (own / "run").exists()


@pytest.mark.parametrize(
    ("name", "what", "image"),
    [("sometimes", "not a number", "1"), ("never", "not a number", "0"), ("unlimited", "infinite", "0")],
)
def test_a_value_that_is_not_finite_is_never_best(folder, own, pairs, name, what, image):
    assert train(folder, own, "fastcut", *validated(pairs, f"mine.py:{name}")) == 0
    assert Checkpoints(own / "run/checkpoints").best() is None
    said = [line for line in (own / "run/log.txt").read_text().splitlines() if "run.best: " in line]
    assert len(said) == 1
    assert f"run.best: {name} is {what} on {image}: a mean that is not finite is never the best" in said[0]


def test_another_function_of_the_same_name_looks_for_a_new_best(folder, own, pairs):
    (own / "other.py").write_text((own / "other.py").read_text().replace("return output.mean()", "return -9"))
    assert train(folder, own, "fastcut", *validated(pairs, "mine.py:darkness", "run.steps=1")) == 0
    assert stored(own, 1)["run.best"] == "mine.py:darkness"
    sentence = "the best checkpoint was measured by mine.py:darkness, not other.py:darkness: a new best is looked for"
    for metric, steps, best, sentences in (("mine.py", 2, None, 0), ("other.py", 3, 3, 1)):
        settings = validated(pairs, f"{metric}:darkness", f"run.steps={steps}")
        assert train(folder, own, "fastcut", *settings) == 0
        assert (own / "run/log.txt").read_text().count(sentence) == sentences
        if best:
            assert (own / "run/checkpoints/best").read_text().strip() == f"step-{best:08d}"
            assert stored(own, best)["run.best"] == "other.py:darkness"


@pytest.mark.parametrize("name", ["distance", "learnt"])
def test_a_metric_may_have_parameters_and_change_its_arguments(folder, own, pairs, name):
    """The outputs of a translator are inference tensors, which autograd does not take."""
    assert train(folder, own, "fastcut", *validated(pairs, f"mine.py:{name}", "run.steps=2")) == 0
    assert 0 < stored(own, 2)[name] < 10
    with torch.inference_mode():
        output = torch.rand(1, 3, 16, 16)
    truth, kept = torch.rand(1, 3, 16, 16), output.clone()
    metric = find_metric(f"mine.py:{name}")
    assert measured(metric, output, truth) == measured(metric, output, truth)
    assert torch.equal(output, kept)


def test_a_metric_is_tried_on_the_channels_of_the_run(folder, own, pairs, capsys):
    one = ["network.in_channels=1", "network.out_channels=1"]
    assert train(folder, own, "fastcut", *validated(pairs, "mine.py:gray", *one)) == 0
    sentence = "run.best: gray fails on two images (1, 3, 64, 64): AssertionError"
    assert sentence in refused(capsys, "train", "fastcut", "--dry-run", "run.best=mine.py:gray")


def test_a_folder_beside_an_own_data_set_has_the_held_out_pairs(own, pairs, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/test").symlink_to(pairs)
    options = [*SMALL, "data.dataset=mine.py:Data", "loss.nce_layers=0,4", "run.validate_every=2"]
    assert main(["train", "fastcut", "--data", str(tmp_path / "set"), "--out", str(own / "run"), *options]) == 0
    assert "psnr_y" in stored(own, 2)
