"""What a translation is worth: PSNR and SSIM against the truth, FID and KID between sets, reports of both."""

from .quality import DerainingMetrics, luma, psnr, ssim

__all__ = ["DerainingMetrics", "luma", "psnr", "ssim"]
