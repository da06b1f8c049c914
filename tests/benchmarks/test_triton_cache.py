"""Compiled kernels that are packed on one machine and found on another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import triton_cache


def test_an_unpacked_cache_is_found(tmp_path, monkeypatch):
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "here"))
    entry = FileCacheManager("KEY")
    files = {name: entry.put(f"{name} of it", name, binary=False) for name in ("k.cubin", "k.json", "k.ptx", "k.ttir")}
    entry.put_group("k.json", files)
    assert triton_cache.pack(tmp_path / "here", tmp_path / "packed.tar.xz") == 1

    there = tmp_path / "other" / "place"
    assert triton_cache.unpack(tmp_path / "packed.tar.xz", there) == 1
    for path in (tmp_path / "here").rglob("*"):
        if path.is_file():
            path.unlink()  # as on another machine
    monkeypatch.setattr(knobs.cache, "dir", str(there))
    found = FileCacheManager("KEY").get_group("k.json")
    assert {name: Path(path).read_text() for name, path in found.items()} == {
        "k.cubin": "k.cubin of it",
        "k.json": "k.json of it",
    }


def test_a_wrong_archive_is_an_error_message(tmp_path, capsys):
    file = tmp_path / "broken.tar.xz"
    whole = tmp_path / "whole.tar.xz"
    (tmp_path / "here" / "KEY").mkdir(parents=True)
    (tmp_path / "here" / "KEY" / "k.cubin").write_bytes(bytes(range(256)) * 40)
    triton_cache.pack(tmp_path / "here", whole)
    # the last archive has a file, but no entry that Triton would find
    for content in (b"not an archive", whole.read_bytes()[:150], whole.read_bytes()):
        file.write_bytes(content)
        assert triton_cache.main(["unpack", str(file), str(tmp_path / "cache")]) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith(f"error: {file} is not an archive of compiled kernels")
        assert not (tmp_path / "cache").exists()
    assert triton_cache.main(["unpack", str(whole), str(file)]) == 2
    assert "is a file" in capsys.readouterr().err
    assert triton_cache.main(["unpack", str(tmp_path / "none"), str(tmp_path / "cache")]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device it builds for minutes")
def test_nothing_is_built_without_a_device(tmp_path, capsys):
    assert triton_cache.main(["build", str(tmp_path / "kernels.tar.xz")]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: PyTorch finds no CUDA device")
    assert not list(tmp_path.iterdir())


def test_compilations_are_counted():
    from triton import knobs

    before = knobs.compilation.listener
    with triton_cache.Compilations() as counting:
        for hit in (True, False, True):
            knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
    assert knobs.compilation.listener is before
    assert counting.counted.sentence() == "2 of 3 kernels were in Triton's cache, 1 were compiled"
