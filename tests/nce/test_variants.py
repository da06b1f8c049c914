"""Every variant of PatchNCE compared with the formula of its paper in plain loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastnce.nce import PatchNCEHead, PatchSampleF, patch_nce, patch_nce_layers
from fastnce.nce.negatives import LearnedNegatives, ascend, diversity, only_external
from fastnce.nce.selection import attention_patch_ids, dense_patch_ids
from fastnce.nce.weights import Weights, asp_query_weight, hdce, hdce_pair_weight, monce, monce_log_weight

T = 0.07


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def pairs(images=2, patches=9, dim=6):
    keys = unit(images * patches, dim)
    queries = F.normalize(keys + 0.5 * unit(images * patches, dim), dim=-1)
    return queries.requires_grad_(), keys


def plain_transport(queries, keys, eps, iterations, cost):
    """Sinkhorn's iterations in plain loops."""
    size = len(queries)
    kernel = torch.empty(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            c = float(queries[i] @ keys[j])
            kernel[i, j] = math.exp((-10.0 if i == j else c if cost == "hard" else 1 - c) / eps)
    u, v = torch.ones(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    for _ in range(iterations):
        u = 1 / (kernel @ v)
        v = 1 / (u @ kernel)
    return torch.diag(u) @ kernel @ torch.diag(v)


@pytest.mark.parametrize(("eps", "cost", "strength"), [(1.0, "hard", 1.0), (0.3, "easy", 2.0)])
def test_monce(eps, cost, strength):
    queries, keys = pairs()
    log_weight = monce_log_weight(queries, keys, 2, eps=eps, strength=strength, hard=cost == "hard")
    loss = patch_nce(
        queries, keys, images=2, weights=Weights(pair_log_weight=log_weight), reduction="none", temperature=T
    )
    plain = []
    for q, k in zip(queries.unflatten(0, (2, -1)), keys.unflatten(0, (2, -1)), strict=True):
        size = len(q)
        weight = plain_transport(q.detach(), k, eps, 50, cost) * (size - 1) * strength + 1e-8
        for i in range(size):
            positive = (q[i] @ k[i] / T).exp()
            negatives = sum(weight[i, j] * (q[i] @ k[j] / T).exp() for j in range(size) if j != i)
            plain.append(-torch.log(positive / (positive + negatives)))
    plain = torch.stack(plain)
    torch.testing.assert_close(loss, plain, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(rows.mean(), queries)[0] for rows in (loss, plain)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)


def test_monce_rows_and_columns_sum_to_one():
    queries, keys = pairs(images=1, patches=20)
    weight = (monce_log_weight(queries, keys).exp() - 1e-8) / 19
    torch.testing.assert_close(weight.sum(1), torch.ones(1, 20, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weight.sum(2), torch.ones(1, 20, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert not weight.requires_grad


@pytest.mark.parametrize("gamma", [1.0, 0.1])
def test_hdce(gamma):
    queries, keys = pairs()
    weight = hdce_pair_weight(keys, 2, gamma=gamma)
    weights = Weights(pair_weight=weight, decoupled=True)
    loss = patch_nce(queries, keys, images=2, weights=weights, reduction="none", temperature=T)
    plain = []
    for q, k in zip(queries.unflatten(0, (2, -1)), keys.unflatten(0, (2, -1)), strict=True):
        for i in range(len(q)):
            others = [j for j in range(len(q)) if j != i]
            relation = torch.stack([k[i] @ k[j] / gamma for j in others]).softmax(0)
            relation = relation / relation.max()
            negatives = torch.stack([w * (q[i] @ k[j]) for w, j in zip(relation, others, strict=True)])
            # the published loss: logsumexp over the negatives of (negative - positive) / T
            plain.append(torch.logsumexp((negatives - q[i] @ k[i]) / T, 0))
    plain = torch.stack(plain)
    torch.testing.assert_close(loss, plain, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(rows.mean(), queries)[0] for rows in (loss, plain)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)


def asp_by_hand(x, t, schedule, lookup, k):
    p = {
        "lambda": 1.0 if t < k else (1 - t) / (1 - k),
        "linear": 1 - t,
        "sigmoid": 1 / (1 + math.exp((t - 0.5) * 10)),
        "none": 1.0,
    }[schedule]
    w = {
        "linear": max(x, 0.0),
        "top": math.sqrt(1 - (max(x, 0.0) - 1) ** 2),
        "bell": math.exp(-(((x - 0.5) * 4) ** 2) / 2) / math.sqrt(2 * math.pi),
        "uniform": 1.0,
    }[lookup]
    return p + (1 - p) * w


@pytest.mark.parametrize("schedule", ["lambda", "linear", "sigmoid", "none"])
@pytest.mark.parametrize("lookup", ["linear", "top", "bell", "uniform"])
def test_adaptive_supervised_weights(schedule, lookup):
    queries, keys = unit(12, 4), unit(12, 4)
    for progress in (0.0, 0.6, 1.0):
        weight = asp_query_weight(queries, keys, progress, schedule=schedule, lookup=lookup, decay_from=0.4)
        plain = torch.tensor(
            [asp_by_hand(float(q @ k), progress, schedule, lookup, 0.4) for q, k in zip(queries, keys, strict=True)]
        )
        torch.testing.assert_close(weight, plain.double() / plain.double().mean(), rtol=1e-6, atol=1e-8)
    rows = patch_nce(queries, keys, reduction="none")
    weighted = patch_nce(queries, keys, weights=Weights(query_weight=weight), reduction="none")
    torch.testing.assert_close(weighted, rows * weight)


def test_adaptive_supervised_weights_refuse_unknown_choices():
    with pytest.raises(ValueError, match="schedule must be"):
        asp_query_weight(unit(2, 3), unit(2, 3), 0.5, schedule="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lookup must be"):
        asp_query_weight(unit(2, 3), unit(2, 3), 0.5, lookup="steps")  # type: ignore[arg-type]


def test_attention_selects_the_least_entropy():
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    ids, attention = attention_patch_ids(maps, 6)
    assert ids.shape == (2, 6)
    for image in range(2):
        f = maps[image].flatten(1).T
        entropy = []
        for i in range(20):
            p = torch.stack([f[i] @ f[j] for j in range(20)]).softmax(0)
            entropy.append(float(-(p * p.log()).sum()))
        order = sorted(range(20), key=entropy.__getitem__)
        assert ids[image].tolist() == order[:6]
        torch.testing.assert_close(attention[image], (f[ids[image]] @ f.T).softmax(1))
    assert attention_patch_ids(maps, 99)[0].shape == (2, 20)


def test_dense_ids_take_every_location():
    maps = [torch.randn(2, 3, 4, 5), torch.randn(2, 8, 2, 2)]
    assert [ids.tolist() for ids in dense_patch_ids(maps)] == [list(range(20)), list(range(4))]


def test_learned_negatives_are_the_only_ones_and_are_trained_adversarially():
    queries, keys = pairs(images=2, patches=5)
    maker = LearnedNegatives(6, noise=3).double()
    codes, noise = keys.unflatten(0, (2, 5)).mean(1), torch.randn(2, 7, 3, dtype=torch.float64)
    negatives = maker(codes, noise=noise)
    assert negatives.shape == (2, 7, 6)
    torch.testing.assert_close(negatives.norm(dim=2), torch.ones(2, 7, dtype=torch.float64), rtol=1e-5, atol=1e-5)

    def loss(extra):
        weights = Weights(pair_log_weight=only_external(2, 5))
        return patch_nce(queries, keys, images=2, extra_keys=extra, weights=weights, temperature=T)

    plain = []
    for i in range(10):
        logits = torch.cat([(queries[i] @ keys[i])[None], negatives[i // 5] @ queries[i]]) / T
        plain.append(-logits.log_softmax(0)[0])
    plain = torch.stack(plain).mean()
    torch.testing.assert_close(loss(negatives), plain, rtol=1e-10, atol=1e-12)
    weight = maker.mlp[0].weight
    expected = torch.autograd.grad(plain, [queries, weight], retain_graph=True)
    found = torch.autograd.grad(loss(ascend(negatives)), [queries, weight])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found[1], -expected[1], rtol=1e-8, atol=1e-12)


def test_diversity():
    negatives = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [0.0, 4.0]]])
    # |0-1|, |1-1|, |2-0|, |0-4|
    assert diversity(negatives).item() == pytest.approx((1 + 0 + 2 + 4) / 4)


def make_head(**options):
    return PatchNCEHead([3, 4], dim=8, patches=10, init_gain=1.0, **options).double()


def make_maps(images):
    return [torch.randn(images, 3, 6, 6, dtype=torch.float64), torch.randn(images, 4, 3, 3, dtype=torch.float64)]


def unweighted(queries, keys, groups):
    return Weights()


@pytest.mark.parametrize("negatives", ["image", "batch"])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_weighting_without_weights_changes_nothing(negatives, directions):
    torch.manual_seed(1)
    head = make_head(negatives=negatives, temperature=[0.07, 0.2])
    torch.manual_seed(1)
    weighted = make_head(negatives=negatives, temperature=[0.07, 0.2], weighting=unweighted)
    queries, keys = make_maps(4), make_maps(4)
    ids = [head.draw_ids([m[:1] for m in keys]) for _ in range(directions)]
    given = ids if directions > 1 else ids[0]
    ours, plain = (h(queries, keys, directions=directions, patch_ids=given) for h in (weighted, head))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", ["none", "monce", "hdce"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_weighted_head_equals_its_layers(weighting, symmetric):
    function = {"none": None, "monce": monce, "hdce": hdce}[weighting]
    head = make_head(temperature=[0.07, 0.2], weighting=function, symmetric=symmetric)
    queries, keys = make_maps(2), make_maps(2)
    ids = head.draw_ids(keys)
    query_rows, _ = PatchSampleF.forward(head, queries, 10, ids)
    key_rows, _ = PatchSampleF.forward(head, keys, 10, ids)
    plain = []
    for q, k, temperature in zip(query_rows, key_rows, (0.07, 0.2), strict=True):
        options = {"images": 2, "temperature": temperature, "symmetric": symmetric}
        if weighting == "monce":
            options["weights"] = Weights(pair_log_weight=monce_log_weight(q, k, 2))
        if weighting == "hdce":
            options["weights"] = Weights(pair_weight=hdce_pair_weight(k, 2), decoupled=True)
        plain.append(patch_nce(q, k, **options))
    ours = head(queries, keys, patch_ids=ids)
    torch.testing.assert_close(ours, torch.stack(plain).mean(), rtol=1e-12, atol=1e-12)


def test_wrong_weightings_are_refused():
    with pytest.raises(ValueError, match="weighting must be a function or None, not 'moco'"):
        make_head(weighting="moco")
    maps = make_maps(1)
    with pytest.raises(ValueError, match="weights must be a fastnce.nce.Weights, not a torch.float64 tensor"):
        make_head(weighting=lambda queries, keys, groups: queries)(maps, maps)
    wrong = Weights(pair_weight=torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"pair_weight must be \(1, 10, 10\), not \(1, 3, 3\)"):
        make_head(weighting=lambda queries, keys, groups: wrong)(maps, maps)
    head = make_head(weighting=monce)
    head.others = lambda keys: keys[None]
    with pytest.raises(ValueError, match="keys of other ranks cannot be combined with a weighting"):
        head(maps, maps)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("extra", ["none", "other"])
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_all_layers_and_directions_with_weights(cosine, extra, implementation):
    """The result equals `patch_nce` of each layer and direction."""
    torch.manual_seed(3)
    dtype = torch.float64 if implementation == "eager" else torch.float32
    queries, keys = (
        [[F.normalize(torch.randn(12, dim, dtype=dtype), dim=1) for dim in (8, 16)] for _ in range(2)] for _ in range(2)
    )

    def weight(queries, keys, groups):
        similarity = (queries.unflatten(0, (groups, -1)) @ keys.unflatten(0, (groups, -1)).mT).abs()
        return Weights(pair_weight=1 + similarity, query_weight=queries[:, 0].exp())

    found = patch_nce_layers(
        queries,
        keys,
        images=3,
        temperature=[0.1, 0.3],
        cosine=cosine,
        extra_keys=None if extra == "none" else "other",
        weighting=weight,
        implementation=implementation,
    )
    for direction in range(2):
        losses = []
        for layer, temperature in enumerate((0.1, 0.3)):
            q, k = queries[direction][layer].double(), keys[direction][layer].double()
            e = None if extra == "none" else queries[1 - direction][layer].double().unflatten(0, (3, 4))
            weights = weight(q, k, 3)
            losses.append(patch_nce(q, k, images=3, temperature=temperature, extra_keys=e, weights=weights))
        exact = torch.stack(losses).mean()
        rtol = 1e-12 if implementation == "eager" else 1e-5
        torch.testing.assert_close(found[direction].double(), exact, rtol=rtol, atol=0)


def test_a_weighting_cannot_change_the_rows():
    def in_place(queries, keys, groups):
        queries.zero_()
        keys.zero_()
        return Weights()

    queries, keys = make_maps(2), make_maps(2)
    head = make_head()
    ids = head.draw_ids(keys)
    plain = head(queries, keys, patch_ids=ids)
    head.weighting = in_place
    torch.testing.assert_close(head(queries, keys, patch_ids=ids), plain, rtol=1e-12, atol=0)
    rows = [[F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)] for _ in range(2)]
    found = patch_nce_layers(rows, rows, images=2, weighting=in_place)
    torch.testing.assert_close(found, patch_nce_layers(rows, rows, images=2), rtol=1e-12, atol=0)


def test_weights_are_constants_of_the_right_kind():
    queries, keys = pairs()
    weight = torch.rand(len(queries), dtype=torch.float64, requires_grad=True)
    loss = patch_nce(queries.clone().requires_grad_(), keys, weights=Weights(query_weight=weight))
    loss.backward()
    assert weight.grad is None
    with pytest.raises(ValueError, match="decoupled must be True or False, not 'no'"):
        patch_nce(queries, keys, weights=Weights(decoupled="no"))
    maps = make_maps(1)
    with pytest.raises(ValueError, match=r"weights must be a fastnce.nce.Weights, not None"):
        make_head(weighting=lambda queries, keys, groups: None)(maps, maps)
    with pytest.raises(ValueError, match="weighting must be a function or None, not 'monce'"):
        patch_nce_layers([[queries]], [[keys]], weighting="monce")
