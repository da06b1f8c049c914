"""The format aoti: a compiled program, which leaves no files of the compiler behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from fastnce.export import aoti_format, write_graph
from tests.export.networks import Small, source_of

HERE = aoti_format.missing("float32") == ""


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="no C++ compiler here")
def test_a_program_is_compiled_and_compared(tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    before = torch.get_num_threads()
    source = source_of(Small())
    written = write_graph(source, tmp_path / "out", "aoti")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.pt2"]
    assert written.checked.difference < 1e-5
    assert list(place.iterdir()) == []
    assert torch.get_num_threads() == before
    x = torch.rand(2, 3, 20, 4)
    assert (torch._inductor.aoti_load_package(str(written.paths[0]))(x) - source.network(x)).abs().max() < 1e-5


def test_without_a_compiler_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "none"),))
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, such as g\+\+"):
            write_graph(source_of(Small()), Path(tmp_path) / "out", "aoti")
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    assert not (tmp_path / "out").exists()


def test_a_failing_compilation_is_one_sentence(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("C++ compile error\nlines")

    monkeypatch.setattr(aoti_format, "missing", lambda dtype: "")
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    with pytest.raises(ValueError, match=r"cannot be compiled: RuntimeError: C\+\+ compile error$"):
        write_graph(source_of(Small()), tmp_path / "out", "aoti")
    assert list((tmp_path / "t").iterdir()) == []
    assert not (tmp_path / "out").exists()
