"""The format torch: a program of PyTorch's own operators for pictures of any size, checked after writing."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from fastnce.export import graph, torch_format, write_graph
from fastnce.networks import set_implementation
from tests.export.networks import TINY, Small, source_of


@pytest.fixture
def source():
    return source_of(Small())


def test_a_program_of_a_unet_in_16_bits(tmp_path):
    """Its deepest maps have one pixel for the smallest pictures, which PyTorch takes for a case of its own."""
    source = source_of(TINY["unet"]())
    written = write_graph(source, tmp_path / "out", "torch", "float16")
    assert written.checked.sizes[0] == (1, 32, 32)
    assert 0 < written.checked.difference < 0.01
    content = written.paths[0].read_bytes()
    assert b"fastnce" not in content  # nor the path of a file
    assert b"site-packages" not in content
    program = torch.export.load(written.paths[0])
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in names), names
    x = torch.rand(3, 3, 64, 32) * 2 - 1
    found = program.module()(x)
    assert found.dtype == torch.float32
    assert (found - source.network(x)).abs().max() < 0.01
    details = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (details["format"], details["file"], details["weights"]["dtype"]) == ("torch", "model.pt2", "float16")
    assert (details["input"]["multiple"], details["input"]["smallest"]) == (32, 32)
    assert written.sentence in (tmp_path / "out" / "README.md").read_text()


def test_a_copy_is_exported_which_uses_no_kernels():
    source = source_of(TINY["resnet"]())
    set_implementation(source.network, "triton")
    before = {key: value.clone() for key, value in source.network.state_dict().items()}
    copied = graph.prepared(source, "float16").network
    assert copied.model[0].implementation == "eager"
    assert {copied.model[1].weight.dtype, copied.model[-2].weight.dtype} == {torch.float16, torch.float32}
    assert all(torch.equal(value, before[key]) for key, value in source.network.state_dict().items())
    assert source.network.model[0].implementation == "triton"


def test_warnings_of_the_exporters_about_their_own_code_are_hidden():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with graph.quiet():
            warnings.warn("The given buffer is not writable, and PyTorch does not support this", stacklevel=1)
            warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]


@pytest.mark.parametrize("wrong", ["values", "NaN", "size", "dtype", "error"])
def test_a_file_that_computes_something_else_is_not_written(wrong, source, tmp_path, monkeypatch):
    def changed(path):
        run = torch.export.load(path).module()

        def altered(x):
            if wrong == "error":
                raise RuntimeError("no such operator")
            y = run(x)
            if wrong == "NaN":
                y[0, 0, 0, 0] = float("nan")
            return {"values": y + 2e-4, "size": y[:, :, 1:], "dtype": y.double()}.get(wrong, y)

        return altered

    monkeypatch.setattr(torch_format, "load", changed)
    said = {"values": "largest difference is 0.0002", "NaN": "is nan", "size": "instead of", "dtype": "torch.float64"}
    with pytest.raises(ValueError, match=said.get(wrong, "cannot compute pictures of 1 x 4 x 4: RuntimeError")):
        write_graph(source, tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_stays_if_the_next_fails(source, tmp_path, monkeypatch):
    write_graph(source, tmp_path / "out", "torch")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def stopped(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch_format, "load", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_graph(source, tmp_path / "out", "torch")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_16_bits_have_a_bound(source):
    """Twice the error of PyTorch's own 16 bits: an error five times as large is refused."""
    network = graph.prepared(source, "float16")
    found = graph.check(source, network, network, "x")
    assert 0 < found.difference < found.allowed < 0.1
    with pytest.raises(ValueError, match="computes something else"):
        graph.check(source, network, lambda x: 5 * (network(x) - source.network(x)) + source.network(x) + 0.01, "x")


def test_rounding_at_the_smallest_size_is_compared_with_float64(source, monkeypatch):
    network = graph.prepared(source, "float32")
    off = lambda x: source.network(x) + (1.2e-4 if x.shape[2] == 4 else 0)  # noqa: E731
    with pytest.raises(ValueError, match="on pictures of 1 x 4 x 4 the largest difference is 0.00012, and 0.0001"):
        graph.check(source, network, off, "x")
    monkeypatch.setattr(graph, "_rounding", lambda *_: 2e-5)
    assert graph.check(source, network, off, "x").allowed == pytest.approx(1.4e-4)
    everywhere = lambda x: source.network(x) + 1.2e-4  # noqa: E731
    with pytest.raises(ValueError, match="on pictures of 1 x 40 x 48"):
        graph.check(source, network, everywhere, "x")


def test_weights_beyond_16_bits_are_refused(source):
    source.network.convolution.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"convolution.weight of G is too large for float16: take another --dtype"):
        graph.prepared(source, "float16")


class ReadsValues(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def test_a_network_that_cannot_be_traced_is_one_sentence(tmp_path):
    source = source_of(ReadsValues(), own="mine.py:ReadsValues")
    with pytest.raises(ValueError, match=r"G \(mine.py:ReadsValues\) cannot be written as torch: ") as caught:
        write_graph(source, tmp_path / "out", "torch")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
