"""The format onnx: what it needs, and every network (see tests/commands/test_export_formats.py for its files)."""

from __future__ import annotations

import os

import pytest

from fastnce.export import onnx_format, write_graph
from tests.export.networks import WHOLE, Small, source_of

pytest.importorskip("onnxruntime", reason="onnxruntime (extra export) is not installed")


def test_bfloat16_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no convolutions in bfloat16 .*take --dtype float16"):
        write_graph(source_of(Small()), tmp_path / "out", "onnx", "bfloat16")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "find_spec", lambda name: None if name.startswith("onnxr") else object())
    with pytest.raises(ValueError, match="needs onnxruntime: pip install onnxruntime"):
        write_graph(source_of(Small()), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("FASTNCE_EXPORTS" not in os.environ, reason="FASTNCE_EXPORTS=1 exports every network: minutes")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize("name", WHOLE)
def test_every_network_at_its_published_width(name, form, dtype, tmp_path):
    write_graph(source_of(WHOLE[name]()), tmp_path / "out", form, dtype)
