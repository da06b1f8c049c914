"""PatchNCE of all layers and directions in one call: the kernels, the eager path, and DCLGAN's use of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastnce import project_patches
from fastnce.methods import dclgan
from fastnce.methods.base import Batch, Draws, NetworkOptions
from fastnce.nce import patch_nce_layers
from fastnce.nce.impl import reference
from tests.oracle import DEVICE, GRADIENT_GATE, LOSS_GATE, Launches, error, unit_rows

IMAGES, TEMPERATURES = 2, [0.07, 0.2]
SHAPES = [(2 * 33, 24), (2 * 20, 100)]  # of the rows of each layer
FORMS = ["none", "shared", "groups", "other"]


def rows(dtype, directions=2):
    """Return queries and keys as [direction][layer], with rows of any length; one row is zero."""
    sides = [[[torch.randn(*s).to(dtype) for s in SHAPES] for _ in range(directions)] for _ in range(2)]
    sides[0][0][1][3] = 0
    return sides


def extra(form, dtype, groups, directions=2):
    if form in ("none", "other"):
        return None if form == "none" else "other"
    shape = (1,) * (form == "shared") or (groups,)
    return [[unit_rows(*shape, 9, s[1], dtype=dtype).squeeze(0) for s in SHAPES] for _ in range(directions)]


def divided(rows):
    """Return unit rows in float64, rounded to their original dtype."""
    unit = F.normalize(rows.double(), dim=1, eps=1e-8)
    return unit + (unit.to(rows.dtype).double() - unit).detach()


def definition(queries, keys, form, groups):
    """Return the loss in float64, layer by layer and direction by direction, and the leaves of the queries."""
    leaves = [[q.clone().requires_grad_() for q in side] for side in queries]
    unit = [[divided(q) for q in side] for side in leaves]
    means = []
    for d, side in enumerate(unit):
        layers = []
        for i, (q, t) in enumerate(zip(side, TEMPERATURES, strict=True)):
            k = divided(keys[d][i])
            more = unit[1 - d][i].detach().unflatten(0, (groups, -1)) if form == "other" else None
            if isinstance(form, list):
                more = form[d][i].double().expand(groups, -1, -1)
            q, k = (x.unflatten(0, (groups, -1)) for x in (q, k))
            loss, _, _ = reference.nce_rows(q, k, more, temperature=t)
            layers.append(loss.mean())
        means.append(torch.stack(layers).mean())
    return torch.stack(means), leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", ["triton", "eager"])
def test_layers_and_their_gradients(implementation, form, dtype):
    groups = IMAGES if form != "shared" else 1
    queries, keys = rows(dtype)
    more = extra(form, dtype, groups)
    truth, leaves = definition(queries, keys, more, groups)
    weight = torch.tensor([2.0, -3.0])
    expected = torch.autograd.grad((truth * weight.double()).sum(), [q for side in leaves for q in side])

    ours = [[q.to(DEVICE).requires_grad_() for q in side] for side in queries]
    move = lambda side: side if side in ("other", None) else [[x.to(DEVICE) for x in layers] for layers in side]  # noqa: E731
    means = patch_nce_layers(
        ours, move(keys), images=IMAGES, negatives="image" if groups > 1 else "batch", temperature=TEMPERATURES,
        extra_keys=move(more), cosine=True, implementation=implementation,
    )  # fmt: skip
    assert means.shape == (2,)
    assert error(means, truth) <= LOSS_GATE[dtype]
    gradients = torch.autograd.grad((means * weight.to(means)).sum(), [q for side in ours for q in side])
    for a, b, q in zip(gradients, expected, [q for side in queries for q in side], strict=True):
        assert a.dtype == q.dtype
        some = q.any(dim=1)  # by definition a zero row has a gradient of 1e8; the kernels return 0
        assert implementation == "eager" or not a[~some].any()
        assert error(a[some], b[some]) <= GRADIENT_GATE[dtype]


def test_without_cosine_the_rows_are_used_unchanged():
    queries, keys = rows(torch.float32, directions=1)
    queries, keys = ([[F.normalize(x, dim=1) for x in side[0]]] for side in (queries, keys))
    for side in (queries, keys):
        side[0] = [x.to(DEVICE) for x in side[0]]
    leaves = [q.requires_grad_() for q in queries[0]]
    both = []
    for implementation in ("triton", "eager"):
        mean = patch_nce_layers([leaves], keys, images=IMAGES, unit_rows=True, implementation=implementation)
        assert mean.shape == (1,)
        both.append((mean.detach(), *torch.autograd.grad(mean.sum(), leaves)))
    for a, b in zip(*both, strict=True):
        assert error(a, b) <= 5e-6


def test_wrong_arguments_are_refused():
    q = torch.randn(6, 4)
    with pytest.raises(ValueError, match="the same directions and layers"):
        patch_nce_layers([[q], [q]], [[q]])
    with pytest.raises(ValueError, match="two directions"):
        patch_nce_layers([[q]], [[q]], extra_keys="other")
    with pytest.raises(ValueError, match="of one shape"):
        patch_nce_layers([[q], [q[:3]]], [[q], [q[:3]]])
    with pytest.raises(ValueError, match="one number or 1"):
        patch_nce_layers([[q]], [[q]], temperature=[0.1, 0.2])


def test_operators_and_compilation():
    queries, keys = rows(torch.float32)
    flat_q = [queries[d][i].to(DEVICE) for i in range(2) for d in range(2)]
    flat_k = [keys[d][i].to(DEVICE) for i in range(2) for d in range(2)]
    arguments = (flat_q, flat_k, [], [0.07, 0.07, 0.2, 0.2], IMAGES, 2, True, True, True, True, [])
    torch.library.opcheck(torch.ops.fastnce.nce_layers.default, arguments)
    mean, gradients = torch.ops.fastnce.nce_layers(*arguments)
    torch.library.opcheck(torch.ops.fastnce.row_gradients.default, (flat_q, gradients, mean, True))

    def loss(*leaves):
        return patch_nce_layers(
            [leaves[::2], leaves[1::2]], [flat_k[::2], flat_k[1::2]], images=IMAGES, extra_keys="other", cosine=True,
            implementation="triton",
        )  # fmt: skip

    leaves = [q.clone().requires_grad_() for q in flat_q]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    plain = loss(*leaves)
    torch.testing.assert_close(compiled, plain)
    both = (torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (compiled, plain))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)
    (first, *_) = torch.autograd.grad(loss(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()


@pytest.mark.parametrize("external", ["none", "branch"])
def test_launches_of_dclgan(monkeypatch, external):
    """Forward: ids of two domains, rows of two sides, three launches for all losses; backward: zeros and three."""
    options = dclgan.DCLGANOptions(nce_layers=[0, 1], patches=7, projection=16, external=external)
    torch.manual_seed(0)
    method = dclgan.DCLGAN(options, NetworkOptions("resnet_4blocks", width=4, discriminator_width=4)).to(DEVICE)
    for projector in (method.projector_a, method.projector_b):
        projector.implementation = "triton"
    maps = [[torch.randn(1, c, 6, 6, device=DEVICE, requires_grad=i > 1) for c in (3, 4)] for i in range(4)]
    monkeypatch.setattr(method, "features", lambda *_: maps)
    monkeypatch.setattr(dclgan, "project_patches", partial(project_patches, implementation="triton"))
    monkeypatch.setattr(dclgan, "patch_nce_layers", partial(patch_nce_layers, implementation="triton"))
    picture = torch.zeros(1, 3, 8, 8, device=DEVICE)
    with Launches() as forward:
        losses = method.contrast(Batch(picture, picture), {}, Draws())
    drawn, projected = ["draw_kernel"] * 2, ["project_kernel"] * 2
    assert forward.kernels == [*drawn, *projected, "cosine_kernel", "nce_kernel", "mean_kernel"]
    assert forward.library == ["aten.randint.default"] * 2
    upstream = torch.ones_like(losses)
    parameters = [*method.projector_a.parameters(), *method.projector_b.parameters()]
    with Launches() as backward:
        torch.autograd.grad(losses, [*maps[2], *maps[3], *parameters], upstream)
    assert backward.kernels == ["row_gradient_kernel", "project_backward_kernel", "weight_gradient_kernel"]
    assert sorted(backward.library) == ["aten.zeros.default"]
