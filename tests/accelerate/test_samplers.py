"""Which samplers are found by what they compute, what their calls return afterwards, and which are kept."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch

from fastnce import accelerate
from fastnce.accelerate import sampler as samplers
from fastnce.accelerate.candidates import candidates
from fastnce.accelerate.replace import replace
from tests.accelerate.checkouts import NETWORKS, module_of

MAPS = [torch.randn(2, 3, 6, 5), torch.randn(2, 4, 3, 3)]
CHANGES = {
    "another name": (("PatchSampleF", "Rows"), ("gpu_ids=[]):", "gpu_ids=[], verbose=False):")),
    "other names inside": (("create_mlp", "make_layers"), ("feats", "maps")),
    "weights on a device": (("self.mlp_init = True", "self.cuda(); self.mlp_init = True"),),
}


def sampler_class(*changes: tuple[str, str]) -> type[torch.nn.Module]:
    source = NETWORKS
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    module = module_of(source)
    return next(c.value for c in candidates(module))


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_sampler_is_found_by_what_it_computes(changes):
    cls = sampler_class(*changes)
    (candidate,) = candidates(__import__(cls.__module__))
    assert replace(candidate).replaced


def test_the_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        cls = sampler_class()
        assert accelerate.patch(__import__(cls.__module__))
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def patched() -> type[torch.nn.Module]:
    cls = sampler_class(("num_patches=64, patch_ids=None):", "num_patches=64, patch_ids=None, whole=False):"))
    accelerate.patch(__import__(cls.__module__))
    return cls


def made(cls, **options):
    sampler = cls(**{"use_mlp": True, "init_gain": 0.5, "nc": 8} | options)
    sampler(MAPS)
    return sampler


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The `num_patches` of the calls that this library computes."""
    found = []
    forward = samplers._Fast.forward

    def counted(self, feats, num_patches, patch_ids):
        found.append(num_patches)
        return forward(self, feats, num_patches, patch_ids)

    monkeypatch.setattr(samplers._Fast, "forward", counted)
    return found


@pytest.mark.parametrize("use_mlp", [False, True])
def test_rows_are_those_of_the_class(patched, use_mlp, calls):
    sampler = made(patched, use_mlp=use_mlp)
    ids = [np.arange(5), torch.arange(3)]
    for call in ({"patch_ids": ids, "num_patches": 5}, {"patch_ids": ids}):
        ours, theirs = sampler(MAPS, **call), patched.forward.__wrapped__(sampler, MAPS, **call)
        for a, b in zip(ours[0], theirs[0], strict=True):
            torch.testing.assert_close(a, b)
    assert calls == [5, 64]


def test_the_first_call_draws_the_published_weights(patched):
    states = []
    for cls in (patched, sampler_class()):
        torch.manual_seed(3)
        states.append(made(cls).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


@pytest.mark.parametrize("call", ["whole", "none", "hook", "list", "layer"])
def test_calls_that_are_not_covered_run_as_before(patched, call, calls):
    sampler = made(patched)
    if call == "whole":
        sampler(MAPS, 4, None, True)
    elif call == "none":
        whole, none = sampler(MAPS, 0)
        assert whole[0].shape == (2, 8, 6, 5)
        assert none == [[], []]
    elif call == "hook":
        doubled = sampler.mlp_0[0].register_forward_hook(lambda module, inputs, output: output * 2)
        sampler(MAPS, 4)
        doubled.remove()
    elif call == "list":
        with pytest.raises(AttributeError):  # the class's own error
            sampler([[1]], 4)
    else:
        sampler.mlp_1 = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
        sampler(MAPS, 4)
    assert calls == []
    if call == "hook":
        sampler(MAPS, 4)
        assert calls == [4]


def test_copies_and_loaded_weights_are_used(patched):
    sampler = made(patched)
    other = copy.deepcopy(sampler)
    with torch.no_grad():
        other.mlp_0[0].weight.zero_()
    ids = [torch.arange(4), torch.arange(4)]
    other(MAPS, 4, ids)
    sampler.load_state_dict(other.state_dict())
    for a, b in zip(sampler(MAPS, 4, ids)[0], other(MAPS, 4, ids)[0], strict=True):
        assert torch.equal(a, b)
    assert b"fastnce" not in pickle.dumps(sampler.state_dict())
    assert not [name for name in vars(sampler) if "fast" in name]


KEPT = {
    "cosines of other rows": ("+ 1e-7", "+ 1e-3", "its rows or gradients differ by"),
    "another activation": ("nn.ReLU()", "nn.GELU()", "it has no MLPs mlp_0, mlp_1, ... of Linear, ReLU and Linear"),
    "always the same locations": ("np.random.permutation(x.shape[1])", "np.arange(x.shape[1])", "it does not draw"),
    "locations near the middle": (
        "np.random.permutation(x.shape[1])",
        "np.concatenate([np.random.permutation(6) + 3, np.random.permutation(3)])",
        "it does not draw locations uniformly",
    ),
    "a grid": (
        "np.random.permutation(x.shape[1])[:num_patches]",
        "(np.arange(0, x.shape[1], 3) + np.random.randint(3))[:num_patches]",
        "it does not draw locations uniformly",
    ),
    "the strongest locations": (
        "np.random.permutation(x.shape[1])",
        "x[0].sum(1).argsort().numpy()",
        "the locations that it draws depend on the maps",
    ),
    "three results": ("return rows, ids", "return rows, ids, feats", "it returns 3 values where two are expected"),
    "the fifth layer": ("rows.append(x)", "rows.append(x if number < 4 else -x)", "its rows or gradients differ by"),
    "a file": ("rows, ids = [], []", "rows, ids = [], []; open('seen', 'w')", "its code uses open"),
    "no such constructor": ("init_gain=0.02, ", "", "its constructor does not take use_mlp, init_type, init_gain"),
}


@pytest.mark.parametrize(("old", "new", "sentence"), KEPT.values(), ids=KEPT)
def test_a_sampler_that_may_differ_is_kept(old, new, sentence):
    cls = sampler_class((old, new))
    (candidate,) = candidates(__import__(cls.__module__))
    outcome = replace(candidate)
    assert not outcome.replaced
    assert outcome.what.startswith(sentence)
    assert not hasattr(cls.forward, "__wrapped__")


MADE = ("self.init_type, self.init_gain = ", "self.scale = 1.0; self.init_type, self.init_gain = ")
OF_CLASS = ("class PatchSampleF(nn.Module):\n", "class PatchSampleF(nn.Module):\n    scale = 1.0\n\n")
LATER = {
    "attribute": ("self.scale", MADE, lambda cls, sampler: setattr(sampler, "scale", 0.5)),
    "new attribute": ("self.scale", OF_CLASS, lambda cls, sampler: setattr(sampler, "scale", 0.5)),
    "attribute of the class": ("self.scale", OF_CLASS, lambda cls, sampler: setattr(cls, "scale", 0.5)),
    "global": (
        "SCALE",
        ("class PatchSampleF", "SCALE = 1.0\n\n\nclass PatchSampleF"),
        lambda cls, sampler: setattr(sys.modules[cls.__module__], "SCALE", 0.5),
    ),
    "option": (
        "1.0",
        ("rows, ids = [], []", "rows, ids = [], []  #"),
        lambda cls, sampler: setattr(sampler, "use_mlp", False),
    ),
    "forward of an MLP": (
        "1.0",
        ("rows, ids = [], []", "rows, ids = [], []  #"),
        lambda cls, sampler: setattr(sampler.mlp_0, "forward", lambda x: x[:, :1].expand(-1, 16)),
    ),
    "hook of an MLP": (
        "1.0",
        ("rows, ids = [], []", "rows, ids = [], []  #"),
        lambda cls, sampler: sampler.mlp_0[1].register_full_backward_pre_hook(lambda _, slopes: slopes),
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_a_change_after_the_trial_counts(name, calls):
    """An instance that has been changed returns what its class would; another keeps the replacement."""
    value, change, later = LATER[name]
    cls = sampler_class(("rows.append(x)", f"rows.append(x * {value})"), change)
    (candidate,) = candidates(sys.modules[cls.__module__])
    assert replace(candidate).replaced
    changed, other = made(cls), made(cls, init_type="xavier", gpu_ids=["cpu"])
    calls.clear()  # of the trial
    ids = [np.arange(5), np.arange(3)]
    for sampler in (changed, other):
        sampler(MAPS, 5, ids)
    assert len(calls) == 2
    later(cls, changed)
    ours, theirs = changed(MAPS, 5, ids), cls.forward.__wrapped__(changed, MAPS, 5, ids)
    assert all(map(torch.equal, ours[0], theirs[0]))
    assert len(calls) == 2
    if name not in ("attribute of the class", "global"):
        other(MAPS, 5, ids)
        assert len(calls) == 3
