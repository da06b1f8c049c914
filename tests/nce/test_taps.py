"""Taps: rows of a generator's features without dense gradients, against the dense features and against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from fastnce.kernels import common
from fastnce.kernels.add_rows import add_rows
from torch import Tensor, nn

from fastnce.common import first_use
from fastnce.common.first_use import find_fault
from fastnce.common.taps import MOST_ROWS, Slot, Tap, opened, untapped
from fastnce.nce import PatchNCEHead, project_patches
from fastnce.nce.impl.uses import MapsUse
from fastnce.networks import ResnetGenerator, set_implementation
from tests.oracle import DEVICE, GRADIENT_GATE, error

pytestmark = pytest.mark.skipif(not common.INTERPRET.value, reason="made for Triton's interpreter")

LAYERS = [0, 4, 8, 12]
PATCHES = 12


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setenv("FASTNCE_CHECK_KERNELS", "0")
    first_use.forget()
    yield
    first_use.forget()


# The kernel


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_added_in_place(layout, dtype):
    images, channels, patches, sets = 4, 20, 300, 2  # more rows than one block has
    target = torch.randn(images, channels, 17, 19).to(dtype)
    if layout == "channels_last":
        target = target.to(memory_format=torch.channels_last)
    elif layout == "odd":
        target = nn.functional.pad(target, (1, 2, 3, 0))[:, :, 3:, 1:-2]
    rows = torch.randn(images * patches, channels)
    ids = torch.stack([torch.randperm(17 * 19)[:patches] for _ in range(sets)])
    ids[0, 7] = 17 * 19  # left out
    before, d_bias = target.double(), torch.full((channels,), float("nan"))
    place = ids.repeat_interleave(images // sets, 0)
    inside = (place < 17 * 19).flatten()
    exact = nn.functional.pad(before.flatten(2), (0, 1))
    exact.scatter_add_(2, place[:, None].expand(-1, channels, -1), rows.double().view(images, patches, -1).mT)
    expected = exact[:, :, :-1].view_as(before)
    add_rows(target.to(DEVICE), rows.to(DEVICE), ids.to(DEVICE), d_bias)
    assert torch.equal(target, expected.to(dtype))
    total = rows[inside].double().sum(0)
    assert error(d_bias, total) < 1e-6
    add_rows(target, rows, ids, d_bias, more=True)
    assert error(d_bias, 2 * total) < 1e-6


# A generator and a head


class Pair(nn.Module):
    """A small generator and a head, with weights that make every gradient far from zero."""

    def __init__(self, implementation="triton", **options):
        super().__init__()
        torch.manual_seed(0)
        self.G = ResnetGenerator(width=4, blocks=1)
        self.F = PatchNCEHead(self.G.feature_channels(LAYERS), 8, PATCHES, implementation=implementation, **options)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        set_implementation(self.G, implementation)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.named_parameters()}


def pictures(images: int = 2) -> Tensor:
    return torch.rand(images, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def contrast(pair: Pair, real: Tensor, *, taps: bool, ids: list[Tensor] | None = None) -> Tensor:
    """PatchNCE of two directions between pictures and their negatives. The last layer's gradient passes every norm."""
    with torch.no_grad():
        keys = pair.G(-real, LAYERS, encode_only=True, taps=taps)
    queries = pair.G(real, LAYERS, encode_only=True, taps=taps)
    assert [type(q) is Tap for q in queries] == [type(k) is Tap for k in keys] == [False, taps, taps, False]
    torch.manual_seed(3)
    return pair.F(queries, keys, directions=2, patch_ids=ids).sum()


def drawn_ids(pair: Pair, real: Tensor) -> list[Tensor]:
    """The locations that `contrast` draws."""
    with torch.no_grad():
        keys = pair.G(real, LAYERS, encode_only=True)
    torch.manual_seed(3)
    return pair.F.draw_ids(keys, 2)


def exact_gradients(pair: Pair, real: Tensor) -> dict[str, Tensor | None]:
    """The gradients of plain PyTorch in float64, of the biases in front of norms among them."""
    ids = drawn_ids(pair, real)
    exact = Pair("eager").double()
    exact.load_state_dict({name: t.double() for name, t in pair.state_dict().items()})
    contrast(exact, real.double(), taps=False, ids=ids).backward()
    return exact.gradients()


def test_gradients_are_those_of_float64():
    pair, real = Pair(), pictures(4)
    exact = exact_gradients(pair, real)
    errors = []
    for taps in (False, True):
        pair.zero_grad()
        contrast(pair, real, taps=taps).backward()
        found = pair.gradients()
        assert [name for name, g in found.items() if g is None] == [name for name, g in exact.items() if g is None]
        errors.append({name: error(g, exact[name]) for name, g in found.items() if g is not None})
    assert max(errors[1][f"G.model.{i}.bias"] for i in (4, 8)) < 1e-4
    for name, value in errors[1].items():
        assert value <= 2 * errors[0][name] + GRADIENT_GATE[torch.float32], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_errors_are_those_of_dense_features(dtype):
    pair, real = Pair(), pictures()
    exact = exact_gradients(pair, real)
    errors = []
    for taps in (False, True):
        pair.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = contrast(pair, real, taps=taps)
        loss.backward()
        errors.append({name: error(g, exact[name]) for name, g in pair.gradients().items() if g is not None})
    mean = [sum(values.values()) / len(values) for values in errors]
    assert mean[1] < 1.3 * mean[0]


def test_repeated_steps_have_the_same_bits():
    pair, real = Pair(), pictures()
    steps = []
    for _ in range(2):
        pair.zero_grad()
        loss = contrast(pair, real, taps=True)
        loss.backward()
        steps.append([loss.detach(), *(g.clone() for g in pair.gradients().values() if g is not None)])
    for step in steps[1:]:
        assert all(map(torch.equal, step, steps[0]))


def test_a_backward_pass_that_stops_early_leaves_nothing_for_the_next():
    """The gradients of the head alone do not reach the generator's norms, which would have taken the rows."""
    pair, real = Pair(), pictures()
    contrast(pair, real, taps=True).backward()
    expected = pair.gradients()
    again = Pair()
    again.load_state_dict(pair.state_dict())
    loss = contrast(again, real, taps=True)
    torch.autograd.grad(loss, list(again.F.parameters()), retain_graph=True)
    torch.autograd.grad(loss, list(again.F.parameters()), retain_graph=True)
    loss.backward(retain_graph=True)
    for name, gradient in again.gradients().items():
        assert gradient is None or torch.equal(gradient, expected[name]), name
    again.zero_grad()
    loss.backward()
    for name, gradient in again.gradients().items():
        assert gradient is None or torch.equal(gradient, expected[name]), name


def test_a_tap_that_nothing_projects_gives_its_bias_no_gradient():
    pair, real = Pair(), pictures(1)
    features = pair.G(real, LAYERS, encode_only=True, taps=True)
    features[-1].square().mean().backward()
    found = pair.gradients()
    assert found["G.model.4.bias"] is None
    assert found["G.model.8.bias"] is None
    assert found["G.model.4.weight"] is not None


def test_a_loss_of_rows_alone():
    """The last norm after a tap has no gradient of its own output."""
    pair, real = Pair(), pictures(2)
    gradients = []
    for taps in (False, True):
        pair.zero_grad()
        features = pair.G(real, [4, 12], encode_only=True, taps=taps)
        ids = torch.arange(9)
        (rows,) = project_patches(features[:1], [ids], distinct_ids=True, implementation="triton")
        (rows * torch.arange(rows.numel()).view_as(rows).cos()).sum().backward()
        gradients.append([pair.G.model[i].weight.grad for i in (1, 4)] + [pair.G.model[4].bias.grad])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert error(found, expected) < 1e-5


def test_several_projections_of_parts_of_one_map():
    """Two projections of the same images, whose locations overlap, and one of other images of the batch."""
    pair, real = Pair(), pictures(3)
    gradients = []
    for taps in (False, True):
        pair.zero_grad()
        features = pair.G(real, LAYERS, encode_only=True, taps=taps)[1]
        first, second = features.split([2, 1])
        assert type(first) is (Tap if taps else Tensor)
        total = 0.0
        for part, ids in ((first, torch.arange(9)), (first, torch.arange(4, 20)), (second, torch.arange(3, 30))):
            (rows,) = project_patches([part], [ids], distinct_ids=True, implementation="triton")
            total = total + (rows * torch.arange(rows.numel()).view_as(rows).cos()).sum()
        total.backward()
        gradients.append([pair.G.model[1].weight.grad, pair.G.model[4].weight.grad, pair.G.model[4].bias.grad])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert error(found, expected) < 1e-5


def test_second_derivatives_are_an_error():
    pair, real = Pair(), pictures()
    weight = pair.G.model[4].weight
    contrast(pair, real, taps=True).backward()
    expected = weight.grad.clone()
    (first,) = torch.autograd.grad(contrast(pair, real, taps=True), weight, create_graph=True)
    assert error(first, expected) < 1e-4
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(first.square().sum(), weight)


# What becomes dense


def test_locations_that_may_repeat_use_dense_gradients():
    x, bias = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    ids = torch.tensor([3, 7, 3])
    found = []
    for source in (opened(x, bias), x + bias[:, None, None]):
        (rows,) = project_patches([source], [ids], implementation="triton")
        upstream = torch.arange(12.0).view(3, 4).cos()
        found.append([rows, *torch.autograd.grad((rows * upstream).sum(), [x, bias])])
    assert all(map(torch.equal, *found))


def test_too_many_rows_use_dense_gradients():
    tap = opened(torch.randn(2, 4, 5, 5, requires_grad=True), None)
    assert untapped([tap], True, 9).taps == (tap,)
    assert untapped([tap], True, MOST_ROWS).taps == ()
    assert untapped([tap.detach()], True, MOST_ROWS).taps  # constants have no gradient


@pytest.mark.parametrize("change", ["attribute", "hook of the norm", "hook of the convolution", "eager", "norm"])
def test_generators_that_hand_out_no_taps(change):
    generator = Pair().G
    if change == "attribute":
        generator.hands_out_taps = False
    elif change.startswith("hook"):
        generator.model[5 if "norm" in change else 4].register_forward_hook(lambda *_: None)
    elif change == "eager":
        set_implementation(generator, "eager")
    else:
        generator = ResnetGenerator(width=4, blocks=1, norm="batch")
        set_implementation(generator, "triton")
    features = generator(pictures(1), LAYERS, encode_only=True, taps=True)
    assert type(features[1]) is Tensor
    assert torch.equal(features[1], copy.deepcopy(generator)(pictures(1), LAYERS, encode_only=True)[1])


def test_the_last_feature_of_an_encoder_is_dense():
    features = Pair().G(pictures(1), [4, 8], encode_only=True, taps=True)
    assert [type(f) for f in features] == [Tap, Tensor]


def test_a_tap_without_a_token_is_dense():
    x = torch.randn(1, 4, 5, 5)
    assert untapped([Tap(x, None, Slot())], True, 3).taps == ()


@pytest.mark.parametrize("name", ["project_patches", "PatchNCEHead"])
def test_the_first_use_notices_a_wrong_bias(name, monkeypatch):
    use = MapsUse(name, (3, 16), (True, False), (torch.float32,) * 2, 2, 12, 8, torch.float32, taps=(0, 2))
    assert find_fault(use, torch.device("cpu"), torch.float32) == ""
    monkeypatch.setattr(Tap, "dense", lambda tap: tap.map)  # not what the measurement compares
    monkeypatch.setattr("fastnce.common.taps.kernel.add_rows", lambda *_, **__: None)
    assert "gradient of map 1" in find_fault(use, torch.device("cpu"), torch.float32)
