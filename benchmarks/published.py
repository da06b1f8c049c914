"""Run the published repositories unmodified, from a folder that the user unpacked.

checkout = Checkout("published/cut")
loss = checkout.losses()["PatchNCELoss"](options)       # their class
model = checkout.model(["--batch_size", "1"])           # their model, built from their own options

Their code imports packages that training steps never use (torchvision's transforms, dominate, visdom). A missing one is
replaced by a stand-in that can be imported and fails at its first use. DCD-GAN calls `torch.rfft`, which PyTorch
removed; it is reimplemented with `torch.fft`. Their mathematics is unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

PACKAGES = ("models", "options", "data", "util")
"""Top-level packages of a checkout. All checkouts use the same names, so `sys.modules` has them only while a checkout
is active."""

OPTIONAL = ("torchvision", "dominate", "visdom", "cv2", "bs4", "requests", "GPUtil")


class _Missing(types.ModuleType):
    """Stand-in for a package that is not installed: any name can be imported, but not called."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ModuleNotFoundError(f"{self.__name__} was called, but its package is not installed")


@functools.cache
def _broken() -> frozenset[str]:
    """The optional packages that are installed and cannot be imported, such as a torchvision for another PyTorch."""
    found = set()
    for name in OPTIONAL:
        before = set(sys.modules)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            pass
        except Exception:  # a package may raise anything
            found.add(name)
            for part in set(sys.modules) - before:
                if part.split(".")[0] == name:
                    del sys.modules[part]
    return frozenset(found)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Collection[str]):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        missing = name.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if missing else None

    def create_module(self, spec):
        return _Missing(spec.name)

    def exec_module(self, module):
        pass


def find_checkouts(folders: Sequence[str | Path]) -> list[Checkout]:
    """Return the checkouts: each folder is one, or contains some. A missing folder is skipped with a warning.

    Raises:
        ValueError: a folder neither is nor contains a checkout.
    """
    found = []
    for folder in map(Path, folders):
        if not folder.exists():
            print(f"warning: {folder} does not exist: measuring without it", file=sys.stderr)
            continue
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        here = [path for path in [folder, *inside] if (path / "models" / "patchnce.py").is_file()]
        if not here:
            raise ValueError(f"{folder} neither is nor contains a checkout of CUT or DCLGAN: no models/patchnce.py")
        found += [Checkout(path) for path in here]
    return found


class Checkout:
    """One unpacked repository with the layout of CUT's.

    Args:
        folder: with `models/patchnce.py`, `models/networks.py`, `options/`, `data/` and `util/`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()
        self.name = self.folder.name
        self._modules: dict[str, types.ModuleType] = {}
        if not (self.folder / "models" / "patchnce.py").is_file():
            raise ValueError(f"{self.folder} is not a checkout of CUT or DCLGAN: no models/patchnce.py")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context manager in which `import models` imports from this checkout; the state before is restored."""

        def remove() -> dict[str, types.ModuleType]:
            return {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] in PACKAGES}

        broken = _StandIns(_broken())
        others, path = remove(), list(sys.path)
        known = set(sys.modules)
        stand_ins = _StandIns(OPTIONAL)
        sys.modules.update(self._modules)
        sys.path.insert(0, str(self.folder))
        sys.meta_path.insert(0, broken)
        sys.meta_path.append(stand_ins)  # last, so that installed packages are found first
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.meta_path.remove(broken)
            sys.meta_path.remove(stand_ins)
            sys.path[:] = path
            self._modules = remove()
            sys.modules.update(others)
            for name in set(sys.modules) - known:
                if isinstance(sys.modules[name], _Missing):
                    del sys.modules[name]

    def load(self, module: str) -> types.ModuleType:
        """Import a module of the checkout, such as "models.networks"."""
        with self.active():
            return importlib.import_module(module)

    def losses(self) -> dict[str, type[nn.Module]]:
        """Return their contrastive losses by class name: PatchNCELoss; DCLGAN's uses cosines, and has PatchNCELoss2."""
        module = self.load("models.patchnce")
        return {name: cls for name, cls in vars(module).items() if name.startswith("PatchNCELoss")}

    @property
    def sampler(self) -> type[Any]:
        """Their PatchSampleF."""
        return self.load("models.networks").PatchSampleF

    @property
    def cosine(self) -> bool:
        """Whether PatchNCELoss is DCLGAN's, with cosines and the whole batch as negatives."""
        return hasattr(self.losses()["PatchNCELoss"](loss_options()), "similarity_function")

    def options(self, arguments: Sequence[str] = ()) -> Any:
        """Return their training options, parsed by their code from a command line without the script's name.

        Without `--gpu_ids`, use the first GPU if there is one, else the CPU. Pass `--checkpoints_dir`: their parser
        writes the options there. The parser also reads `sys.argv`, which is replaced during the call.

        Raises:
            RuntimeError: their parser rejects the arguments.
        """
        arguments = list(arguments)
        if "--gpu_ids" not in arguments:
            arguments += ["--gpu_ids", "0" if torch.cuda.is_available() else "-1"]
        before = sys.argv
        sys.argv = ["train.py", *arguments]
        try:
            with self._running():
                return importlib.import_module("options.train_options").TrainOptions().parse()
        finally:
            sys.argv = before

    def model(self, arguments: Sequence[str] = ()) -> Any:
        """Return their model (CUTModel, DCLModel or that of `--model`), ready for `data_dependent_initialize`.

        Arguments: as for `options`. To train as their train.py does, call
        `model.data_dependent_initialize(data); model.setup(model.opt); model.parallelize()` with the first batch, and
        `model.set_input(data); model.optimize_parameters()` with each batch, where
        `data = {"A": (batch, 3, height, width), "B": the same, "A_paths": "", "B_paths": ""}`.
        """
        opt = self.options(arguments)
        if not hasattr(torch, "rfft"):
            torch.rfft = _rfft  # type: ignore[attr-defined]  # DCD-GAN's code calls it
        with self._running():
            return importlib.import_module("models").create_model(opt)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Context manager for their code: its output goes to stderr, and `sys.exit` raises RuntimeError."""
        try:
            with self.active(), contextlib.redirect_stdout(sys.stderr):
                yield
        except SystemExit as error:
            raise RuntimeError(f"{self.name} exited with code {error.code}; see its output above") from error


def _rfft(x: torch.Tensor, signal_ndim: int, normalized: bool = False, onesided: bool = True) -> torch.Tensor:
    """`torch.rfft` of PyTorch up to 1.7: real and imaginary parts in a last dimension of 2."""
    dims = list(range(-signal_ndim, 0))
    transform = torch.fft.rfftn if onesided else torch.fft.fftn
    return torch.view_as_real(transform(x, dim=dims, norm="ortho" if normalized else "backward"))


def loss_options(images: int = 1, whole_batch: bool = False, temperature: float = 0.07) -> SimpleNamespace:
    """Return the options that their losses read."""
    return SimpleNamespace(nce_T=temperature, batch_size=images, nce_includes_all_negatives_from_minibatch=whole_batch)
