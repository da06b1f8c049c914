"""Evaluation of translations: PSNR and SSIM against the truth, FID and KID between sets, reports."""

from .quality import DerainingMetrics, luma, psnr, ssim

__all__ = ["DerainingMetrics", "luma", "psnr", "ssim"]
