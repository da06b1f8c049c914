"""Values in messages."""

import collections

import numpy as np
import pytest
import torch

from fastnce import patch_nce
from fastnce.common.messages import brief, shown


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None"),
        (True, "True"),
        (0.5, "0.5"),
        ("a", "'a'"),
        ("a" * 100, f"'{'a' * 49}..."),
        ([], "an empty list"),
        ((1, 2), "a tuple of 2"),
        ({"a": 1}, "a dict of 1"),
        (torch.zeros(2, 3), "a torch.float32 tensor of shape (2, 3) on cpu"),
        (np.zeros(2), "a numpy.ndarray"),
        (collections.OrderedDict(), "a collections.OrderedDict"),
        (len, "a builtin_function_or_method"),
    ],
)
def test_values_in_words(value, words):
    assert shown(value) == words


def test_long_values_are_cut():
    assert len(brief(list(range(1000)))) < 60


@pytest.mark.parametrize("name", ["images", "temperature"])
def test_numbers_that_python_does_not_print(name):
    rows = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    assert shown(10**5000) == "a number of thousands of digits"
    for number in (10**5000, -(10**5000)):
        with pytest.raises(ValueError, match=f"{name}.*a number of thousands of digits"):
            patch_nce(rows, rows, **{name: number})
