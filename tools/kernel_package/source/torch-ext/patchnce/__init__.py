"""PatchNCE as Triton kernels with gradients: fastnce's loss without its training engine."""

from . import layers
from .nce import (
    NegativeBank,
    PatchNCEHead,
    PatchNCELoss,
    PatchSampleF,
    Weights,
    hdce,
    monce,
    patch_nce,
    patch_nce_layers,
    products,
    project_patches,
    sample_patch_ids,
    which,
)

__all__ = [
    "NegativeBank",
    "PatchNCEHead",
    "PatchNCELoss",
    "PatchSampleF",
    "Weights",
    "hdce",
    "layers",
    "monce",
    "patch_nce",
    "patch_nce_layers",
    "products",
    "project_patches",
    "sample_patch_ids",
    "which",
]
