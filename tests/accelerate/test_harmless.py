"""A trial is harmless: what is not run at all, and what a trial restores."""

import random
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fastnce.accelerate import harmless, trial
from fastnce.accelerate.candidates import candidates
from fastnce.accelerate.replace import replace
from tests.accelerate.checkouts import DOT_LOSS, module_of

LOSS = DOT_LOSS.format(name="Contrast", extra="")


def outcome_of(source: str):
    (candidate,) = candidates(module_of(source))
    return replace(candidate)


def with_line(line: str, before: str = "") -> str:
    """The loss with a line more in its constructor."""
    return f"{before}\n" + LOSS.replace("self.opt = opt", f"self.opt = opt\n        {line}")


NOT_RUN = {
    "open('seen', 'w')": "its code uses open",
    "torch.save(1, 'seen')": "its code uses .save",
    "torch.manual_seed(0)": "its code uses .manual_seed",
    "torch.backends.cudnn.benchmark = True": "its code uses .backends",
    "self.o = torch.optim.Adam(self.parameters())": "its code uses .optim",
    "torch.cuda.FloatTensor(1)": "its code uses .FloatTensor",
    "print(eval('1'))": "its code uses eval",
    "import os; os.mkdir('seen')": "its code imports os",
    "from pathlib import Path; Path('seen').touch()": "its code imports pathlib",
    "global seen; seen = 1": "its code changes the global seen",
    "[self.later() for _ in range(3)]\n    def later(self):\n        input()": "its code uses input",
    "getattr(self, 'later')()\n    def later(self):\n        input()": "its code uses input",
    "self.x = property(lambda self: exit())": "its code uses exit",
}


@pytest.mark.parametrize(("line", "sentence"), NOT_RUN.items())
def test_code_that_does_more_than_compute_is_not_run(line, sentence):
    outcome = outcome_of(with_line(line))
    assert (outcome.what, outcome.tried, outcome.replaced) == (sentence, False, False)


BEFORE = {
    "import os": ("os.getpid()", "its code uses the module os"),
    "from subprocess import run": ("run(['true'])", "its code uses run of subprocess"),
    "STATE = {'scale': 1}": ("STATE['scale']", "its code uses STATE, a dict that may change"),
    "def write():\n    open('seen', 'w')": ("write()", "its code uses open"),
    "class Helper:\n    def __init__(self):\n        open('seen', 'w')": ("Helper()", "its code uses open"),
    "from functools import partial\nwrite = partial(open, 'seen', 'w')": ("write()", "its code uses write"),
    "from torch import save": ("save(1, 'seen')", "its code uses save of torch.serialization"),
    "from torch.utils.data import DataLoader": ("DataLoader([1])", "its code uses DataLoader of torch.utils.data"),
    "class Meta(type): pass\nclass Made(metaclass=Meta): pass": (
        "Made()",
        "Made is made by Meta, not by Python's type",
    ),
}


@pytest.mark.parametrize(("before", "line", "sentence"), [(b, *rest) for b, rest in BEFORE.items()])
def test_what_the_code_reaches_is_read_too(before, line, sentence):
    outcome = outcome_of(with_line(line, before))
    assert outcome.what.startswith(sentence)
    assert not outcome.tried


ALLOWED = [
    ("from torch import bmm, einsum", "einsum('ij->j', torch.zeros(1, 1))"),
    ("from numpy.random import permutation", "permutation(3)"),
    ("SCALE = 1.0\nTRIPLE = (1, 2.0, None)", "self.scale = SCALE * TRIPLE[0]"),
    ("class Helper(nn.Module):\n    def forward(self, x):\n        return x", "self.helper = Helper()(0)"),
    ("import torch.nn.functional as F", "F.relu(torch.zeros(1))"),
    ("", "torch.zeros(1).cuda(); torch.zeros(1, device='cuda'); torch.zeros(1).to(torch.device('cuda:0'))"),
    ("", "print('made'); torch.rand(3); torch.zeros(1).sum().item()"),
]


@pytest.mark.parametrize(("before", "line"), ALLOWED)
def test_code_that_only_computes_is_tried(before, line):
    outcome = outcome_of(with_line(line, before))
    assert outcome.replaced, outcome.what


def test_a_trial_leaves_nothing_behind(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "print('made'); torch.rand(3); np.random.rand(3); nn.Linear(2, 2)"

    def states():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(), torch.is_grad_enabled()

    def seeded():
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    seeded()
    expected = states()
    seeded()
    with torch.no_grad():
        assert outcome_of(with_line(line, "import numpy as np")).replaced
    assert states() == expected
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    assert not [t for t in threading.enumerate() if t.name == "fastnce-trial" and t.is_alive() and not time.sleep(0.5)]


@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize(
    "body", ["while True: self.opt", "while True:\n            try: 1 / 0\n            except Exception: pass"]
)
def test_a_trial_that_hangs_is_ended(where, body, monkeypatch):
    monkeypatch.setattr(trial.isolated.__wrapped__, "__defaults__", (0.2,))
    found = []

    def work():
        found.append(outcome_of(with_line(body)))

    if where == "main":
        work()
    else:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(20)
    assert found[0].what == "its trial took more than 0.2 seconds"
    assert found[0].tried


def test_an_except_without_a_class_is_not_run():
    body = "while True:\n            try: 1 / 0\n            except: pass"
    assert outcome_of(with_line(body)).what == "its code has an except without a class"


BYSTANDERS = """
class Model(nn.Module):
    def __init__(self, opt):
        raise SystemExit("made")
    def forward(self, x):
        return self.opt.nce_T
class Pair(nn.Module):
    def __init__(self, opt):
        raise SystemExit("made")
    def forward(self, a, b):
        return a
class Data(torch.utils.data.Dataset):
    def __init__(self, opt):
        raise SystemExit(opt.nce_T)
def once(a, b):
    return a @ b
"""


def test_other_classes_are_no_candidates():
    assert candidates(module_of(BYSTANDERS)) == []


def test_classes_of_installed_libraries_are_no_candidates():
    assert harmless.of_a_library("torch.nn.modules.loss")
    assert harmless.of_a_library("json")
    assert not harmless.of_a_library("tests.accelerate.checkouts")
    assert candidates(sys.modules["torch.nn"]) == []


NAMED = """
class InfoNCE(nn.Module):
    def __init__(self, temperature):
        super().__init__()
    def forward(self, a, b):
        return a
class PatchNCELoss3(nn.Module):
    def __init__(self, opt):
        super().__init__()
    def forward(self, feats):
        return feats
def patch_nce_loss(q, k, T=0.07):
    return torch.nn.functional.cross_entropy(q @ k.T / T, torch.arange(len(q)))
"""


def test_classes_and_functions_of_such_names_are_mentioned():
    found = {c.value.__name__: replace(c) for c in candidates(module_of(NAMED))}
    assert {name: outcome.what for name, outcome in found.items()} == {
        "InfoNCE": "it does not read opt.nce_T",
        "PatchNCELoss3": "its forward does not take (feat_q, feat_k)",
        "patch_nce_loss": "a function: its arguments have no agreed meaning, so it is not tried",
    }
    assert not any(outcome.tried for outcome in found.values())


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A folder on PYTHONPATH with PyTorch's metadata, which is the only folder of packages."""
    (tmp_path / "torch-1.dist-info").mkdir()
    (tmp_path / "torch-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(harmless.sysconfig, "get_path", lambda name: None)
    monkeypatch.setattr(harmless.site, "getsitepackages", list)
    monkeypatch.setattr(harmless.site, "getusersitepackages", str)
    caches = harmless._library_folders, harmless._lies_in_a_library
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def test_pytorch_may_be_installed_in_another_folder(elsewhere):
    """Clusters put packages on PYTHONPATH, outside of Python's own folders."""
    assert harmless.of_a_library("torch.nn.functional")
    assert harmless.of_a_library("numpy.random")
    assert not harmless.of_a_library("tests.accelerate.test_harmless")
    assert harmless._lies_in_a_library(str(elsewhere / "beside.py"))


def test_the_user_s_code_beside_pytorch_is_no_library(elsewhere, monkeypatch):
    """After `pip install --target .` in a checkout, its code would be trusted unread."""
    (elsewhere / "checkout").mkdir()
    for folder in (elsewhere, elsewhere / "checkout"):
        harmless._library_folders.cache_clear()
        harmless._lies_in_a_library.cache_clear()
        monkeypatch.chdir(folder)
        assert not harmless._lies_in_a_library(str(elsewhere / "models" / "patchnce.py"))
        assert harmless._lies_in_a_library(str(elsewhere / "torch" / "nn" / "functional.py"))
        assert harmless.of_a_library("torch.nn.functional")
