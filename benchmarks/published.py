"""The published repositories themselves, run unmodified from a folder that the user unpacked.

checkout = Checkout("published/cut")
loss = checkout.losses()["PatchNCELoss"](options)       # their class
model = checkout.model(["--batch_size", "1"])           # their model, built from their own options

Packages that their code imports but training steps never use (torchvision's transforms, dominate, visdom) are stood in
for when they are missing: the stand-in imports, and fails at the first use. `torch.rfft`, which PyTorch removed and
DCD-GAN calls, is written anew on `torch.fft`. Nothing of their mathematics is touched.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

PACKAGES = ("models", "options", "data", "util")
"""Top-level packages of a checkout. Every checkout has the same, so they are imported under their names only while
one checkout is active, and kept aside between."""

OPTIONAL = ("torchvision", "dominate", "visdom", "cv2", "bs4", "requests", "GPUtil")


class _Missing(types.ModuleType):
    """Stands in for a package that is not installed: any name can be imported from it, none can be used."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ModuleNotFoundError(f"{self.__name__} was called, but its package is not installed")


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        missing = name.split(".")[0] in OPTIONAL
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if missing else None

    def create_module(self, spec):
        return _Missing(spec.name)

    def exec_module(self, module):
        pass


def find_checkouts(folders: Sequence[str | Path]) -> list[Checkout]:
    """Each folder is one checkout, or holds several; one that is not there is left out, and said.

    Raises:
        ValueError: a folder that is neither.
    """
    found = []
    for folder in map(Path, folders):
        if not folder.exists():
            print(f"warning: {folder} is not there: measured without it", file=sys.stderr)
            continue
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        here = [path for path in [folder, *inside] if (path / "models" / "patchnce.py").is_file()]
        if not here:
            raise ValueError(f"{folder} is no checkout of CUT or DCLGAN, and holds none: models/patchnce.py is missing")
        found += [Checkout(path) for path in here]
    return found


class Checkout:
    """One unpacked repository with the layout of CUT's.

    Args:
        folder: it holds `models/patchnce.py`, `models/networks.py`, `options/`, `data/` and `util/`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()
        self.name = self.folder.name
        self._modules: dict[str, types.ModuleType] = {}
        if not (self.folder / "models" / "patchnce.py").is_file():
            raise ValueError(f"{self.folder} is no checkout of CUT or DCLGAN: models/patchnce.py is missing")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, `import models` means this checkout's; afterwards whatever it meant before."""

        def take() -> dict[str, types.ModuleType]:
            return {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] in PACKAGES}

        others, path = take(), list(sys.path)
        known = set(sys.modules)
        stand_ins = _StandIns()
        sys.modules.update(self._modules)
        sys.path.insert(0, str(self.folder))
        sys.meta_path.append(stand_ins)  # last: an installed package is found before
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.meta_path.remove(stand_ins)
            sys.path[:] = path
            self._modules = take()
            sys.modules.update(others)
            for name in set(sys.modules) - known:
                if isinstance(sys.modules[name], _Missing):
                    del sys.modules[name]

    def load(self, module: str) -> types.ModuleType:
        """A module of the checkout, such as "models.networks"."""
        with self.active():
            return importlib.import_module(module)

    def losses(self) -> dict[str, type[nn.Module]]:
        """Their contrastive losses by class name: CUT has PatchNCELoss, DCLGAN that (cosine) and PatchNCELoss2."""
        module = self.load("models.patchnce")
        return {name: cls for name, cls in vars(module).items() if name.startswith("PatchNCELoss")}

    @property
    def sampler(self) -> type[Any]:
        """Their PatchSampleF."""
        return self.load("models.networks").PatchSampleF

    @property
    def cosine(self) -> bool:
        """Whether PatchNCELoss is DCLGAN's: cosines, and the whole batch as negatives."""
        return hasattr(self.losses()["PatchNCELoss"](loss_options()), "similarity_function")

    def options(self, arguments: Sequence[str] = ()) -> Any:
        """Their training options, made by their own parsers from a command line without the script's name.

        Without `--gpu_ids` the first GPU is used where there is one, else the CPU. Pass `--checkpoints_dir`: their
        parser writes what it parsed there. It also reads `sys.argv`, which is set meanwhile.

        Raises:
            RuntimeError: their parser does not take the arguments.
        """
        arguments = list(arguments)
        if "--gpu_ids" not in arguments:
            arguments += ["--gpu_ids", "0" if torch.cuda.is_available() else "-1"]
        kept = sys.argv
        sys.argv = ["train.py", *arguments]
        try:
            with self._running():
                return importlib.import_module("options.train_options").TrainOptions().parse()
        finally:
            sys.argv = kept

    def model(self, arguments: Sequence[str] = ()) -> Any:
        """Their model (CUTModel, DCLModel or what `--model` names), ready for `data_dependent_initialize`.

        Arguments: as for `options`. A training step is then, as in their train.py: for the first batch
        `model.data_dependent_initialize(data); model.setup(model.opt); model.parallelize()`, and for each
        `model.set_input(data); model.optimize_parameters()` with
        `data = {"A": (batch, 3, height, width), "B": the same, "A_paths": "", "B_paths": ""}`.
        """
        opt = self.options(arguments)
        if not hasattr(torch, "rfft"):
            torch.rfft = _rfft  # type: ignore[attr-defined]  # DCD-GAN's code calls it
        with self._running():
            return importlib.import_module("models").create_model(opt)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Their own program: it prints, and where it ends the process it only fails here."""
        try:
            with self.active(), contextlib.redirect_stdout(sys.stderr):
                yield
        except SystemExit as error:
            raise RuntimeError(f"{self.name} ended with {error.code}; its words stand above") from error


def _rfft(x: torch.Tensor, signal_ndim: int, normalized: bool = False, onesided: bool = True) -> torch.Tensor:
    """`torch.rfft` as PyTorch had it until 1.7: real and imaginary part as a last dimension of 2."""
    dims = list(range(-signal_ndim, 0))
    transform = torch.fft.rfftn if onesided else torch.fft.fftn
    return torch.view_as_real(transform(x, dim=dims, norm="ortho" if normalized else "backward"))


def loss_options(images: int = 1, whole_batch: bool = False, temperature: float = 0.07) -> SimpleNamespace:
    """The options that their losses read."""
    return SimpleNamespace(nce_T=temperature, batch_size=images, nce_includes_all_negatives_from_minibatch=whole_batch)
