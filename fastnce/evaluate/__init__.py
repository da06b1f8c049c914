"""Evaluation of translations: PSNR and SSIM against the truth, distances between sets such as FID, reports."""

import sys

from .called import EvaluatePackage
from .features import FeatureDistance
from .quality import DerainingMetrics, luma, psnr, ssim

__all__ = ["DerainingMetrics", "FeatureDistance", "luma", "psnr", "ssim"]

sys.modules[__name__].__class__ = EvaluatePackage  # fastnce.evaluate(model, data)
