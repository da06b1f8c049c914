"""Checkpoints and weight files with any damage: refused with path and remedy, or passed over, never loaded wrong."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

from fastnce.engine.state import sealed
from fastnce.interop import save_published
from fastnce.networks import ResnetGenerator

from .common import Campaign, Outcome, Run, command, contents, each, picture

FILES = ("generator.safetensors", "training.safetensors", "state.json")
ODD: list[Any] = [
    None,
    "x",
    -1,
    0,
    3,
    10**30,
    [],
    {},
    True,
    1.5,
    [["G"]],
    float("nan"),
    "../../x",
    ["G", "G"],
    {"a": {}},
]


def damage(file: Path, rng: random.Random, other: Path) -> str:
    """Do something to a file; returns what."""
    content = bytearray(file.read_bytes())
    kind = rng.choice(
        ["cut", "flip", "flip", "flips", "empty", "missing", "folder", "loop", "zeros", "longer", "other"]
    )
    if kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else rng.randrange(2, 50)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        start = rng.randrange(len(content))
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    elif kind == "longer":
        content += rng.randbytes(rng.randrange(1, 5000))
    elif kind == "empty":
        content.clear()
    elif kind == "other":  # of another step
        content = bytearray((other / file.name).read_bytes())
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind != "missing":
        file.write_bytes(content)
    return f"{kind} of {file.parent.name}/{file.name}"


def change_state(folder: Path, rng: random.Random) -> str:
    """An odd value in state.json, under a right digest or none."""
    state = json.loads((folder / "state.json").read_text())
    for key in ("format", "digest"):
        state.pop(key)
    place: Any = state
    path = []
    while isinstance(place, dict) and place:
        key = rng.choice(sorted(place))
        path.append(key)
        if not isinstance(place[key], dict) or rng.random() < 0.4:
            break
        place = place[key]
    value = rng.choice(ODD)
    if rng.random() < 0.2:
        place.pop(path[-1])
        value = "nothing"
    else:
        place[path[-1]] = value
    (folder / "state.json").write_text(json.dumps(state) if rng.random() < 0.5 else sealed(state))
    return f"{value!r} for {'.'.join(path)} in {folder.name}"


def change_header(folder: Path, rng: random.Random) -> str:
    """Odd values in the header of a file of tensors, under right digests."""
    name = rng.choice(FILES[:2])
    content = (folder / name).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    key = rng.choice([key for key in header if key != "__metadata__"])
    part = rng.choice(["dtype", "shape", "data_offsets", "name", "gone"])
    value: Any = None
    if part == "name":
        value = rng.choice(["x", "G/x", "network/D/x", "", "a/b/c"])
        header[value] = header.pop(key)
    elif part == "gone":
        header.pop(key)
    else:
        odd = {"dtype": ["F7", "F4", "I64", "F64", 5], "shape": [[2**40, 2**40], [], [-1], "x", [0]]}
        value = rng.choice(odd.get(part, [[0, 4], [4, 0], [2**62, 2**63], "x", [0, 0]]))
        header[key][part] = value
    text = json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    state = json.loads((folder / "state.json").read_text())
    state = {key: value for key, value in state.items() if key not in ("format", "digest")}
    state["sha256"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in FILES[:2]}
    (folder / "state.json").write_text(sealed(state))
    return f"{part} of {key} is {value!r} in {folder.name}/{name}"


def checkpoints(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    run = Run(folder, "run.keep=3", steps=8)
    begun = folder / "begun"
    command(run.train(begun, "run.steps=6")).check(0)
    photo = picture(folder / "photo.png")
    right: dict[str, list[dict[str, str]]] = {"translate": [], "export": []}

    def asked(name: str, out: Path) -> list[object]:
        if name == "translate":
            return ["translate", out, photo, "--out", folder / "made", "--device", "cpu"]
        return ["export", out, "--out", folder / "made"]

    def made() -> dict[str, str]:
        return contents(folder / "made") if (folder / "made").exists() else {}

    for name, answers in right.items():
        for step in (2, 4, 6):
            shutil.rmtree(folder / "made", ignore_errors=True)
            command(asked(name, begun / "checkpoints" / f"step-{step:08d}")).check(0)
            answers.append(made())

    def attempt(number: int, rng: random.Random) -> str:
        out = folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(begun, out)
        newest, before = (out / "checkpoints" / f"step-{step:08d}" for step in (6, 4))
        kind = rng.choice(["files", "files", "state", "header", "pointer"])
        if kind == "files":
            done = damage(newest / rng.choice(FILES), rng, before)
        elif kind == "state":
            done = change_state(newest, rng)
        elif kind == "header":
            done = change_header(newest, rng)
        else:
            name = rng.choice(["latest", "good"])
            content = rng.choice(
                ["", "x" * 5000, "../step-00000006", "\\0", "/etc/passwd", "step-99999999", "step-00000004\\n"]
            )
            (out / "checkpoints" / name).write_text(content)
            done = f"{name} holds {content[:20]!r}"
        for name, answers in right.items():
            shutil.rmtree(folder / "made", ignore_errors=True)
            ended = command(asked(name, out))
            try:
                ended.check(0, 2)
            except AssertionError as error:
                return f"{done}: {name}: {error}"
            if ended.code == 0 and made() not in answers:
                return f"{done}: {name} makes what no checkpoint makes"
            if ended.code and (made() or str(out) not in ended.err):
                return f"{done}: {name}: {ended.told}, made {sorted(made())}"
        ended = command(run.train(out))
        try:
            ended.check(0, 2)
            if ended.code == 0:
                run.compare(out)
            elif str(out) not in ended.err:
                return f"{done}: train does not name the run: {ended.told}"
        except AssertionError as error:
            return f"{done}: train: {error}"
        return ""

    return each(tries, seed, only, attempt)


def weights(tries: int, seed: int, folder: Path, only: int | None = None) -> Outcome:
    """Bits of a published file flipped, parts of it cut, zeroed or exchanged, in its archive or around it."""
    (model,) = save_published({"G": ResnetGenerator(width=2, blocks=1)}, folder / "published")
    (other,) = save_published({"G": ResnetGenerator(width=2, blocks=1)}, folder / "other")
    photo = picture(folder / "photo.png")
    out = folder / "made"

    def translate(file: Path) -> list[object]:
        return ["translate", file, photo, "--out", out, "--device", "cpu"]

    command(translate(model)).check(0)
    right = contents(out)
    command(translate(other)).check(0)
    swapped = contents(out)

    def attempt(number: int, rng: random.Random) -> str:
        shutil.rmtree(out, ignore_errors=True)
        copy = folder / "try" / model.name
        shutil.rmtree(copy.parent, ignore_errors=True)
        copy.parent.mkdir()
        shutil.copy(model, copy)
        done = damage(copy, rng, other.parent)
        ended = command(translate(copy))
        try:
            ended.check(0, 2)
        except AssertionError as error:
            return f"{done}: {error}"
        found = contents(out) if out.exists() else {}
        if ended.code == 0 and found != (swapped if done.startswith("other") else right):
            return f"{done}: it translates otherwise"
        if ended.code and (found or str(copy) not in ended.err):
            return f"{done}: {ended.told}"
        return ""

    return each(tries, seed, only, attempt)


CAMPAIGNS = [
    Campaign(
        "checkpoints",
        "any damage or odd value in the newest checkpoint: refused with its path, or the one before is taken; what is "
        "made is what one of the checkpoints makes",
        300,
        checkpoints,
    ),
    Campaign(
        "weight-files", "any damage of a published .pth: refused with its path, or the same picture", 300, weights
    ),
]
