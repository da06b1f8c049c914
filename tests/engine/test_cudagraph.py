"""Record and replay a step, with a recorder for the CPU instead of CUDA's (see test_engine_gpu.py)."""

from __future__ import annotations

import itertools
import random
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastnce.engine.cudagraph import WARM_UP, Graphs, pick_graph
from fastnce.engine.optim import ParameterGroup
from fastnce.engine.options import OptimOptions
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws
from fastnce.methods.presets import PRESETS
from fastnce.nce import checks
from tests.engine.test_engine import random_batch, small_method
from tests.methods.test_methods_more import build, pictures


class Tape:
    """Records a function by running it and undoing its changes; a replay runs it again, into the same losses.

    As in CUDA graphs, values that the function reads from the host are those at the recording.
    """

    def __init__(self):
        self.step: Step | None = None
        self.warmed = self.recorded = self.replayed = self.closed = 0

    def warm(self, function):
        self.warmed += 1
        return function()

    def record(self, function):
        self.recorded += 1
        assert self.step is not None
        before = {key: tensor.clone() for key, tensor in self.step.state().items()}
        numbers = torch.get_rng_state()
        losses = {name: loss.clone() for name, loss in function().items()}
        for key, tensor in self.step.state().items():
            tensor.copy_(before[key])
        torch.set_rng_state(numbers)
        return (function, losses), losses

    def replay(self, graph):
        self.replayed += 1
        function, losses = graph
        for name, loss in function().items():
            losses[name].copy_(loss)

    def close(self, graphs):
        self.closed += len(graphs)


def taped(method, **options) -> tuple[Step, Tape]:
    tape = Tape()
    tape.step = Step(method, OptimOptions(**options), graph=tape)
    return tape.step, tape


def twins(**options):
    methods = [small_method(**options) for _ in range(2)]
    methods[1].load_state_dict(methods[0].state_dict())
    return methods


def one_step(step: Step, number: int, batch: Batch) -> dict[str, torch.Tensor]:
    """Run a step as the loop does: draw the host's choices, then seed the device."""
    rng = random.Random(f"7/{number}")
    draws = step.method.draw(rng)
    torch.manual_seed(rng.getrandbits(63))
    return step.run(batch, draws)


def assert_same_state(one: Step, other: Step) -> None:
    states = one.state(), other.state()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


def test_recorded_steps_are_the_steps():
    """FastCUT has two kinds of steps. Each warms up, then is recorded once; losses and state are bit-equal."""
    plain, recorded = twins(nce_idt=False, flip_equivariance=True)
    one = Step(plain, OptimOptions(ema=0.9))
    other, tape = taped(recorded, ema=0.9)
    for number in range(14):
        if number == 9:  # a new learning rate, which must reach the recorded step
            one.set_learning_rate(0.5)
            other.set_learning_rate(0.5)
        batch = random_batch()
        expected, found = one_step(one, number, batch), one_step(other, number, batch)
        for name, loss in expected.items():
            assert torch.equal(found[name], loss), (number, name)
        assert_same_state(one, other)
    assert (tape.warmed, tape.recorded) == (2 * WARM_UP, 2)
    assert tape.replayed == 14 - 2 * WARM_UP
    other.close()
    assert tape.closed == 2


def test_a_recorded_run_is_resumed_exactly():
    plain, recorded = twins()
    one, (other, tape) = Step(plain, OptimOptions()), taped(recorded)
    batches = [random_batch() for _ in range(10)]
    for number in range(5):
        one_step(one, number, batches[number])
        one_step(other, number, batches[number])
    third, second_tape = taped(small_method())
    third.load_state({key: tensor.clone() for key, tensor in other.state().items()})
    # drops the graph and warms up again
    other.load_state({key: tensor.clone() for key, tensor in other.state().items()})
    assert tape.closed == 1
    for number in range(5, 10):
        for step in (one, other, third):
            one_step(step, number, batches[number])
    assert_same_state(one, third)
    assert_same_state(one, other)
    assert tape.recorded == 2
    assert second_tape.warmed == WARM_UP


def test_the_graph_reads_buffers_of_its_own():
    step, _ = taped(small_method())
    for number in range(WARM_UP + 1):
        one_step(step, number, random_batch())
    batch = random_batch()
    losses = one_step(step, 9, batch)
    kept = {name: loss.clone() for name, loss in losses.items()}
    batch.a.zero_()  # the data set may reuse this memory
    assert step.graphs.inputs.a.abs().max() > 0
    again = one_step(step, 10, random_batch())
    assert all(again[name] is losses[name] for name in losses)  # the same tensors in all replays
    assert any(not torch.equal(kept[name], losses[name]) for name in losses)


def test_what_a_graph_cannot_stand_for_runs_as_it_is():
    method = small_method(nce_idt=False)
    step, tape = taped(method)
    for number in range(WARM_UP + 1):
        one_step(step, number, random_batch())
    ids = [[torch.randperm(n)[:16] for n in (38 * 38, 32 * 32, 16 * 16, 8 * 8)]]
    before = {key: tensor.clone() for key, tensor in step.state().items()}
    step.run(random_batch(), Draws(patch_ids=ids))
    with pytest.warns(UserWarning, match=r"run uncaptured: the graphs are for \(1, 3, 32, 32\)"):
        step.run(random_batch(2), Draws())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.run(random_batch(2), Draws())  # no second warning
        assert tape.replayed == 1
        step.run(random_batch(), Draws())
    assert (tape.recorded, tape.replayed) == (1, 2)
    assert not torch.equal(step.state()["network/G/model.1.weight"], before["network/G/model.1.weight"])


@pytest.mark.parametrize("change", ["training", "place", "library"])
def test_other_settings_are_recorded_anew(change, monkeypatch):
    method = small_method(nce_idt=False)
    step, tape = taped(method)
    for number in range(WARM_UP + 2):
        one_step(step, number, random_batch())
    if change == "training":
        method.eval()
    elif change == "place":
        weight = method.generator.model[1].weight
        weight.data = weight.data.clone()
    else:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    with pytest.warns(UserWarning, match="the step is recorded anew: settings, or addresses of its state"):
        one_step(step, 9, random_batch())
    assert tape.closed == 1
    for number in range(WARM_UP + 1):
        one_step(step, 10 + number, random_batch())
    assert (tape.warmed, tape.recorded) == (2 * WARM_UP, 2)


def moved(owner, name: str) -> None:
    """Replace a tensor by a copy at another address; `owner` is a dict or an object."""
    if isinstance(owner, dict):
        owner[name] = owner[name].clone()
    else:
        setattr(owner, name, getattr(owner, name).clone())


@pytest.mark.parametrize(
    "what",
    [
        *("moments", "rate", "average", "pool", "count", "bank", "loss scale", "bad"),
        "a loaded group",
    ],
)
def test_state_that_moved_is_recorded_anew(what):
    """A replay would write to the old address, and the new tensor would not change."""
    preset = "cyclegan" if what in ("pool", "count") else "dclgan"
    changes = {"external": "bank", "bank_size": 8, "pool_size": 2, "nce_layers": [0, 4]}
    method = build(preset, network={"generator": "resnet_4blocks"}, **changes).float()
    tape = Tape()
    precision = "fp16" if what == "loss scale" else "fp32"
    step = tape.step = Step(method, OptimOptions(ema=0.9), precision, graph=tape)
    numbers = itertools.count()
    batch = pictures()
    batch = Batch(batch.a.float(), batch.b.float())
    for _ in range(WARM_UP + 2):
        one_step(step, next(numbers), batch)
    assert (tape.recorded, tape.replayed) == (1, 2)
    moments = list(step.groups["G"].adam.state.values())[-1]
    {
        "moments": lambda: [moved(moments, key) for key in moments],
        "rate": lambda: moved(step.groups["D"], "lr"),
        "average": lambda: moved(step.averages["G_B"].average, "model.1.bias"),
        "pool": lambda: moved(method.pool_b, "pictures"),
        "count": lambda: moved(method.pool_b, "count"),
        "bank": lambda: moved(method.bank_b, "rows_1"),
        "loss scale": lambda: moved(step.loss_scale, "scale"),
        "bad": lambda: moved(step, "bad_steps"),
        "a loaded group": lambda: step.groups["D"].load_state(step.groups["D"].state()),
    }[what]()
    with pytest.warns(UserWarning, match="the step is recorded anew"):
        one_step(step, next(numbers), batch)
    for _ in range(WARM_UP + 1):
        one_step(step, next(numbers), batch)
    assert (tape.closed, tape.recorded, tape.replayed) == (1, 2, 4)


def test_what_a_failed_recording_held_is_free_before_the_step_runs_again():
    """If a recording runs out of memory, the step that follows must have that memory."""
    held: list[weakref.ref] = []
    alive: list[bool] = []

    class TooSmall(Tape):
        def record(self, function):
            maps = torch.zeros(8)
            held.append(weakref.ref(maps))
            raise torch.OutOfMemoryError("out of memory")

    def compute(batch, draws):
        alive.extend(reference() is not None for reference in held)
        return {}

    graphs = Graphs(compute, TooSmall(), lambda: 0)
    for _ in range(WARM_UP):
        graphs.run(random_batch(), Draws())
    with pytest.warns(UserWarning, match=r"recording it failed \(out of memory\)"):
        graphs.run(random_batch(), Draws())
    assert alive == [False]


def test_a_recording_that_fails_is_said_once_and_training_goes_on():
    class Broken(Tape):
        def record(self, function):
            self.recorded += 1
            raise RuntimeError("\noperation not permitted when stream is capturing\nand more")

    plain, recorded = twins()
    tape = Broken()
    one, other = Step(plain, OptimOptions()), Step(recorded, OptimOptions(), graph=tape)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(WARM_UP + 3):
            batch = random_batch()
            one_step(one, number, batch)
            one_step(other, number, batch)
    assert [str(w.message) for w in said] == [
        "the step runs uncaptured, launch by launch: recording it failed (operation not permitted when stream is "
        "capturing)"
    ]
    assert tape.recorded == 1
    assert_same_state(one, other)


def test_a_step_that_breaks_half_way_leaves_no_trace():
    """As a failed recording does: frozen weights must be trainable again, and no gradients must be left."""
    method = small_method()
    step = Step(method, OptimOptions())
    real = step.phases[1].loss

    def broken(*args):
        raise RuntimeError("in the middle")

    step.phases = (step.phases[0], step.phases[1]._replace(loss=broken))
    with pytest.raises(RuntimeError, match="in the middle"):
        step.run(random_batch(), Draws())
    assert all(p.requires_grad and p.grad is None for p in method.parameters())
    step.phases = (step.phases[0], step.phases[1]._replace(loss=real))
    step.run(random_batch(), Draws())


class AsksTheHost(TorchDispatchMode):
    """Collects operations that wait for the device or copy from the host, neither of which can be recorded."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        self.count += 1
        if name.startswith(self.FORBIDDEN):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_a_group_of_parameters_is_built_without_waiting_for_the_device():
    """Adam checks that its learning rate is positive; it must not read the one on the device."""
    with AsksTheHost() as asked:
        group = ParameterGroup((torch.nn.Linear(3, 2),), 2e-4, (0.5, 0.999))
    assert "_local_scalar_dense" not in asked.found
    assert all(options["lr"] is group.lr for options in group.adam.param_groups)


@pytest.mark.parametrize("preset", [*PRESETS, "dcdgan-bank", "cut-monce", "cut-attention", "cut-dropout"])
def test_a_step_asks_nothing_of_the_host(preset, monkeypatch):
    """`Graphs` requires of every method: no random draw, no value and no branch of the host."""
    name, _, change = preset.partition("-") if preset not in PRESETS else (preset, "", "")
    options = {
        "bank": {"external": "bank", "bank_size": 32},
        "monce": {"weighting": "monce"},
        "attention": {"selection": "attention"},
    }.get(change, {})
    if name in ("sincut",):
        options["patches"] = 4
    method = build(name, **options)
    if change == "dropout":
        method.generator.model.insert(13, torch.nn.Dropout(0.5))
    step = Step(method, OptimOptions(ema=0.9), "fp16")
    batch = pictures(1 if name == "simdcl" else 2)
    step.run(batch, Draws())  # makes moments and pools

    def drawn(*_, **__):
        raise AssertionError("a random draw on the host")

    monkeypatch.setattr(checks, "ids", lambda *_: None)  # it reads the ids, on the CPU only
    for place in ("random", "randint", "uniform", "choice", "shuffle"):
        monkeypatch.setattr(random, place, drawn)
    with AsksTheHost() as watch:
        step.run(batch, Draws())
    assert watch.count > 100
    assert not watch.found


def test_an_update_to_be_traced_asks_nothing_of_the_host():
    """A compiled step is recorded too, with its updates."""
    layer = torch.nn.Linear(5, 3)
    group = ParameterGroup((layer,), 1e-2, (0.5, 0.999))
    group.prepare()
    gradients, scale = tuple(torch.randn_like(p) for p in layer.parameters()), torch.tensor(1024.0)
    bad = torch.tensor(False)
    with AsksTheHost() as watch:
        group.update_traced(gradients, bad, scale)
    assert watch.count > 10
    assert not watch.found


def test_where_graphs_are_used():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [pick_graph("auto", device) for device in (cpu, cuda)] == [False, True]
    assert [pick_graph("false", device) for device in (cpu, cuda)] == [False, False]
    assert pick_graph("true", cuda)
    with pytest.raises(ValueError, match=r"run\.graph=true needs a CUDA device, not cpu"):
        pick_graph("true", cpu)
    with pytest.raises(ValueError, match=r"run\.graph must be auto, true or false, not 'on'"):
        pick_graph("on", cpu)
