"""What the tests of ends share: commands on small pictures, and disks that fill up."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

FULL = Path("/dev/full")
"""To be opened and printed to; never given to a command as a file, which a fault might replace."""
NO_ROOM = os.strerror(errno.ENOSPC)
TINY = [
    "network.generator=resnet_4blocks",
    "network.width=2",
    "network.discriminator=n_layers",
    "network.discriminator_layers=1",
    "network.discriminator_width=2",
    "loss.nce_layers=0,4",
    "loss.patches=8",
    "loss.projection=8",
    "data.load_size=20",
    "data.crop_size=16",
    "run.device=cpu",
    "run.threads=1",
    "run.log_every=1",
    "run.sample_every=0",
    "run.monitor_every=0",
]
"""A run whose steps take milliseconds."""


def tiny(data: Path, run: Path, *more: str) -> list[str]:
    return ["train", "fastcut", "--data", str(data), "--out", str(run), *TINY, *more]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within: the system lets this process write no file beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)).save(path)
    return folder


def commands(model: Path, photos: Path, pairs: Path, out: Path) -> dict[str, list[str]]:
    """Those that write pictures."""
    found = {
        "translate": ["translate", model, photos, "--out", out, "--device", "cpu"],
        "rain": ["rain", photos, "--out", out],
        "unpair": ["unpair", pairs, "--out", out],
        "evaluate": [
            "evaluate",
            "--inputs-only",
            "--data",
            pairs,
            "--sheet",
            out.with_suffix(".png"),
            "--device",
            "cpu",
        ],
    }
    return {name: [str(argument) for argument in arguments] for name, arguments in found.items()}


def one_sentence(capsys) -> str:
    message = capsys.readouterr().err
    assert message.startswith("fastnce: ")
    assert message.count("\n") == 1
    return message


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def failing_second(monkeypatch, error: BaseException) -> None:
    """The second picture that is saved gets half of its bytes, then the error."""
    count, write = iter(range(1000)), Path.write_bytes

    def half(path, data):
        if next(count) == 1:
            write(path, data[: len(data) // 2])
            raise error
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", half)


def half_or_whole(write_bytes, path: Path, data: bytes, fails: bool) -> int:
    if not fails:
        return write_bytes(path, data)
    write_bytes(path, data[:100])
    raise OSError(errno.ENOSPC, NO_ROOM)
