"""Symbols of shared objects, and the code that is generated for them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.standin import build, symbols
from tools.standin.symbols import Symbol

TABLE = """
Symbol table '.dynsym' contains 5 entries:
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     0: 0000000000000000     0 NOTYPE  LOCAL  DEFAULT  UND
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cudaMalloc@libcudart.so.13 (2)
     2: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND ncclSend
     3: 0000000000001139    11 FUNC    GLOBAL DEFAULT   12 made_here@@TORCH_1
     4: 0000000000001139    11 FUNC    LOCAL  DEFAULT   12 hidden
"""

needs_tools = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("readelf") is None, reason="needs gcc and readelf"
)


def test_a_table_of_symbols():
    undefined, defined = symbols.parse(TABLE)
    assert undefined == {Symbol("cudaMalloc", "libcudart.so.13"), Symbol("ncclSend")}
    assert defined == {Symbol("made_here", "TORCH_1")}


def test_symbols_go_to_their_library():
    wanted = {
        Symbol("cudaMalloc", "libcudart.so.13"),
        Symbol("cublasSgemm_v2", "libcublas.so.13"),
        Symbol("cuFileRead"),
        Symbol("cuLaunchKernel"),
        Symbol("ncclSend"),
        Symbol("nvshmem_ptr", "NVSHMEM"),
        Symbol("printf", "GLIBC_2.2.5"),
    }
    found = {library.name: build.names_of(library, wanted) for library in build.LIBRARIES}
    assert {name: names for name, names in found.items() if names} == {
        "libcudart.so.13": {"cudaMalloc"},
        "libcuda.so.1": {"cuLaunchKernel"},
        "libcublas.so.13": {"cublasSgemm_v2"},
        "libcufile.so.0": {"cuFileRead"},
        "libnccl.so.2": {"ncclSend"},
        "libnvshmem_host.so.3": {"nvshmem_ptr"},
    }


def test_every_source_belongs_to_a_library():
    used = {source for library in build.LIBRARIES for source in library.sources}
    assert used == {file.name for file in build.SOURCES.glob("*.c")}


def test_files_are_short():
    for file in [*build.SOURCES.iterdir(), *build.SOURCES.parent.glob("*.py")]:
        assert len(file.read_text().splitlines()) < 350, file.name


def test_computations_are_logged_and_functions_of_cuda_are_refused():
    blas = next(library for library in build.LIBRARIES if library.name == "libcublas.so.13")
    code = build.generate(blas, {"cublasSgemm_v2", "cublasSetWorkspace_v2"})
    assert 'cublasSgemm_v2(void *handle) { return standin_blas(handle, "cublasSgemm_v2"); }' in code
    assert 'standin_stub("cublasSetWorkspace_v2")' in code
    code = build.generate(build.RUNTIME, {"cudaIpcGetMemHandle"})
    assert f'return standin_refuse({build.NOT_SUPPORTED}, "cudaIpcGetMemHandle"' in code


@needs_tools
def test_a_stand_in_replaces_the_library_that_a_program_was_linked_with(tmp_path, monkeypatch):
    """A library with a version node is rebuilt from the symbols that its user wants; the user runs with it."""
    user = tmp_path / "libuser.so"
    first = tmp_path / "first"
    first.mkdir()
    (tmp_path / "real.c").write_text("int far_multiply(void *h) { return 7; }\nint far_other(void) { return 7; }\n")
    (tmp_path / "map").write_text("FAR_1 { global: *; };\n")
    (tmp_path / "user.c").write_text(
        "int far_multiply(void *);\nint far_other(void);\n"
        "int use(void) { return far_multiply(0) + 100 * far_other(); }\n"
    )
    script = f"-Wl,--version-script,{tmp_path}/map"
    gcc = ["gcc", "-shared", "-fPIC"]
    subprocess.run(
        [*gcc, "-o", f"{first}/libfar.so.1", f"{tmp_path}/real.c", "-Wl,-soname,libfar.so.1", script], check=True
    )
    subprocess.run([*gcc, "-o", str(user), f"{tmp_path}/user.c", f"{first}/libfar.so.1"], check=True)
    wanted = symbols.wanted([user])
    assert {Symbol("far_multiply", "FAR_1"), Symbol("far_other", "FAR_1")} <= wanted
    assert "use" not in {symbol.name for symbol in wanted}

    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "far.c").write_text(
        "void standin_stub(const char *name) {}\nint standin_far(const void *h, const char *name) { return 40; }\n"
    )
    monkeypatch.setattr(build, "SOURCES", sources)
    far = build.Library("libfar.so.1", ("far.c",), version="FAR_1", computes="far_m", call="standin_far")
    monkeypatch.setattr(build, "RUNTIME", far)
    out = tmp_path / "out"
    out.mkdir()
    build.build_one(far, build.names_of(far, wanted), sources, out, tmp_path)
    ctypes.CDLL(str(out / "libfar.so.1"), mode=ctypes.RTLD_GLOBAL)
    assert ctypes.CDLL(str(user)).use() == 40


@needs_tools
def test_only_the_wanted_names_are_exported(tmp_path, monkeypatch):
    (tmp_path / "plain.c").write_text("int helper(void) { return 1; }\nint wanted_one(void) { return helper(); }\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    library = build.Library("libplain.so.1", ("plain.c",), names="wanted")
    monkeypatch.setattr(build, "RUNTIME", build.Library("none"))
    (tmp_path / "none").write_bytes(b"")
    object_file = Path(tmp_path / "stub.c")
    object_file.write_text("void standin_stub(const char *name) {}\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "none"), str(object_file)], check=True)
    build.build_one(library, {"wanted_one", "wanted_two"}, tmp_path, tmp_path, tmp_path)
    run = subprocess.run(
        ["readelf", "--dyn-syms", "-W", str(tmp_path / "libplain.so.1")], check=True, capture_output=True, text=True
    )
    assert {symbol.name for symbol in symbols.parse(run.stdout)[1]} == {"wanted_one", "wanted_two"}
