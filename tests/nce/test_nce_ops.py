"""The operators in PyTorch: choice, opcheck, compile, autocast, functional gradients, launches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fastnce.kernels import common
from fastnce.kernels.map_layout import map_layout

from fastnce import PatchNCEHead, PatchNCELoss, PatchSampleF, patch_nce, project_patches
from fastnce.common import operators
from fastnce.nce.impl import triton_maps
from tests.oracle import DEVICE, Launches, error, unit_rows

CHANNELS = (3, 8, 20)


def maps(images: int = 4, requires_grad: bool = False, layers: int = 3) -> list[torch.Tensor]:
    sizes = list(zip(CHANNELS, (20, 9, 5), strict=True))
    return [torch.randn(images, c, n, n, device=DEVICE, requires_grad=requires_grad) for c, n in sizes[:layers]]


def head(implementation="triton", layers: int = 3, **options) -> PatchNCEHead:
    torch.manual_seed(1)
    options = {"dim": 16, "patches": 24, "init_gain": 1.0, **options}
    return PatchNCEHead(CHANNELS[:layers], implementation=implementation, **options).to(DEVICE)


def some_ids(keys: list[torch.Tensor], sets: int = 1) -> list[torch.Tensor]:
    """Return ids like those of `draw_ids`, whose kernel is slow in the interpreter."""
    drawn = [torch.stack([torch.randperm(m[0, 0].numel())[:24] for _ in range(sets)]) for m in keys]
    return [(i[0] if sets == 1 else i).to(DEVICE) for i in drawn]


def gradients(module, queries, keys, **options):
    loss = module(queries, keys, **options)
    weighted = (loss.flatten() * torch.arange(1.0, loss.numel() + 1, device=DEVICE)).sum()
    return loss.detach(), torch.autograd.grad(weighted, [*queries, *module.parameters()])


GIVEN = ("drawn", "shared", "image", "direction")


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("negatives", ["image", "batch"])
@pytest.mark.parametrize("given", GIVEN)
def test_head_equals_eager(given, negatives, directions):
    """Half of the cases have an MLP, so that all combinations of any three of the four settings occur."""
    use_mlp = (GIVEN.index(given) + (negatives == "batch") + directions) % 2 == 1
    ours = head(use_mlp=use_mlp, negatives=negatives)
    queries, keys = maps(requires_grad=True), maps()
    if given == "drawn":
        ids = some_ids(keys, directions)
    elif given == "shared":
        ids = some_ids(keys)
    elif given == "image":
        ids = [i.repeat_interleave(2, dim=0) for i in some_ids(keys, 2)]
    else:
        ids = [some_ids(keys) for _ in range(directions)]
    loss, grads = gradients(ours, queries, keys, patch_ids=ids, directions=directions)
    ours.implementation = "eager"
    expected, expected_grads = gradients(ours, queries, keys, patch_ids=ids, directions=directions)
    assert loss.shape == (() if directions == 1 else (directions,))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        assert error(a, b) <= 5e-6


def test_repeated_locations_add_up():
    ours = head()
    queries, keys = maps(requires_grad=True), maps()
    ids = [torch.zeros(5, dtype=torch.long, device=DEVICE) + 3 for _ in keys]
    _, grads = gradients(ours, queries, keys, patch_ids=ids)
    ours.implementation = "eager"
    _, expected = gradients(ours, queries, keys, patch_ids=ids)
    for a, b in zip(grads, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5


def test_key_projector():
    ours, other = head(), head()
    torch.nn.init.normal_(other.mlp_0[0].weight)
    queries, keys = maps(requires_grad=True), maps()
    ids = some_ids(keys)
    loss, grads = gradients(ours, queries, keys, patch_ids=ids, key_projector=other)
    ours.implementation = other.implementation = "eager"
    expected, expected_grads = gradients(ours, queries, keys, patch_ids=ids, key_projector=other)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        assert error(a, b) <= 5e-6


@pytest.mark.parametrize("directions", [1, 2])
def test_launches_of_the_head(directions):
    """Forward: five launches for ids, projection of both sides, InfoNCE and mean; backward: zeroed maps and two."""
    ours, queries, keys = head(), maps(requires_grad=True), maps()
    with Launches() as forward:
        loss = ours(queries, keys, directions=directions)
    assert forward.kernels == ["draw_kernel", "project_kernel", "nce_kernel", "mean_kernel"]
    assert forward.library == ["aten.randint.default"]
    upstream = torch.ones_like(loss)
    with Launches() as backward:
        torch.autograd.grad(loss, [*queries, *ours.parameters()], upstream)
    assert backward.kernels == ["project_backward_kernel", "weight_gradient_kernel"]
    assert backward.library == ["aten.zeros.default"]


def test_given_ids_need_one_more_launch():
    ours, queries, keys = head(), maps(requires_grad=True), maps()
    ids = some_ids(keys)
    with Launches() as forward:
        loss = ours(queries, keys, patch_ids=ids)
    assert len(forward.kernels) + len(forward.library) == 3
    with Launches() as backward:
        torch.autograd.grad(loss, [*queries, *ours.parameters()])
    assert backward.kernels == ["project_backward_kernel", "merge_kernel", "weight_gradient_kernel"]
    assert [name for name in backward.library if "ones_like" not in name] == ["aten.zeros.default"]


def test_choice_and_its_reasons(monkeypatch):
    rows = unit_rows(8, 16)
    with pytest.raises(ValueError, match="implementation must be"):
        patch_nce(rows, rows, implementation="fast")
    with pytest.raises(ValueError, match="float64"):
        patch_nce(rows.double().to(DEVICE), rows.double().to(DEVICE), implementation="triton")
    with pytest.raises(ValueError, match="at most 512"):
        patch_nce(torch.ones(4, 513, device=DEVICE), torch.ones(4, 513, device=DEVICE), implementation="triton")
    monkeypatch.setattr(common.INTERPRET, "value", False)
    with pytest.raises(ValueError, match="on the CPU"):
        patch_nce(rows, rows, implementation="triton")
    assert patch_nce(rows, rows).isfinite()


def test_ids_are_checked():
    feature, ids = torch.randn(2, 3, 4, 4), torch.tensor([0, 16])
    with pytest.raises(ValueError, match=r"0\.\.15"):
        project_patches([feature], [ids])
    with pytest.raises(ValueError, match=r"0\.\.15"):
        project_patches([feature.to(DEVICE)], [-ids.to(DEVICE)], check_ids=True)
    with pytest.raises(ValueError, match="int64"):
        project_patches([feature], [ids.int()])
    with pytest.raises(ValueError, match="patches"):
        project_patches([feature], [torch.zeros(3, 5, dtype=torch.long)])


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_autocast_takes_rows_in_its_dtype(implementation):
    sampler = PatchSampleF(nc=16, in_channels=CHANNELS, init_gain=1.0, implementation=implementation).to(DEVICE)
    feats = maps()
    exact, ids = sampler(feats, 24)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        rows, _ = sampler(feats, 24, ids)
        loss = PatchNCELoss(implementation=implementation)(rows[0], rows[0].flip(0), images=4)
        same = patch_nce(exact[0], exact[0].flip(0), images=4, implementation=implementation, reduction="none")
    assert all(r.dtype == torch.bfloat16 for r in rows)
    assert loss.dtype == same.dtype == torch.float32
    for a, b in zip(rows, exact, strict=True):
        assert error(a, b) < 1e-2
    rounded = patch_nce(exact[0].bfloat16().float(), exact[0].bfloat16().float().flip(0), images=4, reduction="none")
    torch.testing.assert_close(same, rounded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_compiles_without_a_graph_break(implementation):
    ours, queries, keys = head(implementation, layers=2), maps(2, requires_grad=True, layers=2), maps(2, layers=2)
    ids = some_ids(keys)
    compiled = torch.compile(lambda q, k: ours(q, k, patch_ids=ids), fullgraph=True, backend="aot_eager")
    loss, expected = compiled(queries, keys), ours(queries, keys, patch_ids=ids)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, queries), torch.autograd.grad(expected, queries), strict=True):
        torch.testing.assert_close(a, b)
    drawing = torch.compile(lambda q, k: ours(q, k, directions=2), fullgraph=True, backend="aot_eager")
    assert drawing(queries, keys).shape == (2,)
    rows, chosen = torch.compile(PatchSampleF.forward, fullgraph=True, backend="aot_eager")(ours, queries, 24)
    for a, b in zip(rows, PatchSampleF.forward(ours, queries, 24, chosen)[0], strict=True):
        torch.testing.assert_close(a, b)
    criterion = PatchNCELoss(implementation=implementation)
    q, k = rows[0].detach(), rows[0].detach().flip(0)
    torch.testing.assert_close(torch.compile(criterion, fullgraph=True, backend="aot_eager")(q, k), criterion(q, k))


def test_devices_too_old_for_the_kernels(monkeypatch):
    for capability, why in (((7, 5), "the kernels need compute capability 8.0, this device has 7.5"), ((8, 0), None)):
        monkeypatch.setattr(operators, "_device_capability", lambda index, found=capability: found)
        assert operators.obstacle(torch.device("cuda", 0), torch.bfloat16) == why

    def refuse(index):
        raise AssertionError("a traced function queried the device")

    monkeypatch.setattr(operators, "_device_capability", refuse)
    device = torch.device("cuda", 0)
    traced = torch.compile(lambda x: x + (operators.obstacle(device, x.dtype) is None), fullgraph=True, backend="eager")
    assert traced(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inductor_finds_every_map_in_the_buffer_of_gradients(layout):
    """The gradients of all maps are views of one buffer, whose layout the compiler may choose."""
    ours = head(layers=2)
    queries, keys = ([m.contiguous(memory_format=layout).detach() for m in maps(2, layers=2)] for _ in range(2))
    ids = some_ids(keys)
    leaves = [*(q.requires_grad_() for q in queries), *ours.parameters()]
    compiled = torch.compile(lambda q, k: ours(q, k, patch_ids=ids), fullgraph=True)
    found, expected = (torch.autograd.grad(f(queries, keys), leaves) for f in (compiled, partial(ours, patch_ids=ids)))
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= 5e-6


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_a_compiled_function_takes_a_tensor_twice_and_constants_only(implementation):
    """SimDCL samples its maps twice, and samples without gradients inside a step with gradients."""

    def loss(m, mlp):
        ids = torch.arange(6, device=DEVICE)
        twice = project_patches([m, m, m], [ids, ids + 5, ids], [mlp] * 3, implementation=implementation)
        with torch.no_grad():
            constant = project_patches([m], [ids], [mlp], implementation=implementation)[0]
        fixed = project_patches([m.detach()], [ids], [[w.detach() for w in mlp]], implementation=implementation)[0]
        return sum(n * (rows * (constant + fixed).cos()).sum() for n, rows in enumerate(twice, start=1))

    leaves = [maps()[1], torch.randn(16, 8), torch.randn(16), torch.randn(16, 16), torch.randn(16)]
    leaves = [x.to(DEVICE).requires_grad_() for x in leaves]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(leaves[0], leaves[1:]), leaves) for f in (compiled, loss))
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= 5e-6


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("images", [1, 3])
def test_a_compiled_gradient_is_the_gradient(implementation, images):
    """Also for one group, whose rows need no view to be grouped."""
    q, k = unit_rows(24, 16).to(DEVICE).requires_grad_(), unit_rows(24, 16).to(DEVICE)
    criterion = partial(patch_nce, images=images, implementation=implementation, reduction="sum")
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    ours, expected = (torch.autograd.grad(2.0 * f(q, k), q)[0] for f in (compiled, criterion))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_dynamic_shapes_and_every_gradient(implementation):
    def loss(q, k, e, how):
        return patch_nce(q, k, extra_keys=e, detach_keys=False, symmetric=True, implementation=how)

    # with every size dynamic, tracing the eager loss takes twice as long as with the sizes that vary here
    dynamic = True if implementation == "triton" else None
    compiled = torch.compile(lambda *x: loss(*x, implementation), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, extra in ((30, 9), (41, 7)):
        leaves = [unit_rows(n, 16).to(DEVICE).requires_grad_() for n in (rows, rows, extra)]
        for leaf in leaves:
            torch._dynamo.mark_dynamic(leaf, 0)
        ours, truth = (torch.autograd.grad(f, leaves) for f in (compiled(*leaves), loss(*leaves, "eager")))
        for a, b in zip(ours, truth, strict=True):
            assert error(a, b) <= 5e-6


def test_functional_gradient_and_refused_second_derivative():
    q, k = unit_rows(12, 16).to(DEVICE), unit_rows(12, 16).to(DEVICE)
    functional = torch.func.grad(lambda x: patch_nce(x, k, implementation="triton"))(q)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(patch_nce(leaf, k, implementation="eager"), leaf)
    torch.testing.assert_close(functional, expected, rtol=1e-4, atol=1e-6)
    queries = maps(requires_grad=True)
    losses = (patch_nce(leaf, k, implementation="triton"), leaf), (head()(queries, maps()), queries[1])
    for loss, source in losses:
        (gradient,) = torch.autograd.grad(loss, source, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            gradient.sum().backward()


def test_opcheck():
    operators = torch.ops.fastnce
    q, k, e = (unit_rows(2, n, 16).to(DEVICE) for n in (10, 10, 5))
    weight = torch.rand(2, 10, 10, device=DEVICE)
    arguments = ([q], [k], [e], [weight], [weight], [0.07], False, False, True, [])
    torch.library.opcheck(operators.nce_forward.default, arguments)
    _, negative, positive, _ = operators.nce_forward(*arguments)
    torch.library.opcheck(
        operators.nce_keys.default, ([q], [k], [weight], [weight], [0.07], negative, positive.sigmoid(), False, [])
    )
    torch.library.opcheck(operators.draw_ids.default, (torch.randint(9**9, (3, 2), device=DEVICE), [400, 81, 25], 24))
    ours, feats, others = head(layers=2), maps(2, layers=2), maps(2, layers=2)
    ids = some_ids(feats, 2)
    mlp = [w.detach() for mlp in ours.mlps(2) for w in mlp]
    torch.library.opcheck(operators.project.default, (feats, ids, mlp, torch.float32, True))
    units, *saved = operators.project(feats, ids, mlp, torch.float32, True)
    layout = triton_maps._pack([map_layout(m) for m in feats])
    torch.library.opcheck(
        operators.project_backward.default,
        (units, None, 1, layout, ids, mlp, units, *saved, False, [False, True], True),
    )
    torch.library.opcheck(operators.head.default, (feats, others, ids, mlp, mlp, [0.07] * 2, 2, 2, torch.float32, True))


def test_deterministic_mode():
    ours, queries, keys = head(), maps(requires_grad=True), maps()
    ids = some_ids(keys)
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (gradients(ours, queries, keys, patch_ids=ids) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(once[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(once[1], again[1], strict=True))
