"""Measures through pyiqa: by its interface always, and with the library itself where it is installed."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from fastnce.commands.main import main
from fastnce.evaluate.metrics import find_metric, measured
from tests.engine.test_validate import SMALL, lines
from tests.engine.test_validate_sets import draw
from tests.evaluate.test_evaluate import picture, tensor
from tests.inception import prepare_torchvision

pytestmark = pytest.mark.usefixtures("few_blocks")

MEASURES = {
    "lpips": ("FR", True),
    "musiq": ("NR", False),
    "niqe": ("NR", True),
    "fid": ("NR", True),
    "far": ("FR", False),
}
SOURCE = "https://weights.example/models/musiq_koniq.pth"


@pytest.fixture
def stand_in(monkeypatch):
    """A pyiqa of three measures, with the interface of the real one; musiq's weights are missing."""

    class Model:
        def __init__(self, name):
            mode, self.lower_better = MEASURES[name]
            self.metric_mode = mode

        def __call__(self, output, truth=None):
            for each in (output, truth):
                assert each is None or (each.shape[1] == 3 and 0 <= each.min() <= each.max() <= 1)
            return output.mean()[None] if truth is None else (output - truth).abs().mean()[None]

    def create_metric(name, device):
        assert isinstance(device, torch.device)
        if name == "far":
            raise KeyError("params")
        if name == "musiq":
            print(f'Downloading: "{SOURCE}" to HUB/pyiqa/musiq_koniq.pth\n')
            raise URLError("no network")
        return Model(name)

    module = types.ModuleType("pyiqa")
    module.list_models = lambda: list(MEASURES)
    module.create_metric = create_metric
    monkeypatch.setitem(sys.modules, "pyiqa", module)


def refused(name: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        find_metric(name)
    return str(caught.value)


def test_direction_range_and_channels(stand_in):
    lpips, niqe = find_metric("lpips"), find_metric("niqe")
    assert (lpips.needs, lpips.higher_is_better) == ("truth", False)
    assert (niqe.needs, niqe.higher_is_better) == ("nothing", False)
    output, truth = torch.full((1, 1, 8, 8), 0.6), torch.full((1, 1, 8, 8), -3.0)  # outside, and grey
    assert measured(lpips, output, truth) == pytest.approx(204 / 255)  # rounded to 8 bits
    assert measured(niqe, output, None) == measured(niqe, output, truth) == pytest.approx(204 / 255)
    assert math.isnan(measured(niqe, output / 0, None))


def test_what_pyiqa_cannot_measure_is_refused(stand_in, monkeypatch):
    message = refused("musiq")
    assert "run.best: musiq needs the file musiq_koniq.pth, which pyiqa could not fetch (URLError: " in message
    assert f"fetch {SOURCE} and put it into {Path('HUB/pyiqa')}" in message
    assert "run.best: pyiqa cannot load far (KeyError: 'params')" in refused("far")
    assert "there is no measure lpip: take " in refused("lpip")
    assert refused("lpip").endswith("did you mean 'lpips'?")
    assert find_metric("fid").needs == "sets"  # torch-fidelity's, not pyiqa's
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    message = refused("lpips")
    assert "lpips is none of psnr_y, ssim_y, psnr_rgb, ssim_rgb, l1, fid, kid" in message
    assert "pip install 'pyiqa>=" in message


def test_single_images_are_measured_in_training(stand_in, tmp_path):
    """testA has no truths, and needs none; two measures, of which the first decides."""
    data = draw(tmp_path / "set", {"trainA": 2, "trainB": 2, "testA": 3, "testB": 1})
    command = ["train", "fastcut", "--data", str(data), *SMALL, "run.validate_every=1", "run.steps=2", "run.keep=9"]
    assert main([*command, "--out", str(tmp_path / "run"), "run.metrics=niqe"]) == 0
    found = lines(tmp_path / "run", "held_out_niqe")
    assert list(found) == [0, 1, 2]
    best = (tmp_path / "run/checkpoints/best").read_text().strip()
    assert int(best.removeprefix("step-")) == min((1, 2), key=found.get)


@pytest.fixture
def pyiqa():
    prepare_torchvision()
    return pytest.importorskip("pyiqa", reason="pyiqa (extra iqa) is not installed")


def test_the_real_library(pyiqa):
    a, b = (tensor(picture(seed)) / 127.5 - 1 for seed in (0, 1))
    ssim, gmsd = find_metric("ssim"), find_metric("gmsd")
    assert (ssim.needs, ssim.higher_is_better, gmsd.higher_is_better) == ("truth", True, False)
    assert measured(ssim, a, a) == pytest.approx(1)
    assert measured(gmsd, a, a) == pytest.approx(0, abs=1e-4)
    assert measured(ssim, b, a) < 0.9
    assert measured(gmsd, b, a) > 0.05
    assert find_metric("psnr").higher_is_better
    assert "did you mean 'gmsd'?" in refused("gmds")
    for name in ("sfid", "inception_score"):
        assert f"there is no measure {name}" in refused(name)


def test_the_real_librarys_weights(pyiqa, tmp_path, monkeypatch):
    """NIQE from a file in its place; without the file, its name and place are said."""
    import scipy.io
    from pyiqa.utils import download_util

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(download_util, "download_url_to_file", offline)
    message = refused("niqe")
    assert "run.best: niqe needs the file niqe_modelparameters.mat, which pyiqa could not fetch" in message
    assert message.endswith(f"and put it into {tmp_path}")
    model = {"mu_prisparam": np.ones((1, 36)), "cov_prisparam": np.eye(36)}
    scipy.io.savemat(tmp_path / "niqe_modelparameters.mat", model)
    niqe = find_metric("niqe")
    assert (niqe.needs, niqe.higher_is_better) == ("nothing", False)
    noisy, smooth = (tensor(picture(seed, 200, 200)) / 127.5 - 1 for seed in (0, 1))
    assert measured(niqe, noisy, None) != measured(niqe, smooth, None)
