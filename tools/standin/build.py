"""Build the stand-in libraries: the functions written in `src/`, and a generated one for each other that is wanted.

A generated function does nothing and reports success; its first call is logged as "stub". Those that would compute
something are logged as launches, those of CUDA itself are refused as not supported.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.standin import symbols

SOURCES = Path(__file__).resolve().parent / "src"
NOT_SUPPORTED = 801  # cudaErrorNotSupported and CUDA_ERROR_NOT_SUPPORTED


@dataclass(frozen=True)
class Library:
    """One stand-in library.

    name: its file name, which is also its soname.
    sources: files of `src/`.
    version: the version node of its symbols; empty: they have none.
    names: pattern of the symbols without a version that belong to it.
    computes: pattern of its functions that compute something.
    call: the function of its sources that logs such a computation: (handle, name) to a status.
    refuses: whether generated functions fail as not supported.
    """

    name: str
    sources: tuple[str, ...] = ()
    version: str = ""
    names: str = r"(?!)"
    computes: str = r"(?!)"
    call: str = ""
    refuses: bool = False


RUNTIME = Library(
    "libcudart.so.13",
    ("log.c", "errors.c", "streams.c", "capture.c", "launch.c", "memory.c", "device.c"),
    version="libcudart.so.13",
    refuses=True,
)
LIBRARIES = (
    RUNTIME,
    Library("libcuda.so.1", ("driver.c",), names=r"cu(?!File)[A-Z]", refuses=True),
    Library(
        "libcublas.so.13",
        ("cublas.c",),
        version="libcublas.so.13",
        computes=r"cublas(?!Create|Destroy|Get|Set)",
        call="standin_blas",
    ),
    Library("libcublasLt.so.13", ("cublaslt.c",), version="libcublasLt.so.13"),
    Library(
        "libcudnn.so.9",
        ("cudnn.c",),
        version="libcudnn.so.9",
        computes=r"cudnn(Convolution|BatchNormalization|RNN|CTCLoss|Pooling|SpatialTf|Find)",
        call="standin_dnn",
    ),
    Library("libcufft.so.12", ("cufft.c",), version="libcufft.so.12"),
    Library("libcusolver.so.12", ("answers.c",), version="libcusolver.so.12"),
    Library("libcusparse.so.12", ("answers.c",), version="libcusparse.so.12"),
    Library("libnvrtc.so.13", ("answers.c",), version="libnvrtc.so.13"),
    Library("libcupti.so.13", ("answers.c",), version="libcupti.so.13"),
    Library("libnccl.so.2", ("answers.c",), names=r"p?nccl[A-Z]"),
    Library("libcusparseLt.so.0", names=r"cusparseLt"),
    Library("libcurand.so.10", names=r"curand"),
    Library("libcufile.so.0", names=r"cuFile"),
    Library("libnvshmem_host.so.3", version="NVSHMEM", names=r"nvshmem"),
)
"""In the order in which they are built: the others link with the runtime."""


def sources() -> list[Path]:
    """Return every file that decides what is built."""
    here = Path(__file__).resolve()
    return [here, here.with_name("symbols.py"), *sorted(SOURCES.iterdir())]


def build(site: Path, headers: Path, out: Path) -> None:
    """Build all libraries for the PyTorch in `site`, a folder of installed packages, into `out`.

    headers: the folder of `cuda_runtime_api.h`.
    """
    wanted = symbols.wanted(sorted((site / "torch" / "lib").glob("*.so*")))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        for library in LIBRARIES:
            build_one(library, names_of(library, wanted), headers, out, Path(folder))


def names_of(library: Library, wanted: set[symbols.Symbol]) -> set[str]:
    """Return the names that belong to a library: those of its version, and those without one that match."""
    return {
        symbol.name
        for symbol in wanted
        if (symbol.version == library.version if symbol.version else re.match(library.names, symbol.name))
    }


def build_one(library: Library, names: set[str], headers: Path, out: Path, work: Path) -> None:
    """Build one library that exports `names`; `work` is a folder for files in between."""
    compiler = ["gcc", "-O1", "-fPIC", "-Wall", "-I", str(headers), "-I", str(SOURCES)]
    objects = []
    for source in library.sources:
        objects.append(work / f"{library.name}.{source}.o")
        _run([*compiler, "-c", str(SOURCES / source), "-o", str(objects[-1])])
    written = symbols.defined_names(objects)
    generated, script = work / f"{library.name}.c", work / f"{library.name}.map"
    generated.write_text(generate(library, names - written))
    exported = names | {name for name in written if library is RUNTIME or library.refuses}
    script.write_text(version_script(library.version, exported))
    linked = [] if library is RUNTIME else [str(out / RUNTIME.name)]
    options = [f"-Wl,-soname,{library.name}", f"-Wl,--version-script,{script}", "-fno-builtin", "-shared"]
    files = [str(generated), *map(str, objects), *linked]
    _run([*compiler, *options, "-o", str(out / library.name), *files, "-lpthread", "-ldl"])


def generate(library: Library, names: set[str]) -> str:
    """Return C code with a function for each of these names. It knows no prototypes, so it includes no header."""
    lines = ["void standin_stub(const char *function);"]
    lines += ["int standin_refuse(int code, const char *function, const char *reason);"]
    if library.call:
        lines += [f"int {library.call}(const void *handle, const char *name);"]
    for name in sorted(names):
        if re.match(library.computes, name):
            lines.append(f'int {name}(void *handle) {{ return {library.call}(handle, "{name}"); }}')
        elif library.refuses:
            lines.append(f'int {name}(void) {{ return standin_refuse({NOT_SUPPORTED}, "{name}", "not written"); }}')
        else:
            once = f'static int called; if (!called++) standin_stub("{name}");'
            lines.append(f"long {name}(void) {{ {once} return 0; }}")
    return "\n".join(lines) + "\n"


def version_script(version: str, names: set[str]) -> str:
    """Return a linker script that exports these names alone, in a version node if there is one."""
    exported = " ".join(f"{name};" for name in sorted(names))
    return f"{version} {{\n  global: {exported}\n  local: *;\n}};\n" if names else f"{version} {{ local: *; }};\n"


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)
