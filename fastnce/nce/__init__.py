"""The contrastive operation: what it means (`reference`), how it is called (`api`), and its modules."""

from .api import patch_nce, project_patches, sample_patch_ids
from .bank import NegativeBank
from .head import PatchNCEHead
from .modules import PatchNCELoss, PatchSampleF
from .multilayer import patch_nce_layers

__all__ = [
    "NegativeBank",
    "PatchNCEHead",
    "PatchNCELoss",
    "PatchSampleF",
    "patch_nce",
    "patch_nce_layers",
    "project_patches",
    "sample_patch_ids",
]
