"""Install what `make capture` needs into a folder of its own, and reuse a finished installation.

The folder gets a virtual environment with the CUDA builds of PyTorch and Triton, without the CUDA libraries that they
depend on; the headers of the CUDA runtime; and the stand-in libraries, built for this PyTorch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tools.standin import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".capture"
CONSTRAINTS = HERE / "constraints.txt"
HEADERS = ("nvidia-cuda-runtime", "nvidia-cuda-crt")
"""Packages of which only the headers are used. They stay outside the virtual environment, where PyTorch would load
their libraries instead of the stand-ins."""
STALE = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
"""Variables of the caller that would lead a case away from the stand-ins."""


class MissingError(Exception):
    """Something that the tool needs from the machine is missing; the message is one sentence."""


def pinned() -> dict[str, str]:
    """Return the version of every package in the constraints file."""
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {name.strip(): version.strip() for name, version in pairs}


def check_machine() -> None:
    """Raise `MissingError` if the machine lacks a program or file that the installation needs."""
    absent = [program for program in ("gcc", "readelf", "c++filt") if shutil.which(program) is None]
    if absent:
        raise MissingError(
            f"make capture needs gcc, readelf and c++filt, but {', '.join(absent)} cannot be found: install gcc and "
            f"binutils"
        )
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise MissingError("make capture needs Linux on x86-64, where PyTorch's default build is the one for CUDA")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise MissingError(
            f"make capture needs the headers of {sys.executable}, because Triton compiles a module against Python.h: "
            f"install python3-dev, or use another Python (make capture PYTHON=...)"
        )


def python(folder: Path) -> Path:
    """Return the Python of the virtual environment in `folder`."""
    return folder / "venv" / "bin" / "python"


def libraries(folder: Path) -> Path:
    """Return the folder of the stand-in libraries in `folder`."""
    return folder / "lib"


def environment(folder: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a process that shall use the stand-ins.

    Compiled kernels are cached in `folder`, so that later runs are faster. The first-use check of the kernels is off:
    it would compare numbers that nothing has computed.
    """
    kept = {name: value for name, value in base.items() if name not in STALE}
    lib = str(libraries(folder))
    return kept | {
        "LD_LIBRARY_PATH": lib,
        "TRITON_LIBCUDA_PATH": lib,
        "TRITON_CACHE_DIR": str(folder / "cache" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT),
        "FASTNCE_CHECK_KERNELS": "0",
    }


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager: no other process installs into `folder` or runs cases there.

    Raises:
        MissingError: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MissingError(f"another make capture is running in {folder.name}/: wait until it ends") from None
        yield


def install(folder: Path) -> None:
    """Install everything that is missing or was installed from other pins or sources.

    Raises:
        MissingError: the machine lacks something.
    """
    check_machine()
    stamp = folder / "packages.stamp"
    packages = _digest([CONSTRAINTS], sys.version)
    if not _matches(stamp, packages):
        print(
            f"installing PyTorch {pinned()['torch']} for CUDA into {folder.name}/ (0.8 GB to download, some minutes)",
            flush=True,
        )
        stamp.unlink(missing_ok=True)
        _install_packages(folder)
        stamp.write_text(packages)
    stamp = folder / "libraries.stamp"
    sources = _digest(build.sources(), packages)
    if not _matches(stamp, sources):
        print(f"building the stand-in libraries into {folder.name}/lib", flush=True)
        stamp.unlink(missing_ok=True)
        build.build(_site(folder), folder / "headers" / "nvidia" / "cu13" / "include", libraries(folder))
        stamp.write_text(sources)


def _install_packages(folder: Path) -> None:
    for name in ("venv", "headers", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], capture_output=True).returncode:
        shutil.rmtree(folder / "venv", ignore_errors=True)
        raise MissingError(
            f"{sys.executable} cannot make a virtual environment: install python3-venv, or use another Python "
            f"(make capture PYTHON=...)"
        )
    _pip(folder, sorted(set(pinned()) - set(HEADERS)))
    _pip(folder, HEADERS, "--target", str(folder / "headers"))


def _pip(folder: Path, names: Sequence[str], *options: str) -> None:
    """Install packages without their dependencies: those of PyTorch are the CUDA libraries that are replaced."""
    command = [str(python(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--constraint", str(CONSTRAINTS), *options, *names], check=True)


def _site(folder: Path) -> Path:
    """Return the folder of installed packages of the virtual environment."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run = subprocess.run([str(python(folder)), "-c", code], check=True, capture_output=True, text=True)
    return Path(run.stdout.strip())


def _digest(files: Sequence[Path], more: str) -> str:
    digest = hashlib.sha256(more.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _matches(stamp: Path, text: str) -> bool:
    return stamp.is_file() and stamp.read_text() == text
