"""No command replaces what it reads, or its own output; counts are those of files on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fastnce.commands.main import main
from fastnce.common.writing import check_free, check_not_replaced, distinct_names, move_together, write_whole
from fastnce.config import resolve
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published
from fastnce.training import train_run
from tests.ends import left, one_sentence, write


@pytest.fixture
def model(tmp_path) -> Path:
    return save_published({"G": ResnetGenerator(width=2, blocks=1)}, tmp_path / "published")[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in left(folder)}


def test_a_report_never_replaces_a_picture_or_the_model(model, tmp_path, capsys):
    pairs = write(tmp_path / "pairs", *(f"{side}/{n}.png" for n in (1, 2) for side in ("rain", "norain")))
    (tmp_path / "link.png").symlink_to(pairs / "norain" / "2.png")
    before = contents(tmp_path)
    measure = ["evaluate", str(model), "--data", str(pairs), "--device", "cpu"]
    for option, file in (
        ("--sheet", pairs / "rain" / "1.png"),
        ("--sheet", tmp_path / "link.png"),
        ("--csv", pairs / "norain" / ".." / "norain" / "1.png"),
        ("--json", model),
    ):
        assert main([*measure, option, str(file)]) == 2
        assert f"{file} is read by this command and would be replaced" in one_sentence(capsys)
        assert contents(tmp_path) == before


def test_translations_never_replace_each_other_or_the_model(model, tmp_path, capsys):
    photos = write(tmp_path / "photos", "a.png", "b.png")
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "x.png").write_bytes(b"x")
    for name in ("a.png", "b.png"):
        (out / name).symlink_to(tmp_path / "x.png")
    translate = ["translate", str(model), str(photos), "--device", "cpu", "--out"]
    assert main([*translate, str(out)]) == 2
    assert f"{out / 'a.png'} and {out / 'b.png'} are the same file (one is a link)" in one_sentence(capsys)
    assert (tmp_path / "x.png").read_bytes() == b"x"
    os.replace(model, renamed := out / "c.png")
    write(photos, "c.png")
    translate[1] = str(renamed)
    for name in ("a.png", "b.png"):
        (out / name).unlink()
    assert main([*translate, str(out)]) == 2
    assert f"{renamed} is read by this command" in one_sentence(capsys)
    assert left(out) == ["c.png"]


NAMES = ["a.bmp", "a.jpg", "a.jpg.png", "a.png", "A.png", "a.png.png", "é.bmp", "e\u0301.jpg", "b/a.jpg", "B/a.bmp"]


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
def test_names_differ_on_every_kind_of_disk(order):
    names = distinct_names([Path("top", name) for name in order], Path("top"), ".png")
    assert list(names) == [Path("top", name) for name in order]
    plain = {str(name).replace("e\u0301", "é").lower() for name in names.values()}
    assert len(plain) == len(order)
    assert all(name.parent == file.parent.relative_to("top") for file, name in names.items())


@pytest.mark.parametrize("command", ["translate", "rain"])
def test_as_many_files_as_are_told(command, model, tmp_path, capsys):
    photos = write(tmp_path / "photos", "a.bmp", "a.jpg", "a.jpg.png", "a.png", "A.png")
    out = tmp_path / "out"
    arguments = {
        "translate": ["translate", str(model), str(photos), "--out", str(out), "--device", "cpu"],
        "rain": ["rain", str(photos), "--out", str(out)],
    }[command]
    assert main(arguments) == 0
    assert "5 pictures written" in (said := capsys.readouterr().out) or "5 in norain, 5 in rain" in said
    assert len(left(out / "rain" if command == "rain" else out)) == 5


def test_a_link_to_nothing_is_in_the_way(tmp_path):
    (tmp_path / "trainA").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="trainA exists already: take another folder"):
        check_free(tmp_path, ["trainB", "trainA"])


def test_targets_are_compared_where_links_lead(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"b.x is read by this command"):
        check_not_replaced([tmp_path / "b" / "x"], [tmp_path / "a" / "x"])
    check_not_replaced([tmp_path / "b" / "x"], [tmp_path / "a" / "y"])


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2])
def test_folders_are_shown_together_or_not_at_all(at, after, tmp_path, monkeypatch):
    files = write(tmp_path, ".aside/a/1.png", ".aside/b/1.png", ".aside/c/1.png")
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) != at:
            return replace(source, target)
        if after:
            replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        move_together(files / ".aside", files, ["a", "b", "c"])
    assert sorted(os.listdir(files)) == [".aside"]
    move_together(files / ".aside", files, ["a", "b", "c"])
    assert sorted(os.listdir(files)) == [".aside", "a", "b", "c"]


def test_a_disk_that_fails_for_good_is_told_by_its_first_error(tmp_path, monkeypatch):
    files = write(tmp_path, ".aside/a/1.png", ".aside/b/1.png")
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) > 1:
            raise OSError(errno.EROFS, "Read-only file system", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Read-only") as caught:
        move_together(files / ".aside", files, ["a", "b"])
    assert caught.value.filename == str(files / "b")


# ---- a run's configuration ----


def test_the_configuration_of_a_run_is_whole_or_as_before(tmp_path, monkeypatch):
    """A full disk, or a kill, while it is written."""
    data = write(tmp_path / "data", "trainA/1.png", "trainB/1.png")
    small = ["data.crop_size=32", "data.load_size=32", "network.width=2", "network.generator=resnet_4blocks"]
    config = resolve("fastcut", None, [*small, "network.discriminator_width=2", "run.device=cpu"])
    config.data.dir = str(data)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("before")
    write_bytes = Path.write_bytes

    def half(self, content):
        if self.suffix != ".toml":  # the cache of the pictures
            return write_bytes(self, content)
        write_bytes(self, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left") as caught:
        train_run(config, run, quiet=True)
    assert caught.value.filename == str(run / "config.toml")
    assert left(run) == ["config.toml"]
    assert (run / "config.toml").read_text() == "before"


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n"])
def test_an_empty_configuration_is_not_taken_for_the_defaults(text, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"c.toml is empty: leave it out"):
        resolve("cut", file)


def test_what_is_written_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(number):
        events.append(("flushed", os.fstat(number).st_size))
        fsync(number)

    def renamed(source, target):
        events.append(("renamed", os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "x", b"12345")
    assert events == [("flushed", 5), ("renamed", 5)]
