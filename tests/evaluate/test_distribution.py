"""FID and KID, computed by the real torch-fidelity with random weights in a file."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.evaluate.distribution import FEATURES, Inception, fid, fid_kid, kid
from tests.evaluate.test_evaluate import error_of, picture, tensor, write


def spread(count: int, seed: int, width: int = 40) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_features_and_kid_are_those_of_torch_fidelity(inception):
    from torch_fidelity import calculate_metrics

    class Levels(torch.utils.data.Dataset):
        def __init__(self, seeds):
            self.pictures = [tensor(picture(seed))[0] for seed in seeds]

        def __len__(self):
            return len(self.pictures)

        def __getitem__(self, place):
            return self.pictures[place]

    one, other = Levels((0, 1)), Levels((2, 3, 4))
    wanted = calculate_metrics(
        input1=one,
        input2=other,
        cuda=False,
        kid=True,
        kid_subset_size=2,
        feature_extractor_weights_path=str(inception),
        verbose=False,
        save_cpu_ram=True,
    )
    network = Inception("cpu", inception)
    features = [torch.stack([network.features(p[None] / 127.5 - 1) for p in each.pictures]) for each in (one, other)]
    assert features[0].shape == (2, FEATURES)
    mean, deviation = kid(*features)
    assert mean == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-4)
    assert deviation == pytest.approx(wanted["kernel_inception_distance_std"], rel=1e-4)
    assert abs(mean) > 1e-6  # the random features tell images apart
    grey = network.features(torch.zeros(1, 1, 20, 20))
    assert torch.equal(grey, network.features(torch.zeros(1, 3, 20, 20)))
    assert network.features(torch.full((1, 3, 20, 20), float("nan"))).isnan().all()
    outside = torch.rand(1, 3, 20, 20) * 6 - 3  # clipped, as in a file
    assert torch.equal(network.features(outside), network.features(outside.clamp(-1, 1)))


@pytest.mark.parametrize("counts", [(6, 9), (30, 25)], ids=["fewer images than features", "more"])
def test_fid_is_that_of_all_features(counts, inception):
    """Fewer images than features are rotated into the subspace that they span."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    one, other = spread(counts[0], 0), spread(counts[1], 1) * 2 + 0.5
    whole = [fid_features_to_statistics(each) for each in (one, other)]
    wanted = fid_statistics_to_metric(*whole, verbose=False)["frechet_inception_distance"]
    assert fid(one, other) == pytest.approx(wanted, rel=1e-6)
    assert wanted > 1


def test_known_distances(inception):
    one = spread(8, 0)
    shift = torch.linspace(0, 1, 40, dtype=torch.float64)
    assert fid(one, one) == pytest.approx(0, abs=1e-6)
    assert fid(one, one + shift) == pytest.approx(float(shift.square().sum()), rel=1e-6)
    assert fid_kid(one, one + shift)["fid"] == fid(one, one + shift)
    bad = torch.where(torch.arange(8)[:, None] == 3, float("nan"), one)
    assert all(np.isnan(value) for value in fid_kid(bad, one).values())
    with pytest.raises(ValueError, match="at least two pictures of each set, not 8 and 1"):
        fid(one, one[:1])


def test_evaluate_with_a_weights_file(inception, tmp_path, capsys):
    """Equal sets of unpaired pictures have the distance 0; pairs have FID beside PSNR."""
    weights = ["--fid", "--feature-extractor-weights-path", str(inception), "--device", "cpu"]
    same = write(tmp_path / "same", {f"test{side}/{i}.png": i for side in "AB" for i in range(2)})
    out = tmp_path / "m.json"
    assert main(["evaluate", "--inputs-only", "--data", str(same), "--json", str(out), *weights]) == 0
    found = json.loads(out.read_text())
    assert found["mean"]["fid"] == pytest.approx(0, abs=1e-4)
    assert found["pictures"] == []
    assert set(found["mean"]) == {"fid", "kid", "kid_std"}
    pairs = write(tmp_path / "pairs", {"rain/a.png": 0, "norain/a.png": 1, "rain/b.png": 2, "norain/b.png": 3})
    capsys.readouterr()
    assert main(["evaluate", "--inputs-only", "--data", str(pairs), "--json", str(out), *weights]) == 0
    found = json.loads(out.read_text())["mean"]
    assert found["fid"] > 1e-3
    assert f"FID {found['fid']:.2f}, KID {found['kid']:.5f}" in capsys.readouterr().out
    assert {"psnr_y", "ssim_y"} < set(found)


class Attack:
    def __reduce__(self):
        return (print, ("code of a weights file runs",))


def test_wrong_weights_are_named(inception, tmp_path, capsys):
    data = write(tmp_path / "set", {f"test{side}/{i}.png": i for side in "AB" for i in range(2)})
    file, out = tmp_path / "weights.pth", tmp_path / "m.json"
    flag = ["--feature-extractor-weights-path", str(file)]
    arguments = ["--inputs-only", "--data", str(data), "--json", str(out), "--device", "cpu"]
    assert "has no effect without --fid" in error_of(capsys, *arguments, *flag)
    assert f"there is no file {file}" in error_of(capsys, *arguments, "--fid", *flag)
    file.write_text("<html>not found</html>")
    assert "does not hold torch-fidelity's Inception weights" in error_of(capsys, *arguments, "--fid", *flag)
    file.write_bytes(pickle.dumps(Attack()))
    assert "does not hold torch-fidelity's Inception weights" in error_of(capsys, *arguments, "--fid", *flag)
    torch.save([1, 2], file)
    assert "a table of tensors" in error_of(capsys, *arguments, "--fid", *flag)
    torch.save({"weight": torch.zeros(3)}, file)
    assert "does not fit torch-fidelity's Inception network" in error_of(capsys, *arguments, "--fid", *flag)
    torch.save(torch.nn.Linear(1, 1), file)  # PyTorch's own message advises to run the code in the file
    assert "it is damaged, or no file of tensors that torch.save wrote" in error_of(capsys, *arguments, "--fid", *flag)
    known = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    known.symlink_to(inception)
    message = error_of(capsys, *arguments, "--fid", *flag[:1], str(known))
    assert f"{known} is damaged: its SHA-256 should begin with 6726825d" in message
    assert not out.exists()


def offline(*args, **kwargs):
    raise URLError("no network")


def test_what_is_missing_is_named(inception, tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "set", {f"test{side}/{i}.png": i for side in "AB" for i in range(2)})
    arguments = ["--inputs-only", "--data", str(data), "--fid", "--device", "cpu"]
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "HUB")
    message = error_of(capsys, *arguments)
    assert "FID and KID need the file weights-inception-2015-12-05-6726825d.pth" in message
    assert f"put it into {Path('HUB/checkpoints')}" in message
    assert "--feature-extractor-weights-path FILE" in message
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "FID and KID need torch-fidelity: pip install 'torch-fidelity>=0.4'" in error_of(capsys, *arguments)


def test_pictures_of_different_sizes_without_a_connection(inception, tmp_path, monkeypatch):
    for name in ("socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(name, offline)
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    for side in "AB":
        for i, size in enumerate(((30, 41), (50, 22))):
            file = tmp_path / f"test{side}" / f"{i}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(picture(i + 5 * (side == "B"), *size)).save(file)
    weights = ["--fid", "--feature-extractor-weights-path", str(inception)]
    assert main(["evaluate", "--inputs-only", "--data", str(tmp_path), "--device", "cpu", *weights]) == 0
