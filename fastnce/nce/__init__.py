"""The contrastive operation: functions (`api`), modules, and variants from other papers."""

from ..common.dispatch import Choice
from .api import patch_nce, products, project_patches, sample_patch_ids
from .bank import NegativeBank
from .head import PatchNCEHead
from .impl.dispatch import which
from .modules import PatchNCELoss, PatchSampleF
from .multilayer import patch_nce_layers
from .weights import WEIGHTINGS, Weighting, Weights, hdce, monce

__all__ = [
    "WEIGHTINGS",
    "Choice",
    "NegativeBank",
    "PatchNCEHead",
    "PatchNCELoss",
    "PatchSampleF",
    "Weighting",
    "Weights",
    "hdce",
    "monce",
    "patch_nce",
    "patch_nce_layers",
    "products",
    "project_patches",
    "sample_patch_ids",
    "which",
]
