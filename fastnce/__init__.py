"""fastnce: fast, exact training of contrastive unpaired image translation.

Three ways in::

    from fastnce import PatchNCELoss, PatchSampleF     # drop-in losses
    fastnce train cut --data DIR --out RUN             # the training engine
    make bench                                         # every speed we claim
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._version import __version__

# In a source checkout the kernels stand beside this package, not inside it; a wheel carries them inside.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").exists() and (_here.parent / "kernels" / "common.py").exists():
    __path__.append(str(_here.parent))

if _TYPE_CHECKING:
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
    "DerainingMetrics",
    "NegativeBank",
    "PatchNCEHead",
    "PatchNCELoss",
    "PatchSampleF",
    "__version__",
    "patch_nce",
    "project_patches",
    "sample_patch_ids",
]


def __getattr__(name: str) -> object:
    """Import what is asked for, when it is asked for: PyTorch takes seconds, and a command may be stopped meanwhile."""
    if name in __all__:
        place = "evaluate" if name == "DerainingMetrics" else "nce"
        found: object = getattr(_import_module(f"{__name__}.{place}"), name)
    elif name in ("data", "evaluate", "initialise", "kernels", "nce", "networks", "operators"):
        found = _import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
