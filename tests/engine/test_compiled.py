"""The step of every method compiled around the kernels, which run in Triton's interpreter: the same numbers."""

from __future__ import annotations

import functools
import random
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch.fx
from torch._dynamo.backends.common import aot_autograd

from fastnce.engine.compiled import TRACES_GRADIENTS
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws, NetworkOptions
from fastnce.methods.presets import PRESETS
from fastnce.nce.impl import dispatch
from fastnce.networks import build
from fastnce.networks.resnet import ResnetGenerator
from tests.engine.test_bad_steps import Small
from tests.engine.test_engine import random_batch, smaller_method

pytestmark = pytest.mark.usefixtures("fewest_blocks")

SIDE = 16


def method_of(preset: str, changes: dict[str, Any], **sizes: int):
    """A small method whose weights make every gradient far from zero; `sizes` are of its networks."""
    options = PRESETS[preset].options()
    for name, value in {"patches": 12, "projection": 8, "pool_size": 3, **changes}.items():
        if name in changes or hasattr(options, name):
            setattr(options, name, value)
    network = dict(PRESETS[preset].sections.get("network", {}))
    network |= {"width": 4, "discriminator_width": 4, "discriminator_layers": 1, "resolution": SIDE, **sizes}
    if "generator" not in network:
        network |= {"generator": "resnet_4blocks", "discriminator": "n_layers"}
        options.nce_layers = changes.get("nce_layers", [0, 4, 8, 12])
    torch.manual_seed(1)
    method = PRESETS[preset].method(options, NetworkOptions(**network))
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return method


def with_blocks(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.GENERATORS, "resnet_4blocks", functools.partial(ResnetGenerator, blocks=blocks))


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("cut", {"weighting": "monce", "weighting_options": "iterations=3"}),  # each is traced
        ("dclgan", {"external": "bank", "bank_size": 24, "nce_layers": [4, 8]}),
        ("simdcl", {"nce_layers": [4, 8]}),
        ("dcdgan", {"nce_layers": [4, 8]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_step_around_the_kernels_compiles_and_is_the_same(preset, changes, monkeypatch):
    with_blocks(2 if preset == "cut" else 0, monkeypatch)  # CUT has the fewest networks, and many moments are compared
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda name, *rest: choose(name or "triton", *rest))
    methods = [method_of(preset, changes) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*uncompiled")
        steps = [Step(methods[0], OptimOptions()), Step(methods[1], OptimOptions(), compile=True, backend="aot_eager")]
        torch.manual_seed(2)
        batch, draws = Batch(*(torch.rand(2, 1, 3, SIDE, SIDE) * 2 - 1)), methods[0].draw(random.Random(0))
        losses = []
        for step in steps:
            torch.manual_seed(3)
            losses.append(step.run(batch, draws))
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-5)
    one, other = (step.state() for step in steps)
    moments = [key for key, tensor in one.items() if key.endswith("/exp_avg") and tensor.dim() > 1]
    assert len(moments) > 20
    for key in moments:
        assert (other[key] - one[key]).norm() <= 1e-3 * one[key].norm(), key


ASKS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique", "equal")
"""Operators that read a value or a shape from the device. They cannot be recorded in a CUDA graph."""

traces_gradients = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, TRACES_GRADIENTS), reason="this PyTorch does not trace gradients"
)


class Kept:
    """A backend of `torch.compile` that runs the traced graphs as they are, and keeps them."""

    def __init__(self):
        self.graphs: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self.keep)

    def keep(self, graph: torch.fx.GraphModule, inputs):
        self.graphs.append(graph)
        return graph.forward

    def check(self) -> None:
        """There is one graph, and it asks nothing of the device."""
        (graph,) = self.graphs
        called = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        assert len(called) > 500
        assert not [target for target in called if target.name().split("::")[1].split(".")[0] in ASKS]


@traces_gradients
@pytest.mark.parametrize(
    ("preset", "changes", "sizes"),
    [
        ("cyclegan", {}, {}),
        ("sincut", {"patches": 4, "nce_layers": [0, 3]}, {"width": 1, "discriminator_width": 1, "resolution": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_whole_graph_asks_nothing_of_the_device(preset, changes, sizes, monkeypatch):
    """No operator in the traced graph reads from the device; some would read a tensor of one element as a number.

    The step is compiled once: the second step finds no state that the first one has made. (For CUT, see below.)
    """
    torch._dynamo.reset()  # or other presets' steps would count against a limit
    with_blocks(0, monkeypatch)
    kept, side = Kept(), sizes.get("resolution", SIDE)
    step = Step(method_of(preset, changes, **sizes), OptimOptions(), "bf16", "whole", backend=kept.backend)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            step.run(Batch(*(torch.rand(2, 2, 3, side, side) * 2 - 1)), Draws())
    if preset == "sincut" and any("`requires_grad_()`" in str(w.message) for w in said):
        pytest.skip("this PyTorch (2.11) does not trace what R1 asks: a gradient with respect to the pictures")
    assert step.whole is not None
    assert step.whole.usable
    kept.check()


@traces_gradients
def test_a_whole_compiled_step_is_one_graph_and_the_same():
    """The graph includes gradients and updates, and skips a step that is not finite. It asks nothing of the device."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    methods = [smaller_method(nce_idt=False).double() for _ in range(2)]
    methods[1].load_state_dict(methods[0].state_dict())
    kept = Kept()
    eager = Step(methods[0], OptimOptions())
    whole = Step(methods[1], OptimOptions(), compile="whole", backend=kept.backend)
    for i in range(4):
        batch = random_batch(dtype=torch.float64)
        if i == 1:
            batch.a[0, 0, 0, 0] = float("nan")
        ids = [[torch.randperm(n)[:16] for n in (32 * 32, 16 * 16)]]
        losses = [step.run(batch, Draws(patch_ids=ids)) for step in (eager, whole)]
        assert eager.bad_steps.item() == whole.bad_steps.item() == (1 if i == 1 else 0)
        if i != 1:
            for name, value in losses[0].items():
                torch.testing.assert_close(losses[1][name], value, rtol=1e-9, atol=1e-12)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert whole.whole is not None
    assert whole.whole.usable
    assert not torch._dynamo.utils.counters["graph_break"]
    one, other = eager.state(), whole.state()
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-7, atol=2e-9, msg=key)
    kept.check()


class Weighted(Small):
    """`Small` with a factor that is a constant of the traced step."""

    def __init__(self):
        super().__init__("D, G")
        self.factor = 1.0

    def g_loss(self, batch, outputs, draws):
        loss, logged = super().g_loss(batch, outputs, draws)
        return loss * self.factor, logged


@traces_gradients
def test_a_whole_step_that_is_compiled_anew_stays_whole():
    """Later steps run without the setting that compiling needs, and compile anew all the same."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    method = Weighted()
    step = Step(method, OptimOptions(), compile="whole", backend="aot_eager")
    graphs = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not whole")
        for number in range(3):
            if number == 1:
                method.factor = 2.0
            step.run(random_batch(), Draws())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2]
    assert step.whole is not None
    assert step.whole.usable
