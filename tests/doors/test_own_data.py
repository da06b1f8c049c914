"""A user's own data set by import path, and the messages for wrong ones."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fastnce.commands.main import main
from fastnce.common.imports import CodeError
from fastnce.data.own import open_own
from fastnce.engine.checkpoint import Checkpoints
from tests.doors.own_code import CODE, SMALL, refused
from tests.doors.own_data_sets import DATA_SETS


@pytest.fixture
def own(here):
    """The working folder; its mine.py has the classes of `DATA_SETS` too."""
    (here / "mine.py").write_text(CODE + DATA_SETS)
    return here


def go(here, name, *settings, out="run"):
    options = [*SMALL, f"data.dataset=mine.py:{name}", "loss.nce_layers=0,4"]
    return ["train", "fastcut", "--out", str(here / out), *options, *settings]


def test_a_data_set_trains_and_continues(here, capsys):
    assert main(go(here, "Data", "run.steps=2")) == main(go(here, "Data", "run.steps=4")) == 0
    assert main(go(here, "Data", "run.steps=4", out="whole")) == 0
    one, other = (load_file(here / run / "checkpoints/step-00000004/training.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert main(["cache", "fastcut", "data.dataset=mine.py:Data"]) == 0
    assert "nothing is cached: data.dataset=mine.py:Data" in capsys.readouterr().out


TENSORS = "two float32 tensors (1, 3, height, width) on cpu"
BATCH = "batch(0, decaying=False) must return"
STEPS = "steps_per_epoch must be a whole number of at least 1, not"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Silent", "data.dataset=mine.py:Silent lacks digest: see fastnce.engine.contracts.DataSet"),
        ("OneDomain", f"{BATCH} A and B, {TENSORS}, not a torch.float32 tensor of shape (1, 3, 32, 32)"),
        ("OddSize", "images of 31x32 from data.dataset do not fit"),
        ("Judge", "Judge(options, channels=, seed=, rank=, world=, device=) fails: TypeError"),
        ("FailingInit", "FailingInit(options, channels=, seed=, rank=, world=, device=) fails: ValueError: no folder"),
        ("NOT_CALLABLE", "data.dataset=mine.py:NOT_CALLABLE must be a class, not 3"),
        ("NumberDigest", "digest() must return a text, not 5"),
        ("NoDigest", "digest() must return a text, not None"),
        ("TupleDigest", "digest() must return a text, not a tuple of"),
        ("FailingDigest", "digest() fails: KeyError: 'files'"),
        ("HalfSteps", f"{STEPS} 2.5"),
        ("NoSteps", f"{STEPS} None"),
        ("MethodSteps", f"{STEPS} a function"),
        ("ZeroSteps", f"{STEPS} 0"),
        ("TrueSteps", f"{STEPS} True"),
        ("LateSteps", f"{STEPS} 2.5"),
        ("FailingSteps", "steps_per_epoch fails: OSError: no disk"),
        ("Half", f"{BATCH} {TENSORS}; A is a torch.float16 tensor of shape (1, 3, 32, 32) on cpu"),
        ("Double", f"{BATCH} {TENSORS}; A is a torch.float64 tensor of shape (1, 3, 32, 32) on cpu"),
        ("Elsewhere", f"{BATCH} {TENSORS}; A is a torch.float32 tensor of shape (1, 3, 32, 32) on meta"),
        ("Levels", f"{BATCH} images in [-1, 1]; A ranges from 0."),
        ("Nan", f"{BATCH} finite numbers; A has NaN"),
        ("Infinite", f"{BATCH} finite numbers; A has NaN or infinite ones"),
        ("FailingBatch", "batch(0, decaying=False) fails: ValueError: no index"),
        ("LaterDouble", f"batch(1) must return {TENSORS}; A is a torch.float64 tensor of shape (1, 3, 32, 32) on cpu"),
        (
            "LaterElsewhere",
            f"batch(1) must return {TENSORS}; A is a torch.float32 tensor of shape (1, 3, 32, 32) on meta",
        ),
        ("LaterMore", f"batch(1) must return {TENSORS}; A is a torch.float32 tensor of shape (2, 3, 32, 32)"),
        ("LaterGray", f"batch(1) must return {TENSORS}; A is a torch.float32 tensor of shape (1, 1, 32, 32)"),
        ("LaterNone", f"batch(1) must return A and B, {TENSORS}, not None"),
        ("LaterSize", "batch(1) returns A and B of 64x32 and 64x32, batch(0) of 32x32 and 32x32: return images of"),
        ("OddOneSize", "one_size must be True or False, not 'no'"),
        ("OddSkipped", "skipped must be a list of (path, reason), not a list of 1"),
        ("OddCount", "size_a must be a whole number, not 'many'"),
    ],
)
def test_wrong_data_sets_are_refused(own, capsys, name, sentence):
    message = refused(capsys, *go(own, name))
    assert message.startswith(f"data.dataset=mine.py:{name}") or name == "OddSize"
    assert sentence in message


IMAGES = "samples(2) must return two float32 tensors (images, 3, height, width) on cpu"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "NoSamples",
            "samples(2) must return A and B, two float32 tensors (images, 3, height, width) on cpu, not None",
        ),
        ("EmptySamples", f"{IMAGES}; A is a torch.float32 tensor of shape (0, 3, 32, 32)"),
        ("GraySamples", f"{IMAGES}; A is a torch.float32 tensor of shape (1, 1, 32, 32)"),
        ("FlatSamples", f"{IMAGES}; A is a torch.float32 tensor of shape (3, 32, 32)"),
        ("DoubleSamples", f"{IMAGES}; A is a torch.float64 tensor of shape (1, 3, 32, 32)"),
        ("UnequalSamples", "samples(2) must return as many images of A as of B, not 1 of A and 2 of B"),
        ("FailingSamples", "samples(2) fails: RuntimeError: no files"),
    ],
)
def test_wrong_samples_are_refused_before_the_run(own, capsys, name, sentence):
    settings = ["run.sample_every=2", "run.samples=2"]
    assert sentence in refused(capsys, *go(own, name, *settings))
    assert not (own / "run").exists()


@pytest.mark.parametrize("name", ["NearlyOne", "AnySize", "TensorSteps", "Assigned", "Forwarding", "build"])
def test_right_data_sets_train(own, name):
    assert main(go(own, name, "--dry-run")) == 0
    assert main(go(own, name)) == 0
    state = json.loads((own / "run/checkpoints/step-00000002/state.json").read_text())
    assert state["data"] == "noise"


def test_the_digest_is_that_of_the_opened_data_set(own):
    assert main(go(own, "ChangingDigest", "run.steps=1")) == main(go(own, "ChangingDigest", "run.steps=2")) == 0
    found = Checkpoints(own / "run/checkpoints").state()
    assert found is not None
    assert (found[0]["step"], found[0]["data"]) == (2, "call 1")


def opened(name):
    options, run = SimpleNamespace(batch=1), {"seed": 0, "rank": 0, "world": 1, "device": torch.device("cpu")}
    return open_own(f"mine.py:{name}", options, channels=(3, 3), batch=1, **run)


def test_too_little_memory_is_no_mistake_of_the_class(own):
    """`fastnce train` then says how to need less."""
    with pytest.raises(MemoryError):
        opened("Hungry")


def test_values_are_read_from_the_first_batch_only(own):
    """Later values may be on a device that is still computing them."""
    data = opened("Data")
    read: list[str] = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            read.append(getattr(function, "__qualname__", str(function)))
            return super().__torch_function__(function, types, arguments, options or {})

    inner = data._data
    inner.batch = lambda step, *, decaying=False: tuple(
        torch.full((1, 3, 32, 32), float("nan")).as_subclass(Watched) for _ in "AB"
    )
    data.batch(1)
    seen = {name for name in read if not re.search(r"\.__get__$|__get__|\.dim$|\.numel$|\.__len__$|__len__", name)}
    assert read
    assert not seen
    assert data.options is inner.options  # other attributes are passed on
    with pytest.raises(AttributeError, match="nothing"):
        _ = data.nothing
    inner.batch = lambda step, *, decaying=False: [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32, device="meta")]
    with pytest.raises(CodeError, match=r"batch\(7\) must return"):
        data.batch(7)


def test_rain_has_no_effect_and_is_refused(own, capsys):
    sentence = "data.rain=0.5 has no effect with data.dataset=mine.py:Data: leave it at 0"
    assert sentence in refused(capsys, *go(own, "Data", "data.rain=0.5"))
    assert sentence in refused(capsys, *go(own, "Data", "data.rain=0.5", "--dry-run"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing", "mine.py has no missing; it defines"),
        ("NOT_CALLABLE", "data.dataset=mine.py:NOT_CALLABLE must be a class, not 3"),
        ("Unfinished", "data.dataset=mine.py:Unfinished lacks samples, digest: see"),
        ("BatchIsAList", "data.dataset=mine.py:BatchIsAList: batch must be a method, not a list of 2"),
        ("HalfSteps", f"data.dataset=mine.py:HalfSteps: {STEPS} 2.5"),
        ("MethodSteps", f"data.dataset=mine.py:MethodSteps: {STEPS} a function"),
    ],
)
def test_a_dry_run_checks_the_class(own, capsys, name, sentence):
    assert sentence in refused(capsys, *go(own, name, "--dry-run"))
    assert capsys.readouterr().out == ""


def test_a_dry_run_builds_no_data_set(own):
    assert main(go(own, "FailingInit", "--dry-run")) == 0
