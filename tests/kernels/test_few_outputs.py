"""Convolutions with few output channels: the kernels against float64, as operators, and in the generators."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from fastnce.kernels import chosen, few_outputs, few_outputs_backward
from fastnce.kernels.configs import Tile
from torch import Tensor

from fastnce.networks import ResnetGenerator, Restorer, fused_last, set_implementation
from fastnce.networks.layers import LastConvolution, full_precision, keeps_float32
from tests.maps import DEVICE, GATE, error, launches, random_map

VALUE_GATE = {torch.float32: 1e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}
"""For outputs and weight gradients: float32 sums of exact products, or of factors of 17 bits."""
MAP_GATE = {**GATE, torch.float32: 1e-6}
"""For the gradient of the map, which is rounded to the map's dtype."""


@pytest.fixture(autouse=True)
def exact_products():
    """Without this, PyTorch's convolutions and the kernels round to 10 bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def poison(monkeypatch):
    """Memory that has not been written is NaN."""

    def poisoned(create):
        def filled(*args, **options):
            x = create(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() and x.device.type != "meta" else x

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def small_tiles(monkeypatch, rows: int = 2) -> None:
    """Tiles so small that everything takes several programs, and a reduction several parts."""
    tiles = {"forward": Tile(16, rows, 4, 1), "map": Tile(32, 16, 4, 1), "weight": Tile(32, 32, 4, 1)}
    monkeypatch.setattr(chosen, "few_outputs_tile", lambda arch, dtype, kernel, *_: tiles[kernel])
    monkeypatch.setattr(chosen, "few_outputs_pack_tile", lambda arch: Tile(64, 1, 4, 1))


def parameters(outputs: int, channels: int, kernel: int, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    weight = 0.1 * torch.randn(outputs, channels, kernel, kernel, device=DEVICE)
    return weight, torch.randn(outputs, device=DEVICE) if bias else None


def check(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, upstream: Tensor | None = None):
    """Compare output and gradients with float64 on the same rounded numbers; return them."""
    y = few_outputs.few_outputs(x, weight, bias, padding)
    upstream = torch.randn_like(y) if upstream is None else upstream
    wanted = True, True, bias is not None
    gradients = few_outputs_backward.few_outputs_backward(upstream, x, weight, padding, *wanted)
    leaves = [t.detach().double().cpu().requires_grad_() for t in (x, weight, bias) if t is not None]
    truth = F.conv2d(*leaves, padding=padding) if bias is not None else F.conv2d(*leaves, None, padding=padding)
    expected = torch.autograd.grad(truth, leaves, upstream.double().cpu())
    assert y.dtype == torch.float32
    assert y.shape == truth.shape
    assert gradients[0].dtype == x.dtype
    assert gradients[1].dtype == gradients[2].dtype == torch.float32
    assert error(y, truth) <= VALUE_GATE[x.dtype]
    gates = (MAP_GATE[x.dtype], VALUE_GATE[x.dtype], 1e-6)
    for ours, theirs, gate in zip(gradients, expected, gates, strict=False):
        assert ours.shape == theirs.shape
        assert error(ours, theirs) <= gate
    assert gradients[2].numel() == (0 if bias is None else bias.numel())
    return y, *gradients


CASES = (
    # images, channels, height, width, outputs, kernel, padding, bias
    (1, 64, 12, 11, 3, 7, 0, True),
    (2, 3, 9, 7, 16, 7, 0, False),
    (1, 65, 7, 9, 1, 7, 3, True),
    (3, 16, 8, 10, 4, 7, 0, True),
    (2, 64, 5, 7, 3, 3, 1, True),
    (1, 3, 11, 4, 1, 3, 0, False),
    (1, 65, 6, 6, 16, 3, 1, True),
    (3, 16, 3, 5, 4, 3, 2, False),
    (2, 64, 5, 4, 16, 1, 0, True),
    (1, 65, 7, 3, 3, 1, 0, False),
    (3, 3, 1, 1, 4, 1, 0, True),
    (1, 16, 6, 9, 1, 1, 1, True),
    (1, 20, 9, 9, 5, 5, 2, True),
)


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, poison):
    images, channels, height, width, outputs, kernel, padding, bias = case
    check(
        random_map(images, channels, height, width, dtype=dtype), *parameters(outputs, channels, kernel, bias), padding
    )


@pytest.mark.parametrize(
    ("rows", "dtype", "padding"), [(1, torch.bfloat16, 0), (2, torch.float32, 1), (4, torch.bfloat16, 1)]
)
def test_many_programs_and_the_same_bits(rows, dtype, padding, poison, monkeypatch):
    small_tiles(monkeypatch, rows)
    weight, bias = parameters(5, 20, 3)
    x = random_map(2, 20, 5, 13, dtype=dtype)
    upstream = torch.randn(2, 5, 3 + 2 * padding, 11 + 2 * padding, device=DEVICE)
    once, again = (check(x, weight, bias, padding, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_seven_wide_in_many_programs(poison, monkeypatch):
    small_tiles(monkeypatch)
    check(random_map(1, 16, 9, 21, dtype=torch.bfloat16), *parameters(3, 16, 7), 0)


def test_channels_in_chunks(poison, monkeypatch):
    for module in (few_outputs, few_outputs_backward):
        monkeypatch.setattr(module, "channel_block", lambda channels: 16)
    for dtype in (torch.bfloat16, torch.float32):
        check(random_map(1, 40, 5, 6, dtype=dtype), *parameters(3, 40, 3), 1)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "transposed", "inside"])
def test_layouts(layout):
    x = random_map(2, 6, 8, 9, dtype=torch.bfloat16, layout=layout)
    weight, bias = parameters(3, 6, 3)
    for laid in (weight, weight.contiguous(memory_format=torch.channels_last), weight.flip(0)[:, :, :, ::1]):
        upstream = random_map(2, 3, 6, 7, layout=layout)
        y, d_x, d_weight, _ = check(x, laid, bias, 0, upstream)
        last = layout in ("channels_last", "inside")
        assert y.is_contiguous(memory_format=torch.channels_last) == last
        assert d_x.is_contiguous(memory_format=torch.channels_last) == last
        assert d_weight.stride() == laid.stride()


def test_expanded_maps_and_gradients():
    x = random_map(1, 5, 1, 8).expand(2, 5, 7, 8)
    check(x, *parameters(2, 5, 3), 1, torch.tensor(0.5, device=DEVICE).expand(2, 2, 7, 8))
    check(random_map(2, 5, 14, 16)[:, :, ::2, ::2], *parameters(2, 5, 3), 0)


def test_weights_and_gradients_of_16_bits():
    x = random_map(1, 16, 6, 7, dtype=torch.bfloat16)
    weight, bias = (t.bfloat16() for t in parameters(3, 16, 3))
    check(x, weight, bias, 0, random_map(1, 3, 4, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-7, 3e5])
def test_factors_beyond_the_range_of_float16(dtype, size):
    x, (weight, _) = random_map(1, 8, 7, 7, dtype=dtype), parameters(3, 8, 3)
    leaf = (size * weight).double().cpu().requires_grad_()
    truth = F.conv2d(x.double().cpu(), leaf)
    upstream = size * torch.randn(truth.shape, device=DEVICE)
    d_weight = few_outputs_backward.few_outputs_backward(upstream, x, weight, 0, False, True, False)[1]
    assert error(few_outputs.few_outputs(x, size * weight, None, 0), truth) <= 1e-5
    assert error(d_weight, torch.autograd.grad(truth, leaf, upstream.double().cpu())[0]) <= 1e-5


def test_only_wanted_gradients_are_computed(monkeypatch):
    names = launches(monkeypatch)
    x, (weight, _) = random_map(1, 4, 5, 5, dtype=torch.bfloat16), parameters(3, 4, 3)
    upstream = torch.randn(1, 3, 3, 3, device=DEVICE)
    backward = few_outputs_backward.few_outputs_backward
    every = backward(upstream, x, weight, 0, True, True, True)
    assert names == [
        "pack_gradient_kernel", "map_gradient_kernel", "few_outputs_sums_kernel", "few_outputs_join_kernel"
    ]  # fmt: skip
    for wanted in itertools.product((False, True), repeat=3):
        for ours, whole, of in zip(backward(upstream, x, weight, 0, *wanted), every, wanted, strict=True):
            assert torch.equal(ours, whole) if of else ours.numel() == 0
    del names[:]
    backward(upstream, x, weight, 0, True, False, False)
    assert names == ["pack_gradient_kernel", "map_gradient_kernel"]


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's
def test_an_infinity_reaches_its_neighbours_alone(monkeypatch):
    """One row of outputs per program: several rows share products with zeros between them."""
    small_tiles(monkeypatch, rows=1)
    x = random_map(1, 4, 9, 9, dtype=torch.bfloat16)
    x[0, 1, 5, 6] = torch.inf
    y = few_outputs.few_outputs(x, *parameters(3, 4, 3), 0)
    touched = torch.zeros(7, 7, dtype=torch.bool, device=DEVICE)
    touched[3:6, 4:7] = True
    assert not y[:, :, touched].isfinite().any()
    assert y[:, :, ~touched].isfinite().all()


def test_offsets_beyond_32_bits():
    """The second image or row is 2^31 elements after the first."""
    far = 2**31 + 64
    room = torch.empty(far + 4096, dtype=torch.float16, device=DEVICE)  # untouched pages take no memory
    values = torch.randn(2, 3, 2, 40).half()
    for image, row in ((far, 128), (512, far)):
        x = room.as_strided(values.shape, (image, 1, row, 3))
        x.copy_(values)
        weight, bias = parameters(2, 3, 1)
        y = few_outputs.few_outputs(x, weight, bias, 0)
        truth = F.conv2d(*(t.double().cpu() for t in (values, weight, bias)))
        assert error(y, truth) <= 1e-5
        upstream = torch.randn_like(y)
        d_weight = few_outputs_backward.few_outputs_backward(upstream, x, weight, 0, False, True, False)[1]
        expected = torch.einsum("nohw,nchw->oc", upstream.double().cpu(), values.double())[:, :, None, None]
        assert error(d_weight, expected) <= 1e-5


def test_unsupported_weights():
    x = random_map(1, 4, 5, 5)
    for shape in ((17, 4, 3, 3), (3, 4, 4, 4), (3, 4, 3, 5), (3, 4, 9, 9)):
        assert "at most 16 outputs" in few_outputs.obstacle(*shape)
        with pytest.raises(ValueError, match="at most 16 outputs"):
            fused_last.few_outputs_convolution(x, torch.empty(shape), None)
    with pytest.raises(ValueError, match="4 channels, but the weights are for 5"):
        fused_last.few_outputs_convolution(x, torch.empty(3, 5, 3, 3), None)
    with pytest.raises(ValueError, match="leave no output of 5x5"):
        fused_last.few_outputs_convolution(x, torch.empty(3, 4, 7, 7), None)


# As PyTorch operators


def test_opcheck():
    operators = torch.ops.fastnce
    weight, bias = parameters(3, 4, 3)
    for layout, dtype in (("channels_last", torch.bfloat16), ("contiguous", torch.float32)):
        x = random_map(2, 4, 6, 5, dtype=dtype, layout=layout)
        y = operators.few_outputs(x, weight, bias, 1)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operators.few_outputs.default, (x, weight, bias, 1), test_utils=tests)
        torch.library.opcheck(operators.few_outputs.default, (x, weight, None, 0), test_utils=tests)
        for wanted in ((True, True, True), (False, True, False)):
            arguments = (y, x, weight, 1, *wanted)
            torch.library.opcheck(operators.few_outputs_backward.default, arguments, test_utils=tests)


def test_second_derivatives():
    x, (weight, bias) = random_map(1, 4, 6, 5), parameters(3, 4, 3)
    second = []
    for function, leaves in (
        (fused_last.few_outputs_convolution, [x, weight, bias]),
        (lambda x, w, b, p: F.conv2d(x, w, b, padding=p), [t.double().cpu() for t in (x, weight, bias)]),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        slopes = torch.autograd.grad(function(*leaves, 1).pow(3).sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves))
    for ours, theirs in zip(*second, strict=True):
        assert error(ours, theirs) <= 1e-5


def test_functional_gradient():
    x, (weight, bias) = random_map(1, 4, 6, 5), parameters(3, 4, 3)
    ours = torch.func.grad(lambda w: fused_last.few_outputs_convolution(x, w, bias).pow(3).sum())(weight)
    leaf = weight.double().cpu().requires_grad_()
    truth = F.conv2d(x.double().cpu(), leaf, bias.double().cpu()).pow(3).sum()
    assert error(ours, torch.autograd.grad(truth, leaf)[0]) <= 1e-5


# In networks


def layer_and_map(dtype: torch.dtype = torch.bfloat16) -> tuple[LastConvolution, Tensor]:
    return LastConvolution(8, 3, 7).to(DEVICE), random_map(1, 8, 12, 13, dtype=dtype)


def test_the_layer_is_a_conv2d():
    layer, x = layer_and_map()
    assert isinstance(layer, torch.nn.Conv2d)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert keeps_float32(layer)
    twin = torch.nn.Conv2d(8, 3, 7).to(DEVICE)
    twin.load_state_dict(layer.state_dict())
    for implementation in ("eager", "triton"):
        layer.implementation = implementation
        for autocast in (False, True):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
                y = full_precision(layer, x)
            assert y.dtype == torch.float32
            assert error(y, twin(x.float()).double()) <= 1e-5


def test_which_implementation_computes(monkeypatch):
    names = launches(monkeypatch)
    layer, x = layer_and_map()
    set_implementation(layer, "eager")
    layer(x)
    assert not names
    set_implementation(layer, "triton")
    layer(x)
    assert names == ["pack_weight_kernel", "few_outputs_kernel"]
    with pytest.raises(ValueError, match="float64"):
        layer.double()(x.double())
    wide = LastConvolution(4, 17, 3).to(DEVICE)  # the kernels do not support it
    set_implementation(wide, "triton")
    del names[:]
    assert wide(random_map(1, 4, 5, 5)).shape == (1, 17, 3, 3)
    assert not names


@pytest.mark.parametrize("build", [lambda: ResnetGenerator(width=8, blocks=1), lambda: Restorer(width=8, middle=1)])
def test_generators_use_the_kernels(build, monkeypatch):
    network, x = build().to(DEVICE), random_map(1, 3, 16, 16, spread=0.5, centre=0.0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    results = []
    names = launches(monkeypatch)
    for implementation in ("eager", "triton"):
        set_implementation(network, implementation)
        leaf = x.clone().requires_grad_()
        y = network(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), (leaf, *network.parameters()), allow_unused=True)))
    assert names.count("few_outputs_kernel") == names.count("few_outputs_sums_kernel") == 1
    for theirs, ours in zip(*results, strict=True):
        assert (theirs is None) == (ours is None)  # a bias before an instance norm has no gradient
        if theirs is not None:
            assert error(ours, theirs.double()) <= 2e-5


def test_compiles_without_a_graph_break():
    layer, x = layer_and_map()
    layer.implementation = "triton"
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), (leaf, *layer.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
