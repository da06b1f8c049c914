"""fastnce: fast, exact training of contrastive unpaired image translation.

Three ways in::

    from fastnce import PatchNCELoss, PatchSampleF     # drop-in losses
    fastnce train cut --data DIR --out RUN             # the training engine
    make bench                                         # every speed we claim
"""

from pathlib import Path as _Path

from ._version import __version__

# In a source checkout the kernels stand beside this package, not inside it; a wheel carries them inside.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").exists() and (_here.parent / "kernels" / "common.py").exists():
    __path__.append(str(_here.parent))

from .evaluate import DerainingMetrics  # noqa: E402  (the path above comes first)
from .nce import (  # noqa: E402
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
