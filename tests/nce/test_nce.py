"""The contrastive operation on the CPU: the eager path and the modules against the definition in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastnce import PatchNCEHead, PatchNCELoss, PatchSampleF, patch_nce, project_patches, sample_patch_ids
from fastnce.nce import Weights
from fastnce.nce.impl import eager, reference
from tests.oracle import eager_rows


def unit_rows(*shape, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def confident(rows, dim, probability, temperature=0.07):
    """Return queries whose positive has about this probability, found by bisection towards the key, and keys."""
    keys = unit_rows(rows, dim)
    noise = unit_rows(rows, dim)
    low, high = torch.zeros(rows, 1, dtype=torch.float64), torch.ones(rows, 1, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        queries = torch.nn.functional.normalize(middle * keys + (1 - middle) * noise, dim=1)
        found = torch.softmax(queries @ keys.T / temperature, dim=1).diagonal()[:, None]
        low, high = torch.where(found < probability, middle, low), torch.where(found < probability, high, middle)
    return queries, keys


OPTIONS = list(itertools.product([False, True], [False, True], ["none", "shared"], [False, True]))


@pytest.mark.parametrize(("log_weight", "weight", "extra", "decoupled"), OPTIONS)
@pytest.mark.parametrize("block", [1 << 22, 160, 40])  # all, some groups, some rows at once
@pytest.mark.parametrize("groups", [1, 3])
def test_eager_equals_the_definition(log_weight, weight, extra, decoupled, groups, block, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", block)
    rows, dim = 7, 5
    q, k, e = (unit_rows(groups, n, dim).requires_grad_() for n in (rows, rows, 4))
    pairs = {
        "pair_log_weight_GSS": torch.randn(groups, rows, rows, dtype=torch.float64) if log_weight else None,
        "pair_weight_GSS": torch.rand(groups, rows, rows, dtype=torch.float64) + 0.5 if weight else None,
    }
    upstream = torch.randn(groups, rows, dtype=torch.float64)
    results = []
    for implementation in (reference.nce_rows, eager_rows):
        outputs = implementation(q, k, e if extra == "shared" else None, temperature=0.1, decoupled=decoupled, **pairs)
        leaves = [q, k, e] if extra == "shared" else [q, k]
        results.append([*outputs, *torch.autograd.grad(outputs[0], leaves, upstream)])
    for ours, definition in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("probability", [1 / 64, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_float32_stays_accurate_for_confident_rows(probability):
    q, k = confident(64, 32, probability)
    q, k = q.float(), k.float()  # the same rounded inputs for both
    exact = q.double().requires_grad_()
    loss, _, _ = reference.nce_rows(exact[None], k.double()[None], temperature=0.07)
    loss.mean().backward()
    leaf = q.clone().requires_grad_()
    ours = patch_nce(leaf, k, reduction="none")
    ours.mean().backward()
    assert float((ours.detach().double() - loss.detach()[0]).norm() / loss.detach().norm()) < 2e-6
    assert float((leaf.grad.double() - exact.grad).norm() / exact.grad.norm()) < 5e-6


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e3])
def test_rows_of_any_length(scale):
    """Rows need not have unit length: logits of many thousands do not overflow and stay accurate."""
    q, k = (scale * torch.randn(9, 5, dtype=torch.float64) for _ in range(2))
    definition, _, _ = reference.nce_rows(q[None], k[None], temperature=0.07)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        loss = patch_nce(q.to(dtype), k.to(dtype), reduction="none").double()
        assert bool(loss.isfinite().all())
        assert float((loss - definition[0]).norm() / definition.norm()) < tolerance


def test_groups_of_images_are_independent():
    q, k = unit_rows(12, 6), unit_rows(12, 6)
    whole = patch_nce(q, k, images=3, reduction="none")
    apart = [patch_nce(q[i : i + 4], k[i : i + 4], reduction="none") for i in (0, 4, 8)]
    torch.testing.assert_close(whole, torch.cat(apart))
    batch = patch_nce(q, k, images=3, negatives="batch", reduction="none")
    torch.testing.assert_close(batch, patch_nce(q, k, reduction="none"))
    assert not torch.allclose(whole, batch)


@given(st.integers(2, 12), st.integers(1, 8), st.floats(0.05, 2.0), st.randoms())
@settings(max_examples=25, deadline=None)
def test_properties(rows, dim, temperature, random):
    q, k = unit_rows(rows, dim), unit_rows(rows, dim)
    loss = patch_nce(q, k, temperature=temperature, reduction="none")
    assert bool((loss >= 0).all())
    order = list(range(rows))
    random.shuffle(order)
    torch.testing.assert_close(patch_nce(q[order], k[order], temperature=temperature, reduction="none"), loss[order])
    # scaling both temperature and rows changes nothing
    torch.testing.assert_close(patch_nce(2 * q, k, temperature=2 * temperature, reduction="none"), loss)
    # the loss of a row does not depend on the other queries
    changed = q.clone()
    changed[1:] = unit_rows(rows - 1, dim)
    torch.testing.assert_close(patch_nce(changed, k, temperature=temperature, reduction="none")[0], loss[0])


def test_a_single_patch_has_loss_zero():
    q = unit_rows(3, 4).requires_grad_()
    loss = patch_nce(q, unit_rows(3, 4), images=3, reduction="none")
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0, 0.0]
    assert float(q.grad.abs().max()) == 0.0


def test_symmetric_and_weighted_and_reduced():
    q, k = unit_rows(8, 5).requires_grad_(), unit_rows(8, 5)
    one, other = patch_nce(q, k, reduction="none"), patch_nce(k, q, detach_keys=False, reduction="none")
    both = patch_nce(q, k, symmetric=True, reduction="none")
    torch.testing.assert_close(both, 0.5 * (one + other))
    expected = torch.autograd.grad(0.5 * (one + other).sum(), q)[0]
    torch.testing.assert_close(torch.autograd.grad(both.sum(), q)[0], expected)
    weight = torch.rand(8, dtype=torch.float64)
    torch.testing.assert_close(
        patch_nce(q, k, weights=Weights(query_weight=weight), reduction="sum"), (one * weight).sum()
    )
    loss, stats = patch_nce(q, k, return_stats=True)
    torch.testing.assert_close(loss, (stats["logsumexp"] - stats["positive"]).mean())
    assert not stats["logsumexp"].requires_grad


def test_keys_are_constants_by_default():
    q, k = unit_rows(6, 4).requires_grad_(), unit_rows(6, 4).requires_grad_()
    patch_nce(q, k).backward()
    assert k.grad is None
    patch_nce(q, k, detach_keys=False).backward()
    assert float(k.grad.abs().max()) > 0


def test_a_second_derivative_is_refused():
    q = unit_rows(4, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(patch_nce(q, unit_rows(4, 3)), q, create_graph=True)
    with pytest.raises(RuntimeError, match="patch_nce can be differentiated once"):
        gradient.square().sum().backward()


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_holds_all_logits_of_many_rows():
    rows, dim = 8192, 4
    q, k = unit_rows(rows, dim, dtype=torch.float32).requires_grad_(), unit_rows(rows, dim, dtype=torch.float32)
    with LargestTensor() as largest:
        patch_nce(q, k, detach_keys=False).backward()
    assert largest.elements <= eager.BLOCK_ELEMENTS < rows * rows


MISTAKES = [
    ({"temperature": 0.0}, "temperature must be from 1e-30 to 1e\\+30, not 0.0"),
    ({"temperature": float("nan")}, "temperature must be from .* not nan"),
    ({"images": 4}, "6 rows cannot be shared equally among images=4"),
    ({"images": 0}, "images must be at least 1, not 0"),
    ({"negatives": "all"}, 'negatives must be "image" or "batch"'),
    ({"reduction": "max"}, 'reduction must be "mean"'),
    ({"extra_keys": torch.zeros(3, 5)}, r"extra_keys must be \(count, 4\) or \(1, count, 4\), not \(3, 5\)"),
    ({"extra_keys": torch.zeros(0, 4)}, "extra_keys must be"),
    ({"weights": Weights(query_weight=torch.zeros(5))}, r"query_weight must be \(6,\), not \(5,\)"),
    ({"weights": Weights(pair_log_weight=torch.zeros(6, 5))}, r"pair_log_weight must be \(1, 6, 6\), not \(1, 6, 5\)"),
    ({"weights": Weights(decoupled=True), "images": 6}, "decoupled needs at least one negative"),
    ({"weights": torch.ones(6)}, "weights must be a fastnce.nce.Weights or None, not a torch.float32 tensor"),
    ({"implementation": "cuda"}, 'implementation must be None, "triton" or "eager"'),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_wrong_arguments_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        patch_nce(torch.zeros(6, 4), torch.zeros(6, 4), **arguments)


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        patch_nce(torch.zeros(6, 4), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"\(rows, dim\)"):
        patch_nce(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="share a floating dtype"):
        patch_nce(torch.zeros(6, 4), torch.zeros(6, 4).bfloat16())
    with pytest.raises(ValueError, match="empty"):
        patch_nce(torch.zeros(0, 4), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="keys is on meta, queries are on cpu"):
        patch_nce(torch.zeros(6, 4), torch.zeros(6, 4, device="meta"))


def test_ids_are_distinct_and_uniform():
    ids = sample_patch_ids(50, 20, images=400)
    assert ids.shape == (400, 20)
    assert all(len(set(row.tolist())) == 20 for row in ids)
    counts = torch.bincount(ids.flatten(), minlength=50)
    assert counts.min() > 100  # 160 expected, standard deviation 9.8
    assert counts.max() < 220
    assert sorted(sample_patch_ids(7, 256).tolist()) == list(range(7))
    with pytest.raises(ValueError, match="at least 1"):
        sample_patch_ids(0, 4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
def test_sampling_takes_the_given_locations(channels_last, per_image):
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    ids = torch.stack([torch.randperm(24)[:7] for _ in range(3)]) if per_image else torch.randperm(24)[:7]
    (rows,) = project_patches([x], [ids])
    upstream = torch.randn_like(rows)
    expected = torch.stack(
        [
            x[i, :, place // 6, place % 6] / (x[i, :, place // 6, place % 6].norm() + 1e-7)
            for i in range(3)
            for place in (ids[i] if per_image else ids).tolist()
        ]
    )
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(*(torch.autograd.grad(r, x, upstream)[0] for r in (rows, expected)))


def test_the_gradient_of_a_zero_row_is_zero():
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    (rows,) = project_patches([x], [torch.arange(4)])
    rows.sum().backward()
    assert float(x.grad.abs().max()) == 0.0
    assert float(rows.detach().abs().max()) == 0.0


def published_options(**changes):
    options = {"nce_T": 0.1, "batch_size": 2, "nce_includes_all_negatives_from_minibatch": False}
    return SimpleNamespace(**{**options, **changes})


def test_the_drop_in_loss_uses_the_options():
    q, k = unit_rows(8, 4), unit_rows(8, 4)
    expected = patch_nce(q, k, images=2, temperature=0.1, reduction="none")
    torch.testing.assert_close(PatchNCELoss(published_options())(q, k), expected)
    everything = PatchNCELoss(published_options(nce_includes_all_negatives_from_minibatch=True))
    torch.testing.assert_close(everything(q, k), patch_nce(q, k, temperature=0.1, reduction="none"))
    torch.testing.assert_close(PatchNCELoss(temperature=0.1)(q, k, images=2), expected)


def test_the_drop_in_sampler():
    feats = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    lazy = PatchSampleF(use_mlp=True, nc=6, gpu_ids=[])
    rows, ids = lazy(feats, 20)
    assert [tuple(r.shape) for r in rows] == [(40, 6), (32, 6)]  # the second map has 16 locations only
    assert set(lazy.state_dict()) == {f"mlp_{i}.{j}.{w}" for i in (0, 1) for j in (0, 2) for w in ("weight", "bias")}
    again, same = lazy(feats, 20, [i.numpy() for i in ids])  # published: ids are NumPy arrays
    for one, other in zip(rows + ids, again + same, strict=True):
        assert torch.equal(one, other)
    eagerly = PatchSampleF(nc=6, in_channels=[3, 5])
    eagerly.load_state_dict(lazy.state_dict())
    without_mlps = PatchSampleF(nc=256)
    without_mlps.load_state_dict(lazy.state_dict())
    for other in (eagerly, without_mlps):
        assert torch.equal(other(feats, 20, ids)[0][1], rows[1])
    maps, _ = PatchSampleF(use_mlp=False)(feats, 0)
    assert maps[0].shape == (2, 3, 8, 8)
    torch.testing.assert_close(maps[0].flatten(2).norm(dim=2), torch.ones(2, 3))


def test_the_head_equals_the_published_modules():
    query_maps = [torch.randn(2, c, 8, 8, dtype=torch.float64, requires_grad=True) for c in (3, 5)]
    key_maps = [torch.randn(2, c, 8, 8, dtype=torch.float64) for c in (3, 5)]
    head = PatchNCEHead([3, 5], dim=6, patches=10, temperature=[0.07, 0.2]).double()
    ids = [torch.randperm(64)[:10] for _ in range(2)]
    loss = head(query_maps, key_maps, patch_ids=ids)
    (q, _), (k, _) = PatchSampleF.forward(head, query_maps, 10, ids), PatchSampleF.forward(head, key_maps, 10, ids)
    layers = [patch_nce(q[i], k[i], images=2, temperature=t) for i, t in enumerate((0.07, 0.2))]
    torch.testing.assert_close(loss, torch.stack(layers).mean())
    loss.backward()
    assert all(float(m.grad.abs().max()) > 0 for m in query_maps)


def test_directions_are_independent():
    """CUT's two losses, (x, G(x)) and (y, G(y)), in one batch and each with its own ids."""
    maps = [[torch.randn(4, c, 6, 6, dtype=torch.float64) for c in (3, 5)] for _ in range(2)]
    head = PatchNCEHead([3, 5], dim=6, patches=9).double()
    ids = [[torch.randperm(36)[:9] for _ in range(2)] for _ in range(2)]
    both = head(*maps, directions=2, patch_ids=ids)
    assert both.shape == (2,)
    for direction in range(2):
        images = slice(2 * direction, 2 * direction + 2)
        alone = head(*[[m[images] for m in side] for side in maps], patch_ids=ids[direction])
        torch.testing.assert_close(both[direction], alone)
    with pytest.raises(ValueError, match="directions=3"):
        head(*maps, directions=3)
