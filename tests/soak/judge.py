"""A working folder for a command line, and the checks after its end."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

from fastnce.common.writing import PARTIAL

from .common import TINY, Child, Ended, run, training_pictures, tree

SECONDS = 60.0
MEMORY = 3 << 30
WORK = Path("a/b")
"""The working folder below a try's folder, so that "../.." stays within the try's folder."""


def prepare_template(folder: Path) -> Path:
    """Create the files of a try: pictures, a run of one step, published files, configurations."""
    template = folder / "template"
    training_pictures(template / "data", 2)
    run(["train", "fastcut", "--data", template / "data", "--out", template / "run", *TINY, "run.steps=1"])
    run(["export", template / "run", "--out", template / "pub"])
    if not (template / "pub" / "latest_net_G.pth").exists():
        raise RuntimeError("the template has no exported run")
    shutil.rmtree(template / "data" / ".fastnce-cache")
    (template / "ok.toml").write_text("[optim]\nlr = 1e-3\n")
    (template / "none.toml").write_text("")
    (template / "bad.toml").write_text("[x\n")
    (template / "text.txt").write_text("hello")
    for name in ("empty", "OUT"):
        (template / name).mkdir()
    return template


def place_of(template: Path, folder: Path) -> Path:
    """Return a copy of the template, with its own devices, which a faulty command may replace."""
    place = folder / WORK
    place.parent.mkdir(parents=True)
    shutil.copytree(template, place, symlinks=True)
    for name, minor in (("null", 3), ("full", 7)):
        try:
            os.mknod(place / name, 0o20666, os.makedev(1, minor))
        except (OSError, AttributeError):  # needs root
            (place / name).write_text("")
    return place


def attempt_line(arguments: list[str], place: Path) -> Ended:
    def prepare() -> None:
        os.chdir(place)
        home = str(place.parent.parent / "home")
        os.environ |= {"HOME": home, "XDG_CACHE_HOME": home}

    return Child(arguments, prepare, MEMORY).end(SECONDS)


def judged(arguments: list[str], ended: Ended, place: Path, before: dict[str, bytes]) -> list[str]:
    """Return the faults of an ended command."""
    usage = ended.code == 2 and "usage: " in ended.err
    wrong = ended.wrong(0, 1, 2)
    if usage:  # argparse prints its own error message
        wrong = [text for text in wrong if not text.startswith("0 sentences")]
        if not re.search(r"^fastnce( \w+)?: error: .", ended.err, re.MULTILINE):
            wrong.append(f"no error message: {ended.err[-300:]!r}")
    after = tree(place)
    named = _written_to(arguments, place)
    for name in sorted(before.keys() - {n for n, data in after.items() if before.get(n) == data}):
        real = os.path.realpath(place / name)
        if not any(real == target or real.startswith(target + os.sep) for target in named):
            wrong.append(f"{name} is {'changed' if name in after else 'gone'}")
    for name in sorted(after.keys() - before.keys()):
        if any(PARTIAL.fullmatch(part) or part.endswith((".partial", ".tmp")) for part in Path(name).parts):
            wrong.append(f"{name} is left")
        elif os.path.realpath(place / name) not in named and (problem := broken(place / name)):
            wrong.append(f"{name} is not whole: {problem}")
    return wrong


def _written_to(arguments: list[str], place: Path) -> list[str]:
    """Return the files and folders that the command may write to."""
    found = []
    for first, second in zip(["", *arguments], [*arguments, ""], strict=True):
        name, equals, text = first.partition("=")
        if name in ("--out", "--json", "--csv", "--sheet"):
            found.append(os.path.realpath(place / (text if equals else second)))
    return found


def broken(path: Path) -> str:
    """Return the fault of a written file, checked according to its suffix; empty if it is valid."""
    try:
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"):
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            for line in path.read_text(encoding="utf-8").splitlines():
                json.loads(line)
        elif path.suffix == ".safetensors":
            # through a plain name, as safetensors accepts only Unicode
            with open(path, "rb") as file, safe_open(f"/proc/self/fd/{file.fileno()}", "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    tensors.get_tensor(key)
    except Exception as error:
        return str(error) or type(error).__name__
    return ""
