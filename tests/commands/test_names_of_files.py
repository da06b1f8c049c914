"""`--out x.png`: a file where one picture is translated, and no folder of such a name elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fastnce.commands.main import main
from fastnce.translate import load_translator, translate_files
from tests.ends import left, one_sentence, tiny, write


def translated(model: Path, source: Path, out: Path, *more: str) -> int:
    return main(["translate", str(model), str(source), "--out", str(out), "--device", "cpu", *more])


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("x.png", "PNG", ()),
        ("new/x.JPG", "JPEG", ()),
        ("x.webp", "WEBP", ("--format", "webp")),
        ("x.jpeg", "JPEG", ("--format", "jpg")),
        ("x.tif", "TIFF", ("--format", "tiff")),
    ],
)
def test_one_picture_becomes_that_file(name, kind, more, model, photos, tmp_path, capsys):
    out = tmp_path / "o" / name
    assert translated(model, photos / "a.png", out, *more) == 0
    assert left(tmp_path / "o") == [name]
    with Image.open(out) as picture:
        assert picture.format == kind
    assert capsys.readouterr().out == f"1 picture written to {out}\n"


def test_an_earlier_file_is_replaced_and_a_folder_of_this_name_is_kept(model, photos, tmp_path):
    out = tmp_path / "x.png"
    out.write_bytes(b"old")
    assert translated(model, photos / "a.png", out) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    folder = tmp_path / "y.png"
    folder.mkdir()
    assert translated(model, photos / "a.png", folder, "--format", "bmp") == 0
    assert translated(model, photos, folder) == 0
    assert left(folder) == ["a.bmp", "a.png", "b.png", "c.png"]


def test_the_function_takes_the_format_from_the_name_too(model, photos, tmp_path):
    translator = load_translator(model, "cpu")
    assert translate_files(translator, photos / "a.png", tmp_path / "x.npy") == [tmp_path / "x.npy"]
    assert translate_files(translator, photos / "a.png", tmp_path / "plain") == [tmp_path / "plain" / "a.png"]
    with pytest.raises(ValueError, match="ends with .npy, but --format asks for png: leave --format out"):
        translate_files(translator, photos / "a.png", tmp_path / "y.npy", ".png")


def test_names_that_do_not_fit_are_one_sentence(model, photos, pairs, tmp_path, capsys):
    before = left(tmp_path)
    one, folder = photos / "a.png", "is the name of a file, and a folder is needed: it will hold"
    translate, unpair = ["translate", model, "--device", "cpu", "--out"], ["unpair", pairs, "--out"]
    for arguments, wanted in (
        ([*translate, tmp_path / "x.png", photos], f"{folder} the translated pictures"),
        ([*translate, tmp_path / "x.jpg", one, "--format", "png"], "ends with .jpg, but --format asks for png"),
        ([*translate, tmp_path / "x.gif", one], "ends with .gif; a translation is written as .png, .jpg"),
        ([*translate, one, one], "is read by this command and would be replaced"),
        ([*translate, photos / "b.png", photos], "a file is in the way, a folder is needed"),
        ([*translate, model, one], "ends with .pth; a translation is written as"),
        (["rain", one, "--out", tmp_path / "x.png"], f"{folder} norain and rain"),
        ([*unpair, tmp_path / "x.png"], f"{folder} trainA and trainB"),
        ([*unpair, photos / "a.png"], "a file is in the way, a folder is needed"),
    ):
        assert main([str(argument) for argument in arguments]) == 2, arguments
        assert wanted in one_sentence(capsys)
        assert left(tmp_path) == before


def test_export_writes_into_a_folder(tmp_path, capsys):
    data = write(tmp_path / "data", "trainA/a.png", "trainB/b.png")
    assert main(tiny(data, tmp_path / "run", "run.steps=1", "--quiet")) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "G.pth")]) == 2
    assert "it will hold one file per network, such as latest_net_G.pth" in one_sentence(capsys)
    assert not (tmp_path / "G.pth").exists()
