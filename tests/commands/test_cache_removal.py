"""`fastnce cache --remove`: the caches of one data set, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fastnce.commands.main import main
from fastnce.common.locking import InUse, hold
from fastnce.data import DataError, UnpairedData
from fastnce.data.removal import FILE, remove_caches
from tests.ends import left, one_sentence, tiny, write

SMALL = {"load_size": 20, "crop_size": 16}


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "my data", "trainA/a.png", "trainA/b.png", "trainB/b.png")


def cache(data: Path, *more: str) -> list[str]:
    return ["cache", "fastcut", "--data", str(data), *tiny(data, data)[6:], *more]


def test_the_command_that_is_named_removes_the_cache(data, capsys):
    place = data / ".fastnce-cache"
    for _ in range(2):  # the second time, nothing is decoded
        assert main(cache(data)) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        megabytes = sum(path.stat().st_size for path in place.glob("*.bin")) / 2**20
        assert last == (
            f"cached 3 pictures in {place} ({megabytes:.1f} MiB); `fastnce cache --remove --data '{data}'` deletes it"
        )
    assert len(left(place)) == 8  # two domains, two sizes, two files each
    assert main(["cache", "--remove", "--data", str(data)]) == 0
    assert capsys.readouterr().out.startswith("removed 8 cache files (0.0 MiB) from ")
    assert left(data) == ["trainA/a.png", "trainA/b.png", "trainB/b.png"]
    assert not place.exists()
    assert main(["cache", "--remove", "--data", str(data)]) == 0
    assert capsys.readouterr().out.startswith(f"there is no cache of {data} in {place} or ")
    assert main(["cache", "--remove", "--data", str(data / "missing")]) == 2
    assert f"there is no folder {data / 'missing'}" in one_sentence(capsys)


def test_training_says_it_once_where_it_builds_one(data, tmp_path, capsys):
    for run, count in (("1", 1), ("2", 0)):
        assert main(tiny(data, tmp_path / run, "run.steps=2")) == 0
        assert capsys.readouterr().out.count(f"cached 3 pictures in {data / '.fastnce-cache'} (") == count
    assert main(tiny(data, tmp_path / "3", "run.steps=1", f"data.cache_dir={tmp_path / 'c'}")) == 0
    assert f"--data '{data}' data.cache_dir={tmp_path / 'c'}` deletes it" in capsys.readouterr().out


def test_progress_lines_say_which_size(data, capsys):
    assert main(cache(data)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("decoding ")]
    assert len(lines) == len(set(lines)) == 4
    assert sum("2 pictures of" in line and "resized to 20x20, into" in line for line in lines) == 1
    assert sum("2 pictures of" in line and "resized to 16x16, into" in line for line in lines) == 1


def test_files_of_others_stay(data):
    UnpairedData(data, **SMALL)
    place = data / ".fastnce-cache"
    others = ["notes.txt", "photo-0123456789.bin", "x-01234567-0123456789abcdef.png", "index"]
    for name in others:
        (place / name).write_text("mine")
    (place / "x-01234567-0123456789abcdef.bin").mkdir()
    assert sorted(path.suffix for path in remove_caches(data)) == [".bin", ".bin", ".index", ".index"]
    assert sorted(os.listdir(place)) == sorted([*others, "x-01234567-0123456789abcdef.bin"])


def test_a_shared_folder_keeps_the_caches_of_other_data(data, tmp_path):
    other, place = write(tmp_path / "my data 2", "trainA/a.png", "trainB/b.png"), tmp_path / "shared"
    UnpairedData(data, cache_dir=place, **SMALL)
    mine = set(left(place))
    UnpairedData(other, cache_dir=place, **SMALL)
    theirs = set(left(place)) - mine
    old = next(path for path in place.glob("*.index") if path.name in mine)
    assert {path.name for path in remove_caches(data, place)} == mine
    assert set(left(place)) == theirs
    assert old.name in mine


def test_the_cache_folder_of_the_user_is_looked_through(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data.chmod(0o555)
    UnpairedData(data, **SMALL)
    data.chmod(0o755)
    assert not (data / ".fastnce-cache").exists()
    assert len(remove_caches(data)) == 4
    assert left(tmp_path / "home") == []


def test_an_index_that_cannot_be_read_is_left_in_a_shared_folder(data, tmp_path):
    place = tmp_path / "shared"
    UnpairedData(data, cache_dir=place, **SMALL)
    first, second = sorted(place.glob("*.index"))
    digest, head, rest = first.read_bytes().split(b"\n", 2)
    without = {key: value for key, value in json.loads(head).items() if key != "source"}
    first.write_bytes(b"\n".join([digest, json.dumps(without).encode(), rest]))
    second.write_bytes(b"\xff" * 100)
    assert remove_caches(data, place) == {}
    assert len(left(place)) == 4


def test_a_cache_in_use_is_kept_whole(data):
    """Opened data map the cache. A process that builds one holds its lock."""
    opened = UnpairedData(data, **SMALL)
    before = left(data)
    with pytest.raises(DataError, match="is in use by a running process: wait until it ends, or stop it"):
        remove_caches(data)
    assert left(data) == before
    opened.batch(0)
    del opened
    stem = FILE.fullmatch(next((data / ".fastnce-cache").glob("trainB*.bin")).name)["stem"]
    held = hold(data / ".fastnce-cache", "fastnce train", name=f"{stem}.lock")
    with held, pytest.raises(InUse, match="is in use by fastnce train"):
        remove_caches(data)
    assert left(data) == before
    assert len(remove_caches(data)) == 4


def test_a_first_build_is_not_disturbed(data):
    place = data / ".fastnce-cache"
    with hold(place, "fastnce train", name="trainA-01234567.lock"), pytest.raises(InUse):
        remove_caches(data)


def test_data_sets_of_the_user_have_no_cache(data, capsys):
    assert main(["cache", "--remove", "data.dataset=mine.py:Mine"]) == 2
    assert "has no cache to remove" in one_sentence(capsys)
