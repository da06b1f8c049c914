"""Small checkouts with the published layout, and ways to run their scripts."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import subprocess
import sys
import traceback
import types
from collections.abc import Mapping
from pathlib import Path

from fastnce import accelerate
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]

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


def run(
    folder: Path, *arguments: str, accelerated: bool = True, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, with `more` environment variables."""
    command = [sys.executable, *(["-m", "fastnce.accelerate"] if accelerated else []), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(more or {})}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def run_forked(folder: Path, *arguments: str, accelerated: bool = True) -> subprocess.CompletedProcess:
    """As `run`, in a forked process, which saves the seconds of importing PyTorch."""

    def work() -> int:
        os.chdir(folder)
        sys.argv, sys.path[:0] = list(arguments), [str(folder)]
        try:
            if accelerated:
                return accelerate.main(arguments)
            if arguments[0] == "-m":
                sys.argv = list(arguments[1:])
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
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


_NUMBERS = itertools.count()


def module_of(source: str) -> types.ModuleType:
    """Return a module with this source, as an import makes it."""
    module = types.ModuleType(f"fork_{next(_NUMBERS)}")
    sys.modules[module.__name__] = module
    exec(compile(f"import torch\nfrom torch import nn\n{source}", f"{module.__name__}.py", "exec"), vars(module))
    return module
