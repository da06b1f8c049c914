"""Carry Triton's compiled kernels from a machine without a GPU to one with a GPU.

python -m benchmarks.triton_cache build FILE.tar.xz      # runs the work of check.py and packs the compiled kernels
python -m benchmarks.triton_cache unpack FILE.tar.xz DIR

Triton's cache key is the kernel's source, its arguments, the architecture and the version of Triton. It contains no
folder of the machine, but each entry lists its files with absolute paths; `unpack` rewrites them. `build` needs a CUDA
device, or libraries that stand in for one: compiling a kernel computes nothing.
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

from benchmarks import outcomes
from benchmarks.device_tests import pytest_command

ROOT = Path(__file__).resolve().parents[1]
GROUP = "__grp__"
"""Prefix of the file that lists the files of an entry."""
NEEDED = (".cubin", ".hsaco", ".json", ".so")
"""Kernels, metadata and launchers. The other files are for human readers."""


def pack(folder: Path, file: Path) -> int:
    """Write the entries of a cache into one compressed file and return their number."""
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
    """Extract the entries into a cache folder for `TRITON_CACHE_DIR` and return their number.

    Raises:
        ValueError: the file does not exist, or `pack` did not write it.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the kernels")
    if not file.exists():
        raise ValueError(f"{file} does not exist: `python -m benchmarks.triton_cache build` makes it")
    count = 0
    try:
        with tarfile.open(file) as archive:
            if not any(Path(name).name.startswith(GROUP) for name in archive.getnames()):
                raise ValueError("it contains no kernel")
            archive.extractall(folder, filter="data")
        for path in folder.glob(f"*/{GROUP}*"):
            names = json.loads(path.read_text())["child_paths"]
            path.write_text(json.dumps({"child_paths": {name: str(path.parent / name) for name in names}}))
            count += 1
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
        why = str(error).splitlines()[0].removesuffix(":") if str(error) else type(error).__name__
        raise ValueError(f"{file} is not an archive of compiled kernels ({why})") from None
    return count


@dataclass
class Counted:
    """Numbers of kernels that were requested and compiled."""

    requested: int = 0
    compiled: int = 0

    def sentence(self) -> str:
        if not self.requested:
            return "no kernel was requested"
        found = self.requested - self.compiled
        return f"{found} of {self.requested} kernels were in Triton's cache, {self.compiled} were compiled"


class Compilations:
    """Context manager that counts the kernels that Triton compiles or finds in its cache."""

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
        self.counted.requested += 1
        self.counted.compiled += not cache_hit


def build(file: Path, published: Sequence[str] = ()) -> int:
    """Run check.py and its tests with an empty cache, pack the cache, and return the number of entries.

    Raises:
        ValueError: PyTorch finds no CUDA device, so nothing would be compiled.
    """
    probe = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        raise ValueError("PyTorch finds no CUDA device: build needs one, or libraries that stand in for CUDA's")
    with tempfile.TemporaryDirectory(prefix="fastnce-cache-") as work:
        cache = Path(work) / "triton"
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
        environment[outcomes.FILE] = str(Path(work) / "outcomes.jsonl")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        # stand-in libraries compute nothing: -O disables assertions, so that a test goes on to its next kernel
        run = [sys.executable, "-O", "-W", "ignore"]
        program = [sys.executable, str(ROOT / "benchmarks" / "check.py"), "--out", str(Path(work) / "out")]
        more = ["--slower", "5", *(["--published", *published] if published else [])]
        stages = ["--only", "smoke", "loss", "steps", "waterfall", "growth", "data", "compiled"]
        for command in ([*program, *more, *stages], [*run, *pytest_command(second=False)[1:], "--assert=plain"]):
            print(" ".join(command), flush=True)
            subprocess.run(command, cwd=ROOT, env=environment, check=False)
        return pack(cache, file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 2 after an error message for a wrong file."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_cache", description=summary)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="compile all kernels that check.py needs, and pack them")
    building.add_argument("file", type=Path, help="the archive to write")
    building.add_argument("--published", nargs="+", default=[], metavar="DIR", help="checkouts to pass to check.py")
    unpacking = commands.add_parser("unpack", help="extract an archive into a folder for TRITON_CACHE_DIR")
    unpacking.add_argument("file", type=Path, help="an archive that `build` wrote")
    unpacking.add_argument("folder", type=Path, help="the folder for the kernels")
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
