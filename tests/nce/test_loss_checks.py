"""The shared losses refuse shapes that would be broadcast silently, and values that are not image tensors."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from fastnce.methods.losses import (
    GAN_MODES,
    channel_cycle_loss,
    frequency_cycle_loss,
    gan_loss,
    gradient_penalty,
    r1_penalty,
)

X = torch.rand(2, 3, 4, 6)
CRITIC = nn.Sequential(nn.Flatten(), nn.Linear(72, 1))


def refused(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", GAN_MODES)
def test_gan_loss(mode):
    for wrong in ([X, X], None, 0.5, X.numpy(), np.float32(1)):
        refused(lambda wrong=wrong: gan_loss(wrong, True, mode), "prediction must be a tensor, not ")
    refused(lambda: gan_loss(X.int(), True, mode), "prediction must have a floating dtype, not torch.int32")
    refused(lambda: gan_loss(X[:0], True, mode), "prediction must not be empty: (0, 3, 4, 6)")
    for wrong in (0.9, 1, None, "real", torch.tensor(True)):
        refused(lambda wrong=wrong: gan_loss(X, wrong, mode), "target_is_real must be True or False, not ")


@pytest.mark.parametrize(
    ("name", "other_name", "loss"),
    [
        ("reconstruction", "picture", channel_cycle_loss),
        ("reconstruction", "picture", frequency_cycle_loss),
        ("real", "fake", lambda real, fake: gradient_penalty(CRITIC, real, fake)),
    ],
)
def test_images_of_different_shapes_are_refused(name, other_name, loss):
    assert loss(X, X.flip(0)).isfinite()
    for other in (X[:1], X[:, :1], X[..., :1], X[0], X.transpose(2, 3)):
        for pair in ((X, other), (other, X)):
            shapes = f"{tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
            wanted = f"{name} and {other_name} must have the same shape, not {shapes}"
            refused(lambda pair=pair: loss(*pair), wanted)
    refused(lambda: loss(X[0], X[0]), f"{name} must have 4 dimensions, not (3, 4, 6)")
    refused(lambda: loss(X[:0], X[:0]), f"{name} must not be empty")
    refused(lambda: loss(X.byte(), X), f"{name} must have a floating dtype, not torch.uint8")
    refused(lambda: loss(X, None), f"{other_name} must be a tensor, not None")
    refused(lambda: loss(X, X.to("meta")), f"{name} is on cpu, {other_name} on meta: move one of them")


def test_penalties():
    refused(lambda: gradient_penalty(CRITIC, X, X, torch.rand(1)), "must have the same shape, not (1,) and (2,)")
    refused(lambda: gradient_penalty(CRITIC, X, X, 0.5), "mix must be a tensor, not 0.5")
    pictures = X.clone().requires_grad_()
    assert r1_penalty(CRITIC(pictures), pictures).requires_grad
    refused(lambda: r1_penalty(CRITIC(X), X), "pictures must require a gradient")
    refused(lambda: r1_penalty(CRITIC(pictures).detach(), pictures), "judged must require a gradient")
    refused(lambda: r1_penalty([CRITIC(pictures)], pictures), "judged must be a tensor, not a list")
