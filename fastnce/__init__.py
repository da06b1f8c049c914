"""fastnce: fast, exact training of contrastive unpaired image translation.

from fastnce import PatchNCELoss, PatchSampleF     # drop-in losses

run = fastnce.train("cut", data="DIR", out="RUN")  # the training engine; on the command line: fastnce train
picture = fastnce.load("RUN").translate(picture)     # or "derain", a trained model that comes with the package
fastnce.evaluate("RUN", "TEST")
"""

import sys as _sys
from importlib import import_module as _import_module
from importlib.machinery import ModuleSpec as _ModuleSpec
from importlib.util import module_from_spec as _module_from_spec
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._version import __version__

# In a source checkout the kernels are beside this package; in a wheel they are inside it.
_here = _Path(__file__).resolve().parent
_beside = _here.parent / "kernels"
if not (_here / "kernels").exists() and (_beside / "common.py").exists():
    _spec = _ModuleSpec(f"{__name__}.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(_beside)]
    _sys.modules[_spec.name] = _module_from_spec(_spec)

if _TYPE_CHECKING:
    from .api import Callback, Run, RunInfo, StopTraining, TrainingFailed, evaluate, load, train
    from .evaluate import DerainingMetrics
    from .nce import (
        NegativeBank,
        PatchNCEHead,
        PatchNCELoss,
        PatchSampleF,
        patch_nce,
        project_patches,
        sample_patch_ids,
    )

__all__ = [
    "Callback",
    "DerainingMetrics",
    "NegativeBank",
    "PatchNCEHead",
    "PatchNCELoss",
    "PatchSampleF",
    "Run",
    "RunInfo",
    "StopTraining",
    "TrainingFailed",
    "__version__",
    "evaluate",
    "load",
    "patch_nce",
    "project_patches",
    "sample_patch_ids",
    "train",
]

_PLACES = {"DerainingMetrics": "evaluate"} | dict.fromkeys(
    ("Callback", "Run", "RunInfo", "StopTraining", "TrainingFailed", "load", "train"), "api"
)


def __getattr__(name: str) -> object:
    """Import a public name at its first use: importing PyTorch takes seconds, during which Ctrl-C must work."""
    if name in ("data", "evaluate", "kernels", "models", "nce", "networks", "watch"):
        found: object = _import_module(f"{__name__}.{name}")
    elif name in __all__:
        found = getattr(_import_module(f"{__name__}.{_PLACES.get(name, 'nce')}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
