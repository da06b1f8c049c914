"""Shared fixtures. Without a GPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if torch.accelerator.is_available():
    os.environ.pop("TRITON_INTERPRET", None)
else:
    # must be set before a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"


if "TRITON_INTERPRET" in os.environ:
    from tests.interpreter import speed_up

    speed_up()


# The tests' tensors are small: a second thread costs more in waiting than it computes.
torch.set_num_threads(1)


# What the collection of thousands of tests makes stays: to look for garbage in it takes a quarter of its time.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "slow" not in item.keywords)  # first, or one process would end with them alone
    if torch.accelerator.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


def pytest_runtest_teardown(item):
    """After a fault on a device every further call of the process fails: end here, at the test that made it."""
    if "gpu" in item.keywords and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            # pytest-xdist then starts another worker for the tests that are left
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(3)
            pytest.exit(f"the device is lost since {item.nodeid}: {str(error).splitlines()[0]}", returncode=3)


def plain_environment() -> dict[str, str]:
    """For a pytest of its own within a test: it is no worker of this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def shared_folder() -> Path | None:
    """Recordings and photographs, where they are there: FASTNCE_SHARED or ../shared beside the checkout."""
    named = os.environ.get("FASTNCE_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip("no shared folder: set FASTNCE_SHARED to one with golden/ and data/")
    return folder


@pytest.fixture(scope="session")
def inception(tmp_path_factory) -> Iterator[Path]:
    """A file of random weights for torch-fidelity's Inception network, which takes smaller images from now on."""
    from tests.inception import SIDE, prepare_torchvision, save_random_weights

    prepare_torchvision()
    pytest.importorskip("torch_fidelity", reason="torch-fidelity (extra eval) is not installed")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", SIDE)
        yield save_random_weights(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def without_plans():
    """A test may change the tiles, on which plans depend."""
    if "fastnce.kernels.planned" in sys.modules:
        sys.modules["fastnce.kernels.planned"].forget_plans()


@pytest.fixture(scope="module")
def few_blocks():
    """Within a module: resnet_4blocks, and restorer if it is narrow, have one block at their lowest resolution.

    They still have every kind of layer.
    """
    from fastnce.networks import build

    restorer = build.Restorer
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.GENERATORS, "resnet_4blocks", partial(build.ResnetGenerator, blocks=1))
        patch.setattr(build, "Restorer", lambda n, width: restorer(n, width, 1) if width <= 4 else restorer(n, width))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Ten noisy pictures: more would train no better."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("trainA", 4), ("trainB", 3), ("testA", 2), ("testB", 2)):
        (root / name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (40, 44, 3), np.uint8)).save(root / name / f"{i}.png")
    return root
