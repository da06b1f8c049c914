"""PSNR and SSIM of published deraining networks, compared with the table that their authors computed in MATLAB.

Without weights, the recorded figures are compared with the table. To measure them anew, set FASTNCE_PRENET to a
checkout of csdwren/PReNet and FASTNCE_SHARED to a folder with data/Rain100L.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from statistics import fmean

import pytest
import torch

from fastnce import DerainingMetrics
from fastnce.evaluate.pairs import Pair, find_pairs

from .conventions import conventions
from .prenet import BLOCKS, GATES, NETWORKS, Weights, derain, load_weights, measure

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "benchmarks" / "results" / "prenet-2026-11-28"
TABLE = {"PReNet": (37.48, 0.979), "PRN": (36.99, 0.977), "PReNet_r": (37.10, 0.977), "PRN_r": (36.11, 0.973)}
"""PSNR in dB and SSIM on Y of Rain100L, as the README of csdwren/PReNet states them."""
DB, SSIM = 0.02, 0.001


def recorded(network: str) -> list[dict[str, str]]:
    lines = (RECORDED / f"{network}.csv").read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def mean(rows: list, key: str) -> float:
    return fmean(float(row[key]) for row in rows)


def assert_as_published(network: str, rows: list) -> None:
    stated_psnr, stated_ssim = TABLE[network]
    assert len(rows) == 100
    assert mean(rows, "psnr_y") == pytest.approx(stated_psnr, abs=DB)
    assert mean(rows, "ssim_y") == pytest.approx(stated_ssim, abs=SSIM)


@pytest.mark.parametrize("network", TABLE)
def test_recorded_figures_are_those_of_the_table(network):
    assert_as_published(network, recorded(network))


def test_the_documentation_states_the_recorded_figures():
    text = (ROOT / "docs" / "proof.md").read_text()
    for network, (stated_psnr, stated_ssim) in TABLE.items():
        rows = recorded(network)
        cut = f"{mean(rows, 'psnr_y'):.3f} / {mean(rows, 'ssim_y'):.4f}"
        rounded = f"{mean(rows, 'psnr_y_rounded'):.3f} / {mean(rows, 'ssim_y_rounded'):.4f}"
        assert f"| {network} | {stated_psnr:.2f} / {stated_ssim:.3f} | {cut} | {rounded} |\n" in text


# --- the networks -----------------------------------------------------------------------------------------------------


def made(lstm: bool, blocks: int, width: int = 4) -> Weights:
    """Weights of a small network with the published names."""
    sizes = {"conv0.0": (width, 6), "conv.0": (3, width)}
    sizes |= {f"conv_{gate}.0": (width, 2 * width) for gate in GATES if lstm}
    sizes |= {f"res_conv{n}.{part}": (width, width) for n in range(1, blocks + 1) for part in (0, 2)}
    weights = {f"{name}.weight": torch.randn(*size, 3, 3) / 6 for name, size in sizes.items()}
    return weights | {f"{name}.bias": torch.randn(size[0]) / 6 for name, size in sizes.items()}


@pytest.mark.parametrize("lstm", [True, False])
def test_one_block_is_five_equal_ones(lstm):
    one, rainy = made(lstm, 1), torch.rand(2, 3, 9, 7)
    five = one | {
        f"res_conv{n}.{part}": one[f"res_conv1.{part}"]
        for n in range(2, BLOCKS + 1)
        for part in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    assert torch.equal(derain(one, rainy), derain(five, rainy))
    five["res_conv3.0.bias"] = five["res_conv3.0.bias"] + 1
    assert not torch.allclose(derain(one, rainy), derain(five, rainy))


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match=r"no weights of PReNet or PRN: 1 blocks, and \['more.bias'\] left over"):
        derain(made(True, 1) | {"more.bias": torch.zeros(3)}, torch.rand(1, 3, 9, 9))
    with pytest.raises(ValueError, match="no weights of PReNet or PRN: 2 blocks"):
        derain(made(True, 2), torch.rand(1, 3, 9, 9))


def test_other_conventions_give_other_figures():
    truth = torch.randint(30, 226, (1, 3, 24, 31))
    output = truth + torch.randint(-30, 31, truth.shape)
    (measured,) = DerainingMetrics().update(output.byte(), truth.byte())
    (psnr, ssim), *others = conventions(output.double(), truth.double()).values()
    assert (float(psnr), float(ssim)) == pytest.approx((measured["psnr_y"], measured["ssim_y"]), abs=1e-9)
    assert len(others) == 7
    for other_psnr, other_ssim in others:
        assert other_psnr is None or abs(float(other_psnr) - measured["psnr_y"]) > 1e-4
        assert other_ssim is None or abs(float(other_ssim) - measured["ssim_y"]) > 1e-6


# --- with the published weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout() -> Path:
    named = os.environ.get("FASTNCE_PRENET")
    if not named:
        pytest.skip("no published weights: set FASTNCE_PRENET to a checkout of csdwren/PReNet")
    return Path(named)


@pytest.fixture(scope="module")
def pairs(shared) -> list[Pair]:
    data = shared / "data" / "Rain100L" / "test"
    if not data.is_dir():
        pytest.skip(f"no Rain100L in {shared}")
    return find_pairs(data)


@pytest.mark.parametrize("network", ["PRN", "PRN_r"])
def test_one_picture_has_the_recorded_figures(checkout, pairs, network):
    """Float32 sums in another order move a few of 464,000 values over the edge between two levels."""
    (row,) = measure(load_weights(checkout, network), pairs[:1])
    (known,) = recorded(network)[:1]
    assert row.pop("picture") == known.pop("picture")
    assert {key: pytest.approx(float(value), abs=1e-3) for key, value in known.items()} == row


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_all_pairs_have_the_published_figures(checkout, pairs, network):
    assert_as_published(network, list(measure(load_weights(checkout, network), pairs)))
