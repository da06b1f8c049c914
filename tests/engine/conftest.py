"""Fixtures of the engine's tests."""

from __future__ import annotations

from functools import partial

import pytest

from fastnce.networks.build import GENERATORS
from fastnce.networks.resnet import ResnetGenerator


@pytest.fixture
def one_block(monkeypatch):
    """Within: resnet_4blocks has one block, which has every kind of layer and is compiled in a third of the time."""
    monkeypatch.setitem(GENERATORS, "resnet_4blocks", partial(ResnetGenerator, blocks=1))
