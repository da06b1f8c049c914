"""The files of a cache: with any content, damaged, or left by killed builders; and memory use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.data import DataError, build_cache, cached, decoding
from fastnce.data.augment import PictureStore
from fastnce.data.cache import open_cache
from fastnce.data.folder import Folder
from fastnce.data.order import Draw
from fastnce.data.target import Target
from fastnce.data.unpaired import UnpairedData

TARGET = Target.checked("resize_and_crop", 8, 8, 3)
COUNT = 5


@pytest.fixture
def root(tmp_path) -> Path:
    """Two domains; B has one unreadable picture."""
    for domain in "AB":
        (tmp_path / "data" / f"train{domain}").mkdir(parents=True)
        for i in range(COUNT):
            pixels = np.random.default_rng([ord(domain), i]).integers(0, 256, (10 + i, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / f"train{domain}" / f"{i}.png")
    (tmp_path / "data" / "trainB" / "3.png").write_bytes(b"no picture")
    return tmp_path / "data"


def wanted(folder: Path) -> bytes:
    """The expected content of a folder's cache, computed with PIL alone."""
    found = b""
    for file in sorted(folder.iterdir()):
        with contextlib.suppress(OSError):
            found += Image.open(file).resize((8, 8), Image.Resampling.BICUBIC).tobytes()
    return found


def opened(root: Path, place: Path, domain: str = "B") -> cached.PictureCache:
    return open_cache(Folder.listed(root / f"train{domain}"), TARGET, place, skip_bad=True)


def hidden(place: Path) -> list[str]:
    return [file.name for file in place.iterdir() if file.suffix not in (".bin", ".index")]


# ---- an index of any content ----


def sealed(head: object, rows: bytes) -> bytes:
    """An index with this content and the right digest."""
    content = (head if isinstance(head, bytes) else json.dumps(head).encode()) + b"\n" + rows
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def test_an_index_with_a_flipped_bit_or_truncated_anywhere_is_not_used(root, tmp_path):
    cache = opened(root, tmp_path)
    file = cache.path.with_suffix(".index")
    whole = file.read_bytes()
    digest = json.loads(whole.splitlines()[1])["digest"]

    def used() -> bool:
        base = cache.path.with_suffix("")
        return cached.read_cache(base, digest, Folder.listed(root / "trainB"), TARGET) is not None

    assert used()
    for place in range(len(whole)):
        file.write_bytes(whole[:place])
        assert not used()
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert not used()
    file.write_bytes(whole + b"\0")
    assert not used()


ODD = [
    None,
    [],
    {},
    "x",
    "uint32",
    5,
    True,
    -1,
    1.5,
    [[1, 2, 3]],
    [["a", "b"]],
    [[2**70, "x"]],
    [[-1, "x"]],
    [[3.0, "x"]],
]
ODD += [[[True, "x"]], [[3, None]], [[3, "x"], [3, "x"]], [[99, "x"]], [["../../x.png", "x"]], float("nan"), [[[]]]]


def test_an_invalid_index_with_the_right_digest_is_rebuilt(root, tmp_path):
    cache = opened(root, tmp_path)
    file = cache.path.with_suffix(".index")
    _, line, rows = file.read_bytes().split(b"\n", 2)
    head = json.loads(line)
    row = np.frombuffer(rows, "<u4").reshape(-1, 3)
    changed = [{**head, key: value} for key in ("digest", "dtype", "skipped") for value in ODD if value != head[key]]
    changed += [{k: v for k, v in head.items() if k != key} for key in head if key != "source"]  # older ones have none
    contents = [sealed(one, rows) for one in changed if one.get("skipped") != []] + [
        sealed({**head, "skipped": []}, rows)
    ]
    contents += [
        sealed(one, rows) for one in (b"[" * 100_000, b"\xff", b"NaN", b"null", b'{"digest": 1e400}', b"", b"1" * 9999)
    ]
    for side in (0, 2**16, 2**31, 2**32 - 1):
        large = row.copy()
        large[1, :2] = side
        contents.append(sealed(head, large.tobytes()))
    contents += [sealed(head, rows[:-12]), sealed(head, rows[:-1]), sealed(head, rows + rows[:12]), sealed(head, b"")]
    contents += [b"", b"\0" * 200, b"x" * 300]
    base, folder = cache.path.with_suffix(""), Folder.listed(root / "trainB")
    for content in contents:
        file.write_bytes(content)
        assert cached.read_cache(base, head["digest"], folder, TARGET) is None, content[:200]
    for content in contents[::9]:
        file.write_bytes(content)
        again = opened(root, tmp_path)
        assert again.pixels.tobytes() == wanted(root / "trainB")
        assert [path.name for path, _ in again.skipped] == ["3.png"]
        assert file.read_bytes().split(b"\n", 2)[1:] == [line, rows]


@pytest.mark.parametrize("suffix", [".index", ".bin"])
@pytest.mark.parametrize("kind", ["gone", "empty", "longer", "loop", "pipe", "folder"])
def test_other_kinds_of_files_in_place_of_a_cache(suffix, kind, root, tmp_path):
    cache = opened(root, tmp_path / "c")
    file = cache.path.with_suffix(suffix)
    whole = file.read_bytes()
    file.unlink()
    make = {
        "gone": lambda: None,
        "empty": file.touch,
        "longer": lambda: file.write_bytes(whole + b"\0"),
        "loop": lambda: file.symlink_to(file.name),
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
    }
    make[kind]()
    if kind == "folder":
        with pytest.raises(DataError, match=r"\.bin, \d+ bytes, cannot be written: Is a directory"):
            opened(root, tmp_path / "c")
        file.rmdir()
    assert opened(root, tmp_path / "c").pixels.tobytes() == wanted(root / "trainB")
    assert file.read_bytes() == whole
    assert hidden(tmp_path / "c") == []


# ---- damaged pixels ----


def damage(path: Path) -> None:
    """Change one byte of every second picture."""
    with path.open("r+b") as file:
        for place in range(0, path.stat().st_size // 192, 2):
            file.seek(192 * place + 37)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 16]))


def draw(*places: int) -> Draw:
    zero = np.zeros(len(places))
    return Draw(np.array(places), zero, zero, zero > 0)


@pytest.mark.parametrize("staged", [False, True])
def test_a_damaged_picture_is_decoded_again_when_it_is_read(staged, root, tmp_path, monkeypatch):
    opened(root, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cached.zlib, "crc32", lambda _: pytest.fail("opening a cache reads pixels"))
        cache = opened(root, tmp_path)
        store = PictureStore(cache, torch.device("cpu"), resident=False)
    damage(cache.path)
    if staged:
        store.flat = None  # as on a device that cannot hold the cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.crops(draw(1, 3), (8, 8), flip=False)  # undamaged pictures
    words = r"\.bin was damaged where it holds .*0\.png, which was decoded again"
    with pytest.warns(UserWarning, match=words) as caught:
        got = store.crops(draw(0, 1, 0), (8, 8), flip=False)
    assert len(caught) == 1
    right = np.frombuffer(wanted(root / "trainB"), np.uint8).reshape(-1, 8, 8, 3)
    assert np.abs(got.permute(0, 2, 3, 1).numpy() * 127.5 + 127.5 - right[[0, 1, 0]]).max() < 1e-4
    with pytest.warns(UserWarning, match=r"holds .*2\.png"):
        store.crops(draw(2), (8, 8), flip=False)
    assert cache.path.read_bytes() == wanted(root / "trainB")  # the file is repaired too


def test_all_pictures_are_checked_when_a_cache_is_built_or_moved_to_a_device(root, tmp_path):
    for check in (
        lambda: build_cache(root, cache_dir=tmp_path, load_size=8, crop_size=8, skip_bad=True),
        lambda: UnpairedData(root, cache_dir=tmp_path, load_size=8, crop_size=8, skip_bad=True).cached(),
        lambda: PictureStore(opened(root, tmp_path), torch.device("meta"), resident=True),
    ):
        cache = opened(root, tmp_path)
        damage(cache.path)
        with pytest.warns(UserWarning, match="decoded again"):
            check()
        assert cache.path.read_bytes() == wanted(root / "trainB")


def test_the_error_of_irreparable_damage_names_the_cache_the_picture_and_the_remedy(root, tmp_path):
    cache = opened(root, tmp_path)
    damage(cache.path)
    file = root / "trainB" / "0.png"
    before = file.read_bytes()
    Image.new("RGB", (12, 10)).save(file)
    for reason in ("has changed since", "is empty", "there is no file"):
        with pytest.raises(
            DataError, match=rf"\.bin is damaged where it holds {file}, .*{reason}.*; remove the cache .*and"
        ):
            PictureStore(cache, torch.device("cpu"), False).crops(draw(0), (8, 8), flip=False)
        file.write_bytes(b"") if reason == "has changed since" else file.unlink(missing_ok=True)
    file.write_bytes(before)
    with pytest.warns(UserWarning, match="decoded again"):
        cache.check(np.array([0]))


# ---- builders that are killed ----


def killed_after(pictures: int, root: Path, place: Path, end=signal.SIGKILL) -> None:
    """Run a process that builds A's cache and is killed once its journal lists `pictures` + 1 pictures."""
    pid = os.fork()
    if pid == 0:
        decoding.FLUSHED = -1.0
        decoding.threads = lambda: 1
        real, done = cached.prepared, []

        def prepared(*arguments):
            if len(done) == pictures + 1:
                threading.Event().wait(0.2)
                os.kill(os.getpid(), end)
            done.append(1)
            return real(*arguments)

        decoding.prepared = prepared
        decoding._in_order = lambda pool, function, items: ((item, function(item)) for item in items)
        try:
            opened(root, place, "A")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -end


@pytest.mark.parametrize("torn", ["", "journal", "line", "pixels", "byte", "nonsense", "no pixels"])
def test_pictures_that_a_killed_builder_decoded_are_reused(torn, root, tmp_path, monkeypatch):
    """From the first disagreement of its two files on, pictures are decoded again."""
    place = tmp_path / "c"
    place.mkdir()
    killed_after(2, root, place)
    (journal,), (pixels,) = place.glob(".fastnce-*_journal"), place.glob(".fastnce-*_pixels")
    lines = journal.read_bytes().splitlines(keepends=True)
    kept = len(lines)
    assert kept == 3
    data = bytearray(pixels.read_bytes())
    assert len(data) == 3 * 192
    if torn == "journal":
        journal.write_bytes(b"".join(lines[:2]) + lines[2][:4])
        kept = 2
    elif torn == "line":
        journal.write_bytes(b"".join(lines[:1]) + b'{"a": 1}\n')
        kept = 1
    elif torn == "pixels":
        pixels.write_bytes(data[:-100])
        kept = 2
    elif torn == "byte":
        data[200] ^= 1
        pixels.write_bytes(data)
        kept = 1
    elif torn == "nonsense":
        journal.write_bytes(b"[4294967296, 4294967296, 1]\n" + b"[" * 100_000)
        kept = 0
    elif torn == "no pixels":
        pixels.unlink()
        kept = 0
    decoded, messages, real = [], [], cached.prepared
    monkeypatch.setattr(decoding, "prepared", lambda file, *rest: (decoded.append(file.name), real(file, *rest))[1])
    open_cache(Folder.listed(root / "trainA"), TARGET, place, progress=messages.append)
    assert sorted(decoded) == [f"{i}.png" for i in range(kept, COUNT)]
    told = f"; {kept} of them {'was' if kept == 1 else 'were'} decoded before" in messages[0]
    assert told == (kept > 0)
    cache = opened(root, place, "A")
    assert cache.path.read_bytes() == wanted(root / "trainA")
    cache.check()
    assert hidden(place) == []


def test_leftovers_of_a_finished_cache_are_removed_at_the_next_start(root, tmp_path):
    place = tmp_path / "c"
    place.mkdir()
    killed_after(2, root, place)
    dead = next(name for name in hidden(place) if name.startswith(".fastnce")).rpartition(".")[0]
    pid = os.fork()
    if pid == 0:
        write_index = decoding.write_index

        def last(*arguments):
            write_index(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        decoding.write_index = last
        try:
            opened(root, place, "A")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [name.rpartition("_")[2] for name in hidden(place) if "lock" not in name] == ["journal"]
    half = f".fastnce-{'-'.join(decoding.partial_name().split('-')[1:])}.{'0' * 16}_journal"  # alive
    (place / half).touch()
    other = f"{dead}.{'1' * 16}_journal"  # of another unfinished cache, to be continued
    (place / other).touch()
    assert opened(root, place, "A").pixels.tobytes() == wanted(root / "trainA")
    assert {name for name in hidden(place) if "lock" not in name} == {half, other}


def test_an_unfinished_cache_of_changed_sources_is_removed(root, tmp_path):
    place = tmp_path / "c"
    place.mkdir()
    killed_after(2, root, place)
    changed = root / "trainA" / "0.png"
    Image.fromarray(255 - np.asarray(Image.open(changed))).save(changed)
    assert opened(root, place, "A").pixels.tobytes() == wanted(root / "trainA")
    assert hidden(place) == []


def test_the_files_of_a_running_builder_are_kept(root, tmp_path):
    """On a disk without locks, two builders may run at once."""
    place = tmp_path / "c"
    place.mkdir()
    killed_after(2, root, place)
    for file in place.glob(".fastnce-*"):
        machine, _, _, *rest = file.name.removeprefix(".fastnce-").split("-")
        own = decoding.partial_name().removeprefix(".fastnce-").split("-")
        file.rename(place / f".fastnce-{machine}-{own[1]}-{own[2]}-{'-'.join(rest)}")
    before = sorted(place.glob(".fastnce-*"))
    assert opened(root, place, "A").pixels.tobytes() == wanted(root / "trainA")
    assert sorted(place.glob(".fastnce-*")) == before


def test_a_failed_build_leaves_no_files(root, tmp_path):
    place = tmp_path / "c"
    place.mkdir()
    with pytest.raises(DataError, match=r"1 of 5 pictures .*\n  .*3\.png is not a picture"):
        open_cache(Folder.listed(root / "trainB"), TARGET, place)
    assert os.listdir(place) == []


# ---- memory ----


@pytest.mark.parametrize("work", ["list", "make", "open"])
def test_memory_does_not_grow_with_the_number_of_pictures(work, tmp_path, monkeypatch):
    """Apart from the list of names and the index. One decoded picture takes 192 bytes."""
    picture = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(decoding, "probe_picture", lambda _: (8, 8, 8))
    monkeypatch.setattr(decoding, "prepared", lambda *_: picture)
    monkeypatch.setattr(decoding, "threads", lambda: 2)

    def peak(count: int, again: str = "") -> int:
        place = tmp_path / f"{work}{count}{again}"
        (place / "f").mkdir(parents=True)
        for i in range(count):
            (place / "f" / f"{i:06d}.png").touch()
        folder = Folder.listed(place / "f")
        if work == "open":
            open_cache(folder, TARGET, place)
        tracemalloc.start()
        try:
            Folder.listed(place / "f") if work == "list" else open_cache(folder, TARGET, place)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = peak(200)
    many = min(peak(2200), peak(2200, "again"))  # a path may enlarge Python's table of strings by megabytes
    assert (many - few) / 2000 < 250
