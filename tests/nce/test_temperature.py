"""A temperature that is a tensor: values and gradients against autograd of the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fastnce.kernels import nce

from fastnce import PatchNCEHead, patch_nce
from fastnce.config import resolve
from fastnce.methods import CUT, CUTOptions
from fastnce.methods.base import NetworkOptions
from fastnce.methods.dclgan import DCLGAN, DCLGANOptions
from fastnce.nce import Weights, monce, patch_nce_layers
from fastnce.nce.impl import reference
from fastnce.nce.temperature import LearnedTemperature, learned_temperatures
from fastnce.networks.published import load_published, save_published
from fastnce.training.starting import plan_start
from tests.oracle import DEVICE, error

GATES = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-3}
FORMS = ["plain", "symmetric", "extra", "weights", "decoupled", "keys"]
BOTH = [("eager", torch.float64), ("eager", torch.float32), ("eager", torch.bfloat16)]
BOTH += [("triton", torch.float32), ("triton", torch.bfloat16)]
GROUPS, ROWS, DIM = 2, 10, 16


def pair(dtype, *shape):
    """Return unit queries that resemble their keys, and keys."""
    generator = torch.Generator().manual_seed(5)
    keys, noise = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (F.normalize(x, dim=-1).to(DEVICE, dtype) for x in (keys + noise, keys))


def definition(q, k, t, extra, weights, symmetric):
    """Return the mean loss in float64."""
    log_weight, pair_weight, row_weight, decoupled = weights or Weights()
    wide = [None if w is None else w.double() for w in (log_weight, pair_weight)]

    def one(a, b):
        a, b = (x.view(GROUPS, ROWS, DIM) for x in (a, b))
        e = None if extra is None else extra.double().expand(GROUPS, -1, -1)
        named = {"pair_log_weight_GSS": wide[0], "pair_weight_GSS": wide[1], "decoupled": decoupled}
        return reference.nce_rows(a, b, e, temperature=t, **named)[0].flatten()

    loss = 0.5 * (one(q, k) + one(k, q)) if symmetric else one(q, k)
    return (loss if row_weight is None else loss * row_weight.double()).mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("implementation", "dtype"), BOTH)
def test_gradient_of_the_temperature(implementation, dtype, form):
    q, k = pair(dtype, GROUPS * ROWS, DIM)
    e = next(iter(pair(dtype, 7, DIM))) if form == "extra" else None
    weights = {"decoupled": Weights(decoupled=True)}.get(form)
    if form == "weights":
        pairs = torch.rand(2, GROUPS, ROWS, ROWS, device=DEVICE)
        weights = Weights(pairs[0] - 0.5, pairs[1] + 0.5, torch.rand(GROUPS * ROWS, device=DEVICE))
    t = torch.tensor(0.0703125, device=DEVICE, dtype=torch.float32, requires_grad=True)
    q, k = q.requires_grad_(), k.requires_grad_(form == "keys")
    options = {"symmetric": form == "symmetric", "detach_keys": form != "keys"}
    loss = patch_nce(
        q, k, images=GROUPS, temperature=t, extra_keys=e, weights=weights, implementation=implementation, **options
    )
    leaves = [x for x in (t, q, k) if x.requires_grad]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    constant = k.detach().double()
    truth = definition(exact[1], exact[2] if form == "keys" else constant, exact[0], e, weights, form == "symmetric")
    assert error(loss, truth) <= 1e-6
    found, expected = (torch.autograd.grad(x, y) for x, y in ((loss, leaves), (truth, exact)))
    assert found[0].dtype == torch.float32
    if dtype == torch.bfloat16:  # each product q . dq contains dq, which is rounded twice, by at most 2^-9 each
        most = 2.0**-8 * (exact[1] * expected[1]).abs().sum() / t.item()
        assert (found[0] - expected[0]).abs() <= most
    else:
        assert error(found[0], expected[0]) <= max(GATES[dtype], 3e-7)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert error(ours, theirs) <= {torch.bfloat16: 4e-3}.get(dtype, 5e-6)


def test_gradcheck():
    q, k = pair(torch.float64, 8, 5)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weights = Weights(pair_weight=torch.rand(1, 8, 8, dtype=torch.float64) + 0.5)
    q = q.cpu().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, t: patch_nce(q, k.cpu(), temperature=t, weights=weights, symmetric=True, reduction="none"), (q, t)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("extra", [None, "other"])
def test_layers_with_cosine(implementation, dtype, extra):
    """The gradient of T is that of divided rows: the rows' own gradient is orthogonal to them."""
    q, k = pair(dtype, 2, 2, 12, DIM)  # (directions, layers, rows, dim)
    q, k = 3 * q, 2 * k
    t = torch.tensor([0.07, 0.3], device=DEVICE, requires_grad=True)
    lists = ([[*d] for d in x] for x in (q, k))
    loss = patch_nce_layers(
        *lists, images=2, temperature=t, cosine=True, extra_keys=extra, implementation=implementation
    )
    exact = t.detach().double().requires_grad_()
    unit_q, unit_k = (F.normalize(x.double(), dim=-1).to(dtype).double() for x in (q, k))
    truth = 0
    for layer in range(2):
        for d in range(2):
            a, b, other = (x.view(2, 6, DIM) for x in (unit_q[d, layer], unit_k[d, layer], unit_q[1 - d, layer]))
            more = other if extra else None
            truth = truth + reference.nce_rows(a, b, more, temperature=exact[layer])[0].mean() * (d + 1) / 2
    ours = (loss * torch.tensor([1.0, 2.0], device=DEVICE)).sum()
    assert error(ours, truth) <= (1e-6 if dtype == torch.float32 else 1e-5)
    found, expected = torch.autograd.grad(ours, t)[0], torch.autograd.grad(truth, exact)[0]
    assert error(found, expected) <= GATES[dtype]


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_compiled(implementation):
    q, k = pair(torch.float32, GROUPS * ROWS, DIM)
    t = torch.tensor(0.1, device=DEVICE, requires_grad=True)

    def loss(q, t):
        rows = patch_nce(q, k, images=GROUPS, temperature=t, symmetric=True, implementation=implementation)
        layers = patch_nce_layers([[q], [k]], [[k], [q.detach()]], temperature=t, implementation=implementation)
        return rows + layers.sum()

    q = q.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(q, t), (q, t)) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_host_does_not_read_it():
    """Its value reaches the kernel as a tensor: a plan of one value serves another."""
    q, k = pair(torch.float32, 1, 16, DIM)
    both = [
        nce.nce_forward([q], [k], [], [], [], [1.0], [torch.full((4,), 1 / t, device=DEVICE)])[0] for t in (0.1, 0.5)
    ]
    for t, ours in zip((0.1, 0.5), both, strict=True):
        truth = reference.nce_rows(q.double(), k.double(), temperature=torch.full((), 1 / (1 / t)))[0]
        assert error(ours, truth.flatten()) <= 1e-6
    rows, t = torch.ones(4, 2, device="meta"), torch.ones(1, device="meta")
    assert patch_nce(rows, rows, temperature=t).shape == ()  # reading a tensor without memory fails


def test_a_second_derivative_is_refused():
    q, k = pair(torch.float32, 6, 4)
    for implementation in ("eager", "triton"):
        t = torch.tensor(0.1, device=DEVICE, requires_grad=True)
        loss = patch_nce(q, k, temperature=t, implementation=implementation)
        (first,) = torch.autograd.grad(loss, t, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            first.backward()


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("variant", [{}, {"symmetric": True}, {"weighting": monce}, {"negatives": "batch"}])
def test_head(implementation, variant):
    """A learned T gives the loss of the same constant T, and the gradients of the rest."""
    torch.manual_seed(0)
    first = [0.0703125, 0.25]
    options = {"dim": 8, "patches": 9, "implementation": implementation, "init_gain": 1.0, **variant}
    ours = PatchNCEHead([3, 5], temperature=first, learn_temperature=True, **options).to(DEVICE)
    plain = PatchNCEHead([3, 5], temperature=first, **options).to(DEVICE)
    own = ours.state_dict()
    assert own.pop("learned_temperature.log_scale").shape == (2,)
    plain.load_state_dict(own)  # no other keys
    queries, keys = ([torch.randn(2, c, 4, 4, device=DEVICE) for c in (3, 5)] for _ in range(2))
    ids = [torch.randperm(16)[:9].to(DEVICE) for _ in range(2)]
    losses = [head(queries, keys, patch_ids=ids, directions=2) for head in (ours, plain)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(loss.sum(), [w for n, w in head.named_parameters() if n.startswith("mlp")])
        for loss, head in zip(losses, (ours, plain), strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    step = 1e-2
    (slope,) = torch.autograd.grad(ours(queries, keys, patch_ids=ids), ours.learned_temperature.log_scale)
    plain.implementation = "eager"
    for layer in range(2):
        values = []
        for sign in (1, -1):
            plain.temperatures = [t * math.exp(-sign * step * (i == layer)) for i, t in enumerate(first)]
            values.append(plain.double()([q.double() for q in queries], [k.double() for k in keys], patch_ids=ids))
            plain.float()
        assert slope[layer].item() == pytest.approx(((values[0] - values[1]) / (2 * step)).item(), rel=2e-3, abs=1e-5)


def test_limits():
    """At a limit, only a gradient that leads back inside moves the parameter."""
    learned = LearnedTemperature([0.01, 1.0, 0.1], shared=False)
    with torch.no_grad():
        learned.log_scale.add_(torch.tensor([0.5, -0.5, 0.0]))
    torch.testing.assert_close(torch.stack(learned()), torch.tensor([0.01, 1.0, 0.1]))
    for sign, expected in ((1.0, [False, True, True]), (-1.0, [True, False, True])):
        (slope,) = torch.autograd.grad(sign * torch.stack(learned()).sum(), learned.log_scale)
        assert (slope != 0).tolist() == expected
    shared = PatchNCEHead([3, 4], learn_temperature=True).learned_temperature
    assert shared.log_scale.shape == (1,)
    assert [t.item() for t in shared()] == pytest.approx([0.07] * 2)


def test_option_of_the_methods():
    """F's group trains it; without the option there is no such parameter. Dual methods have one T for both."""
    network = NetworkOptions("resnet_4blocks", width=4, discriminator_width=4)
    for method, names in (
        (lambda on: CUT(CUTOptions(nce_layers=[0, 4], learn_temperature=on), network), ["head"]),
        (lambda on: DCLGAN(DCLGANOptions(nce_layers=[0, 4], learn_temperature=on), network), ["projector_a"]),
    ):
        on, off = method(True), method(False)
        learned = [n for n, _ in on.named_parameters() if "temperature" in n]
        assert learned == [f"{name}.learned_temperature.log_scale" for name in names]
        assert not [n for n in off.state_dict() if "temperature" in n]
        trained = {id(p) for module in on.groups()["F"].modules for p in module.parameters()}
        assert id(dict(on.named_parameters())[learned[0]]) in trained


def test_weights_of_a_published_projector(tmp_path):
    """They load into a head that learns its temperature, which keeps its value; any other lack is refused."""
    published = PatchNCEHead([3, 4], dim=8)
    save_published({"F": published}, tmp_path)
    ours = PatchNCEHead([3, 4], dim=8, temperature=0.2, learn_temperature=True)
    load_published({"F": ours}, tmp_path)
    assert all(torch.equal(ours.state_dict()[name], w) for name, w in published.state_dict().items())
    assert ours.current_temperatures()[1].item() == pytest.approx(0.2)
    ours.load_state_dict(published.state_dict())
    state = published.state_dict()
    del state["mlp_1.0.bias"]
    with pytest.raises(RuntimeError, match="'mlp_1.0.bias'. Nothing was loaded"):
        ours.load_state_dict(state)
    config = resolve("cut", None, [f"run.start_from={tmp_path}", "loss.learn_temperature=true"])
    begun = plan_start(config, CUTOf({"F": ours}))
    assert begun.lines[0].endswith("its learned temperature begins with loss.temperature, because none is there")


class CUTOf:
    """Stands for a method with these networks."""

    def __init__(self, networks):
        self.networks = lambda: networks


def test_names_and_values_to_log():
    """One value per parameter, bounded as the loss sees it; the name of the network if several learn one."""
    one, three, none = (
        PatchNCEHead([3, 4, 5], temperature=t, learn_temperature=on)
        for t, on in ((0.1, True), ([0.1, 0.2, 0.3], True), (0.1, False))
    )
    with torch.no_grad():
        three.learned_temperature.log_scale[2] = 50.0  # beyond the range
    found = learned_temperatures({"F": three, "D": none})
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {"temperature_0": 0.1, "temperature_1": 0.2, "temperature_2": 0.01}
    )
    assert learned_temperatures({"F1": one, "F2": one}).keys() == {"F1_temperature", "F2_temperature"}
    assert learned_temperatures({"F1": one}).keys() == {"temperature"}
    assert learned_temperatures({"F1": none}) == {}


@pytest.mark.parametrize(("method", "options"), [(CUT, CUTOptions), (DCLGAN, DCLGANOptions)])
def test_nothing_to_learn_from(method, options):
    """Without a contrastive term, nothing would train the temperature."""
    with pytest.raises(ValueError, match=r"loss\.learn_temperature=true needs a contrastive term .* loss\.lambda_nce"):
        method(options(lambda_nce=0.0, learn_temperature=True), NetworkOptions())
