"""Published weight files (.pth) from strangers: no code in them is executed, and their memory is bounded."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from .common import Campaign, Child, Outcome, pictures, run, survey, tree
from .runs import done

MEMORY = 1 << 30
SECONDS = 60.0
FIRST = "model.1.weight"
State = dict[str, torch.Tensor]


class Evil:
    """An object whose unpickling creates the file `mark`."""

    def __init__(self, mark: Path, way: int):
        self.mark, self.way = mark, way

    def __reduce__(self):
        if self.way == 0:
            return os.system, (f"touch '{self.mark}'",)
        if self.way == 1:
            return exec, (f"open({str(self.mark)!r}, 'w')",)
        return open, (str(self.mark), "w")


def _evil(rng: Random, state: State, path: Path, mark: Path) -> None:
    evil = Evil(mark, rng.randrange(3))
    content = rng.choice(
        (evil, {FIRST: evil}, {**state, "x": evil}, [evil], {evil: state[FIRST]} if rng.random() else 0)
    )
    how = rng.choice(("zip", "legacy", "pickle"))
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")


def _odd_tensors(rng: Random, state: State, path: Path, mark: Path) -> None:
    change = rng.choice(list(ODD.values()))
    keys = sorted(state) if rng.random() < 0.5 else [rng.choice(sorted(state))]
    torch.save({**state, **{key: change(state[key]) for key in keys}}, path)


ODD: dict[str, Callable[[torch.Tensor], object]] = {
    "expanded": lambda t: torch.zeros(1).expand(t.shape),
    "huge": lambda t: torch.zeros(1).expand(2**40, 3, 7, 7),
    "wide": lambda t: torch.zeros(1).expand(200_000, 3, 7, 7),
    "no filters": lambda t: t[:0],
    "one dimension": lambda t: t.reshape(-1),
    "no dimension": lambda t: torch.tensor(1.0),
    "complex": lambda t: t.to(torch.complex64),
    "whole": lambda t: t.to(torch.int32),
    "boolean": lambda t: t.to(torch.bool),
    "not finite": lambda t: t * float("nan"),
    "sparse": lambda t: t.to_sparse(),
    "without values": lambda t: t.to("meta"),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "a text": lambda t: "text",
    "a number": lambda t: 1,
    "a list": lambda t: t.tolist(),
    "nothing": lambda t: None,
}


def _odd_keys(rng: Random, state: State, path: Path, mark: Path) -> None:
    small = torch.zeros(1)
    first = state[FIRST]
    blocks = {f"model.{n}.conv_block.1.weight": small for n in range(10, 20_000)}
    deep = {f"model.model.1{'.model.3' * depth}.model.1.weight": small for depth in range(60)}
    unet = {"model.model.0.weight": torch.zeros(2, 3, 4, 4), "model.model.3.weight": torch.zeros(2, 3, 4, 4)}
    level = {
        "final_linear.0.weight": small,
        "convs.0.0.weight": torch.zeros(8, 3, 1, 1),
        "convs.60.conv2.1.weight": small,
    }
    choices: list[object] = [
        dict(enumerate(state.values())),
        {**state, 5: small},
        {**state, ("a", "b"): small},
        {**state, "": small},
        {**state, "model.999999999999999999999.weight": torch.zeros(2, 2, 3, 3), ".conv_block.": small},
        {"model..weight": small, ".conv_block.x": small, FIRST: first},
        {"x.conv_block.1": small, FIRST: first, "model.2.weight": first},
        {**blocks, FIRST: torch.zeros(1).expand(512, 3, 7, 7), "model.20000.weight": torch.zeros(3, 2, 7, 7)},
        {**unet, **deep},
        level,
        {f"module.module.{key}": tensor for key, tensor in state.items()},
        {key: tensor for key, tensor in state.items() if key != rng.choice(sorted(state))},
        {},
        [],
        None,
        state[FIRST],
        "text",
        {"state_dict": state},
    ]
    torch.save(rng.choice(choices), path)


def _lies(rng: Random, state: State, path: Path, mark: Path) -> None:
    """Write an archive with compressed entries, false sizes or a false number of entries."""
    packed = io.BytesIO()
    torch.save(state, packed)
    how = rng.choice(("deflated", "bomb", "size", "entries", "comment"))
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if how == "bomb" and entry.filename.endswith("/data/0"):
                data = bytes(400_000_000)
            kind = zipfile.ZIP_DEFLATED if how in ("deflated", "bomb") else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(entry.filename), data, compress_type=kind)
        if how == "comment":
            new.comment = rng.randbytes(60_000)
    if how in ("size", "entries"):
        content = bytearray(path.read_bytes())
        head = content.rfind(b"PK\x05\x06") if how == "entries" else content.find(b"PK\x01\x02")
        at = head + (10 if how == "entries" else 20)
        width = 2 if how == "entries" else 8
        content[at : at + width] = struct.pack("<H" if width == 2 else "<Q", rng.getrandbits(8 * width))
        path.write_bytes(content)


def _many_numbers(rng: Random, state: State, path: Path, mark: Path) -> None:
    """Write an archive with a storage that claims far more numbers than the archive has bytes."""
    packed = io.BytesIO()
    torch.save(state, packed)
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                # pickle protocol 2 ends a storage's description with its size as BININT1, BININT2 or BININT
                claim = b"J" + struct.pack("<i", rng.choice((2**31 - 1, 2**28, -1)))
                data = data.replace(b"K" + bytes([state["model.1.bias"].numel()]), claim)
            new.writestr(zipfile.ZipInfo(entry.filename), data)


def _damaged(rng: Random, state: State, path: Path, mark: Path) -> None:
    legacy = rng.random() < 0.3
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    content = bytearray(path.read_bytes())
    if legacy or rng.random() < 0.4:  # the legacy format has no checksums: only truncate it
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _noise(rng: Random, state: State, path: Path, mark: Path) -> None:
    begin = rng.choice((b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"\x89HDF", b"GIF89a"))
    path.write_bytes(begin + rng.randbytes(rng.randrange(5_000)))


def _no_file(rng: Random, state: State, path: Path, mark: Path) -> None:
    how = rng.choice(("folder", "pipe", "link to itself", "endless"))
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if how == "link to itself" else "/dev/zero")


def _other_precision(rng: Random, state: State, path: Path, mark: Path) -> None:
    kind = rng.choice((torch.float32, torch.float64))
    old = rng.random() < 0.5
    torch.save({k: t.to(kind) for k, t in state.items()}, path, _use_new_zipfile_serialization=not old)


KINDS = [_evil, _evil, _odd_tensors, _odd_tensors, _odd_keys, _odd_keys, _lies, _many_numbers]
KINDS += [_damaged, _damaged, _damaged, _noise, _no_file, _other_precision]


def weight_files(count: int, seed: int, folder: Path) -> Outcome:
    from fastnce.networks import ResnetGenerator
    from fastnce.networks.published import save_published

    torch.manual_seed(0)
    good = save_published({"G": ResnetGenerator(width=2, blocks=1)}, folder)[0]
    state = torch.load(good, weights_only=True)
    photograph = pictures(folder, "p.png") / "p.png"

    def translate(model: Path, out: Path) -> list[str]:
        return ["translate", str(model), str(photograph), "--out", str(out), "--format", "npy", "--device", "cpu"]

    plain = done(run(translate(good, folder / "out")))
    wanted, most = tree(folder / "out"), 0

    def attempt(number: int, rng: Random, place: Path) -> tuple[str, list[str]]:
        nonlocal most
        kind, path, mark = KINDS[number % len(KINDS)], place / "x.pth", place / "mark"
        kind(rng, dict(state), path, mark)
        ended = Child(translate(path, place / "out"), memory=MEMORY).end(SECONDS)
        most = max(most, ended.peak - plain.peak)
        wrong = ended.wrong(0, 2)
        if mark.exists():
            wrong.append("its code was executed")
        # a flipped bit may have no effect; otherwise the file must be refused
        if ended.code == 0 and tree(place / "out") != wanted:
            wrong.append("it was loaded with other weights")
        if ended.code == 0 and kind in (_evil, _noise, _no_file, _many_numbers):
            wrong.append("it was loaded")
        if ended.code == 2 and str(path) not in ended.err:
            wrong.append(f"the message does not name the file: {ended.err[-300:]!r}")
        if ended.code != 0 and kind is _other_precision:
            wrong.append(f"an intact file is refused: {ended.err[-300:]!r}")
        return kind.__name__.strip("_").replace("_", " "), wrong

    outcome = survey(count, seed, folder, attempt)
    outcome.notes.append(f"At most {max(0, most)} MiB more memory than for an intact file.")
    return outcome


CAMPAIGN = Campaign(
    "weight-files",
    "No code of a published weight file is executed, false sizes take no memory, and only the written weights are "
    "loaded; otherwise one message names the file.",
    1_000,
    weight_files,
)
