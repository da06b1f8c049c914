"""Evaluation of translations: PSNR and SSIM against the truth, FID and KID between sets, reports."""

import sys

from .called import EvaluatePackage
from .quality import DerainingMetrics, luma, psnr, ssim

__all__ = ["DerainingMetrics", "luma", "psnr", "ssim"]

sys.modules[__name__].__class__ = EvaluatePackage  # fastnce.evaluate(model, data)
