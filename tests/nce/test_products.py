"""Kernels multiply float32 in TF32 only if the user allows it in PyTorch."""

from __future__ import annotations

import pytest
import torch
from fastnce.kernels.common import precision


@pytest.mark.parametrize(
    ("convolution", "setting"), [(False, torch.backends.cuda.matmul), (True, torch.backends.cudnn.conv)]
)
def test_tf32_only_if_the_user_allows_it(monkeypatch, convolution, setting):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    kept = setting.fp32_precision
    try:
        setting.fp32_precision = "tf32"
        assert precision("sm_90", torch.float32, convolution) == "tf32"
        assert precision("sm_90", torch.bfloat16, convolution) == "ieee"
        assert precision("gfx942", torch.float32, convolution) == "ieee"
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # forbids TF32 in NVIDIA's libraries
        assert precision("sm_90", torch.float32, convolution) == "ieee"
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
        setting.fp32_precision = "ieee"
        assert precision("sm_90", torch.float32, convolution) == "ieee"
    finally:
        setting.fp32_precision = kept
