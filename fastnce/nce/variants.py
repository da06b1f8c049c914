"""Variants of PatchNCE from other papers, re-exported from `weights`, `selection` and `negatives`."""

from .negatives import LearnedNegatives, ascend, diversity, only_external
from .selection import attention_patch_ids, dense_patch_ids
from .weights import Weighting, asp_query_weight, hdce_pair_weight, monce_log_weight

__all__ = [
    "LearnedNegatives",
    "Weighting",
    "ascend",
    "asp_query_weight",
    "attention_patch_ids",
    "dense_patch_ids",
    "diversity",
    "hdce_pair_weight",
    "monce_log_weight",
    "only_external",
]
