"""Published checkouts and forks of CUT, and ways to run their own scripts on a CPU, twice alike.

None of them lies in the repository: `FASTNCE_CHECKOUTS` names a folder with one subfolder each, unpacked as they are.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.accelerate.checkouts import ROOT, run

SITE = Path(__file__).parent / "site"
SMALL = "--num_patches 32 --netF_nc 32 --netG resnet_6blocks --nce_layers 4,8,12"
SAMPLING = "sampling on the device"
CUT, DCLGAN = "one pass, CUT: inner products", "one pass, DCLGAN: cosines, whole batch"
USUAL = {"PatchSampleF": SAMPLING, "PatchNCELoss": CUT}


@dataclass(frozen=True)
class Fork:
    """A checkout, and what becomes of its classes.

    Args:
        folder: below `FASTNCE_CHECKOUTS`; where its scripts start.
        replaced, kept: class names, with how the last column of the table begins after "replaced: " or "kept: ".
        arguments: of its train.py.
        batch: pictures of a step.
        settings: for `site/sitecustomize.py`.
        bare: packages whose `__init__.py` is not run, because it imports what is not installed.
        modules: those with the classes.
        gradients: compare the first gradients of every optimiser instead of the weights. Adam enlarges the rounding of
            weights whose gradient is about its epsilon, and UNSB has such weights.
    """

    folder: str
    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    arguments: str = ""
    batch: int = 2
    settings: str = "float64 ids"
    bare: str = ""
    modules: str = ""
    gradients: bool = False

    def path(self) -> Path:
        """Return the folder, or skip the test."""
        given = os.environ.get("FASTNCE_CHECKOUTS")
        path = Path(given or ROOT.parent / "checkouts") / self.folder
        if not path.is_dir():
            pytest.skip(f"no checkout {self.folder}: set FASTNCE_CHECKOUTS to a folder that holds it")
        return path


TRAINED = {
    "CUT": Fork("CUT", USUAL, arguments=SMALL),
    "DCLGAN": Fork("DCLGAN", USUAL | {"PatchNCELoss": DCLGAN, "PatchNCELoss2": CUT}, arguments=SMALL),
    "DCD-GAN": Fork("DCDGAN/code", USUAL | {"PatchNCELoss": DCLGAN}, arguments=SMALL),
    "NEGCUT": Fork(
        "NEGCUT",
        USUAL | {"LearnedPatchNCELoss": f"{CUT}; calls with neg_sample run as before"},
        arguments=SMALL,
    ),
    "EnCo": Fork(
        "EnCo-pytorch",
        USUAL | {"PatchNCELoss": DCLGAN, "PatchNCELoss2": CUT},
        {"PatchSampleWithDAGF": "its trial ended with AttributeError: 'NoneType' object has no attribute 'prj_norm'"},
        arguments="--model dcl --num_patches 32 --netG resnet_6blocks",
    ),
    "UNSB": Fork(
        "UNSB",
        USUAL,
        arguments="--num_patches 32 --netF_nc 32 --nce_layers 4,8,12",
        settings="float64 ids cpu",
        gradients=True,
    ),
    "hneg-src": Fork(
        "HNEG/Single-modal",
        USUAL | {"PatchHDCELoss": "one pass, hDCE: without the positive"},
        arguments=SMALL,
        batch=1,
        settings="float64 ids norm",
    ),
    "AdaptiveSupervisedPatchNCE": Fork(
        "AdaptiveSupervisedPatchNCE",
        {"PatchNCELoss": CUT},
        {"PatchSampleF": "its rows or gradients differ by 1.1e-07"},
        arguments=f"--dataset_mode aligned {SMALL}",
    ),
    "AI-FFPE": Fork("AI-FFPE", USUAL, arguments=f"{SMALL} --ngf 64"),
}
"""Their train.py runs on a CPU."""

IMPORTED = {
    "MoNCE": Fork(
        "MoNCE/CUT_MoNCE",
        {"PatchSampleF": SAMPLING},
        dict.fromkeys(("PatchNCELoss", "MoNCELoss"), "its trial ended with ZeroDivisionError"),
        modules="models.patchnce models.networks models.monce",
    ),
    "AdaptiveSupervisedPatchNCE, its own loss": Fork(
        "AdaptiveSupervisedPatchNCE",
        {"PatchNCELoss": CUT},
        {"PatchSampleF": "its rows or gradients differ by 1.1e-07"}
        | {"AdaptiveSupervisedPatchNCELoss": "the options have no n_epochs"},
        modules="models.patchnce models.networks models.asp_loss",
    ),
    "QS-Attn": Fork(
        "QSATTN",
        {"PatchNCELoss": "one pass, inner products, within each image"},
        {"PatchSampleF": "it returns 3 values where two are expected"},
        modules="models.patchnce models.networks_global models.networks_local",
    ),
    "CoLiGen": Fork(
        "CoLiGen",
        {"PatchSampleF": SAMPLING},
        {"PatchNCELoss": "its constructor does not take (opt)"},
        bare="models",
        modules="models.patchnce models.networks",
    ),
    "PatchGCL": Fork(
        "PatchGCL",
        {"PatchSampleF": f"{SAMPLING}, only the sampled rows are read; calls with graph run as before"},
        {"NCESoftmaxLoss": "its forward does not take (feat_q, feat_k)"},
        modules="models.networks models.PatchGCL",
    ),
    "NLCL": Fork(
        "NLCL",
        USUAL,
        {
            "PatchSampleFlattern": "its trial ended with RuntimeError",
            "PatchSampleSquare": "its code uses the module random",
            "PatchSampleNonlocalOneGroup": "its code uses the module random",
            "DisNCELoss": "the options have no num_patches_pos",
        },
        modules="models.patchnce models.networks models.disnce",
    ),
    "joliGEN": Fork(
        "joliGEN",
        {},
        dict.fromkeys(("BaseNCELoss", "PatchNCELoss", "MoNCELoss"), "its forward does not take (feat_q, feat_k)")
        | {"PatchSampleF": "its constructor does not take use_mlp", "PatchSampleF_QSAttn": "name 'F' is not defined"},
        bare="models models.modules",
        modules="models.modules.NCE.patchnce models.modules.NCE.monce models.modules.cut_networks",
    ),
    "TPSeNCE": Fork(
        "TPSeNCE",
        USUAL,
        {"MoNCELoss": "its forward does not take (feat_q, feat_k)"},
        modules="models.patchnce models.networks models.monce",
    ),
    "3D-MRI-style-transfer": Fork(
        "3D-MRI-style-transfer",
        {"PatchNCELoss": CUT},
        {"PatchSampleF": "its rows or gradients differ by 2.6e-04"},
        bare="models",
        modules="models.patchnce models.networks",
    ),
    "pytorch-image-translation-models": Fork(
        "PITM",
        {},
        {"LearnedPatchNCELoss": "its constructor does not take (opt)"},
        bare="src src.models src.models.negcut",
        modules="src.models.negcut.losses",
    ),
    "ASCON": Fork(
        "ASCON", {}, {"PatchNCELoss": "it does not read opt.nce_T"}, bare="models", modules="models.patchnce"
    ),
}
"""Their train.py needs a GPU, data of its own or other packages: only the modules with the classes are imported."""


@dataclass(frozen=True)
class Training:
    """What a run of a train.py has left.

    Args:
        losses: the lines that it printed, one per step, without the times.
        weights: of its last checkpoint, by file and key.
    """

    finished: subprocess.CompletedProcess
    losses: list[str]
    weights: dict[str, torch.Tensor]


def write_pictures(folder: Path, count: int) -> Path:
    """Write pictures of 64x64 pixels in the folders that CUT's and TPSeNCE's data sets read."""
    random = np.random.RandomState(0)
    for name in (f"{phase}{letter}" for phase in ("train", "test") for letter in "ABST"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture = np.kron(random.rand(8, 8, 3), np.ones((8, 8, 1)))
            Image.fromarray((picture * 255).astype("uint8")).save(folder / name / f"{number}.png")
    return folder


def _environment(settings: str) -> dict[str, str]:
    path = f"{SITE}{os.pathsep}{ROOT}"
    return {"PYTHONPATH": path, "FASTNCE_OUTSIDE": settings, "PYTHONDONTWRITEBYTECODE": "1"}


def train(fork: Fork, pictures: Path, out: Path, accelerated: bool) -> Training:
    """Run a checkout's own train.py for one epoch."""
    arguments = f"--dataroot {pictures} --checkpoints_dir {out} --name x --gpu_ids -1 --batch_size {fork.batch}"
    arguments += " --load_size 64 --crop_size 64 --preprocess none --no_flip --num_threads 0 --ngf 8 --ndf 8"
    arguments += " --n_epochs 1 --n_epochs_decay 0 --save_epoch_freq 1 --print_freq 1 --display_id 0 --no_html"
    command = ["train.py", *f"{arguments} {fork.arguments}".split()]
    first = out / "gradients"
    first.mkdir(parents=True)
    environment = _environment(fork.settings) | ({"FASTNCE_GRADIENTS": str(first)} if fork.gradients else {})
    finished = run(fork.path(), *command, accelerated=accelerated, more=environment)
    printed = [line for line in finished.stdout.splitlines() if "iters:" in line and "time:" in line]
    losses = [re.sub(r"(time|data): [^ ,)]*", "", line) for line in printed]
    weights = {}
    for path in sorted(first.iterdir()):
        weights |= {f"{path.name} {key}": value for key, value in torch.load(path, weights_only=True).items()}
    for path in [] if fork.gradients else sorted(out.rglob("latest_net_*.pth")):
        weights |= {f"{path.name} {key}": value for key, value in torch.load(path, weights_only=True).items()}
    return Training(finished, losses, weights)


IMPORTS = """
import importlib, sys, types
for name in {bare!r}.split():
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [name.replace(".", "/")]
for name in {modules!r}.split():
    importlib.import_module(name)
"""


def import_classes(fork: Fork, folder: Path) -> subprocess.CompletedProcess:
    """Run a script that imports the modules with the classes."""
    script = folder / "script.py"
    script.write_text(IMPORTS.format(bare=fork.bare, modules=fork.modules))
    environment = _environment("")
    environment["PYTHONPATH"] += f"{os.pathsep}{fork.path()}"
    return run(fork.path(), str(script), more=environment)


def table_of(finished: subprocess.CompletedProcess) -> dict[str, dict[str, str]]:
    """Return the rows of the table by "replaced" or "kept", and by class: what was done."""
    lines = finished.stderr.splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.split()[:2] == ["class", "module"])
    found: dict[str, dict[str, str]] = {"replaced": {}, "kept": {}}
    for line in lines[start + 1 :]:
        if match := re.fullmatch(r"  (\w+) +\S+ +(replaced|kept): (.*)", line):
            found[match[2]][match[1]] = match[3]
    return found
