"""What a script does around its loss: changes of what the code reads, side effects, and objects that raise."""

from __future__ import annotations

import copy
import random
import sys
import textwrap
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastnce import accelerate
from fastnce.accelerate.errors import scripts_own
from tests.accelerate.checkouts import DOT_LOSS, module_of

OPTIONS = dict.fromkeys(["batch_size", "nce_includes_all_negatives_from_minibatch"], 1) | {"nce_T": 0.5}
LOSS = DOT_LOSS.format(name="Loss", extra=" * {scale}")
EVERY = "opt.nce_includes_all_negatives_from_minibatch"
COPIES = LOSS.replace("self.opt.nce_T", "self.tau").replace("self.opt.batch_size", "self.n")
COPIES = COPIES.replace(f"self.{EVERY}", "self.every")
COPIES = COPIES.replace("self.opt = opt", f"self.tau, self.n, self.every = opt.nce_T, opt.batch_size, {EVERY}")


def loss_of(scale: str = "1", made: str = "", before: str = "", forward: str = "", text: str = LOSS) -> str:
    """The source of a loss that agrees with the formula as long as `scale` is 1."""
    source = text.replace("{scale}", scale).replace("__init__()\n", f"__init__()\n        {made}\n")
    return before + "\n" + source.replace("feat_k):\n", f"feat_k):\n        {forward}\n")


def pair(source: str):
    """The module and its unreplaced twin; each has an instance, `criterion`, made before the replacement."""
    ours, theirs = module_of(source), module_of(source)
    for module in (ours, theirs):
        module.criterion = module.Loss(SimpleNamespace(**OPTIONS))
    assert accelerate.patch(ours)
    return ours, theirs


def assert_equal_losses(ours, theirs) -> None:
    q, k = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
    torch.testing.assert_close(ours.criterion(q, k), theirs.criterion(q, k), rtol=1e-10, atol=1e-12)


TIMES = "def times(x, by=1.0):\n    return x * by\n"

CHANGES = {
    "attribute": (loss_of("self.s", "self.s = 1.0"), lambda m: setattr(m.criterion, "s", 0.5)),
    "new attribute": (loss_of('getattr(self, "s", 1.0)'), lambda m: setattr(m.criterion, "s", 0.5)),
    "new attribute of the class": (loss_of('getattr(self, "s", 1.0)'), lambda m: setattr(m.Loss, "s", 0.5)),
    "attribute of the class": (
        loss_of("self.s").replace("    def __init__", "    s = 1.0\n\n    def __init__", 1),
        lambda m: setattr(m.Loss, "s", 0.5),
    ),
    "global": (loss_of("SCALE", before="SCALE = 1.0"), lambda m: setattr(m, "SCALE", 0.5)),
    "global function": (
        loss_of("scale()", before="def scale():\n    return 1.0\n"),
        lambda m: setattr(m, "scale", lambda: 0.5),
    ),
    "list": (loss_of("self.s[0]", "self.s = [1.0, 2]"), lambda m: m.criterion.s.__setitem__(0, 0.5)),
    "part": (
        loss_of("self.part.eps", "self.part = nn.CosineSimilarity(eps=1.0)"),
        lambda m: setattr(m.criterion.part, "eps", 0.5),
    ),
    "another part": (
        loss_of("self.part(torch.ones(()))", "self.part = nn.Identity()"),
        lambda m: setattr(m.criterion, "part", torch.nn.Threshold(2.0, 0.5)),
    ),
    "tuple with a list": (
        loss_of("self.s[0][0]", "self.s = ([1.0],)"),
        lambda m: m.criterion.s[0].append(m.criterion.s[0].pop() / 2),
    ),
    "set": (loss_of("len(self.s)", "self.s = {1}"), lambda m: m.criterion.s.add(2)),
    "computed name": (loss_of('getattr(self, "s_" + str(1), 1.0)'), lambda m: setattr(m.criterion, "s_1", 0.5)),
    "built-in function": (
        loss_of("self.f(torch.ones(()))", "self.f = torch.abs"),
        lambda m: setattr(m.criterion, "f", torch.neg),
    ),
    "hook of a part": (
        loss_of("self.part(torch.ones(()))", "self.part = nn.Identity()"),
        lambda m: m.criterion.part.register_forward_hook(lambda _, inputs, output: output / 2),
    ),
    "forward of a part": (
        loss_of("self.part(torch.ones(()))", "self.part = nn.Identity()"),
        lambda m: setattr(m.criterion.part, "forward", lambda x: x / 2),
    ),
    "one more part": (
        loss_of("len(self.parts)", "self.parts = nn.ModuleList([nn.Identity()])"),
        lambda m: m.criterion.parts.append(torch.nn.Identity()),
    ),
    "global part": (
        loss_of("PART[0](torch.ones(()))", before="PART = nn.Sequential(nn.Threshold(0.5, 0.5))"),
        lambda m: setattr(m.PART[0], "threshold", 2.0),
    ),
    "global partial": (
        loss_of("F(1.0)", before=f"import functools\n{TIMES}\nF = functools.partial(times, by=1.0)"),
        lambda m: m.F.keywords.update(by=0.5),
    ),
    "code of a function": (
        loss_of("times(1.0)", before=TIMES),
        lambda m: setattr(m.times, "__code__", (lambda x, by=1.0: 0.5 * x).__code__),
    ),
    "default value": (loss_of("times(1.0)", before=TIMES), lambda m: setattr(m.times, "__defaults__", (0.5,))),
    "list as a default value": (
        loss_of("times()", before="def times(x=[1.0]):\n    return x[0]\n"),
        lambda m: m.times.__defaults__[0].insert(0, 0.5),
    ),
    "default value of a keyword": (
        loss_of("times(1.0)", before=TIMES.replace("x, by", "x, *, by")),
        lambda m: m.times.__kwdefaults__.update(by=0.5),
    ),
    "attribute of a function": (
        loss_of("times.by", before=f"{TIMES}\ntimes.by = 1.0"),
        lambda m: setattr(m.times, "by", 0.5),
    ),
    "function": (
        loss_of("self.f(1.0)", "self.f = float"),
        lambda m: setattr(m.criterion, "f", lambda x: 0.5 * x),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_trial_counts(name):
    """The value changes with the class's own, for an instance that was made before the replacement."""
    source, change = CHANGES[name]
    ours, theirs = pair(source)
    assert_equal_losses(ours, theirs)
    for module in (ours, theirs):
        change(module)
    assert_equal_losses(ours, theirs)


@pytest.mark.parametrize("name", ["tau", "s"])
def test_a_change_of_a_copied_option_counts(name):
    """Of an instance that copied its options; another temperature of a new instance is no change."""
    ours, theirs = pair(loss_of("self.s", "self.s = 1.0", text=COPIES))
    for module in (ours, theirs):
        module.criterion = module.Loss(SimpleNamespace(**OPTIONS | {"nce_T": 0.3}))
    assert_equal_losses(ours, theirs)
    assert used(ours)
    for module in (ours, theirs):
        setattr(module.criterion, name, 0.2)
    assert not used(ours)
    assert_equal_losses(ours, theirs)


def used(module) -> bool:
    """Whether a call runs the replacement: the original forward is then not entered."""
    entered = []
    original = module.Loss.forward.__wrapped__.__code__

    def profile(frame, event, _):
        if event == "call" and frame.f_code is original:
            entered.append(1)

    sys.setprofile(profile)
    try:
        module.criterion(torch.randn(4, 3), torch.randn(4, 3))
    finally:
        sys.setprofile(None)
    return not entered


def test_what_changes_nothing_keeps_the_replacement():
    """Attributes that the code does not read, eval mode, hooks, copies, devices and other options."""
    ours, _ = pair(loss_of("1", 'self.place = "cuda:0" if opt.batch_size == 7 else "cpu"'))
    assert used(ours)
    ours.criterion.eval()
    ours.criterion.label = "mine"
    ours.criterion.place = "cuda:1"
    ours.criterion.register_forward_hook(lambda *_: None)
    ours.criterion.opt.nce_T = 0.4
    assert used(ours)
    ours.criterion = copy.deepcopy(ours.criterion)
    assert used(ours)


def test_a_compiled_loss_traces_its_own_code():
    ours, theirs = pair(loss_of())
    q, k = torch.randn(2, 12, 5)
    compiled = torch.compile(ours.criterion, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), theirs.criterion(q, k))
    assert used(ours)


KEPT = {
    "its forward prints": loss_of(forward="print(1)"),
    "its code uses CALLS, a list that may change": textwrap.dedent(
        """
        import functools
        CALLS = []
        def counted(function):
            @functools.wraps(function)
            def wrapper(*arguments):
                CALLS.append(1)
                return function(*arguments)
            return wrapper
        """
    )
    + loss_of().replace("    def forward", "    @counted\n    def forward"),
    "it keeps the tensor b, which may change": loss_of("self.b", 'self.register_buffer("b", torch.ones(()))'),
    "it keeps s, a deque that may change": loss_of(
        "self.s[0]", "self.s = collections.deque([1.0])", before="import collections"
    ),
    "it keeps s, a Box that may change": loss_of("self.s.v", "self.s = Box()", before="class Box:\n    v = 1.0\n"),
    "it keeps f, a function that may change": loss_of(
        "self.f()", "self.f = made(1.0)", before="def made(v):\n    def f():\n        return v\n    return f\n"
    ),
    "it keeps f, a method that may change": loss_of(
        "self.f(1.0)", "self.f = Box().g", before="class Box:\n    def g(self, x):\n        return x\n"
    ),
    "it keeps the tensor s, which may change": loss_of("self.s", "self.s = torch.ones(())"),
}


@pytest.mark.parametrize("reason", KEPT)
def test_kept(reason):
    module = module_of(KEPT[reason])
    (candidate,) = accelerate.candidates.candidates(module)
    outcome = accelerate.replace.replace(candidate)
    assert (outcome.replaced, outcome.what) == (False, reason)
    if hasattr(module, "CALLS"):
        assert module.CALLS == []


def test_a_decorator_of_pytorch_is_no_obstacle():
    source = loss_of().replace("    def forward", "    @torch.autocast('cpu', enabled=False)\n    def forward")
    assert accelerate.patch(module_of(source))


HOSTILE = """
class Proxy:
    @property
    def __class__(self):
        raise RuntimeError("outside of a context")

class Meta(type):
    @property
    def __name__(cls):
        raise RuntimeError("no name")

class Descriptor:
    def __get__(self, *_):
        raise RuntimeError("no forward")

proxy = Proxy()
class NamelessNCE(nn.Module, metaclass=Meta):
    def forward(self, a, b): ...
class DescribedNCE(nn.Module):
    forward = Descriptor()
class SignedNCE(nn.Module):
    def forward(self, a, b): ...
SignedNCE.forward.__signature__ = 3
"""


def test_objects_that_raise_when_they_are_looked_at():
    """They do not end a script, and the loss beside them is replaced."""
    module = module_of(HOSTILE + loss_of())
    assert accelerate.patch(module) == [f"{module.__name__}.Loss"]


def test_a_trial_draws_nothing_from_the_streams_of_the_script():
    """A class that draws when it is made, and in each call, leaves every stream where it was."""
    draw = "torch.rand(3), torch.nn.Linear(2, 2), np.random.rand(2)"
    for source in (loss_of(made=draw, before="import numpy as np"), loss_of(forward=draw, before="import numpy as np")):
        values = []
        for tried in (False, True):
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            if tried:
                assert accelerate.patch(module_of(source))
            values.append((torch.rand(2).tolist(), np.random.rand(), random.random()))
        assert values[0] == values[1]


def test_a_traceback_without_our_frames():
    with pytest.raises(AttributeError) as caught:
        accelerate.patch(3)
    names = [[f.name for f in traceback.extract_tb(trace)] for trace in (caught.tb, scripts_own(caught.tb))]
    assert names[0][-2:] == ["patch", "candidates"]
    assert names[1] == ["test_a_traceback_without_our_frames"]
    assert scripts_own(None) is None
