"""Unusual file names, full disks, and files in place of folders (and the reverse)."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.engine.grid import save_grid
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published
from fastnce.translate.files import translate_files
from fastnce.translate.load import load_translator
from tests.ends import NO_ROOM, commands, failing_second, half_or_whole, left, one_sentence, write

# ---- names ----


NAMES = ["\u00e9\u4e2d.png", os.fsdecode(b"\xff\xfe.png")]


@pytest.mark.parametrize("name", NAMES, ids=["not ASCII", "not Unicode"])
def test_names_that_the_terminal_cannot_print(name, tmp_path, monkeypatch, capsys):
    pairs = write(tmp_path / "p", f"rain/{name}", f"norain/{name}", "rain/2.png", "norain/2.png")
    out = tmp_path / f"{name}-out"
    report = tmp_path / f"{name}.json"
    (model,) = save_published({"G": ResnetGenerator(width=2, blocks=1)}, tmp_path / name)
    measure = ["evaluate", str(model), "--data", str(pairs), "--json", str(report), "--device", "cpu"]
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        assert main(["translate", str(model), str(pairs / "rain"), "--out", str(out), "--device", "cpu"]) == 0
        assert main(["rain", str(pairs / "rain"), "--out", str(out)]) == 0
        assert main(["unpair", str(pairs), "--out", str(out)]) == 0
        assert main([*measure, "--csv", f"{report}.csv", "--sheet", f"{report}.png"]) == 0
    assert "2 pictures written to " in printed.buffer.getvalue().decode("ascii")
    assert (out / name).is_file()
    assert [row["name"] for row in json.loads(report.read_text())["pictures"]] == ["2", name.removesuffix(".png")]
    assert name.removesuffix(".png").encode("utf-8", "backslashreplace") in Path(f"{report}.csv").read_bytes()
    Image.open(f"{report}.png").load()
    capsys.readouterr()
    (pairs / "rain" / name).write_bytes(b"")
    assert main(["translate", str(model), str(pairs / "rain" / name), "--out", str(out), "--device", "cpu"]) == 2
    assert "is empty (0 bytes)" in one_sentence(capsys)


# ---- disks ----


@pytest.mark.parametrize("name", ["translate", "rain", "unpair"])
def test_the_error_of_a_full_disk_names_the_file(name, model, photos, pairs, tmp_path, monkeypatch, capsys):
    failing_second(monkeypatch, OSError(errno.ENOSPC, NO_ROOM))
    out = tmp_path / "out"
    assert main(commands(model, photos, pairs, out)[name]) == 2
    message = one_sentence(capsys)
    wanted = {"translate": "b.png", "rain": "norain/a.png", "unpair": "trainB/2.png"}[name]
    done = "; 1 of 3 pictures were written" if name == "translate" else ""
    assert message == f"fastnce: {out / wanted}: {NO_ROOM}{done}\n"
    assert left(out) == (["a.png"] if name == "translate" else [])


def test_bad_pictures_before_a_full_disk_are_named_too(model, photos, tmp_path, monkeypatch):
    (photos / "a.png").write_bytes(b"no picture")
    failing_second(monkeypatch, OSError(errno.ENOSPC, NO_ROOM))
    with pytest.raises(ValueError, match=rf"a\.png is not a picture[^\n]*\n[^\n]*c\.png: {NO_ROOM}; 1 of 3 "):
        translate_files(load_translator(model), photos, tmp_path / "out")


def test_an_encoder_error_does_not_stop_the_other_pictures(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("fastnce.translate.photographs.save_image", refused_once())
    with pytest.raises(ValueError, match=r"a\.png: encoder error; 0 of 3 pictures were written$"):
        translate_files(load_translator(model), photos, tmp_path / "out")
    assert left(tmp_path / "out") == ["b.png", "c.png"]


def refused_once():
    from fastnce.translate.photographs import save_image

    errors = iter([OSError("encoder error")])

    def save(image, path):
        error = next(errors, None)
        if error is not None:
            raise error
        save_image(image, path)

    return save


def test_an_export_on_a_full_disk(tmp_path, monkeypatch):
    networks = {name: ResnetGenerator(width=1, blocks=1) for name in ("G_A", "G_B")}
    (tmp_path / "latest_net_G_B.pth").write_bytes(b"old")
    written, fails = Path.write_bytes, iter([False, True])
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: half_or_whole(written, path, data, next(fails)))
    with pytest.raises(OSError, match=NO_ROOM) as caught:
        save_published(networks, tmp_path)
    assert caught.value.filename == str(tmp_path / "latest_net_G_B.pth")
    assert left(tmp_path) == ["latest_net_G_A.pth", "latest_net_G_B.pth"]
    assert (tmp_path / "latest_net_G_B.pth").read_bytes() == b"old"


def test_a_grid_of_samples_on_a_full_disk(tmp_path, monkeypatch):
    written = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: half_or_whole(written, path, data, True))
    with pytest.raises(OSError, match=NO_ROOM) as caught:
        save_grid({"a": torch.zeros(1, 3, 8, 8)}, tmp_path / "grid.png")
    assert caught.value.filename == str(tmp_path / "grid.png")
    assert left(tmp_path) == []


@pytest.mark.parametrize("option", ["--json", "--csv", "--sheet"])
def test_figures_that_cannot_be_written_are_printed(option, pairs, tmp_path, monkeypatch, capsys):
    written = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: half_or_whole(written, path, data, True))
    target = tmp_path / "m.png"
    assert main(["evaluate", "--inputs-only", "--data", str(pairs), option, str(target), "--device", "cpu"]) == 2
    assert f"fastnce: {target}: {NO_ROOM}; measured: 2 pictures: Y " in one_sentence(capsys)
    assert left(tmp_path) == [f"pairs/{side}/{n}.png" for side in ("norain", "rain") for n in (1, 2)]


def test_reports_go_through_links_and_pipes(pairs, tmp_path):
    """A device or a pipe is written to and never replaced by a file."""
    (tmp_path / "kept.json").write_text("old")
    (tmp_path / "link.json").symlink_to("kept.json")
    reading, writing = os.pipe()
    pipe = f"/dev/fd/{writing}"
    has_name = Path(pipe).exists()
    measure = ["evaluate", "--inputs-only", "--data", str(pairs), "--device", "cpu"]
    reports = ["--json", str(tmp_path / "link.json"), *(["--csv", pipe] if has_name else [])]
    assert main([*measure, *reports]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert len(json.loads((tmp_path / "kept.json").read_text())["pictures"]) == 2
    os.close(writing)
    with os.fdopen(reading) as read:
        assert read.read().startswith("name,psnr_y") == has_name


def test_files_in_place_of_folders_and_the_reverse(model, photos, pairs, tmp_path, capsys):
    file = photos / "a.png"
    measure = ["evaluate", "--inputs-only", "--data", str(pairs), "--device", "cpu"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for arguments, wanted in (
        (["translate", model, photos, "--out", file], "a file is in the way, a folder is needed"),
        (
            ["translate", model, photos, "--out", tmp_path / "dangling"],
            "nothing, which does not exist: make that folder",
        ),
        (["export", model, "--out", tmp_path / "dangling"], "nothing, which does not exist: make that folder first"),
        (["translate", photos, photos, "--out", tmp_path / "o"], "no checkpoint here"),
        (["translate", file, photos, "--out", tmp_path / "o"], "not a PyTorch weight file"),
        (["rain", photos, "--out", file], "a file is in the way, a folder is needed"),
        (["evaluate", photos, "--data", pairs], "no checkpoint here"),
        (["evaluate", model, "--data", file], "there is no folder"),
        ([*measure, "--json", file / "m.json"], "there is no folder"),
        ([*measure, "--csv", photos], "is a folder; name a file in it"),
        ([*measure, "--csv", tmp_path / "m", "--json", tmp_path / "m"], "the reports need different files"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert wanted in one_sentence(capsys)
    assert not (tmp_path / "o").exists()


def test_originals_are_not_replaced(model, photos, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    (tmp_path / "link").symlink_to(photos)
    for source, out in ((photos, photos), (photos, tmp_path / "link"), (photos / "b.png", photos)):
        assert main(["translate", str(model), str(source), "--out", str(out)]) == 2
        assert "would be replaced: write to another place" in one_sentence(capsys)
    assert {path.name: path.read_bytes() for path in photos.iterdir()} == before
    inside = photos / "out"
    for _ in range(2):  # the pictures in `inside` are not translated again
        assert main(["translate", str(model), str(photos), "--out", str(inside), "--device", "cpu"]) == 0
    assert left(inside) == sorted(before)
