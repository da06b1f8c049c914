"""Weights that are converted one network at a time give the same bits as autocast."""

from __future__ import annotations

import pickle
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from fastnce.kernels import common
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.observe import launches
from fastnce import project_patches
from fastnce.common.narrowed import have_copies, narrowed
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.engine.weights import converted_weights
from fastnce.methods import Batch, Draws
from fastnce.methods.presets import PRESETS
from fastnce.nce import PatchNCEHead
from fastnce.nce.impl.uses import maps_use
from fastnce.networks.layers import full_precision, keep_float32
from tests.engine.test_engine import random_batch, small_method, smaller_method
from tests.methods.test_methods_more import build, pictures


def two_steps(make, batches: list[Batch], precision: str = "bf16", **options) -> tuple[Step, Step]:
    """A step, and one that leaves the conversions to autocast, after the same batches."""
    methods = [make(), make()]
    methods[1].load_state_dict(methods[0].state_dict())
    at_once, one_by_one = (Step(method, OptimOptions(), precision, **options) for method in methods)
    one_by_one.weights_at_once = False
    for step in (at_once, one_by_one):
        if step.loss_scale is not None:
            step.loss_scale.scale.fill_(256.0)
        for seed, batch in enumerate(batches):
            torch.manual_seed(seed)
            losses = step.run(batch, Draws())
            assert all(torch.isfinite(loss) for loss in losses.values())
    return at_once, one_by_one


def assert_same_bits(steps: tuple[Step, Step]) -> None:
    one, other = (step.state() for step in steps)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def float32(batch: Batch) -> Batch:
    return Batch(*(picture.float() for picture in batch))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_method(preset):
    batches = [float32(pictures()) for _ in range(2)]
    assert_same_bits(two_steps(lambda: build(preset).float(), batches))


@pytest.mark.parametrize("generator", ["unet_128", "restorer", "stylegan2"])
def test_every_generator(generator):
    side = 128 if generator == "unet_128" else 32
    layers = {"unet_128": [0, 2, 3], "restorer": [0, 4, 8], "stylegan2": [0, 2, 3]}[generator]
    batches = [float32(pictures(side=side)) for _ in range(2)]
    make = lambda: build("cut", network={"generator": generator}, nce_layers=layers).float()  # noqa: E731
    assert_same_bits(two_steps(make, batches))


@pytest.mark.parametrize(
    ("precision", "options"),
    [("fp16", {}), ("bf16", {"recompute": True}), ("bf16", {"compile": True, "backend": "aot_eager"})],
)
def test_every_form_of_the_step(precision, options, one_block):
    make = partial(smaller_method, nce_idt=False) if "compile" in options else small_method
    assert_same_bits(two_steps(make, [random_batch(2) for _ in range(2)], precision, **options))


class Conversions(TorchDispatchMode):
    """Counts conversions of tensors that have as many elements as one of `parameters`."""

    def __init__(self, parameters):
        super().__init__()
        self.shapes = {p.shape for p in parameters if p.dim() == 4}
        self.single = self.together = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.single += function is torch.ops.aten._to_copy.default and args[0].shape in self.shapes
        if function is torch.ops.aten._foreach_copy_.default:  # other copies are snapshots for bad steps
            self.together += args[0][0].dtype != args[1][0].dtype
        return function(*args, **(kwargs or {}))


def test_few_launches_convert_all_weights():
    """CUT, forward: G once, D twice; backward: D, the encoder of G, the whole G."""
    found = []
    for at_once in (True, False):
        step = Step(small_method(), OptimOptions(), "bf16")
        step.weights_at_once = at_once
        with Conversions(step.method.parameters()) as count:
            step.run(random_batch(1), Draws())
        found.append((count.single, count.together))
    (single, together), (before, none) = found
    assert (single, together, none) == (0, 6, 0)
    assert before > 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_device_converts_many_weights_in_a_launch():
    network = nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(20))).cuda().to(memory_format=torch.channels_last)
    expected = [parameter.bfloat16() for parameter in network.parameters()]
    found = []

    def convert():
        with converted_weights([network], torch.bfloat16):
            found[:] = [layer._parameters[name] for layer in network for name in ("weight", "bias")]

    convert()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    kernels = launches(convert, torch.device("cuda"), "eager")
    if kernels is None:
        pytest.skip("this machine does not let its kernels be watched")
    assert kernels <= 4  # for 40 tensors


def test_weights_come_back():
    """Also after an error. A layer that computes in float32 keeps its weights all the time."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), keep_float32(nn.Conv2d(4, 3, 3)), nn.BatchNorm2d(3))
    own = dict(network.named_parameters())

    def use_and_fail():
        with converted_weights([network], torch.bfloat16):
            assert network[0].weight.dtype == network[0].bias.dtype == torch.bfloat16
            assert network[1].weight.dtype == network[2].weight.dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):
                assert full_precision(network[1], network[0](torch.rand(1, 3, 8, 8))).dtype == torch.float32
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        use_and_fail()
    assert all(parameter is own[name] for name, parameter in network.named_parameters())


def test_frozen_weights_stay_frozen():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3))
    network[0].requires_grad_(False)
    with converted_weights([network], torch.bfloat16):
        assert not network[0].weight.requires_grad
        assert network[1].weight.requires_grad
        network(torch.rand(1, 3, 8, 8, dtype=torch.bfloat16)).sum().backward()
    assert network[0].weight.grad is None
    assert network[1].weight.grad.dtype == torch.float32


def losses_of_rows(projectors, maps, ids) -> torch.Tensor:
    """The sum of the rows of two projectors in one call, as the dual methods make it."""
    mlps = [mlp for projector in projectors for mlp in projector.mlps(len(maps))]
    rows = project_patches([*maps, *maps], [*ids, *ids], mlps, distinct_ids=True, implementation="triton")
    return torch.stack([(r.float() * torch.linspace(-1, 1, r.shape[1])).sum() for r in rows]).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["loss", "loss alone", "rows", "rows alone"])
def test_projectors_read_copies_and_give_the_same_bits(form, dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    heads = [PatchNCEHead([3, 32], dim=32, patches=20, implementation="triton") for _ in range(2)]
    parameters = [p for head in heads for p in head.parameters()]
    maps = [torch.randn(1, c, 6, 7).to(dtype).requires_grad_() for c in (3, 32)]
    keys = [torch.randn(1, c, 6, 7).to(dtype) for c in (3, 32)]
    ids = [torch.randperm(42)[None, :20] for _ in maps]
    loss_of = {
        "loss": lambda: heads[0](maps, keys, patch_ids=ids),
        "rows": lambda: losses_of_rows(heads, maps, ids),
    }[form.split()[0]]

    def results(read: bool, factor: float = 1.0) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype), torch.set_grad_enabled("alone" not in form), ExitStack() as within:
            if read:
                within.enter_context(converted_weights([network], dtype, heads))
            if factor != 1:
                weights = [p for p in parameters if p.dim() == 2]
                within.enter_context(narrowed(weights, [(p.detach() * factor).to(dtype) for p in weights]))
            loss = loss_of()
            if "alone" in form:
                return [loss]
            wanted = [p for p in parameters if form == "rows" or any(p is own for own in heads[0].parameters())]
            return [loss.detach(), *torch.autograd.grad(loss, [*maps, *wanted])]

    plain, read = results(False), results(True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(plain, read, strict=True))
    assert all(g.dtype == torch.float32 for g in plain[3:])
    again, other = results(True), results(True, factor=-1.0)
    assert all(torch.equal(a, b) for a, b in zip(read, again, strict=True))
    assert not torch.equal(other[0], read[0])  # the copies are what is multiplied by
    assert all(torch.equal(a, b) for a, b in zip(results(False), plain, strict=True))


def test_projectors_keep_their_weights():
    """Copies are made where kernels read them: not for a projector that forces plain PyTorch."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    for implementation, expected in (("triton", True), ("eager", False), (None, False)):
        head = PatchNCEHead([3], dim=8, implementation=implementation)
        own = dict(head.named_parameters())
        with converted_weights([network], torch.bfloat16, [head, nn.Linear(3, 3)]):
            assert have_copies([w for four in head.mlps(1) for w in four]) == expected
            assert all(p is own[name] for name, p in head.named_parameters())


@pytest.mark.parametrize("name", ["project_patches", "PatchNCEHead"])
def test_copies_have_a_check_of_their_own(name):
    """Kernels that read 16-bit weights are other kernels, so that their first use is checked too."""
    head = PatchNCEHead([3, 32], dim=32, patches=16)
    maps = [torch.randn(1, c, 6, 7).bfloat16() for c in (3, 32)]
    with_weights = maps_use(name, maps, head.mlps(2), 16)
    weights = [p for p in head.parameters() if p.dim() == 2]
    with narrowed(weights, [w.detach().bfloat16() for w in weights]):
        with_copies = maps_use(name, maps, head.mlps(2), 16)
    assert with_copies.form() != with_weights.form()
    given = []
    start = common.start
    for use in (with_weights, with_copies):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                common, "start", lambda kernel, *a, **o: (given.append((kernel.__name__, a)), start(kernel, *a, **o))
            )
            checks = list(use.measure(torch.device("cpu"), torch.bfloat16))
        assert checks
        assert all(check.ok for check in checks)
    dtypes = [one[1][2][0].weight1.dtype for one in given if one[0] == "project_kernel"]
    assert set(dtypes) == {torch.float32, torch.bfloat16}


def test_a_network_can_be_pickled_within():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    with converted_weights([network], torch.bfloat16):
        found = pickle.loads(pickle.dumps(network))
        assert torch.equal(found[0].weight, network[0].weight)
