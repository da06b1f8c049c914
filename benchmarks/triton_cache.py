"""Triton's compiled kernels, carried from a machine without a GPU to one with it.

python -m benchmarks.triton_cache build FILE.tar.xz      # runs what check.py runs, and packs what was compiled
python -m benchmarks.triton_cache unpack FILE.tar.xz DIR

Triton finds a compiled kernel by its source, its arguments, the architecture and its own version; the folders of the
machine are in none of them, but each entry lists its files with their whole paths. Unpacking puts those right.
`build` needs a CUDA device, or libraries that stand in for one: nothing has to be computed for a kernel to be compiled.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GROUP = "__grp__"
"""What the name of an entry's list of files begins with."""
NEEDED = (".cubin", ".hsaco", ".json", ".so")
"""Kernels, what is known of them, and the launchers; the rest is for reading."""


def pack(folder: Path, file: Path) -> int:
    """Write the entries of a cache into one compressed file; returns how many there are."""
    count = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    with tarfile.open(part, "w:xz") as archive:
        for path in sorted(folder.glob("*/*")):
            if path.suffix not in NEEDED or not path.is_file():
                continue
            data = path.read_bytes()
            if path.name.startswith(GROUP):
                names = json.loads(data)["child_paths"]
                kept = [name for name in names if Path(name).suffix in NEEDED]
                data = json.dumps({"child_paths": {name: name for name in kept}}).encode()
                count += 1
            entry = tarfile.TarInfo(f"{path.parent.name}/{path.name}")
            entry.size, entry.mode = len(data), path.stat().st_mode & 0o755
            archive.addfile(entry, io.BytesIO(data))
    part.replace(file)
    return count


def unpack(file: Path, folder: Path) -> int:
    """Put the entries into a cache folder, where Triton will look for them; returns how many there are.

    Raises:
        ValueError: there is no such file, or it is not one that `pack` has written.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the kernels")
    if not file.exists():
        raise ValueError(f"{file} is not there: `python -m benchmarks.triton_cache build` makes it")
    count = 0
    try:
        with tarfile.open(file) as archive:
            if not any(Path(name).name.startswith(GROUP) for name in archive.getnames()):
                raise ValueError("there is no kernel in it")
            archive.extractall(folder, filter="data")
        for path in folder.glob(f"*/{GROUP}*"):
            names = json.loads(path.read_text())["child_paths"]
            path.write_text(json.dumps({"child_paths": {name: str(path.parent / name) for name in names}}))
            count += 1
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
        why = str(error).splitlines()[0].removesuffix(":") if str(error) else type(error).__name__
        raise ValueError(f"{file} is no packed cache of compiled kernels ({why})") from None
    return count


@dataclass
class Counted:
    """Kernels that were asked for, and how many of them had to be compiled."""

    asked: int = 0
    compiled: int = 0

    def sentence(self) -> str:
        if not self.asked:
            return "no kernel was asked for"
        found = self.asked - self.compiled
        return f"{found} of {self.asked} kernels were in Triton's cache, {self.compiled} were compiled"


class Compilations:
    """Within: counts the kernels that Triton compiles or finds in its cache."""

    def __init__(self) -> None:
        self.counted = Counted()

    def __enter__(self) -> Compilations:
        from triton import knobs

        self._before = knobs.compilation.listener
        knobs.compilation.listener = self._listen  # type: ignore[assignment]
        return self

    def __exit__(self, *_: Any) -> None:
        from triton import knobs

        knobs.compilation.listener = self._before

    def _listen(self, *, cache_hit: bool, **_: Any) -> None:
        self.counted.asked += 1
        self.counted.compiled += not cache_hit


def build(file: Path, published: Sequence[str] = ()) -> int:
    """Run the check and the tests that it runs, into an empty cache, and pack that; returns how many entries.

    Raises:
        ValueError: PyTorch finds no CUDA device here, so that nothing would be compiled.
    """
    from benchmarks import outcomes
    from benchmarks.check import pytest_command

    asked = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if subprocess.run(asked, capture_output=True, check=False).returncode:
        raise ValueError("PyTorch finds no CUDA device: build needs one, or libraries that stand in for CUDA's")
    with tempfile.TemporaryDirectory(prefix="fastnce-cache-") as work:
        cache = Path(work) / "triton"
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
        environment[outcomes.FILE] = str(Path(work) / "outcomes.jsonl")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        # where nothing computes, a test fails at its first comparison: without assertions it goes on to its next kernel
        run = [sys.executable, "-O", "-W", "ignore"]
        program = [sys.executable, str(ROOT / "benchmarks" / "check.py"), "--out", str(Path(work) / "out")]
        more = ["--slower", "5", *(["--published", *published] if published else [])]
        without = ["--only", "smoke", "loss", "steps", "waterfall", "growth", "data", "compiled"]
        for command in ([*program, *more, *without], [*run, *pytest_command(rest=False)[1:], "--assert=plain"]):
            print(" ".join(command), flush=True)
            subprocess.run(command, cwd=ROOT, env=environment, check=False)
        return pack(cache, file)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with one sentence where a file is not what it should be."""
    words = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_cache", description=words)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="compile everything that check.py needs, and pack it")
    building.add_argument("file", type=Path, help="the archive to write")
    building.add_argument("--published", nargs="+", default=[], metavar="DIR", help="checkouts that check.py is given")
    unpacking = commands.add_parser("unpack", help="into a folder that TRITON_CACHE_DIR names")
    unpacking.add_argument("file", type=Path, help="an archive that build has written")
    unpacking.add_argument("folder", type=Path, help="where the kernels go")
    options = parser.parse_args(arguments)
    try:
        if options.command == "build":
            count = build(options.file, options.published)
            print(f"{count} kernels in {options.file}, {options.file.stat().st_size / 2**20:.1f} MiB")
        else:
            print(f"{unpack(options.file, options.folder)} kernels in {options.folder}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
