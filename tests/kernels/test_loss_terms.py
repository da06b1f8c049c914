"""The kernels of a loss's terms: against float64, in every layout and number of programs, and in the methods."""

from __future__ import annotations

import pytest
import torch
from fastnce.kernels import configs, loss_terms
from fastnce.kernels.configs import Tile

from fastnce.common import dispatch
from fastnce.methods import losses
from fastnce.methods.loss_kernels import KINDS, Entry, TermUse, formula, total_and_values
from fastnce.methods.terms import Terms, judge
from tests.maps import DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
MODES = ("lsgan", "vanilla", "wgangp", "nonsaturating", "hinge")


@pytest.fixture
def accelerator(monkeypatch):
    """Tensors on the CPU take the path of an accelerator."""
    monkeypatch.setattr(dispatch, "is_default", lambda device: True)


@pytest.fixture
def several_programs(monkeypatch):
    monkeypatch.setattr(loss_terms, "SHORT", 64)
    monkeypatch.setattr(configs, "find_tile", lambda *_, **__: Tile(128, 1, 4, 1))


def image(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> torch.Tensor:
    x = torch.randn(*shape, device=DEVICE).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def assert_near(measured: torch.Tensor, exact: torch.Tensor, gate: float) -> None:
    assert (measured.double() - exact).norm() <= gate * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_at_the_first_use_passes(dtype):
    checks = list(TermUse(tuple((kind, dtype) for kind in KINDS)).measure(DEVICE, dtype))
    assert len(checks) == 1 + len(KINDS)
    assert all(check.ok for check in checks), [check.line() for check in checks]


def test_the_check_at_the_first_use_sees_a_wrong_kernel(monkeypatch):
    right = loss_terms.loss_slopes
    monkeypatch.setattr(loss_terms, "loss_slopes", lambda g, *rest: right(1.01 * g, *rest))
    checks = list(TermUse((("square", torch.float32),)).measure(DEVICE, torch.float32))
    assert [check.ok for check in checks] == [True, False]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_programs_equal_float64(dtype, last, several_programs):
    """Rows of one tensor, whole tensors in two layouts, and one name for two terms."""
    torch.manual_seed(0)
    judged, given = image(4, 1, 9, 7, dtype=dtype).requires_grad_(), torch.rand(2, device=DEVICE).requires_grad_()
    x, y = image(2, 3, 10, 9, dtype=dtype, last=last).requires_grad_(), image(2, 3, 10, 9)
    entries = [
        Entry("square", 1.0, 0.5, judged, None, (0, 3), 2.0, 0),
        Entry("square", 0.0, 0.5, judged, None, (3, 4), 2.0, 0),
        Entry("linear", 1.0, 3.0, given, None, (0, 1), 0.5, 1),
        Entry("linear", 1.0, 3.0, given, None, (1, 2), 0.5, 2),
        Entry("distance", 0.0, 1.5, x, y, None, 1.0, 3),
        Entry("spectrum", 0.0, 0.5, x, y, None, 1.0, 4),
    ]
    total, values = total_and_values(entries)
    found = torch.autograd.grad(1024 * total, [judged, given, x])
    wide = {id(t): t.detach().double().requires_grad_() for t in (judged, given, x, y)}
    exact = []
    for e in entries:
        own = wide[id(e.x)]
        own = own if e.rows is None else own[slice(*e.rows)]
        exact.append(e.scale * formula(e.kind, e.number, own, wide[id(y)]))
    expected = torch.stack([exact[0] + exact[1], *exact[2:]])
    sums = sum(e.share * value for e, value in zip(entries, exact, strict=True))
    assert_near(values, expected.detach(), 1e-6)
    assert_near(total.detach(), sums.detach(), 1e-6)
    slopes = torch.autograd.grad(1024 * sums, [wide[id(t)] for t in (judged, given, x)])
    for ours, theirs, leaf in zip(found, slopes, (judged, given, x), strict=True):
        assert ours.dtype == leaf.dtype
        assert ours.shape == leaf.shape
        assert_near(ours, theirs, GATE[leaf.dtype])
    again, _ = total_and_values(entries)
    assert torch.equal(again, total)


@pytest.mark.parametrize("width", [8, 9])
def test_spectra_of_even_and_odd_widths(width):
    torch.manual_seed(1)
    xs = [image(2, 3, 6, width).requires_grad_() for _ in range(2)]
    ys = [image(2, 3, 6, width) for _ in range(2)]
    entries = [Entry("spectrum", 0.0, 1.0, x, y, None, 1.0, i) for i, (x, y) in enumerate(zip(xs, ys, strict=True))]
    total, values = total_and_values(entries)
    for x, y, value, slope in zip(xs, ys, values, torch.autograd.grad(total, xs), strict=True):
        wide = x.detach().double().requires_grad_()
        exact = losses.frequency_cycle_loss(wide, y.double())
        assert_near(value, exact.detach(), 1e-6)
        assert_near(slope, torch.autograd.grad(exact, wide)[0], 1e-6)


def test_equal_images_have_no_distance_and_no_slope():
    x = image(1, 3, 8, 8).requires_grad_()
    entries = [Entry(kind, 0.0, 1.0, x, x.detach(), None, 1.0, i) for i, kind in enumerate(("distance", "spectrum"))]
    total, values = total_and_values(entries)
    assert values.tolist() == [0.0, 0.0]
    assert not torch.autograd.grad(total, x)[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["square", "softplus", "linear", "hinge"])
def test_what_is_not_finite_stays_so_as_in_pytorch(kind, bad):
    x, y = torch.zeros(2, 1, 5, 5, device=DEVICE), torch.zeros(2, 1, 5, 5, device=DEVICE)
    x[1, 0, 2, 3] = bad
    x.requires_grad_()
    total, _ = total_and_values([Entry(kind, -1.0, 1.0, x, y)])
    exact = formula(kind, -1.0, x, y)
    torch.testing.assert_close(total, exact, equal_nan=True)
    slopes = [torch.autograd.grad(loss, x)[0] for loss in (total, exact)]
    torch.testing.assert_close(*slopes, equal_nan=True)


def test_a_distance_that_is_not_a_number_has_no_finite_slope():
    """In PyTorch, the slope there is 0, so that the step would look sound."""
    x = torch.tensor([[1.0, float("nan")]], device=DEVICE, requires_grad=True)
    total, _ = total_and_values([Entry("distance", 0.0, 1.0, x, torch.zeros_like(x))])
    assert total.isnan()
    assert torch.autograd.grad(total, x)[0].isnan().tolist() == [[False, True]]


def test_constants_get_no_gradient_and_rows_that_no_term_reads_get_zero():
    x, constant = torch.randn(3, 1, 4, 4, device=DEVICE).requires_grad_(), torch.randn(2, device=DEVICE)
    entries = [Entry("square", 1.0, 1.0, x, None, (1, 2)), Entry("linear", 1.0, 1.0, constant, None, (0, 1), 1.0, 1)]
    total, values = total_and_values(entries)
    assert not values.requires_grad
    (slope,) = torch.autograd.grad(total, x)
    assert not slope[[0, 2]].any()
    assert slope[1].all()


@pytest.mark.parametrize("for_generator", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_terms_are_the_objectives(mode, for_generator, accelerator, monkeypatch):
    """By kernels and in plain PyTorch, of one output for fake and real images."""
    torch.manual_seed(2)
    shown = [torch.randn(2, 1, 6, 6, device=DEVICE), torch.randn(1, 1, 6, 6, device=DEVICE)]
    scale = torch.ones((), device=DEVICE, requires_grad=True)

    def run() -> tuple[torch.Tensor, dict, torch.Tensor]:
        terms = Terms()
        fake, real = judge(lambda images: scale * images, shown, True)
        terms.gan("real", real, True, mode, for_generator=for_generator, share=0.5)
        terms.gan("fake", fake, False, mode, for_generator=for_generator, weight=2.0)
        total, values = terms.total()
        return total.detach(), values, torch.autograd.grad(total, scale)[0]

    calls = []
    values_of = loss_terms.loss_values
    monkeypatch.setattr(loss_terms, "loss_values", lambda *given: calls.append(given) or values_of(*given))
    by_kernels = run()
    assert calls
    calls.clear()
    monkeypatch.setattr(dispatch, "is_default", lambda device: False)
    plain = run()
    assert not calls
    expected = [
        losses.gan_loss(shown[1], True, mode, for_generator=for_generator),
        2.0 * losses.gan_loss(shown[0], False, mode, for_generator=for_generator),
    ]
    for total, values, slope in (by_kernels, plain):
        torch.testing.assert_close([values["real"], values["fake"]], expected)
        torch.testing.assert_close(total, 0.5 * expected[0] + expected[1])
        torch.testing.assert_close(slope, plain[2])


def compared(fill, *leaves: torch.Tensor) -> list[bool]:
    """Whether values and gradients of the terms that `fill` adds equal those of plain PyTorch."""
    found = []
    for plain in (False, True):
        terms = Terms()
        fill(terms)
        if plain:
            terms._by_kernels = lambda: False
        total, values = terms.total()
        found.append([*values.values(), *torch.autograd.grad(total, leaves)])
    return [torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) for ours, theirs in zip(*found, strict=True)]


def test_terms_may_share_rows(accelerator):
    x = torch.randn(4, 1, 2, 2, device=DEVICE, requires_grad=True)
    values = torch.randn(2, device=DEVICE, requires_grad=True)

    def twice(terms):
        terms.gan("a", (x, (0, 2)), True)
        terms.gan("b", (x, (1, 3)), False, "hinge")

    def whole(terms):
        terms.gan("a", x, True)
        terms.gan("b", (x, (0, 2)), False)

    def given(terms):
        terms.given(["a", "b"], values)
        terms.given(["c"], values, weight=3.0)

    def apart(terms):
        terms.gan("a", (x, (2, 4)), True)
        terms.gan("b", (x, (0, 1)), False)

    for fill, leaf in ((twice, x), (whole, x), (given, values), (apart, x)):
        assert all(compared(fill, leaf)), fill.__name__


def test_names_may_come_again(accelerator):
    x = torch.randn(2, 1, 3, 3, device=DEVICE, requires_grad=True)

    def fill(terms):
        terms.gan("a", x, True)
        terms.gan("b", x, False)
        terms.gan("a", x, False, "hinge")

    assert all(compared(fill, x))


def test_terms_refuse_what_their_functions_refuse(accelerator):
    x, y = torch.randn(2, 3, 4, 4, device=DEVICE, requires_grad=True), torch.randn(1, 3, 4, 4, device=DEVICE)
    for add, message in (
        (lambda terms: terms.gan("a", x, True, "lsgn"), "gan_mode must be one of"),
        (lambda terms: terms.gan("a", x, 1), "target_is_real must be True or False"),
        (lambda terms: terms.gan("a", (x, (1, 1)), True), "must not be empty"),
        (lambda terms: terms.channels("a", x, y), "shape"),
        (lambda terms: terms.spectrum("a", x, y), "shape"),
    ):
        terms = Terms()
        add(terms)
        with pytest.raises(ValueError, match=message):
            terms.total()
    terms = Terms()
    terms.distance("a", x, y)
    with pytest.warns(UserWarning, match="broadcasting"):
        total, _ = terms.total()
    assert torch.allclose(total, (x - y).abs().mean())
