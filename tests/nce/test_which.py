"""Which implementation runs is decided in one place, and can be asked."""

import pytest
import torch

from fastnce import PatchNCEHead, patch_nce, project_patches
from fastnce.common import dispatch as common
from fastnce.common import operators
from fastnce.nce import Choice, patch_nce_layers, which
from fastnce.nce.impl import dispatch
from fastnce.networks import InstanceNorm


def test_what_was_asked_for():
    assert which("cpu", implementation="eager") == Choice("eager", "implementation='eager' was given")
    assert which("cpu").implementation == "eager"
    assert "on the CPU" in which("cpu").reason
    with pytest.raises(ValueError, match='implementation must be None, "triton" or "eager", not \'cuda\''):
        which("cpu", implementation="cuda")
    with pytest.raises(ValueError, match="device must be a device such as cpu or cuda:0, not 'xyz'"):
        which("xyz")


def test_reasons_on_a_gpu(monkeypatch):
    """As a device would be asked; no kernel runs."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(operators, "obstacle", lambda device, dtype: None)
    assert which(cuda, torch.bfloat16, rows=99_999).triton
    assert which(cuda, torch.float32, rows=dispatch.FLOAT32_ROWS).triton
    many = which(cuda, torch.float32, rows=dispatch.FLOAT32_ROWS + 1)
    assert (many.implementation, "more than 1,024 rows per group" in many.reason) == ("eager", True)
    assert which(cuda, torch.float32, rows=99_999, implementation="triton").triton
    wide = which(cuda, torch.bfloat16, dim=513)
    assert wide == Choice("eager", "the kernels hold at most 512 channels or dims, not 513")
    with pytest.raises(ValueError, match="implementation='triton' cannot run here: the kernels hold at most 512"):
        which(cuda, torch.bfloat16, dim=513, implementation="triton")
    monkeypatch.setattr(operators, "obstacle", lambda device, dtype: "the device is too old")
    assert which(cuda, torch.bfloat16) == Choice("eager", "the device is too old")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(common, "operators", None)
    assert which("cuda").reason == "Triton is not installed"
    with pytest.raises(ValueError, match="cannot run here: Triton is not installed"):
        which("cpu", implementation="triton")
    norm = InstanceNorm(3)
    norm.implementation = "triton"
    with pytest.raises(ValueError, match="cannot run here: Triton is not installed"):
        norm(torch.rand(1, 3, 4, 4))


def test_every_operation_decides_there_and_once(monkeypatch):
    """Losses of rows, of layers, of maps: one decision for each call (the head also draws its locations)."""
    seen = []
    choose = dispatch.choose

    def counted(*arguments):
        seen.append(arguments)
        return choose(*arguments)

    monkeypatch.setattr(dispatch, "choose", counted)
    rows = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    maps = [torch.randn(2, 4, 4, 4)]
    head = PatchNCEHead([4], dim=4, patches=8)
    for call, times in (
        (lambda: patch_nce(rows, rows), 1),
        (lambda: patch_nce_layers([[rows]], [[rows]]), 1),
        (lambda: project_patches(maps, [torch.arange(4)]), 1),
        (lambda: head.draw_ids(maps), 1),
    ):
        seen.clear()
        call()
        assert len(seen) == times
