"""The format aoti: model.pt2, a program that AOTInductor has compiled for the CPU of this machine."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from ..common.imports import first_line
from .graph import Run, quiet

FILE = "model.pt2"
LOADED_BY = "torch._inductor.aoti_load_package"


def missing(dtype: str) -> str:
    """Why this format cannot be written or checked here; empty if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "--format aoti needs a C++ compiler, such as g++; the environment variable CXX names another one"
    return ""


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile the program into a package.

    Raises:
        ValueError: it cannot be compiled.
    """
    from torch._inductor import aoti_compile_and_package, config
    from torch._inductor.utils import fresh_cache

    # what the compiler leaves goes with the folder, also after an error; no pool of processes for one program
    with tempfile.TemporaryDirectory(prefix="fastnce-aoti-", ignore_cleanup_errors=True) as place:
        package = Path(place) / FILE
        try:
            with quiet(), torch.no_grad(), fresh_cache(dir=place), config.patch(compile_threads=1):
                aoti_compile_and_package(program, package_path=str(package))
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(f"the program cannot be compiled: {first_line(error)}") from error
        shutil.copyfile(package, path)


def load(path: Path) -> Run:
    """Load the package as a user does."""
    from torch._inductor import aoti_load_package

    with quiet():
        return aoti_load_package(str(path))
