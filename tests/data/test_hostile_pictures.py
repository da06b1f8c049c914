"""Files that are not pictures: no other plug-in of PIL reads them, no memory is allocated, and nothing blocks."""

from __future__ import annotations

import ast
import os
import signal
import socket
import struct
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastnce.commands.main import main
from fastnce.data import DataError, find_images, load_image
from fastnce.data.folder import Folder, probe_picture, read_picture
from fastnce.data.opening import FORMATS
from fastnce.data.unpaired import UnpairedData
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published
from fastnce.translate.photographs import read_photograph
from tests.ends import write

READERS = (read_picture, probe_picture, load_image, lambda file: read_photograph(file, 3))
TOP = Path(__file__).parents[2]

# ---- one place opens pictures ----

OTHER_READERS = {"imread", "imread_collection", "imopen", "read_image", "decode_image", "decode_png", "decode_jpeg"}
OTHER_READERS |= {
    "TiffFile",
    "default_loader",
    "pil_loader",
    "ImageFolder",
    "frombuffer_open",
    "loadtxt_image",
    "Parser",
}


def openings(source: str) -> list[int]:
    """Find the lines that open a picture with PIL or any other library."""
    if not any(word in source for word in ("PIL", "ImageFile", *OTHER_READERS)):
        return []  # without these words nothing below is found
    nodes = list(ast.walk(ast.parse(source)))
    modules, functions = {"PIL.Image"}, set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {name.asname for name in node.names if name.name == "PIL.Image" and name.asname}
            modules |= {f"{name.asname}.Image" for name in node.names if name.name == "PIL" and name.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == "PIL":
            modules |= {name.asname or name.name for name in node.names if name.name == "Image"}
        elif isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
            functions |= {name.asname or name.name for name in node.names if name.name == "open"}
    found = []
    for node in nodes:
        name = node.id if isinstance(node, ast.Name) else ""
        module, last = "", name
        if isinstance(node, ast.Attribute):
            last = node.attr
            module = ast.unparse(node.value) if last == "open" else ""
        imported = isinstance(node, ast.ImportFrom) and {one.name for one in node.names} & OTHER_READERS
        by_plugin = last.endswith("ImageFile") and last != "ImageFile"
        if (
            (last == "open" and module in modules)
            or name in functions
            or last in OTHER_READERS
            or imported
            or by_plugin
        ):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "from PIL import Image\nImage.open(f)",
        "from PIL import Image as I\nI.open(f)",
        "import PIL.Image\nPIL.Image.open(f)",
        "import PIL.Image as I\nlater = I.open",
        "import PIL as p\np.Image.open(f)",
        "from PIL.Image import open as o\no(f)",
        "import cv2\ncv2.imread(f)",
        "from skimage.io import imread",
        "from PIL import PngImagePlugin\nPngImagePlugin.PngImageFile(f)",
        "from PIL import ImageFile\nImageFile.Parser()",
    ],
)
def test_openings_are_found(source):
    assert openings(source)


def test_one_place_opens_pictures():
    files = [file for folder in ("fastnce", "kernels", "benchmarks") for file in (TOP / folder).rglob("*.py")]
    assert len(files) > 50
    found = {file.relative_to(TOP).as_posix(): openings(file.read_text()) for file in files}
    own = "fastnce/watch/strips.py"  # sample grids that a run has written; PNG alone
    assert {file: len(lines) for file, lines in found.items() if lines} == {"fastnce/data/opening.py": 1, own: 1}
    assert 'formats=["PNG"]' in (TOP / own).read_text()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n0 0 40 40 rectfill\nshowpage\n%%EOF\n"
OTHERS = {
    "EPS": EPS,
    "PDF": b"%PDF-1.4\n1 0 obj<<>>endobj\n",
    "FITS": b"SIMPLE  =                    T".ljust(2880),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 100, 100, 72) + bytes(40),
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 40, 40, 8, 3) + bytes(5000),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"/>',
    "zeros": bytes(1000),
}


def test_other_formats_reach_no_plug_in_by_any_command(tmp_path, monkeypatch, capsys):
    """Whatever their names. A program `gs`, which PIL would run for EPS, would leave a file."""
    mark, programs = tmp_path / "mark", tmp_path / "programs"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\necho run >> {mark}\nexit 1\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    Image.init()
    for name in set(Image.OPEN) - set(FORMATS):
        monkeypatch.setitem(Image.OPEN, name, (lambda *_, name=name: mark.write_text(name), lambda _: True))
    root = write(tmp_path / "set", *(f"{folder}/a.png" for folder in ("trainA", "trainB", "rain", "norain")))
    (model,) = save_published({"G": ResnetGenerator(width=1, blocks=1)}, tmp_path)
    commands = [
        ["cache", "--data", str(root), "data.load_size=32", "data.crop_size=32"],
        ["translate", str(model), str(root / "trainA"), "--out", str(tmp_path / "o"), "--device", "cpu"],
        ["rain", str(root / "trainA"), "--out", str(tmp_path / "r")],
        ["evaluate", "--inputs-only", "--data", str(root), "--device", "cpu"],
        ["unpair", str(root), "--out", str(tmp_path / "u")],
    ]
    for suffix in (".png", ".jpg", ".tif", ".webp", ".npy"):
        for kind, content in OTHERS.items():
            (root / "trainA" / f"{kind}{suffix}").write_bytes(content)
            for reader in READERS:
                with pytest.raises(DataError, match=f"{kind}{suffix}"):
                    reader(root / "trainA" / f"{kind}{suffix}")
    for folder in ("rain", "norain"):
        (root / folder / "EPS.png").write_bytes(EPS)
    for command in commands:
        assert main(command) == 2
        assert "EPS" in capsys.readouterr().err
    assert not mark.exists()


# ---- pipes, devices, sockets, folders ----


@pytest.fixture
def _hurry():
    """A read that blocks raises an error after a while."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def block(file: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(file.parent)  # the path of a socket may be 107 bytes long
    try:
        listening.bind(file.name)
    finally:
        os.chdir(here)
        listening.close()


KINDS = {
    "a pipe": os.mkfifo,
    "a socket": block,
    "a folder": Path.mkdir,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "symbolic links": lambda file: file.symlink_to(file.name),
    "no file": lambda file: file.symlink_to("nowhere"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="kinds of files are others")
@pytest.mark.usefixtures("_hurry")
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_only_files_are_opened(suffix, tmp_path, monkeypatch):
    root = write(tmp_path / "set", "trainA/a.png", "trainB/a.png")
    for kind, make in KINDS.items():
        make(root / "trainA" / f"{kind}{suffix}")
    opened = []
    monkeypatch.setattr("builtins.open", lambda *_, **__: opened.append(1))
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: opened.append(path))
    for kind in KINDS:
        for reader in READERS:
            with pytest.raises(DataError, match=kind) as caught:
                reader(root / "trainA" / f"{kind}{suffix}")
            assert f"{kind}{suffix}" in str(caught.value)
    assert opened == []
    monkeypatch.undo()
    data = UnpairedData(root, load_size=8, crop_size=8, skip_bad=True)
    assert sorted(file.stem for file, _ in data.skipped) == sorted(set(KINDS) - {"a folder"})


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    root = write(tmp_path, "a.png", "lost+found/b.png", "z/c.png")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "lost+found":
            raise error
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    error: OSError = PermissionError(13, "Permission denied")
    for listed in (find_images, lambda path: [path / name for name in Folder.listed(path).names]):
        with pytest.warns(UserWarning, match=r"no permission to read the folder .*lost\+found: its pictures"):
            assert listed(root) == [root / "a.png", root / "z" / "c.png"]
    error = OSError(5, "Input/output error")
    for listed in (find_images, Folder.listed):
        with pytest.raises(DataError, match=r"the folder .*lost\+found cannot be listed: Input/output error"):
            listed(root)
