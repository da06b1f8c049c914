"""Fixtures of the engine's tests."""

from __future__ import annotations

from functools import partial

import pytest
from torch import nn

from fastnce.networks import build
from fastnce.networks.resnet import ResnetGenerator
from fastnce.networks.restorer import GatedBlock, Restorer
from fastnce.networks.stylegan2 import StyleGAN2Generator


@pytest.fixture
def one_block(monkeypatch):
    """Within: resnet_4blocks has one block, which has every kind of layer and is compiled in a third of the time."""
    monkeypatch.setitem(build.GENERATORS, "resnet_4blocks", partial(ResnetGenerator, blocks=1))


class ShortRestorer(Restorer):
    """Only one of the blocks that follow one another; the positions of the others hold nothing."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, width, middle=1)
        for layers in (self.encoder, self.decode2, self.decode1):
            for i in range(1, len(layers)):
                if isinstance(layers[i], GatedBlock) and isinstance(layers[i - 1], GatedBlock):
                    layers[i] = nn.Identity()


@pytest.fixture
def fewest_blocks(one_block, monkeypatch):
    """`one_block`, and as few blocks in the other generators."""
    monkeypatch.setattr(build, "Restorer", ShortRestorer)
    monkeypatch.setattr(build, "StyleGAN2Generator", partial(StyleGAN2Generator, blocks=2))
