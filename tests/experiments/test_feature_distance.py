"""The experiment that shows the scale of the feature distances, with a network of its own."""

from __future__ import annotations

import pytest
import torch

from experiments.feature_distance import HEAD, distances
from fastnce.evaluate.features import FRECHET, KERNEL, frechet, kernel


class Given:
    def compute(self, features, reference):
        return {FRECHET: frechet(features, reference), KERNEL: kernel(features, reference)}


def test_rows_of_whole_sets_halves_and_few_pictures():
    a, b = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (9, 7))
    table = [dict(zip(HEAD, row, strict=True)) for row in distances(Given(), a, b, [3, 5], 4, 0)]
    assert [(row["one"], row["other"], row["of_one"], row["of_other"], row["draws"]) for row in table] == [
        ("testA", "testB", 9, 7, 1),
        ("testA", "testA", 5, 4, 1),
        ("testB", "testB", 4, 3, 1),
        ("testA", "testB", 3, 3, 4),
        ("testA", "testA", 3, 3, 4),  # no two sets of five are in nine pictures
    ]
    assert float(table[0][FRECHET]) == pytest.approx(frechet(a, b), abs=1e-3)
    assert float(table[1][KERNEL]) == pytest.approx(kernel(a[::2], a[1::2]), abs=1e-6)
    assert float(table[3]["frechet_sd"]) > 0
    assert table == [dict(zip(HEAD, row, strict=True)) for row in distances(Given(), a, b, [3, 5], 4, 0)]
