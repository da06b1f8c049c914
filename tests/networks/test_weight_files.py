"""Untrusted weight files: no code in them is executed, and none takes more memory than it has bytes."""

from __future__ import annotations

import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from fastnce.networks import ResnetGenerator
from fastnce.networks.published import network_from_weights, read_weights, save_published

FIRST = "model.1.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save_published({"G": ResnetGenerator(width=2, blocks=1)}, tmp_path_factory.mktemp("good"))[0]


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        network_from_weights(read_weights(path), str(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "as a weight"])
def test_code_is_never_run(place, zipped, tmp_path):
    mark = tmp_path / "mark"
    content = Evil(mark) if place == "alone" else {FIRST: Evil(mark)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert "holds Python objects besides tensors, which are never loaded" in refusal(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(pickle.dumps(content))
    refusal(tmp_path / "x.pth")
    assert not mark.exists()


ODD = {
    "expanded": (lambda t: torch.zeros(1).expand(t.shape), "claims 294 numbers but holds fewer"),
    "huge": (lambda t: torch.zeros(1).expand(2**40, 3, 7, 7), "numbers but holds fewer"),
    "no filters": (lambda t: torch.zeros(0, 3, 7, 7), "holds no numbers"),
    "no channels": (lambda t: torch.zeros(2, 0, 7, 7), "holds no numbers"),
    "complex": (lambda t: t.to(torch.complex64), "weights must be floats of 16 to 64 bits"),
    "whole": (lambda t: t.int(), "weights must be floats of 16 to 64 bits"),
    "8 bits": (lambda t: t.to(torch.float8_e4m3fn), "weights must be floats of 16 to 64 bits"),
    "sparse": (lambda t: t.to_sparse(), "is sparse, quantised or without values"),
    "meta": (lambda t: t.to("meta"), "is sparse, quantised or without values"),
    "NaN": (lambda t: t * float("nan"), "not finite"),
    "one dimension": (lambda t: torch.zeros(3), "is not a published"),
    "negative": (torch._neg_view, "does not fit: Error(s) in loading"),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_tensors_are_refused(what, good, tmp_path):
    change, message = ODD[what]
    state = torch.load(good)
    keys = state if what == "negative" else [FIRST]
    torch.save(state | {key: change(state[key]) for key in keys}, tmp_path / "x.pth")
    assert message in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [{}, [1], torch.zeros(3), {"state_dict": {}}, {0: torch.zeros(1)}, "text", None])
def test_other_contents_than_a_state_dict_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    refusal(tmp_path / "x.pth")


def repacked(good: Path, path: Path, change) -> Path:
    """Write the archive with changed records and right checksums."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content, packing = change(name, old.read(name))
            new.writestr(zipfile.ZipInfo(name), content, packing)
    return path


PICKLES = {
    "nothing": b"",
    "no pickle": b"\x80\x02garbage.",
    "deep": b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
    "a long number": b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"1.",
    "long bytes": b"\x80\x03B\xff\xff\xff\x7f",
    "a function": b"\x80\x02cos\nsystem\n(S'true'\ntR.",
    "a tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.",
    "no memory": b"\x80\x02h\xff.",
}


@pytest.mark.parametrize("what", PICKLES)
def test_odd_pickles_are_refused(what, good, tmp_path):
    def change(name, content):
        return (PICKLES[what] if name.endswith("data.pkl") else content), zipfile.ZIP_STORED

    refusal(repacked(good, tmp_path / "x.pth", change))


def test_a_compressed_record_is_not_unpacked(good, tmp_path):
    bomb = bytes(64 * 2**20)

    def change(name, content):
        return (bomb, zipfile.ZIP_DEFLATED) if name.endswith("/data/0") else (content, zipfile.ZIP_STORED)

    path = repacked(good, tmp_path / "x.pth", change)
    assert path.stat().st_size < 2**20
    assert "archive/data/0 is compressed, but PyTorch writes no compressed files" in refusal(path)


def test_other_kinds_of_files_are_refused(good, tmp_path):
    for content in (b"", b"hello", b"PK\x05\x06" + bytes(18), b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "x.pth").write_bytes(content)
        assert "not a PyTorch weight file, or a damaged one" in refusal(tmp_path / "x.pth")
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    for name, message in (("fifo", "not a regular file"), ("folder", "not a regular file"), ("loop", "no such file")):
        assert message in refusal(tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match="no such file"):
        read_weights(tmp_path / "absent.pth")


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_detected_or_harmless(seed, good, tmp_path):
    """With a bit flipped anywhere, or truncated, a file is refused or gives the same weights."""
    content, whole, rng = good.read_bytes(), read_weights(good), random.Random(seed)
    refused = 0
    for number in range(60):
        changed = bytearray(content)
        if number % 5 == 0:
            changed = changed[: rng.randrange(len(changed))]
        else:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        (tmp_path / "x.pth").write_bytes(changed)
        try:
            found = read_weights(tmp_path / "x.pth")
        except ValueError:
            refused += 1
            continue
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert refused >= 20


def test_files_without_checksums_and_of_old_versions_are_read(good, tmp_path):
    state = torch.load(good)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(state, tmp_path / "bare.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    for name in ("old", "bare"):
        found = read_weights(tmp_path / f"{name}.pth")
        assert all(torch.equal(found[key], state[key]) for key in state)
