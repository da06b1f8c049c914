"""`python -m fastnce.accelerate` on a small checkout with the published layout, and on the published checkouts."""

import importlib
import json
import os
import runpy
import subprocess
import sys
import textwrap
import traceback
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import fastnce
from fastnce import accelerate
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[1]

DOT_LOSS = """
class {name}(nn.Module):
    def __init__(self, opt):
        super({name}, self).__init__()
        self.opt = opt

    def forward(self, feat_q, feat_k):
        groups = 1 if self.opt.nce_includes_all_negatives_from_minibatch else self.opt.batch_size
        q = feat_q.reshape(groups, -1, feat_q.shape[1])
        k = feat_k.detach().reshape(groups, -1, feat_q.shape[1])
        logits = torch.einsum("gsd,gtd->gst", q, k) / self.opt.nce_T
        target = torch.arange(logits.shape[1]).expand(groups, -1)
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none"){extra}
"""

COSINE_LOSS = """
class PatchNCELoss(nn.Module):
    def __init__(self, opt):
        super(PatchNCELoss, self).__init__()
        self.opt = opt
        self.similarity_function = nn.CosineSimilarity(dim=-1)

    def forward(self, feat_q, feat_k):
        logits = self.similarity_function(feat_q[:, None], feat_k.detach()[None]) / self.opt.nce_T
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
"""

NETWORKS = """
import numpy as np
import torch
from torch import nn


def init_net(net, init_type, init_gain, gpu_ids):
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight, gain=init_gain)
            nn.init.zeros_(layer.bias)
    return net


class PatchSampleF(nn.Module):
    def __init__(self, use_mlp=False, init_type="normal", init_gain=0.02, nc=256, gpu_ids=[]):
        super(PatchSampleF, self).__init__()
        self.use_mlp, self.nc, self.gpu_ids, self.mlp_init = use_mlp, nc, gpu_ids, False
        self.init_type, self.init_gain = init_type, init_gain

    def create_mlp(self, feats):
        for number, feat in enumerate(feats):
            mlp = nn.Sequential(nn.Linear(feat.shape[1], self.nc), nn.ReLU(), nn.Linear(self.nc, self.nc))
            self.add_module("mlp_%d" % number, mlp)
        init_net(self, self.init_type, self.init_gain, self.gpu_ids)
        self.mlp_init = True

    def forward(self, feats, num_patches=64, patch_ids=None):
        if self.use_mlp and not self.mlp_init:
            self.create_mlp(feats)
        rows, ids = [], []
        for number, feat in enumerate(feats):
            batch, _, height, width = feat.shape
            x = feat.permute(0, 2, 3, 1).flatten(1, 2)
            chosen = []
            if num_patches > 0:
                chosen = np.random.permutation(x.shape[1])[:num_patches] if patch_ids is None else patch_ids[number]
                x = x[:, torch.as_tensor(chosen)].flatten(0, 1)
            if self.use_mlp:
                x = getattr(self, "mlp_%d" % number)(x)
            x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)
            if num_patches == 0:
                x = x.permute(0, 2, 1).reshape(batch, -1, height, width)
            rows.append(x)
            ids.append(chosen)
        return rows, ids
"""

TOY_MODEL = """
import numpy as np
import torch
from torch import nn
from . import networks
from .patchnce import {loss} as Criterion


class ToyModel:
    def __init__(self, opt):
        self.criterion = Criterion(opt)
        self.netG = nn.ModuleList([nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3)])
        self.netF = networks.init_net(networks.PatchSampleF(use_mlp=True, init_gain=0.7, nc=16), "xavier", 0.7, [])
        self.ids = np.random.RandomState(5)

    def encode(self, x):
        feats = []
        for layer in self.netG:
            x = layer(x)
            feats.append(x)
        return feats

    def loss(self, source, target):
        keys = self.encode(source)
        ids = [self.ids.permutation(f.shape[2] * f.shape[3])[:20] for f in keys]
        rows_k, ids = self.netF(keys, 20, ids)
        rows_q, _ = self.netF(self.encode(target), 20, ids)
        return sum(self.criterion(q, k).mean() for q, k in zip(rows_q, rows_k))
"""

TRAIN = """
import json, os, pickle, sys
from types import SimpleNamespace
import torch
from models.toy_model import ToyModel

class Local:
    pass

if __name__ == "__main__":
    torch.manual_seed(3)
    opt = SimpleNamespace(nce_T=0.07, batch_size=2, nce_includes_all_negatives_from_minibatch=False)
    model = ToyModel(opt)
    source, target = torch.randn(2, 2, 3, 12, 12)
    model.loss(source, target)  # makes the MLPs
    parameters = [*model.netG.parameters(), *model.netF.parameters()]
    losses = []
    for _ in range(4):
        loss = model.loss(source, target)
        with torch.no_grad():  # an optimiser of PyTorch's takes seconds to import
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= 0.05 * gradient
        losses.append(loss.item())
    torch.save(torch.nn.DataParallel(model.netF).module.cpu().state_dict(), sys.argv[1])
    if len(sys.argv) > 2:
        model.netF.load_state_dict(torch.load(sys.argv[2]))
    pickle.loads(pickle.dumps(Local()))
    print(json.dumps(dict(losses=losses, argv=sys.argv, path=sys.path[0], file=__file__, folder=os.getcwd(),
                          criterion=type(model.criterion).__name__, keys=list(model.netF.state_dict()))))
"""


def write_checkout(folder: Path, flavour: str) -> Path:
    losses = {
        "cut": DOT_LOSS.format(name="PatchNCELoss", extra=""),
        "dclgan": COSINE_LOSS + DOT_LOSS.format(name="PatchNCELoss2", extra=""),
        "changed": DOT_LOSS.format(name="PatchNCELoss", extra=" * 1.5"),
    }
    models = folder / "models"
    models.mkdir(parents=True)
    (models / "__init__.py").write_text("")
    (models / "patchnce.py").write_text("import torch\nfrom torch import nn\n" + losses[flavour])
    (models / "networks.py").write_text(NETWORKS)
    (models / "toy_model.py").write_text(TOY_MODEL.format(loss="PatchNCELoss"))
    (folder / "train.py").write_text(TRAIN)
    return folder


def run(folder: Path, *arguments: str, accelerated: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, *(["-m", "fastnce.accelerate"] if accelerated else []), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def run_forked(folder: Path, *arguments: str, accelerated: bool = True) -> subprocess.CompletedProcess:
    """As `run`, in a forked process, which saves the seconds of importing PyTorch."""

    def work() -> int:
        os.chdir(folder)
        sys.argv, sys.path[:0] = list(arguments), [str(folder)]
        try:
            if accelerated:
                return accelerate.main(arguments)
            runpy.run_path(str(folder / arguments[0]), run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            return 1
        return 0

    process = Forked(work)
    return subprocess.CompletedProcess(arguments, process.end(), process.out.read_text(), process.err.read_text())


def printed(finished: subprocess.CompletedProcess) -> dict:
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("flavour", ["cut", "dclgan"])
def test_same_losses_and_checkpoints_with_and_without(tmp_path, flavour, imported):
    folder = write_checkout(tmp_path / "checkout", flavour)
    begin = run if flavour == "cut" else run_forked
    plain = printed(begin(folder, "train.py", "plain.pth", accelerated=False))
    finished = begin(folder, "train.py", "fast.pth", "plain.pth")  # saves fast.pth and loads plain.pth
    fast = printed(finished)

    assert "replaced models.patchnce.PatchNCELoss" in finished.stderr
    assert ("cosines" in finished.stderr) == (flavour == "dclgan")
    assert "replaced models.networks.PatchSampleF" in finished.stderr
    assert fast["losses"] == pytest.approx(plain["losses"], rel=2e-6)
    assert plain["losses"][0] > plain["losses"][-1]  # the loss decreases, so gradients were compared too
    assert fast["argv"] == ["train.py", "fast.pth", "plain.pth"]
    for same in ("path", "file", "folder", "criterion", "keys"):
        assert fast[same] == plain[same]

    saved = {name: torch.load(folder / f"{name}.pth") for name in ("plain", "fast")}
    assert list(saved["plain"]) == list(saved["fast"]) == plain["keys"]
    for key, value in saved["plain"].items():
        torch.testing.assert_close(saved["fast"][key], value, rtol=1e-4, atol=1e-6)
    unpatched = imported(flavour, "networks")[0].PatchSampleF(use_mlp=True, nc=16)
    unpatched.create_mlp([torch.zeros(1, 5, 2, 2), torch.zeros(1, 7, 2, 2)])
    unpatched.load_state_dict(saved["fast"])


def test_a_script_with_nothing_to_replace_runs_with_a_message(tmp_path):
    (tmp_path / "script.py").write_text("import sys, json\nprint(json.dumps(sys.argv))\nsys.exit(7)\n")
    finished = run_forked(tmp_path, "script.py", "a", "--b")
    assert finished.returncode == 7
    assert json.loads(finished.stdout) == ["script.py", "a", "--b"]
    assert "nothing was replaced" in finished.stderr


def test_errors_of_the_script_are_passed_on(tmp_path):
    (tmp_path / "script.py").write_text("raise RuntimeError('from the script')\n")
    finished = run_forked(tmp_path, "script.py")
    assert finished.returncode == 1
    assert "RuntimeError: from the script" in finished.stderr


ENDS = {
    "raise RuntimeError('x')": "before the script ended with RuntimeError",
    "def f(": "before the script ended with SyntaxError",
    "import missing_module_of_mine": "before the script ended with ModuleNotFoundError",
    "import argparse; argparse.ArgumentParser().parse_args(['--help'])": "before the script ended with exit code 0",
    "import argparse; argparse.ArgumentParser().parse_args(['--no'])": "before the script ended with exit code 2",
    "raise SystemExit('a text')": "before the script ended with exit code 1",
    "print(1)": "the script has no class PatchNCELoss or PatchSampleF",
}


@pytest.mark.parametrize(("text", "sentence"), ENDS.items())
def test_the_last_line_says_how_the_script_ended(tmp_path, text, sentence):
    (tmp_path / "script.py").write_text(f"{text}\n")
    (line,) = [x for x in run_forked(tmp_path, "script.py").stderr.splitlines() if x.startswith("fastnce: ")]
    assert sentence in line
    assert ("imports none" in line) == (text == "print(1)")


def test_an_error_after_a_replacement_blames_nothing(tmp_path):
    folder = write_checkout(tmp_path / "checkout", "cut")
    (folder / "script.py").write_text("import models.patchnce\nraise RuntimeError('later')\n")
    finished = run_forked(folder, "script.py")
    assert [x[:26] for x in finished.stderr.splitlines() if "fastnce:" in x] == ["fastnce: replaced models.p"]
    assert "RuntimeError: later" in finished.stderr


WRONG = [
    ([], "no script was given"),
    (["missing.py"], "there is no script 'missing.py'"),
    (["-m"], "no module was given"),
    (["-m", "missing_package"], "there is no module 'missing_package' that can be run"),
    (["-m", "missing_package.train"], "there is no module 'missing_package.train' that can be run"),
    (["-m", ".train"], "there is no module '.train' that can be run"),
    (["-m", "json"], "there is no module 'json' that can be run"),
    (["-m", "json.decoder.more"], "there is no module 'json.decoder.more' that can be run"),
    (["-m", "__main__"], "there is no module '__main__' that can be run"),
    (["-m", ""], "there is no module '' that can be run"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG)
def test_a_missing_script_is_one_sentence(capsys, arguments, sentence):
    assert accelerate.main(arguments) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert message.startswith(sentence)


FACTS = """
import json, os, sys
from . import models
from .models.patchnce import PatchNCELoss
facts = dict(argv=sys.argv, path=sys.path[0], file=__file__, package=__package__, spec=__spec__.name, doc=__doc__)
if __name__ == "__main__":
    print(json.dumps(dict(facts, bases=[b.__module__ for b in PatchNCELoss.__mro__])))
"""


@pytest.mark.parametrize("module", ["work.train", "work"])
def test_a_module_runs_as_python_m_does(tmp_path, module):
    folder = write_checkout(tmp_path / "work", "cut")
    (folder / "__init__.py").write_text("")
    (folder / ("train.py" if module == "work.train" else "__main__.py")).write_text(f'"""Text."""{FACTS}')
    finished = run(tmp_path, "-m", module, "a", "--b")
    fast, slow = printed(finished), printed(run(tmp_path, "-m", module, "a", "--b", accelerated=False))
    bases = {"fast": fast.pop("bases"), "slow": slow.pop("bases")}
    assert fast == slow
    assert fast["argv"][1:] == ["a", "--b"]
    assert "replaced work.models.patchnce.PatchNCELoss" in finished.stderr
    assert [any(base.startswith("fastnce.") for base in bases[name]) for name in ("fast", "slow")] == [True, False]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("import missing_module_of_mine", "ModuleNotFoundError: No module named 'missing_module_of_mine'"),
        ("from json import missing", "ImportError: cannot import name 'missing' from 'json'"),
        ("raise ValueError('own error')", "ValueError: own error"),
    ],
)
@pytest.mark.parametrize("module", ["broken", "broken.train"])
def test_errors_of_a_package_are_passed_on(line, sentence, module, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text(f"{line}\n")
    for name in ("__main__", "train"):
        (tmp_path / "broken" / f"{name}.py").write_text("print(1)\n")
    finished = run_forked(tmp_path, "-m", module)
    assert finished.returncode == 1
    assert sentence in finished.stderr
    assert "fastnce: " not in finished.stderr


OWN_CLASSES = """
from __future__ import annotations
import pickle
import sys
import torch
from torch import nn
import numpy as np
if len(sys.argv) < 99:
    {loss}
{sampler}
class Other:
    "A class of another name stays."
{helper}
model = PatchNCELoss
class Mine(PatchNCELoss):
    pass
def later():
    class PatchNCELoss9(nn.Module):
        pass
    return PatchNCELoss9
if __name__ == "__main__":
    assert pickle.loads(pickle.dumps(PatchNCELoss)) is PatchNCELoss
    assert __doc__ is None, __doc__
    kinds = [PatchNCELoss, PatchSampleF, model, Mine, later(), Other]
    print([any(base.__module__.startswith("fastnce.") for base in kind.__mro__[1:]) for kind in kinds])
"""


def own_script(path: Path, loss: str = DOT_LOSS.format(name="PatchNCELoss", extra="")) -> Path:
    """Write a script with both classes: the loss in an `if`, and the sampler before the function that it uses."""
    helper, sampler = NETWORKS[NETWORKS.index("def init_net") :].split("class PatchSampleF")
    loss = loss.strip().replace("\n", "\n    ")
    path.write_text(OWN_CLASSES.format(loss=loss, sampler=f"class PatchSampleF{sampler}", helper=helper))
    return path


def test_classes_of_the_script_itself_are_replaced(tmp_path):
    own_script(tmp_path / "script.py")
    finished = run_forked(tmp_path, "script.py")
    assert finished.stdout.strip() == "[True, True, True, True, False, False]", finished.stderr
    assert "replaced __main__.PatchNCELoss: one pass, CUT" in finished.stderr
    assert "replaced __main__.PatchSampleF" in finished.stderr
    assert "left as it is" not in finished.stderr


def test_other_classes_of_the_script_are_kept_and_named_once(tmp_path):
    own_script(tmp_path / "script.py", DOT_LOSS.format(name="PatchNCELoss", extra=" * 1.5"))
    finished = run_forked(tmp_path, "script.py")
    assert finished.stdout.strip() == "[False, True, False, False, False, False]", finished.stderr
    assert finished.stderr.count("__main__.PatchNCELoss is left as it is") == 1


def test_a_class_that_stays_incomplete_is_named_at_the_end(tmp_path):
    loss = DOT_LOSS.format(name="PatchNCELoss", extra="").replace("torch.arange", "missing_function")
    (tmp_path / "script.py").write_text(f"import torch\nfrom torch import nn\n{loss}\nprint(1)\n")
    (line,) = run_forked(tmp_path, "script.py").stderr.splitlines()
    assert "__main__.PatchNCELoss is left as it is" in line
    assert "'missing_function' is not defined" in line


def test_line_numbers_of_errors_are_those_of_the_script(tmp_path):
    path = own_script(tmp_path / "script.py")
    path.write_text(f"{path.read_text()}\n\nraise RuntimeError('here')\n")
    number = len(path.read_text().splitlines())
    assert f'script.py", line {number}, in <module>' in run_forked(tmp_path, "script.py").stderr


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Import modules of a checkout written for one test, and remove them from `sys.modules` afterwards."""

    def load(flavour: str, *names: str) -> list[types.ModuleType]:
        monkeypatch.syspath_prepend(str(write_checkout(tmp_path / flavour, flavour)))
        return [importlib.import_module(f"models.{name}") for name in names]

    yield load
    for name in [n for n in sys.modules if n == "models" or n.startswith("models.")]:
        del sys.modules[name]


def test_patch_reaches_names_that_were_imported_before(imported):
    patchnce, networks, toy_model = imported("cut", "patchnce", "networks", "toy_model")
    published = patchnce.PatchNCELoss
    names = accelerate.patch(patchnce)
    assert sorted(names) == ["models.patchnce.PatchNCELoss", "models.toy_model.Criterion"]
    assert toy_model.Criterion is patchnce.PatchNCELoss is not published
    assert patchnce.PatchNCELoss.__name__ == "PatchNCELoss"
    assert patchnce.PatchNCELoss.__module__ == "models.patchnce"
    assert accelerate.patch(patchnce) == []
    assert accelerate.patch(networks) == ["models.networks.PatchSampleF"]
    assert accelerate.patch(types.ModuleType("empty")) == []


def test_another_loss_of_the_same_name_is_kept(imported):
    (patchnce,) = imported("changed", "patchnce")
    published = patchnce.PatchNCELoss
    assert accelerate.patch(patchnce) == []
    assert patchnce.PatchNCELoss is published


def test_a_changed_loss_is_named(tmp_path):
    finished = run_forked(write_checkout(tmp_path / "checkout", "changed"), "train.py", "fast.pth")
    assert finished.returncode == 0
    assert finished.stderr.count("models.patchnce.PatchNCELoss is left as it is") == 1
    assert "replaced models.networks.PatchSampleF" in finished.stderr


def test_patching_draws_no_random_numbers(imported):
    patchnce, networks = imported("cut", "patchnce", "networks")
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    accelerate.patch(patchnce)
    accelerate.patch(networks)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_the_replaced_sampler_takes_the_published_calls(imported):
    (networks,) = imported("cut", "networks")
    accelerate.patch(networks)
    maps = [torch.randn(2, 3, 6, 5), torch.randn(2, 4, 3, 3)]
    # an init_type that only the checkout's init_net may accept
    sampler = networks.PatchSampleF(use_mlp=True, init_type="their own", init_gain=0.02, nc=8, gpu_ids=[])
    assert sampler.init_type == "their own"
    assert isinstance(sampler, fastnce.PatchSampleF)
    assert not list(sampler.parameters())
    rows, ids = sampler(maps)
    assert [tuple(r.shape) for r in rows] == [(60, 8), (18, 8)]  # 64 patches by default, or all if there are fewer
    again, _ = sampler(maps, 64, ids)
    numpy_ids, _ = sampler(maps, 64, [i.numpy() for i in ids])
    for a, b, c in zip(rows, again, numpy_ids, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    whole, none = sampler(maps, 0)
    assert [tuple(w.shape) for w in whole] == [(2, 8, 6, 5), (2, 8, 3, 3)]
    assert none == [[], []]


def published_checkout(name: str) -> Path:
    given = os.environ.get("FASTNCE_PUBLISHED")
    folder = Path(given) if given else ROOT.parent / "published"
    if not (folder / name / "models" / "patchnce.py").is_file():
        pytest.skip(f"no published checkout {name!r}: set FASTNCE_PUBLISHED to a folder that holds it")
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "norm"), [("2", "library"), ("1", "formula")])
@pytest.mark.parametrize("name", ["cut", "dclgan"])
def test_published_models_train_alike(name, batch, norm, tmp_path):
    """Training with and without the replacement gives the same losses.

    At batch 1 on the CPU, PyTorch's instance norm is wrong for channels-last gradients. Only the published sampler
    sends it such gradients. Both runs therefore use the plain formula.
    """
    folder = published_checkout(name)
    script = tmp_path / "steps.py"
    script.write_text(textwrap.dedent(PUBLISHED_STEPS))
    command = [str(script), str(folder), str(tmp_path), "float64", batch, norm]
    plain = printed(run(ROOT, *command, accelerated=False))
    finished = run(ROOT, *command)
    fast = printed(finished)
    assert finished.stderr.count("fastnce: replaced") == {"cut": 2, "dclgan": 3}[name]
    assert plain["keys"] == fast["keys"]
    for ours, theirs in zip(fast["losses"], plain["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8)


PUBLISHED_STEPS = """
    import json, sys
    import numpy as np
    import torch
    from benchmarks.published import Checkout

    folder, out, dtype, batch, norm = sys.argv[1:]
    torch.set_num_threads(1)
    # Adam's first step is the sign of the gradient, which amplifies float32 rounding differences
    torch.set_default_dtype(getattr(torch, dtype))

    def instance_norm(x, *_, eps=1e-5, **__):
        centred = x - x.mean((2, 3), keepdim=True)
        return centred / (centred.square().mean((2, 3), keepdim=True) + eps).sqrt()

    if norm == "formula":
        torch.nn.functional.instance_norm = instance_norm
    checkout = Checkout(folder)
    arguments = "--ngf 8 --ndf 8 --num_patches 32 --netF_nc 32 --netG resnet_6blocks --nce_layers 4,8,12"
    torch.manual_seed(0)
    np.random.seed(0)
    model = checkout.model([*arguments.split(), "--batch_size", batch, "--checkpoints_dir", out])
    ids = np.random.RandomState(1)

    def same_ids(net, inputs):
        # the published code draws ids from NumPy or torch, fastnce on the device: give both the same
        feats, patches, chosen = inputs
        if chosen is None:
            chosen = [ids.permutation(f.shape[2] * f.shape[3])[:patches] for f in feats]
        return feats, patches, chosen

    projectors = [getattr(model, net) for net in ("netF", "netF1", "netF2") if hasattr(model, net)]
    for projector in projectors:
        projector.register_forward_pre_hook(same_ids)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for step in range(4):
        a, b = torch.rand(2, int(batch), 3, 64, 64, generator=generator) * 2 - 1
        data = {"A": a, "B": b, "A_paths": "", "B_paths": ""}
        if step == 0:
            torch.manual_seed(3)
            model.data_dependent_initialize(data)
            model.setup(model.opt)
        model.set_input(data)
        model.optimize_parameters()
        losses.append(list(model.get_current_losses().values()))
    keys = [list(projector.state_dict()) for projector in projectors]
    print(json.dumps(dict(losses=losses, keys=keys)))
"""
