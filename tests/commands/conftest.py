"""Small inputs that several tests of the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published
from tests.ends import write


@pytest.fixture
def model(tmp_path) -> Path:
    return save_published({"G": ResnetGenerator(width=2, blocks=1)}, tmp_path / "published")[0]


@pytest.fixture
def photos(tmp_path) -> Path:
    return write(tmp_path / "photos", "a.png", "b.png", "c.png")


@pytest.fixture
def pairs(tmp_path) -> Path:
    return write(tmp_path / "pairs", *(f"{side}/{n}.png" for n in (1, 2) for side in ("rain", "norain")))
