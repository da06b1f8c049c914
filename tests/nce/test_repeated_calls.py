"""Calls like an earlier one skip its checks: their results, gradients and errors are those of a first call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from fastnce import PatchNCEHead, PatchNCELoss, PatchSampleF, patch_nce, project_patches
from fastnce.nce.impl import planned_calls, planned_maps, triton_rows
from tests.oracle import DEVICE, error, unit_rows

CHANNELS = (3, 8)


def maps(images: int = 2, seed: int = 0, requires_grad: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [
        torch.randn(images, c, n, n, device=DEVICE, requires_grad=requires_grad)
        for c, n in zip(CHANNELS, (9, 6), strict=True)
    ]


def head(**options) -> PatchNCEHead:
    torch.manual_seed(1)
    options = {"dim": 16, "patches": 20, "init_gain": 1.0, "implementation": "triton", **options}
    return PatchNCEHead(CHANNELS, **options).to(DEVICE)


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """One entry per call that was planned anew."""
    made: list[str] = []
    for kind in (planned_calls.LossCall, planned_calls.RowsCall):
        plan = kind.plan

        def kept(self, *, plan=plan, **options):
            made.append(type(self).__name__)
            return plan(self, **options)

        monkeypatch.setattr(kind, "plan", kept)
    return made


def run(module, seed: int, upstream: float = 1.0, **options):
    """The loss and all gradients for maps of one seed."""
    queries, keys = maps(seed=seed, requires_grad=True), maps(seed=seed + 1)
    torch.manual_seed(7)
    loss = module(queries, keys, **options)
    return loss.detach(), torch.autograd.grad(upstream * loss.sum(), [*queries, *module.parameters()])


@pytest.mark.parametrize("options", [{}, {"use_mlp": False}, {"negatives": "batch"}, {"ids_per_image": True}])
def test_a_repeated_head_equals_a_new_one(options, counted):
    ours = head(**options)
    run(ours, seed=0)
    loss, gradients = run(ours, seed=5, upstream=2.0)
    assert counted == ["LossCall"]
    expected, expected_gradients = run(head(**options), seed=5, upstream=2.0)  # equal settings: repeated as well
    assert counted == ["LossCall"]
    planned_calls._ENTRIES.clear()
    new, new_gradients = run(head(**options), seed=5, upstream=2.0)
    assert counted == ["LossCall", "LossCall"]
    assert torch.equal(loss, expected)
    assert torch.equal(loss, new)
    for a, b, c in zip(gradients, expected_gradients, new_gradients, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_repeated_head_follows_its_weights(counted):
    ours = head()
    before, _ = run(ours, seed=0)
    with torch.no_grad():
        ours.mlp_0[0].weight.mul_(-1.5)
    after, _ = run(ours, seed=0)
    assert counted == ["LossCall"]
    assert not torch.equal(before, after)
    for weight in ours.mlp_1.parameters():
        weight.requires_grad_(False)
    queries, keys = maps(requires_grad=True), maps(seed=1)
    queries[0].requires_grad_(False)
    torch.manual_seed(7)
    loss = ours(queries, keys)
    assert torch.equal(loss, after)
    given = [queries[1], *ours.mlp_0.parameters()]
    for gradient, of in zip(torch.autograd.grad(loss, given, retain_graph=True), given, strict=True):
        assert gradient.shape == of.shape
    loss.backward()
    assert queries[0].grad is None
    assert ours.mlp_1[0].weight.grad is None


def test_the_backward_pass_can_run_twice_and_notices_changed_weights():
    ours = head()
    run(ours, seed=0)
    queries, keys = maps(requires_grad=True), maps(seed=1)
    loss = ours(queries, keys)
    first, second = (torch.autograd.grad(loss, queries, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        ours.mlp_0[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, queries)


def test_a_second_derivative_is_an_error():
    ours = head()
    for _ in range(2):
        queries, keys = maps(requires_grad=True), maps(seed=1)
        gradients = torch.autograd.grad(ours(queries, keys), queries, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.grad(gradients[0].sum(), queries)
    rows = unit_rows(8, 16).to(DEVICE).requires_grad_()
    for _ in range(2):
        loss = patch_nce(rows, rows.detach().flip(0), implementation="triton")
        (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.autograd.grad(gradient.sum(), rows)


def test_wrong_arguments_are_still_refused():
    """The same error before and after a like call with right arguments."""
    ours, loss = head(), PatchNCELoss(implementation="triton")
    queries, keys = maps(), maps(seed=1)
    some_ids = [torch.arange(5, device=DEVICE) for _ in queries]
    rows = unit_rows(8, 16).to(DEVICE)
    wrong = [
        lambda: ours(queries, keys[:1]),
        lambda: ours(queries, [keys[0], keys[1][:, :, :4]]),
        lambda: ours(queries, [keys[0], keys[1].long()]),
        lambda: ours(queries, keys, directions=3),
        lambda: ours(queries, [keys[0], None]),
        lambda: ours([queries[0], "maps"], keys),
        lambda: ours(queries, [keys[0], keys[1].to("meta")]),
        lambda: PatchSampleF(use_mlp=False, implementation="triton")([queries[0], None], 4),
        lambda: project_patches(queries, some_ids, torch.zeros(2, 4, device=DEVICE), implementation="triton"),
        lambda: ours(queries, keys, patch_ids=[torch.zeros(5, dtype=torch.int64, device=DEVICE) + 99] * 2),
        lambda: loss(rows, rows[:4]),
        lambda: loss(rows, rows.double()),
        lambda: loss(rows, rows, images=3),
        lambda: patch_nce(rows, rows, temperature=-1.0, implementation="triton"),
        lambda: patch_nce(rows, rows, reduction="half", implementation="triton"),
        lambda: patch_nce(rows, rows, negatives=["image"], implementation="triton"),
        lambda: patch_nce(rows, rows, implementation=["triton"]),
        lambda: project_patches(queries, [torch.zeros(5, device=DEVICE)] * 2, implementation="triton"),
        lambda: project_patches(queries, [torch.zeros(5, dtype=torch.int64, device=DEVICE)] * 2, implementation=[]),
    ]
    before = []
    for call in wrong:
        with pytest.raises(ValueError, match=" ") as found:
            call()
        before.append(str(found.value))
    for _ in range(2):
        ours(queries, keys)
        loss(rows, rows)
    for call, message in zip(wrong, before, strict=True):
        with pytest.raises(ValueError, match=" ") as found:
            call()
        assert str(found.value) == message


@pytest.mark.parametrize("first", [True, False])
def test_autocast_of_maps_that_are_narrow_already(first):
    """The maps keep their dtype under autocast, the weights do not: both kinds of calls are planned apart."""
    sampler = PatchSampleF(use_mlp=True, nc=16, in_channels=CHANNELS, implementation="triton").to(DEVICE)
    feats = [m.bfloat16() for m in maps()]
    for enabled in (first, not first, first, not first):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            rows, _ = sampler(feats, 20)
        assert {r.dtype for r in rows} == {torch.bfloat16 if enabled else torch.float32}


def test_saved_ids_may_be_copied():
    """Hooks of saved tensors return ids with other strides than those that were saved."""
    ours = head()
    queries, keys = maps(requires_grad=True), maps(seed=1)
    ids = [torch.arange(10, device=DEVICE)[::2] for _ in keys]
    expected = torch.autograd.grad(ours(queries, keys, patch_ids=ids), queries)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        loss = ours(queries, keys, patch_ids=ids)
    for a, b in zip(torch.autograd.grad(loss, queries), expected, strict=True):
        assert torch.equal(a, b)


def test_forward_mode_is_refused_and_not_ignored():
    queries, keys = unit_rows(8, 16).to(DEVICE), unit_rows(8, 16).to(DEVICE)
    for _ in range(2):
        patch_nce(queries, keys, implementation="triton")
        with forward_ad.dual_level(), pytest.raises(ValueError, match="no forward-mode derivative"):
            patch_nce(forward_ad.make_dual(queries, queries), keys, implementation="triton")


def test_replaced_attributes_of_a_head():
    """Numbers of NumPy and tensors are not repeated as plans, and give what they gave."""
    ours = head()
    queries, keys = maps(), maps(seed=1)
    ids = [torch.arange(5, device=DEVICE)] * 2
    plain = ours(queries, keys, patch_ids=ids)
    for replaced in (np.float64, np.float32, torch.tensor):
        ours.temperatures = [replaced(t) for t in head().temperatures]
        for _ in range(2):
            assert error(ours(queries, keys, patch_ids=ids), plain) <= 1e-6
    ours.patches = np.int64(7)
    assert ours(queries, keys).isfinite()
    stacked = torch.stack([keys[1]] * 2)
    with pytest.raises(ValueError, match="key_maps must be a list of maps"):
        ours([queries[1]] * 2, stacked)


def test_autocast_and_precision_are_part_of_a_call():
    ours = head()
    queries, keys = maps(), maps(seed=1)

    def value(dtype=None):
        torch.manual_seed(7)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            return ours(queries, keys).detach()

    exact, half, again = value(), value(torch.bfloat16), value()
    assert torch.equal(exact, again)
    assert not torch.equal(exact, half)
    assert error(half, exact) <= 1e-2


def test_a_repeated_loss_equals_a_new_one(monkeypatch):
    loss = PatchNCELoss(temperature=0.1, implementation="triton")
    kept = []
    remember = triton_rows.remember
    monkeypatch.setattr(triton_rows, "remember", lambda *a: kept.append(a) or remember(*a))
    for seed in range(3):
        torch.manual_seed(seed)
        queries, keys = unit_rows(30, 16).to(DEVICE).requires_grad_(), unit_rows(30, 16).to(DEVICE)
        ours = loss(queries, keys)
        (gradient,) = torch.autograd.grad(ours.sum() * 3, queries)
        eager = patch_nce(queries, keys, temperature=0.1, reduction="none", implementation="eager")
        (expected,) = torch.autograd.grad(eager.sum() * 3, queries)
        assert error(ours, eager) <= 2e-6
        assert error(gradient, expected) <= 5e-6
        with torch.no_grad():
            assert torch.equal(loss(queries, keys), ours)
    assert len(kept) == 2  # with and without a gradient


def test_keys_that_require_a_gradient_are_constants():
    loss = PatchNCELoss(implementation="triton")
    keys = unit_rows(12, 16).to(DEVICE).requires_grad_()
    for _ in range(2):
        assert not loss(keys.detach(), keys).requires_grad
        queries = unit_rows(12, 16).to(DEVICE).requires_grad_()
        loss(queries, keys).sum().backward()
        assert keys.grad is None
        assert queries.grad is not None


@pytest.mark.parametrize("use_mlp", [True, False])
def test_a_repeated_sampler_draws_and_projects_alike(use_mlp, counted):
    def sampler(implementation):
        torch.manual_seed(1)
        return PatchSampleF(
            use_mlp=use_mlp, nc=16, init_gain=1.0, in_channels=CHANNELS, implementation=implementation
        ).to(DEVICE)

    ours, plain = sampler("triton"), sampler("eager")
    for seed in range(3):
        feats = maps(seed=seed, requires_grad=True)
        rows, ids = ours(feats, 20)
        for one, feat in zip(ids, feats, strict=True):
            assert one.shape == (20,)
            assert len(set(one.tolist())) == 20
            assert 0 <= int(one.min()) <= int(one.max()) < feat.shape[2] * feat.shape[3]
        expected, _ = plain(feats, 20, ids)
        given, same = ours(feats, 20, ids)
        weights = [torch.randn_like(r) for r in rows]
        results = []
        for found, module in ((rows, ours), (expected, plain), (given, ours)):
            total = sum((r * w).sum() for r, w in zip(found, weights, strict=True))
            results.append(torch.autograd.grad(total, [*feats, *module.parameters()]))
        for r, e, g in zip(rows, expected, given, strict=True):
            assert error(r, e) <= 1e-6
            assert torch.equal(r, g)
        for r, e, g in zip(*results, strict=True):
            assert error(r, e) <= 5e-6
            assert error(g, e) <= 5e-6
        assert all(a is b for a, b in zip(ids, same, strict=True))
    assert counted.count("RowsCall") == 4  # drawn once; given ids on a CPU are checked at every call


def test_a_setting_that_changes_before_the_backward_pass(monkeypatch):
    """Plans of backward passes are kept apart by the way in which PyTorch multiplies float32."""
    ours = head()
    run(ours, seed=0)
    (entry,) = planned_calls._ENTRIES.values()
    assert len(entry.backward) == 1
    monkeypatch.setattr(planned_maps, "fp32_precision", lambda *_: "another")
    _, gradients = run(ours, seed=0)
    assert len(entry.backward) == 2
    monkeypatch.undo()
    _, again = run(ours, seed=0)
    assert len(entry.backward) == 2
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


class Marked(torch.Tensor):
    """A tensor with a class of its own."""


def test_tensors_with_a_class_of_their_own_are_not_planned(counted):
    queries, keys = maps(), maps(seed=1)
    ours, loss = head(), PatchNCELoss(implementation="triton")
    rows, others = unit_rows(8, 16).to(DEVICE), unit_rows(8, 16).to(DEVICE)
    expected = loss(rows, others)
    assert torch.equal(loss(rows, others.as_subclass(Marked)).as_subclass(torch.Tensor), expected)
    ids = [torch.arange(5, device=DEVICE)] * 2
    expected = ours(queries, keys, patch_ids=ids)
    entries = len(planned_calls._ENTRIES)
    found = ours(queries, [keys[0], keys[1].as_subclass(Marked)], patch_ids=ids)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
    assert len(planned_calls._ENTRIES) == entries


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_recorded_function_computes_anew():
    """`torch.jit.trace` records operators: a plan would be a constant of the recording."""
    loss = PatchNCELoss(implementation="triton")
    rows = [unit_rows(8, 16).to(DEVICE) for _ in range(3)]
    loss(rows[0], rows[1])
    recorded = torch.jit.trace(lambda q, k: loss(q, k), (rows[0], rows[1]), check_trace=False)
    assert torch.equal(recorded(rows[2], rows[0]), loss(rows[2], rows[0]))
