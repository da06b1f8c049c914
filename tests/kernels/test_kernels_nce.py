"""The InfoNCE kernels against the float64 definition. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from fastnce.kernels import nce, nce_keys, project, project_backward, weight_gradient
from fastnce.kernels.nce_keys import nce_key_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import aot_cases
from tests.oracle import DEVICE, GRADIENT_GATE, LOSS_GATE, confident_pair, eager_error, error, oracle, unit_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def in_bfloat16_and_another(cases):
    """A covering subset: every case in bfloat16, and alternately in float32 or float16."""
    return [*((case, torch.bfloat16) for case in cases), *zip(cases, cycle(DTYPES[:2]), strict=False)]


def run(q, k, extra=None, log_weight=None, pair_weight=None, temperature=0.07, **options):
    """Call the launcher with one problem on the test device."""

    def listed(x):
        return [] if x is None else [x.to(DEVICE)]

    groups = q.shape[0]
    extra = None if extra is None else extra.expand(groups, -1, -1)
    loss, negative, positive, gradient = nce.nce_forward(
        listed(q), listed(k), listed(extra), listed(log_weight), listed(pair_weight), [temperature], **options
    )
    return loss.view(q.shape[:2]), negative.view(q.shape[:2]), positive.view(q.shape[:2]), *gradient


def check(q, k, *, temperature=0.07, unit=True, extra=None, log_weight=None, pair_weight=None, decoupled=False):
    """Check loss, statistics and all gradients against the gates and against twice the error of the eager path."""
    upstream = torch.rand(q.shape[:2]) + 0.5
    named = {
        "temperature": temperature,
        "decoupled": decoupled,
        "pair_log_weight_GSS": log_weight,
        "pair_weight_GSS": pair_weight,
    }
    truth = oracle(q, k, upstream, extra, **named)
    loss, negative, positive, d_q = run(
        q, k, extra, log_weight, pair_weight, temperature, unit=unit, decoupled=decoupled
    )
    up = upstream.to(DEVICE)
    grouped = None if extra is None else extra.expand(q.shape[0], -1, -1)
    eager_loss, eager_gradient = eager_error(q, k, truth, upstream, extra_keys_GED=grouped, **named)
    assert error(loss, truth.loss) <= max(LOSS_GATE[q.dtype], 1e-7)
    assert error(loss, truth.loss) <= max(2 * eager_loss, 2e-6)
    assert error(positive, truth.positive) <= 1e-5
    assert d_q.dtype == q.dtype
    scaled = d_q.float() * up[:, :, None]
    assert error(scaled, truth.d_queries) <= GRADIENT_GATE[q.dtype]
    assert error(scaled, truth.d_queries) <= max(2 * eager_gradient, 1e-6)

    share = up if decoupled else up * torch.sigmoid(negative - positive)
    weights = [[] if w is None else [w.to(DEVICE)] for w in (log_weight, pair_weight)]
    stats = [temperature], negative.flatten(), share.flatten()
    q, k = q.to(DEVICE), k.to(DEVICE)
    (d_k,) = nce_key_gradients([q], [k], *weights, *stats, extra=False)
    assert error(d_k, truth.d_keys) <= GRADIENT_GATE[q.dtype]
    if extra is not None:
        flat_queries = q if extra.shape[0] == q.shape[0] else q.flatten(0, 1)[None]
        (d_e,) = nce_key_gradients([flat_queries], [extra.to(DEVICE)], [], [], *stats, extra=True)
        assert error(d_e, truth.d_extra) <= GRADIENT_GATE[q.dtype]


SHAPES = [(1, 1, 3), (3, 2, 32), (2, 49, 64), (1, 70, 100), (1, 255, 128), (2, 256, 256), (1, 70, 512), (1, 1000, 64)]
CONFIDENCE = [1 / 256, 0.5, 0.9, 0.99, 0.999, 0.9999]


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((s, torch.bfloat16) for s in SHAPES), *zip(SHAPES, cycle(DTYPES), strict=False)]
)
def test_every_shape(shape, dtype):
    q, k = unit_rows(*shape, dtype=dtype), unit_rows(*shape, dtype=dtype)
    if shape[1] == 1:  # the positive alone: no negatives, loss or gradient
        loss, negative, _, d_q = run(q, k, unit=True)
        assert loss.item() == 0.0
        assert negative.item() == -torch.inf
        assert not d_q.any()
        return
    check(q, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", CONFIDENCE)
def test_confident_rows_keep_their_digits(p, dtype):
    q, k, temperature = confident_pair(1, 256, 256, p, dtype)
    check(q, k, temperature=temperature, unit=p not in (0.9, 0.9999) or dtype == torch.float32)


FORMS = [(w, e, d) for w in ("none", "log", "pair", "both") for e in (0, 70) for d in (False, True)]


@pytest.mark.parametrize(
    ("form", "dtype"), [*((f, torch.bfloat16) for f in FORMS), *zip(FORMS, cycle(DTYPES), strict=False)]
)
def test_forms(form, dtype):
    weights, extras, decoupled = form
    groups, rows, dim = 2, 70, 48
    q, k = unit_rows(groups, rows, dim, dtype=dtype), unit_rows(groups, rows, dim, dtype=dtype)
    extra = unit_rows(1 if decoupled else groups, extras, dim, dtype=dtype) if extras else None
    log_weight = torch.randn(groups, rows, rows) if weights in ("log", "both") else None
    pair_weight = torch.rand(groups, rows, rows) if weights in ("pair", "both") else None
    check(q, k, extra=extra, log_weight=log_weight, pair_weight=pair_weight, decoupled=decoupled)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_beyond_the_range_of_float16(dtype):
    """In float16, probabilities times a weight above 2 would overflow."""
    q, k = unit_rows(1, 70, 32, dtype=dtype), unit_rows(1, 70, 32, dtype=dtype)
    check(q, k, pair_weight=torch.full((1, 70, 70), 8.0) / 2.5)
    *_, d_q = run(q, k, pair_weight=8 * torch.rand(1, 70, 70), unit=True)
    assert d_q.isfinite().all()


def test_shared_extra_keys_of_two_hundred_and_fifty_six():
    q, k = unit_rows(3, 40, 32), unit_rows(3, 40, 32)
    check(q, k, extra=unit_rows(1, 256, 32))


@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.0231, 0.023, 0.005])
@pytest.mark.parametrize("dtype", DTYPES)
def test_temperatures(temperature, dtype):
    check(unit_rows(1, 100, 32, dtype=dtype), unit_rows(1, 100, 32, dtype=dtype), temperature=temperature)


def launches_of(monkeypatch, call, arch="sm_90"):
    """The options of each kernel that `call` launches on an architecture."""
    found: dict[str, dict] = {}
    for module in (nce, nce_keys, project, project_backward, weight_gradient):
        monkeypatch.setattr(module, "architecture", lambda device: arch)
        monkeypatch.setattr(
            module, "launch", lambda kernel, *args, **options: found.update({kernel.fn.__name__: options})
        )
    call()
    return found


def options_of(monkeypatch, call):
    (options,) = launches_of(monkeypatch, call).values()
    return options


def test_the_default_call_takes_the_bounded_form_and_the_large_tile(monkeypatch):
    rows = torch.empty(1, 16384, 256, dtype=torch.bfloat16, device="meta")
    default = options_of(monkeypatch, lambda: patch_nce_rows(rows))
    assert not default["ONLINE"]
    assert default["CHECKED"]
    assert (default["BM"], default["BN"], default["num_warps"]) == (128, 64, 8)
    promised = options_of(monkeypatch, lambda: patch_nce_rows(rows, unit=True))
    assert not promised["ONLINE"]
    assert not promised["CHECKED"]
    for other in (
        options_of(monkeypatch, lambda: patch_nce_rows(rows.half())),
        options_of(monkeypatch, lambda: patch_nce_rows(rows, temperature=0.02)),
        options_of(monkeypatch, lambda: patch_nce_rows(rows, unit=True, temperature=0.02)),
    ):
        assert other["ONLINE"]
        assert not other["CHECKED"]


def patch_nce_rows(rows, temperature=0.07, **options):
    nce.nce_forward([rows], [rows], [], [], [], [temperature], **options)


@pytest.fixture(params=["ieee", "tf32"])
def library_products(request):
    """PyTorch's setting for float32 products."""
    kept = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = kept


def test_products_are_tf32_if_pytorch_may_use_it(monkeypatch, library_products):
    stats = torch.empty(256, device="meta")

    def every_kernel(dtype):
        rows = torch.empty(1, 256, 64, dtype=dtype, device="meta")
        patch_nce_rows(rows)
        nce_key_gradients([rows], [rows], [], [], [0.07], stats, stats, extra=False)
        aot_cases._sample(64, (3, 64), dtype=dtype, distinct=False)

    for arch, dtype, expected in (
        ("sm_90", torch.float32, library_products),
        ("gfx942", torch.float32, "ieee"),
        ("sm_90", torch.bfloat16, "ieee"),
    ):
        found = launches_of(monkeypatch, lambda dtype=dtype: every_kernel(dtype), arch)
        assert "PRECISION" not in found.pop("merge_kernel")  # sums rows without rounding
        assert set(found) == {
            "nce_kernel", "nce_keys_kernel", "project_kernel", "project_backward_kernel", "weight_gradient_kernel",
        }  # fmt: skip
        assert {options["PRECISION"] for options in found.values()} == {expected}


def test_zero_and_identical_vectors():
    q, k = unit_rows(1, 65, 32), unit_rows(1, 65, 32)
    q[0, 3], k[0, 5] = 0, 0
    check(q, k)
    same = unit_rows(1, 1, 32).expand(1, 65, 32).contiguous()
    loss, _, _, d_q = run(same, same, unit=True)
    torch.testing.assert_close(loss.cpu(), torch.full((1, 65), 65.0).log())
    assert d_q.abs().max() < 1e-5


def test_strided_and_misaligned_rows():
    wide = unit_rows(1, 70, 131).to(DEVICE)  # before slicing: a copy to a device would be contiguous
    aligned = wide[:, :, 1:100].contiguous()
    k = unit_rows(1, 70, 99).to(DEVICE)
    for q in (wide[:, :, 1:100], aligned.transpose(1, 2).contiguous().transpose(1, 2)):
        assert not q.is_contiguous()
        for ours, theirs in zip(run(q, k, unit=False), run(aligned, k, unit=False), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_many_problems_in_one_launch_equal_one_each():
    shapes = [(2, 70, 24), (1, 3, 64), (3, 130, 7)]
    qs, ks = [unit_rows(*s).to(DEVICE) for s in shapes], [unit_rows(*s).to(DEVICE) for s in shapes]
    temperatures = [0.07, 0.2, 0.1]
    *together, gradients = nce.nce_forward(qs, ks, [], [], [], temperatures, unit=True)
    alone = [
        nce.nce_forward([q], [k], [], [], [], [t], unit=True) for q, k, t in zip(qs, ks, temperatures, strict=True)
    ]
    for i in range(3):
        torch.testing.assert_close(together[i], torch.cat([a[i] for a in alone]), rtol=1e-6, atol=1e-6)
    for ours, (theirs,) in zip(gradients, [a[3] for a in alone], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_gradient_the_loss_is_the_same():
    q, k = unit_rows(2, 70, 32), unit_rows(2, 70, 32)
    *with_gradient, _ = run(q, k, unit=True)
    without = run(q, k, unit=True, gradient=False)
    assert len(without) == 3
    for a, b in zip(with_gradient, without, strict=True):
        assert torch.equal(a, b)


def test_every_element_is_written_and_repeats_bitwise(monkeypatch):
    """Outputs start as NaN: an element that no program wrote stays NaN."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: new_empty(*a, **o).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty", lambda *a, **o: empty(*a, **o).fill_(torch.nan))
    q, k, extra = unit_rows(3, 67, 33), unit_rows(3, 67, 33), unit_rows(1, 5, 33)
    first = run(q, k, extra, unit=False)
    assert all(x.isfinite().all() for x in first)
    assert all(torch.equal(a, b) for a, b in zip(first, run(q, k, extra, unit=False), strict=True))
    stats = [0.07], first[1].flatten(), torch.ones(201, device=DEVICE)
    for keys, queries, is_extra in ((k, q, False), (extra, q.flatten(0, 1)[None], True)):
        once, again = (
            nce_key_gradients([queries.to(DEVICE)], [keys.to(DEVICE)], [], [], *stats, extra=is_extra)[0]
            for _ in range(2)
        )
        assert once.isfinite().all()
        assert torch.equal(once, again)


def test_a_nan_stays_nan():
    q, k = unit_rows(1, 70, 32), unit_rows(1, 70, 32)
    q[0, 9, 4] = torch.nan
    for unit in (True, False):
        loss, _, _, d_q = run(q, k, unit=unit)
        assert loss[0, 9].isnan()
        assert d_q[0, 9].isnan().any()
        assert loss[0, :9].isfinite().all()


def test_offsets_beyond_32_bits():
    """Rows 2^31 elements apart, in storage of which only those rows are touched."""
    if DEVICE.type != "cpu" and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 5 GiB of free device memory")
    stride = 2**31 + 64
    storage = torch.empty(stride + 64, dtype=torch.float16, device=DEVICE)  # 4 GiB, two pages of which are used
    q = storage.as_strided((2, 1, 64), (stride, 64, 1))
    k = unit_rows(2, 1, 64, dtype=torch.float16).to(DEVICE)
    q.copy_(unit_rows(2, 1, 64, dtype=torch.float16))
    pair = q.transpose(0, 1)  # (1, 2, 64): rows 2^31 apart; in q, groups
    far = run(pair, k.transpose(0, 1), unit=True)
    near = run(pair.contiguous(), k.transpose(0, 1).contiguous(), unit=True)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
    extra = unit_rows(1, 4, 64, dtype=torch.float16)
    far, near = run(q, k, extra, unit=True), run(q.contiguous(), k, extra, unit=True)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.tuples(st.integers(2, 90), st.integers(1, 70), st.integers(0, 2**31 - 1))


@quick
@given(sizes)
def test_property_order_of_negatives_does_not_matter(size):
    rows, dim, seed = size
    torch.manual_seed(seed)
    q, k = unit_rows(1, rows, dim), unit_rows(1, rows, dim)
    order = torch.randperm(rows)
    loss, _, _, d_q = run(q, k, unit=True)
    permuted, _, _, d_permuted = run(q[:, order], k[:, order], unit=True)
    torch.testing.assert_close(permuted.cpu(), loss.cpu()[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_permuted.cpu(), d_q.cpu()[:, order], rtol=1e-4, atol=1e-4)


@quick
@given(sizes)
def test_property_a_row_does_not_depend_on_other_queries(size):
    rows, dim, seed = size
    torch.manual_seed(seed)
    q, k = unit_rows(1, rows, dim), unit_rows(1, rows, dim)
    loss, _, _, d_q = run(q, k, unit=True)
    other = q.clone()
    other[0, 1:] = unit_rows(rows - 1, dim)
    changed, _, _, d_changed = run(other, k, unit=True)
    assert torch.equal(changed[0, 0], loss[0, 0])
    assert torch.equal(d_changed[0, 0], d_q[0, 0])


@quick
@given(sizes, st.floats(0.1, 8.0))
def test_property_scale_and_temperature_are_equivalent(size, factor):
    rows, dim, seed = size
    torch.manual_seed(seed)
    q, k = unit_rows(1, rows, dim), unit_rows(1, rows, dim)
    scaled, _, _, _ = run(q * factor, k, temperature=0.07 * factor, unit=False)
    loss, _, _, _ = run(q, k, unit=False)
    torch.testing.assert_close(scaled, loss, rtol=1e-4, atol=1e-4)
