"""The sampling kernels against the float64 definition. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from fastnce.kernels import common, project, project_backward, weight_gradient
from fastnce.kernels.map_layout import map_layout, map_views
from fastnce.kernels.nce import mean_by_direction
from fastnce.kernels.planned import forget_plans
from fastnce.kernels.sample import draw_ids
from fastnce.kernels.weight_gradient import weight_views

from fastnce import project_patches
from fastnce.nce.impl import reference
from fastnce.nce.impl.rows import gather_patches
from tests.oracle import DEVICE, GRADIENT_GATE, error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def chain(
    dtype, *, mlp=True, layout="nchw", map_dtype=None, repeated=False, per_image=False, hidden=32, dim=24,
    channels=(3, 20, 33),
):  # fmt: skip
    """Maps of three layers, ids (sets, patches), and weights that are exact in dtype."""
    sides, images = (9, 7, 6), 2
    maps = [torch.randn(images, c, s, s + 1).to(dtype) for c, s in zip(channels, sides, strict=True)]
    maps = [m.to(device=DEVICE, dtype=map_dtype or dtype) for m in maps]
    if layout == "channels_last":
        maps = [m.to(memory_format=torch.channels_last) for m in maps]
    elif layout == "odd":  # neither dense nor aligned
        maps = [torch.nn.functional.pad(m, (1, 2, 3, 0))[:, :, 3:, 1:-2] for m in maps]
    sets = images if per_image else 1
    ids = [torch.stack([torch.randperm(m.shape[2] * m.shape[3])[:20] for _ in range(sets)]).to(DEVICE) for m in maps]
    if repeated:
        ids[0][0, 5] = ids[0][0, 3]
        ids[1][-1, 1:9] = ids[1][-1, 19]
    shapes = [s for c in channels for s in ((hidden, c), (hidden,), (dim, hidden), (dim,))] if mlp else []
    weights = [(torch.randn(*s) / 4).to(dtype).float().to(DEVICE) for s in shapes]
    return maps, ids, weights


def definition(maps, ids, weights, upstream):
    """Rows and gradients of `reference.project` in float64."""
    leaves = [x.detach().double().cpu().requires_grad_() for x in [*maps, *weights]]
    layers, rows = len(maps), []
    for i, (m, given) in enumerate(zip(leaves, ids, strict=False)):
        spread = given.cpu().repeat_interleave(m.shape[0] // given.shape[0], dim=0)
        sampled = gather_patches(m, spread).flatten(0, 1)
        rows.append(reference.project(sampled, leaves[layers + 4 * i : layers + 4 * i + 4] if weights else None))
    return rows, torch.autograd.grad(rows, leaves, [u.double().cpu() for u in upstream])


def eager_errors(maps, ids, weights, dtype, upstream, gradients):
    """The errors of the same gradients, computed by PyTorch's operators in the same dtype."""
    leaves = [x.detach().clone().requires_grad_() for x in [*maps, *(w.to(dtype) for w in weights)]]
    mlps = [tuple(leaves[i : i + 4]) for i in range(len(maps), len(leaves), 4)] or None
    feats = leaves[: len(maps)] if mlps else [m.to(dtype) for m in leaves]
    rows = project_patches(feats, ids, mlps, implementation="eager")
    return [error(a, b) for a, b in zip(torch.autograd.grad(rows, leaves, upstream), gradients, strict=True)]


def gradient_gate(dtype, mlp):
    """GRADIENT_GATE, except for 16-bit MLPs.

    Rounding to bfloat16 has an error of 2^-8 / sqrt(3) of the value at the lower end of a binade, and 0.735 of that
    over a whole binade: 1.66e-3. The gradient of a map is rounded three times (d_z and d_h before the matrix unit, and
    the store): 2.9e-3. Tensors of a few dozen values vary by half as much again. For float16 rows, the gradients are
    also multiplied in bfloat16, for its range (1 / |x| of a short row), which rounds both weights too: five times,
    3.7e-3.
    """
    if dtype == torch.float32 or not mlp:
        return {torch.float32: 2e-6}.get(dtype, GRADIENT_GATE[torch.bfloat16])
    return 1.6 * 1.66e-3 * (3 if dtype == torch.bfloat16 else 5) ** 0.5


def backward(maps, ids, weights, units, saved, upstream, distinct=True, **options):
    layouts = [map_layout(m) for m in maps]
    wanted = [True] * len(maps)
    buffer, flat = project_backward.project_backward(
        upstream, options.get("scale"), options.get("directions", 1), layouts, ids, weights, units, *saved,
        distinct=distinct, wanted=wanted, weights_wanted=True,
    )  # fmt: skip
    return map_views(buffer, layouts, wanted) + weight_views(flat, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        {"layout": "nchw"},
        {"layout": "channels_last", "per_image": True},
        {"layout": "odd", "map_dtype": torch.float32},
        {"layout": "channels_last", "repeated": True, "per_image": True},
        {"layout": "nchw", "repeated": True, "mlp": False},
        {"layout": "channels_last", "mlp": False},
        {"hidden": 70, "dim": 100},
        {"channels": (3, 32, 48), "layout": "channels_last"},
        {"channels": (48, 3, 20), "repeated": True},
        {"channels": (16, 96, 32), "layout": "odd"},
        {"channels": (16, 48, 32), "mlp": False, "repeated": True},
        {"channels": (3, 16, 32), "mlp": False, "layout": "channels_last"},
    ],
    ids=str,
)
def test_rows_and_gradients(case, dtype):
    maps, ids, weights = chain(dtype, **case)
    units, *saved = project.project(maps, ids, weights, dtype, len(maps))
    upstream = [torch.randn(u.shape).to(u) for u in units]
    rows, gradients = definition(maps, ids, weights, upstream)
    for ours, truth in zip(units, rows, strict=True):
        assert ours.dtype == dtype
        assert error(ours, truth) <= (1e-6 if dtype == torch.float32 else GRADIENT_GATE[dtype])
    ours = backward(maps, ids, weights, units, saved, upstream, distinct=not case.get("repeated", False))
    gate, library = gradient_gate(dtype, bool(weights)), eager_errors(maps, ids, weights, dtype, upstream, gradients)
    for a, b, eager in zip(ours, gradients, library, strict=True):
        assert error(a, b) <= gate
        assert dtype == torch.float16 or error(a, b) <= max(2 * eager, 1e-6)  # float16: see `gradient_gate`
    for m, g in zip(maps, ours, strict=False):
        assert g.dtype == m.dtype
        assert g.is_contiguous(memory_format=torch.channels_last) or not map_layout(m).channels_last
    again = backward(maps, ids, weights, units, saved, upstream, distinct=not case.get("repeated", False))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_give_the_same_bits(dtype):
    """A kernel rounds float32 weights to the dtype of the rows."""
    maps, ids, weights = chain(dtype, channels=(3, 32, 48))
    weights = [torch.randn_like(w) / 4 for w in weights]
    narrow = [w.to(dtype) if w.dim() == 2 else w for w in weights]
    results = []
    for mlp in (weights, narrow):
        units, *saved = project.project(maps, ids, mlp, dtype, len(maps))
        # products of gradients are in bfloat16: float16 weights would be rounded twice
        of_gradients = mlp if dtype == torch.bfloat16 else weights
        results.append([*units, *saved, *backward(maps, ids, of_gradients, units, saved, units)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_rows_are_split_where_they_are_many():
    assert weight_gradient.parts_of("sm_90", 36, (4096,) * 5) == 8
    assert weight_gradient.parts_of("sm_90", 36, (2048, 8192)) == 14
    assert weight_gradient.parts_of("sm_90", 140, (512,) * 5) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_parts(dtype, monkeypatch):
    """Layers of 40, 40 and 26 rows in parts of 16: the last part is short, or empty."""
    maps, ids, weights = chain(dtype, channels=(3, 32, 48))
    ids[2] = ids[2][:, :13]
    units, *saved = project.project(maps, ids, weights, dtype, len(maps))
    upstream = [torch.randn(u.shape).to(u) for u in units]
    _, truth = definition(maps, ids, weights, upstream)
    parts, started = [], []
    start = common.start
    monkeypatch.setattr(
        common, "start", lambda kernel, *a, **o: (started.append(kernel.__name__), start(kernel, *a, **o))
    )
    monkeypatch.setattr(weight_gradient, "rows_at_once", lambda dtype: 16)
    for count in (1, 3):
        monkeypatch.setattr(weight_gradient, "parts_of", lambda arch, programs, rows, n=count: n)
        forget_plans()
        parts.append(backward(maps, ids, weights, units, saved, upstream)[len(maps) :])
    forget_plans()
    for whole, split, exact in zip(*parts, truth[len(maps) :], strict=True):
        assert error(split, exact) <= gradient_gate(dtype, True)
        assert error(split, whole.double().cpu()) <= 1e-6
    assert [name for name in started if name.startswith("weight")] == ["weight_gradient_kernel"] * 2 + [
        "weight_join_kernel"
    ]


def test_every_element_is_written(monkeypatch):
    maps, ids, weights = chain(torch.float32)
    empty = torch.empty
    poisoned = lambda *a, **o: empty(*a, **o).fill_(torch.nan) if o["dtype"].is_floating_point else empty(*a, **o)  # noqa: E731
    monkeypatch.setattr(torch, "empty", poisoned)
    units, *saved = project.project(maps, ids, weights, torch.float32, len(maps))
    assert all(x.isfinite().all() for x in [*units, *saved])
    ours = backward(maps, ids, weights, units, saved, units, distinct=False)
    assert all(g.isfinite().all() for g in ours)


def test_a_row_of_zeros_and_a_very_short_one():
    """The length is computed in float32 and includes eps; the gradient at zero is 0."""
    m = torch.zeros(1, 4, 1, 3)
    m[0, :, 0, 1] = 1e-6
    m[0, :, 0, 2] = 1.0
    ids = [torch.arange(3)[None].to(DEVICE)]
    maps = [m.to(DEVICE)]
    units, *saved = project.project(maps, ids, [], torch.float32, 1)
    (rows,), (gradient,) = definition(maps, ids, [], [torch.ones(3, 4)])
    torch.testing.assert_close(units[0].cpu().double(), rows, rtol=1e-5, atol=1e-7)
    (ours,) = backward(maps, ids, [], units, saved, [torch.ones(3, 4, device=DEVICE)])
    assert not ours[0, :, 0, 0].any()
    torch.testing.assert_close(ours.cpu().double(), gradient, rtol=1e-4, atol=1e-6)


def test_short_projections_in_float16():
    """As at initialisation: rows of length 1e-6 before the division, too short for float16."""
    torch.manual_seed(0)
    maps, ids, weights = chain(torch.float16)
    weights = [w * 2.0**-9 for w in weights]  # a power of two: still exact in float16
    units, *_ = project.project(maps, ids, weights, torch.float16, len(maps))
    rows, _ = definition(maps, ids, weights, [torch.zeros_like(u) for u in units])
    for ours, truth in zip(units, rows, strict=True):
        assert error(ours, truth) <= 5e-3


def test_a_location_outside_the_map_gives_nan():
    maps, ids, weights = chain(torch.float32)
    ids[1][0, 4] = maps[1].shape[2] * maps[1].shape[3]
    units, *_ = project.project(maps, ids, weights, torch.float32, len(maps))
    assert units[1][4].isnan().all()
    assert units[1][:4].isfinite().all()


def test_unwanted_maps_take_no_memory():
    maps, ids, weights = chain(torch.float32)
    units, *saved = project.project(maps, ids, weights, torch.float32, len(maps))
    layouts, wanted = [map_layout(m) for m in maps], [False, True, False]
    buffer, flat = project_backward.project_backward(
        units, None, 1, layouts, ids, weights, units, *saved, distinct=True, wanted=wanted, weights_wanted=False
    )
    assert buffer.numel() == layouts[1].bytes()
    assert flat.numel() == 0
    none, view, also_none = map_views(buffer, layouts, wanted)
    assert none is None
    assert also_none is None
    assert view.shape == maps[1].shape


def test_upstream_by_direction():
    maps, ids, weights = chain(torch.float32, per_image=True)
    units, *saved = project.project(maps, ids, weights, torch.float32, len(maps))
    scale = torch.tensor([2.0, -3.0], device=DEVICE)
    d_units = [torch.randn(u.shape).to(u) for u in units]
    fused = backward(maps, ids, weights, units, saved, d_units, scale=scale, directions=2)
    factor = [d * scale.repeat_interleave(20)[:, None] / (20 * 3) for d in d_units]
    apart = backward(maps, ids, weights, units, saved, factor)
    for a, b in zip(fused, apart, strict=True):
        assert error(a, b) <= 1e-6


@pytest.mark.parametrize(("locations", "patches"), [(1, 5), (2, 2), (7, 3), (300, 256), (68644, 256), (10, 64)])
def test_drawn_ids_are_distinct_and_inside(locations, patches):
    seeds = torch.randint(2**62, (2, 3), device=DEVICE)
    ids = draw_ids(seeds, [locations, 50], patches)
    taken = min(patches, locations)
    for chosen in ids[: 3 * taken].view(3, taken):
        assert len(chosen.unique()) == taken
        assert chosen.min() >= 0
        assert chosen.max() < locations
    assert torch.equal(ids, draw_ids(seeds, [locations, 50], patches))


def test_drawn_ids_are_uniform():
    """Chi-square over 60 locations and over the differences of consecutive ids: 60 draws of 20."""
    seeds = torch.randint(2**62, (1, 60), device=DEVICE)
    ids = draw_ids(seeds, [60], 20).view(60, 20).cpu()
    counts = torch.bincount(ids.flatten(), minlength=60).double()
    chi = ((counts - 20) ** 2 / 20).sum() * 59 / 40  # without replacement within a draw
    assert 25 < chi < 110  # 59 degrees of freedom: outside with p < 1e-4
    gaps = torch.bincount(((ids[:, 1:] - ids[:, :-1]) % 60).flatten(), minlength=60)[1:].double()
    expected = gaps.sum() / 59
    assert 24 < ((gaps - expected) ** 2 / expected).sum() < 110


def test_mean_by_direction():
    loss = torch.randn(2 * 1500 + 2 * 7, device=DEVICE)
    ours = mean_by_direction(loss, [3000, 14], 2)
    truth = torch.stack([loss[:3000].view(2, 1500).mean(1), loss[3000:].view(2, 7).mean(1)]).mean(0)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
