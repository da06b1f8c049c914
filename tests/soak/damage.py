"""Ways to damage a run's checkpoints: whole files, state.json, tensors, and the entries of the folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from .runs import FILES

OLDEST, MIDDLE, NEWEST, LAST = 5, 6, 8, 10
"""Steps of the checkpoints in a damaged run (the first is the best one), and the step at its end."""
ALL = ("train", "translate", "best", "export")


@dataclass(frozen=True)
class Damage:
    """One kind of damage.

    Args:
        apply: damages a run and returns a description.
        commands: to try with it.
        codes: allowed exit codes of training.
        silent: no message is required, as nothing remains that it could name.
        pointer: `best` may name another checkpoint.
        remedy: the error message must have a remedy. False if the system's error about a blocked path is enough.
    """

    name: str
    apply: Callable[[Random, Path], str]
    commands: tuple[str, ...] = ALL
    codes: tuple[int, ...] = (0, 2)
    silent: bool = False
    pointer: bool = False
    remedy: bool = True

    @property
    def part(self) -> str:
        """What is damaged: the files, the tensors, state.json, the pointers, the entries of the folder ..."""
        part = re.split(":| is ", self.name)[0]
        return {"renamed": "entries", "linked": "entries", "copied": "entries"}.get(part, part.partition("'")[0])


def place(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


# ---- whole files ----


def _flip(rng: Random, path: Path, run: Path) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _truncate(rng: Random, path: Path, run: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _link(target: str) -> Callable[[Random, Path, Path], None]:
    def link(rng: Random, path: Path, run: Path) -> None:
        path.unlink()
        path.symlink_to(target or path.name)

    return link


def _folder(rng: Random, path: Path, run: Path) -> None:
    path.unlink()
    path.mkdir()


def _of_another_step(rng: Random, path: Path, run: Path) -> None:
    other = {OLDEST: MIDDLE, MIDDLE: NEWEST, NEWEST: MIDDLE}[int(path.parent.name[5:])]
    shutil.copy(place(run, other) / path.name, path)


TO_FILES: dict[str, Callable[[Random, Path, Path], object]] = {
    "flipped": _flip,
    "truncated": _truncate,
    "empty": lambda rng, path, run: path.write_bytes(b""),
    "missing": lambda rng, path, run: path.unlink(),
    "noise": lambda rng, path, run: path.write_bytes(rng.randbytes(path.stat().st_size)),
    "twice": lambda rng, path, run: path.write_bytes(2 * path.read_bytes()),
    "zeros": lambda rng, path, run: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": _folder,
    "a link to itself": _link(""),
    "a link to nothing": _link("nothing"),
    "endless": _link("/dev/zero"),
    "of another step": _of_another_step,
}


def _files() -> list[Damage]:
    found = []
    for name, act in TO_FILES.items():
        for file in (*FILES, "state.json"):
            gone = file == "state.json" and name in ("missing", "a link to itself", "a link to nothing")

            def apply(rng: Random, run: Path, act=act, file=file) -> str:
                step = rng.choice((NEWEST, NEWEST, NEWEST, MIDDLE, OLDEST))
                act(rng, place(run, step) / file, run)
                return f"{file} of step {step}"

            found.append(Damage(f"a file is {name}", apply, silent=gone))
    for name in ("flipped", "truncated", "empty", "missing", "noise", "a folder", "a link to itself", "zeros"):
        for file in ("checkpoints/latest", "checkpoints/best", "checkpoints/good", "config.toml", "metrics.jsonl"):

            def apply(rng: Random, run: Path, name=name, file=file) -> str:
                TO_FILES[name](rng, run / file, run)
                return file

            # a folder or link in place of the file cannot be written to
            found.append(Damage(f"a file of the run is {name}", apply, codes=(0, 1, 2), pointer=True, remedy=False))
    return found


# ---- state.json ----

ODD = (None, "x", "", -1, 10**30, [], {}, True, 1.5, [["G"]], "x" * 5_000)


def seal(state: dict) -> dict:
    """Update the digest, so that the state looks intact."""
    state.pop("digest", None)
    state["digest"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return state


def _rewrite(rng: Random, run: Path, change: Callable[[dict], str], sealed: bool) -> str:
    path = place(run, NEWEST) / "state.json"
    state = json.loads(path.read_text())
    told = change(state)
    path.write_text(json.dumps(seal(state) if sealed else state))
    return f"{told}{', with the right digest' if sealed else ''}"


def _odd_value(rng: Random, run: Path) -> str:
    def change(state: dict) -> str:
        table, path = state, []
        while True:
            key = rng.choice(sorted(key for key in table if key not in ("digest", "format")))
            path.append(key)
            if not isinstance(table[key], dict) or not table[key] or rng.random() < 0.2:
                break
            table = table[key]
        if rng.random() < 0.3:
            del table[key]
            return f"no {'.'.join(path)}"
        table[key] = rng.choice(ODD)
        return f"{'.'.join(path)}={str(table[key])[:40]!r}"

    return _rewrite(rng, run, change, sealed=rng.random() < 0.7)


def _another_step(rng: Random, run: Path) -> str:
    def change(state: dict) -> str:
        state["step"] = rng.choice((0, NEWEST - 1, NEWEST + 1, 1_000))
        return f"step={state['step']}"

    return _rewrite(rng, run, change, sealed=rng.random() < 0.5)


def _whole_text(text: Callable[[bytes], bytes]) -> Callable[[Random, Path], str]:
    def apply(rng: Random, run: Path) -> str:
        path = place(run, NEWEST) / "state.json"
        path.write_bytes(text(path.read_bytes()))
        return "state.json"

    return apply


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "a list": lambda text: b"[]",
    "nested deeply": lambda text: b"[" * 200_000,
    "no number": lambda text: b"NaN",
    "in Latin 1": lambda text: b'{"step": "\xe9"}',
    "with a mark of byte order": lambda text: b"\xef\xbb\xbf" + text,
    "in UTF-16": lambda text: text.decode().encode("utf-16"),
    "with a key twice": lambda text: text.replace(b"{", b'{"step": 6, ', 1),
    "of 40 MB": lambda text: text.replace(b"{", b'{"x": "' + b"x" * 40_000_000 + b'", ', 1),
    "with a long number": lambda text: b'{"step": ' + b"9" * 10_000 + b"}",
}


# ---- tensors, with valid digests ----


def sealed_file(run: Path, file: str, content: bytes) -> None:
    folder = place(run, NEWEST)
    (folder / file).write_bytes(content)
    state = json.loads((folder / "state.json").read_text())
    state["sha256"][file] = hashlib.sha256(content).hexdigest()
    (folder / "state.json").write_text(json.dumps(seal(state)))


def _tensors(file: str, change: Callable[[Random, dict[str, torch.Tensor]], object]) -> Callable[[Random, Path], str]:
    def apply(rng: Random, run: Path) -> str:
        tensors = dict(load_file(place(run, NEWEST) / file))
        change(rng, tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, run / "changed")
        sealed_file(run, file, (run / "changed").read_bytes())
        (run / "changed").unlink()
        return file

    return apply


def _header(file: str, change: Callable[[dict, list[str]], object]) -> Callable[[Random, Path], str]:
    def apply(rng: Random, run: Path) -> str:
        content = (place(run, NEWEST) / file).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        change(header, [key for key in header if key != "__metadata__"])
        text = json.dumps(header).encode()
        sealed_file(run, file, struct.pack("<Q", len(text)) + text + content[8 + length :])
        return file

    return apply


def _raw(file: str, content: bytes) -> Callable[[Random, Path], str]:
    def apply(rng: Random, run: Path) -> str:
        sealed_file(run, file, content)
        return file

    return apply


def _cast(kind: torch.dtype) -> Callable[[Random, dict[str, torch.Tensor]], None]:
    def cast(rng: Random, tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.to(kind) for key, tensor in tensors.items()})

    return cast


def _one(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Random, dict[str, torch.Tensor]], None]:
    def one(rng: Random, tensors: dict[str, torch.Tensor]) -> None:
        key = rng.choice(sorted(key for key, tensor in tensors.items() if tensor.numel() > 1))
        tensors[key] = change(tensors[key])

    return one


def _with_infinity(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.double().clone()
    tensor.view(-1)[0] = float("inf")
    return tensor.float()


CONTENTS: dict[str, Callable[[Random, dict[str, torch.Tensor]], object]] = {
    "a tensor missing": lambda rng, tensors: tensors.pop(rng.choice(sorted(tensors))),
    "a tensor too many": lambda rng, tensors: tensors.update({rng.choice(("x", "G/x", "network/G/x")): torch.zeros(1)}),
    "another network's": lambda rng, tensors: tensors.update({"H/x": torch.zeros(1)}),
    "a tensor of one number": _one(lambda tensor: torch.zeros(1)),
    "a tensor of no numbers": _one(lambda tensor: torch.zeros(0)),
    "a tensor of another shape": _one(lambda tensor: tensor.reshape(-1)[:-1]),
    "a tensor with a dimension more": _one(lambda tensor: tensor[None]),
    "a tensor that is not finite": _one(_with_infinity),
    "whole numbers": _cast(torch.int64),
    "true and false": _cast(torch.bool),
    "numbers of 64 bits": _cast(torch.float64),
}
HEADS: dict[str, Callable[[dict, list[str]], object]] = {
    "overlapping": lambda head, keys: head[keys[1]].update(data_offsets=head[keys[0]]["data_offsets"]),
    "a huge shape": lambda head, keys: head[keys[0]].update(shape=[2**40, 2**40]),
    "an unknown kind of numbers": lambda head, keys: head[keys[0]].update(dtype="F7"),
    "numbers that PyTorch has not": lambda head, keys: head[keys[0]].update(dtype="F8_E8M0"),
    "offsets past the end": lambda head, keys: head[keys[0]].update(data_offsets=[2**40, 2**41]),
}
RAW = {
    "a length of 2^63": struct.pack("<Q", 2**63 - 1) + b"{}",
    "a length of 2^40": struct.pack("<Q", 2**40) + b"{}",
    "nothing": b"",
    "seven bytes": b"1234567",
    "no tensors": struct.pack("<Q", 2) + b"{}",
}


def _all_tensors() -> list[Damage]:
    found = []
    for file in FILES:
        found += [Damage(f"tensors: {name}", _tensors(file, act)) for name, act in CONTENTS.items()]
        found += [Damage(f"tensors: {name}", _header(file, head)) for name, head in HEADS.items()]
        found += [Damage(f"tensors: {name}", _raw(file, content)) for name, content in RAW.items()]
    for prefix in ("bad_steps", "adam", "average", "network/D", "network/F"):

        def without(rng: Random, tensors: dict[str, torch.Tensor], prefix=prefix) -> None:
            for key in [key for key in tensors if key.startswith(prefix)]:
                del tensors[key]

        found.append(Damage(f"tensors: no {prefix}", _tensors(FILES[1], without)))
    for value in (torch.zeros(3), torch.tensor(float("nan")), torch.tensor(-1.0), torch.tensor(2, dtype=torch.int8)):

        def set_to(rng: Random, tensors: dict[str, torch.Tensor], value=value) -> None:
            tensors["bad_steps"] = value

        found.append(Damage(f"tensors: bad_steps is {value.tolist()}", _tensors(FILES[1], set_to)))
    return found


# ---- entries of the folder ----

NONSENSE = (
    "",
    ".",
    "../../../../../etc",
    "/etc/passwd",
    "step-99999999",
    "step-",
    "step-00000006/../step-00000005",
    "\0",
    "x" * 5_000,
    "step-00000006\nstep-00000005",
    "step-6",
)


def _pointer(rng: Random, run: Path) -> str:
    name, text = rng.choice(("latest", "best", "good")), rng.choice((*NONSENSE, "step-00000006", "step-00000006\n"))
    (run / "checkpoints" / name).write_text(text)
    return f"{name}={text[:40]!r}"


def _several(*steps: int) -> Callable[[Random, Path], str]:
    def apply(rng: Random, run: Path) -> str:
        for step in steps:
            _truncate(rng, place(run, step) / rng.choice((*FILES, "state.json")), run)
        return f"steps {steps}"

    return apply


def _in_the_way(name: str, kind: str) -> Callable[[Random, Path], str]:
    def apply(rng: Random, run: Path) -> str:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if kind == "file":
            path.write_text("x")
        else:
            path.mkdir()
            if kind == "full folder":
                (path / "x").write_text("x")
        return f"{name} is a {kind}"

    return apply


def _renamed(rng: Random, run: Path) -> str:
    place(run, NEWEST).rename(place(run, 99))
    return "the newest is called step 99"


def _linked(rng: Random, run: Path) -> str:
    place(run, NEWEST).rename(run / "away")
    place(run, NEWEST).symlink_to(run / "away")
    return "the newest is a link"


def _copied(rng: Random, run: Path) -> str:
    name = rng.choice(("step-00000099", "step-zzz", "step-00000008 (copy)", "step-9"))
    shutil.copytree(place(run, NEWEST), run / "checkpoints" / name)
    return f"{name} is a copy of the newest"


def replaced(other: Path) -> Callable[[Random, Path], str]:
    """Return damage that replaces the newest checkpoint by that of another run."""

    def apply(rng: Random, run: Path) -> str:
        shutil.rmtree(place(run, NEWEST))
        shutil.copytree(place(other, NEWEST), place(run, NEWEST))
        return "the newest is of another run"

    return apply


def damages() -> list[Damage]:
    found = [*_files(), *_all_tensors()]
    found += 12 * [Damage("state.json: an odd value", _odd_value)] + 2 * [Damage("state.json: a step", _another_step)]
    found += [Damage(f"state.json: {name}", _whole_text(text)) for name, text in TEXTS.items()]
    found += 6 * [Damage("a pointer of nonsense", _pointer, pointer=True)]
    found += [Damage("several", _several(NEWEST, MIDDLE)), Damage("several", _several(NEWEST, MIDDLE, OLDEST))]
    found += [Damage("renamed", _renamed), Damage("linked", _linked), *3 * [Damage("copied", _copied)]]
    for name in (f"checkpoints/step-{NEWEST:08d}", f"checkpoints/step-{LAST:08d}", "checkpoints", "samples"):
        for kind in ("file", "folder", "full folder"):
            found.append(Damage("in the way", _in_the_way(name, kind), codes=(0, 1, 2), silent=True, remedy=False))
    return found
