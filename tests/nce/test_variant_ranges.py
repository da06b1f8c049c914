"""Weights and selections of negatives at both ends of their ranges, for degenerate rows, in every dtype.

The oracle is the multiplicative formula of each paper as a plain loop, in decimal numbers of 40 digits, whose exponents
are large enough for every exp(-10 / eps).
"""

from __future__ import annotations

import decimal
import math
import re
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F

from fastnce.nce import PatchNCEHead, patch_nce
from fastnce.nce.impl import reference
from fastnce.nce.negatives import LearnedNegatives, ascend, diversity, only_external
from fastnce.nce.selection import attention_patch_ids, dense_patch_ids
from fastnce.nce.weights import Weights, asp_query_weight, hdce_pair_weight, monce, monce_log_weight

decimal.getcontext().prec = 40
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-15}
"""Rounding error of inner products; 16-bit rows are widened to float32."""


def rows_of(kind, dtype, rows=5, dim=6):
    """Return queries and keys of one of the extreme cases that occur in training."""
    q, k = (F.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1) for _ in range(2))
    q, k = {
        "any": (q, k),
        "confident": (F.normalize(k + 0.05 * q, dim=1), k),
        "opposed": (-k, k),
        "all equal": (q[:1].expand(rows, -1), q[:1].expand(rows, -1)),
        "zero": (torch.zeros_like(q), torch.zeros_like(k)),
        "some zero": (torch.where(torch.arange(rows)[:, None] < 2, 0.0, q), k),
        "one row": (q[:1], k[:1]),
        "two rows": (q[:2], k[:2]),
    }[kind]
    return q.to(dtype), k.to(dtype)


KINDS = ["any", "confident", "opposed", "all equal", "zero", "some zero", "one row", "two rows"]


def exact(q, k):
    """Return the inner products of the rounded rows."""
    return [
        [sum((Decimal(a) * Decimal(b) for a, b in zip(x, y, strict=True)), Decimal(0)) for y in k.tolist()]
        for x in q.tolist()
    ]


def transport(cost, eps, iterations):
    """Sinkhorn's iterations as published, by multiplication."""
    size = range(len(cost))
    kernel = [[((Decimal(-10) if i == j else cost[i][j]) / eps).exp() for j in size] for i in size]
    u, v = [Decimal(1) for _ in size], [Decimal(1) for _ in size]
    for _ in range(iterations):
        u = [1 / sum(kernel[i][j] * v[j] for j in size) for i in size]
        v = [1 / sum(kernel[i][j] * u[i] for i in size) for j in size]
    return [[u[i] * kernel[i][j] * v[j] for j in size] for i in size]


@pytest.mark.parametrize("eps", [1e-4, 1e-3, 0.05, 0.249, 0.25, 1.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_monce_over_its_range(kind, eps):
    for dtype in DTYPES:
        q, k = rows_of(kind, dtype)
        hard = kind != "any"
        found = monce_log_weight(q, k, eps=eps, iterations=8, hard=hard, strength=0.7)[0]
        assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert bool(found.isfinite().all())
        cost = exact(q, k) if hard else [[1 - c for c in row] for row in exact(q, k)]
        weight = transport(cost, Decimal(eps), 8)
        scale = Decimal((len(q) - 1) * 0.7)
        wanted = [[float((w * scale + Decimal("1e-8")).ln()) for w in row] for row in weight]
        # The rounding error of each inner product is relative to the largest value, 10, and is amplified by 1 / eps.
        tolerance = ROUNDING.get(dtype, 6e-8) * (10 / eps + 100)
        torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=tolerance)


def test_monce_of_two_images_and_extreme_strengths():
    q, k = (
        torch.cat(pair) for pair in zip(rows_of("any", torch.float32), rows_of("opposed", torch.float32), strict=True)
    )
    both = monce_log_weight(q, k, 2, eps=1e-3)
    for image in range(2):
        rows = slice(5 * image, 5 * image + 5)
        torch.testing.assert_close(both[image], monce_log_weight(q[rows], k[rows], eps=1e-3)[0], rtol=0, atol=1e-3)
    nothing = monce_log_weight(q, k, strength=0.0)
    torch.testing.assert_close(nothing, torch.full_like(nothing, math.log(1e-8)))
    assert bool(monce_log_weight(q, k, strength=1e30).isfinite().all())


@pytest.mark.parametrize("gamma", [1e-4, 0.1, 1.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_hdce_over_its_range(kind, gamma):
    for dtype in DTYPES:
        _, k = rows_of(kind, dtype)
        found = hdce_pair_weight(k, gamma=gamma)[0]
        relation, size = exact(k, k), range(len(k))
        for i in size:
            others = [(relation[i][j] / Decimal(gamma)).exp() for j in size if j != i]
            wanted = torch.tensor([float(o / max(others)) for o in others], dtype=torch.float64)
            ours = torch.stack([found[i, j] for j in size if j != i]).double() if others else wanted
            torch.testing.assert_close(ours, wanted, rtol=0, atol=ROUNDING.get(dtype, 6e-8) * (10 / gamma + 10))
        assert bool(((found >= 0) & (found <= 1)).all())


@pytest.mark.parametrize("schedule", ["lambda", "linear", "sigmoid", "none"])
@pytest.mark.parametrize("lookup", ["linear", "top", "bell", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_supervised_weights_over_their_ranges(schedule, lookup, kind):
    for dtype in DTYPES:
        q, k = rows_of(kind, dtype)
        cosines = [float(c) for c in (exact(q, k)[i][i] for i in range(len(q)))]
        w = {
            "linear": lambda x: max(x, 0.0),
            "top": lambda x: math.sqrt(1 - (max(x, 0.0) - 1) ** 2),
            "bell": lambda x: math.exp(-(((x - 0.5) * 4) ** 2) / 2) / math.sqrt(2 * math.pi),
            "uniform": lambda x: 1.0,
        }[lookup]
        for progress, start in ((0.0, 0.5), (1.0, 0.5), (0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (0.3, 1.0), (1.0, 1.0)):
            falling = (1 - progress) / (1 - start) if progress > start else 1.0
            p = {"lambda": falling, "linear": 1 - progress, "none": 1.0}
            p = p.get(schedule, 1 / (1 + math.exp((progress - 0.5) * 10)))
            plain = [p + (1 - p) * w(x) for x in cosines]
            mean = sum(plain) / len(plain)
            wanted = torch.tensor([x / mean if mean > 0 else 1.0 for x in plain], dtype=torch.float64)
            found = asp_query_weight(q, k, progress, schedule=schedule, lookup=lookup, decay_from=start)
            # "top" has an infinite slope at 0: there the error is the root of the rounding error of the cosine.
            slack = (
                {torch.float64: 1e-7}.get(dtype, 2e-3) if lookup == "top" else {torch.float64: 1e-12}.get(dtype, 2e-5)
            )
            torch.testing.assert_close(found.double(), wanted, rtol=slack, atol=slack)


def test_supervised_weights_that_are_very_small():
    """The mean of the weights rounds to 0 in float32, but the normalised weights are right."""
    q, k = torch.zeros(10, 1), torch.full((10, 1), 2e-23)
    q[3] = 1e-22
    found = asp_query_weight(q, k, 1.0, schedule="linear")
    assert found.tolist() == [0.0] * 3 + [10.0] + [0.0] * 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["any", "large", "equal", "zero", "one"])
def test_attention_of_degenerate_maps(kind, dtype):
    maps = {
        "any": torch.randn(2, 3, 3, 4),
        "large": 1e3 * torch.randn(2, 3, 3, 4),
        "equal": torch.ones(2, 3, 3, 4),
        "zero": torch.zeros(2, 3, 3, 4),
        "one": torch.randn(2, 3, 1, 1),
    }[kind].to(dtype)
    count = min(5, maps[0, 0].numel())
    ids, attention = attention_patch_ids(maps, 5)
    assert ids.shape == (2, count)
    for image in range(2):
        assert len(set(ids[image].tolist())) == count
        f = maps[image].double().flatten(1).T
        softmax = (f @ f.T).softmax(1)
        torch.testing.assert_close(attention[image].double(), softmax[ids[image]], rtol=1e-3, atol=1e-5)
        entropy = -torch.special.xlogy(softmax, softmax).sum(1)
        torch.testing.assert_close(entropy[ids[image]], entropy.sort().values[:count], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("temperature", [1e-30, 1e-5, 0.07, 1e30])
def test_the_loss_at_extreme_temperatures(temperature, implementation):
    for kind in ("any", "opposed", "all equal", "zero"):
        q, k = rows_of(kind, torch.float32)
        extra = F.normalize(torch.randn(1, 3, 6))
        for alone in (False, True):
            leaf, exactly = q.clone().requires_grad_(), q.double().requires_grad_()
            weights = Weights(pair_log_weight=only_external(1, len(q))) if alone else None
            # -inf in the reference leaves only the external negatives
            plain, _, _ = reference.nce_rows(
                exactly[None],
                k.double()[None],
                extra.double(),
                temperature=temperature,
                pair_log_weight_GSS=torch.full((1, 5, 5), -torch.inf).double() if alone else None,
            )
            options = {"temperature": temperature, "reduction": "none", "implementation": implementation}
            loss = patch_nce(leaf, k, extra_keys=extra, weights=weights, **options)
            scale = 1 + 1 / temperature
            torch.testing.assert_close(loss.double() / scale, plain[0] / scale, rtol=1e-4, atol=3e-6)
            if temperature < 1e-3 and kind != "any":
                continue  # rounding decides which of equal keys is the nearest
            found, wanted = (torch.autograd.grad(x.sum(), y)[0] for x, y in ((loss, leaf), (plain, exactly)))
            torch.testing.assert_close(found.double() * temperature, wanted * temperature, rtol=1e-3, atol=1e-4)


def test_learned_negatives_in_every_dtype():
    for dtype in DTYPES:
        for weights in (torch.float32, torch.float64):
            maker = LearnedNegatives(6, noise=3).to(weights)
            negatives = maker(torch.zeros(2, 6, dtype=dtype), count=4)
            assert negatives.shape == (2, 4, 6)
            assert negatives.dtype == weights
            assert diversity(negatives).isfinite()


ROWS = torch.zeros(6, 4)
MAPS = [torch.zeros(2, 3, 4, 4)]


WEIGHTED = PatchNCEHead([3], weighting=monce)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        *[
            (lambda e=e: monce_log_weight(ROWS, ROWS, eps=e), "eps must be ")
            for e in (0, -1.0, 9e-5, 2e4, math.nan, None, True)
        ],
        (lambda: monce_log_weight(ROWS, ROWS, iterations=0), "iterations must be at least 1, not 0"),
        (lambda: monce_log_weight(ROWS, ROWS, strength=-0.1), "strength must be from 0 to 1e+30, not -0.1"),
        (lambda: monce_log_weight(ROWS, ROWS, 4), "6 rows cannot be shared equally among images=4"),
        (lambda: monce_log_weight(ROWS, ROWS, 0), "images must be at least 1, not 0"),
        (lambda: monce_log_weight(ROWS, ROWS[:3]), "queries and keys must have the same shape, not (6, 4) and (3, 4)"),
        (lambda: monce_log_weight(ROWS, ROWS.tolist()), "keys must be a tensor, not a list"),
        (lambda: monce_log_weight(ROWS.int(), ROWS), "queries must have a floating dtype, not torch.int32"),
        (lambda: monce_log_weight(ROWS[0], ROWS[0]), "queries must have 2 dimensions, not (4,)"),
        (lambda: monce_log_weight(ROWS[:0], ROWS[:0]), "queries must not be empty: (0, 4)"),
        (lambda: monce_log_weight(ROWS, ROWS.to("meta")), "queries is on cpu, keys on meta"),
        *[(lambda g=g: hdce_pair_weight(ROWS, gamma=g), "gamma must be ") for g in (0, -1.0, 9e-5, 2e4, math.nan, "1")],
        (lambda: hdce_pair_weight(ROWS, 5), "6 rows cannot be shared equally among images=5"),
        (lambda: hdce_pair_weight(None), "must be a tensor, not None"),
        *[
            (lambda p=p: asp_query_weight(ROWS, ROWS, p), "progress must be ")
            for p in (-0.1, 1.1, math.nan, torch.tensor(0.5))
        ],
        *[
            (lambda d=d: asp_query_weight(ROWS, ROWS, 0.5, decay_from=d), "decay_from must be ")
            for d in (-0.1, 1.1, None)
        ],
        (
            lambda: asp_query_weight(ROWS, ROWS[:1], 0.5),
            "queries and keys must have the same shape, not (6, 4) and (1, 4)",
        ),
        (lambda: attention_patch_ids(MAPS[0], 0), "patches must be at least 1, not 0"),
        (lambda: attention_patch_ids(MAPS[0][0], 4), "must be (images, channels, height, width)"),
        (lambda: dense_patch_ids(MAPS[0]), "maps must be a list of maps, one per layer"),
        (lambda: dense_patch_ids([None]), "maps[0] must be a tensor, not None"),
        (lambda: only_external(0, 3), "images must be at least 1, not 0"),
        (lambda: ascend(3.0), "x must be a tensor, not 3.0"),
        (lambda: diversity(torch.zeros(2, 1, 4)), "negatives must be (images, 2 or more, dim), not (2, 1, 4)"),
        (lambda: LearnedNegatives(0), "dim must be at least 1, not 0"),
        (lambda: LearnedNegatives(4)(torch.zeros(2, 5)), "mean_code must be (images, 4), not (2, 5)"),
        (lambda: LearnedNegatives(4)(torch.zeros(2, 4), 0), "count must be at least 1, not 0"),
        (lambda: LearnedNegatives(4, 3)(torch.zeros(2, 4), noise=torch.zeros(1, 5, 3)), "noise must be (2, count, 3)"),
        (lambda: WEIGHTED(MAPS, [MAPS[0][:, :, :2]]), "the same images, height and width"),
        (lambda: WEIGHTED(MAPS, MAPS, directions=3), "among directions=3"),
    ],
)
def test_values_outside_their_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_weighted_head_checks_its_implementation():
    head = PatchNCEHead([3], dim=4, weighting=monce, implementation="triton")
    head.implementation = "triton" if torch.accelerator.is_available() else "nowhere"
    with pytest.raises(ValueError, match="implementation"):
        head([m.cpu().double() for m in MAPS], MAPS, patch_ids=[torch.arange(4)])
