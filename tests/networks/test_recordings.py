"""Networks compute what the published ones do: replays the recordings of experiments/record_networks.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.record_networks import CASES, GENERATORS, drawn, filled, image_of, part_of
from fastnce.networks.build import build_discriminator, build_generator
from fastnce.networks.published import network_from_weights

FOLDER = Path(__file__).parent / "recordings"


def ours(case: dict) -> nn.Module:
    options = {key: value for key, value in case.items() if key not in ("network", "image", "layers")}
    if case["network"] in GENERATORS:
        return build_generator(case["network"], **options)
    return build_discriminator(case["network"], layers=case.get("layers", 3), **options)


def in_published_order(scores: torch.Tensor, side: int) -> torch.Tensor:
    """The scores of tiles as the published class returns them: (tiles of all images, 1, side, side)."""
    images, _, height, width = scores.shape
    tiles = scores.reshape(images, height // side, side, width // side, side).permute(0, 1, 3, 2, 4)
    return tiles.reshape(-1, 1, side, side)


def close(value: torch.Tensor, stored: np.ndarray) -> None:
    expected = torch.from_numpy(stored)
    scale = float(expected.abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("name", CASES)
def test_a_network_computes_what_the_published_one_does(name):
    case = CASES[name]
    stored = dict(np.load(FOLDER / f"{name}.npz"))
    network = ours(case)
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert shapes == json.loads(stored.pop("shapes").tobytes())
    filled(network, "stylegan2" in case["network"])
    x = image_of(case).requires_grad_()
    if case["network"] in GENERATORS:
        y, features = network(x, case["layers"])
        assert [f.shape[1] for f in features] == network.feature_channels(case["layers"])
        encoded = network(x, case["layers"], encode_only=True)
        for index, feature, alone in zip(case["layers"], features, encoded, strict=True):
            close(part_of(feature), stored[f"feat{index}"])
            close(part_of(alone), stored[f"feat{index}"])
    else:
        y = network(x)
        assert y.shape[0] == x.shape[0]
        y = in_published_order(y, 2) if case["network"] == "patch" else y
    close(y, stored["y"])
    (y * drawn("cotangent", *y.shape)).sum().backward()
    close(x.grad, stored["dx"])


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_published_files_are_recognised(name):
    """Their keys are those of the recordings, so a network of the same kind and widths is built from them."""
    case = CASES[name]
    network = filled(ours(case), "stylegan2" in case["network"]).float().eval()
    found = network_from_weights(network.state_dict())
    # A file does not show that scores are of tiles.
    assert type(found) is type(network) or case["network"] == "patch"
    x = image_of(case).float()
    x = x[:1, :, :16, :16] if case["network"] == "patch" else x
    judged = found(x)
    assert torch.equal(judged, network(x))
    if "stylegan2" in case["network"] and case["network"] in GENERATORS:
        noises = [module.active for module in found.modules() if hasattr(module, "active")]
        assert noises == [not case["network"].startswith("small")] * case.get("stylegan2_downsampling", 1)


def test_recordings_are_small_and_of_these_networks():
    files = {path.stem: path.stat().st_size for path in FOLDER.glob("*.npz")}
    assert files.keys() == CASES.keys()
    assert max(files.values()) < 60 * 1024
