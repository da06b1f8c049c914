"""The package for Hugging Face's `kernels`: what is in it, what it imports, and that it computes without fastnce."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from fastnce import patch_nce
from tools.kernel_package import __main__ as program
from tools.kernel_package import build, sources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    out = tmp_path_factory.mktemp("package") / "new" / "patchnce"
    assert program.main(["--out", str(out)]) == 0
    return out


def metadata(package, backend="cpu"):
    return json.loads((package / "build" / f"torch-{backend}" / "metadata.json").read_text())


def test_all_files_but_the_package_s_own_are_copies(package):
    tree = package / "torch-ext" / "patchnce"
    files = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*.py")}
    own = {path.relative_to(sources.OWN).as_posix() for path in sources.OWN.rglob("*.py")}
    assert own == {"__init__.py", "layers.py", "common/namespace.py"}
    for path, content in files.items():
        if path in own:
            origin = sources.OWN / path
        elif path == "kernels/__init__.py":
            continue
        else:
            origin = ROOT / path if path.startswith("kernels/") else ROOT / "fastnce" / path
        assert content == origin.read_bytes(), path
    assert {"kernels/nce.py", "kernels/project.py", "nce/api.py", "nce/impl/eager.py", "_version.py"} < files.keys()
    assert not [path for path in files if path.startswith(("engine", "methods", "networks", "data", "config"))]
    assert not {"kernels/instance_norm.py", "kernels/blur.py", "kernels/loss_terms.py"} & files.keys()


def test_the_package_imports_itself_relatively_and_else_torch_and_triton(package):
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in (package / "build" / "torch-cpu").rglob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, f"{path}:{node.lineno}"


def test_every_variant_has_its_metadata_and_digests(package):
    general = tomllib.loads((package / "build.toml").read_text())["general"]
    assert {path.name for path in (package / "build").iterdir()} == {f"torch-{b}" for b in general["backends"]}
    names = set()
    for backend in general["backends"]:
        variant, found = package / "build" / f"torch-{backend}", metadata(package, backend)
        assert (found["name"], found["version"], found["license"]) == ("patchnce", general["version"], "Apache-2.0")
        assert found["backend"] == {"type": backend}
        assert found["id"].isidentifier()
        names.add(found["id"])
        files = {
            path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
            for path in variant.rglob("*")
            if path.is_file() and path.name != "metadata.json"
        }
        assert found["digest"] == {"algorithm": "sha256", "files": files}
        assert f'"{found["id"]}"' in (variant / "_ops.py").read_text()
    assert len(names) == len(general["backends"])
    assert "_ops.py" not in {path.name for path in (package / "torch-ext").rglob("*")}  # kernel-builder writes it


def test_a_changed_file_has_other_operators():
    files = sources.package_files()
    changed = files | {"kernels/nce.py": files["kernels/nce.py"] + b"\n"}
    assert build.identity(files) != build.identity(changed)
    assert build.identity(dict(reversed(files.items()))) == build.identity(files)


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert program.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path} exists: give a new folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_error_of_the_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(self, content):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert program.main(["--out", str(tmp_path / "out")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("import fastnce.nce", "imports fastnce by its name"),
        ("from fastnce import patch_nce", "imports fastnce by its name"),
        ("from .common import nothing_there\nfrom .nowhere import x", ":2 imports nowhere, which is not in fastnce"),
    ],
)
def test_what_cannot_be_copied_is_refused(tmp_path, monkeypatch, line, complaint):
    (tmp_path / "__init__.py").write_text(line)
    monkeypatch.setattr(sources, "OWN", tmp_path)
    with pytest.raises(ValueError, match=complaint):
        sources.package_files()


def test_a_clean_interpreter_computes_with_the_kernels(package, tmp_path):
    name = metadata(package)["id"]
    paths = dict.fromkeys(str(Path(module.__file__).parents[1]) for module in (torch, triton))
    program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("alone.py"))]
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    environment = {**kept, "HOME": str(tmp_path), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, str(package / "build" / "torch-cpu"), name, *paths],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {what: len(errors) for what, errors in found["errors"].items()} == {"loss": 3, "chain": 6, "layer": 1}
    assert max(map(max, found["errors"].values())) < 5e-6, found["errors"]
    assert found["namespaces"] == [name]  # the operators of no other package
    assert found["modules"] == []


def rows(seed=0):
    torch.manual_seed(seed)
    queries, keys = torch.nn.functional.normalize(torch.randn(2, 32, 16), dim=2)
    return queries.requires_grad_(), keys


def check_equal(module):
    """The package computes what fastnce does, in one process with it."""
    results = []
    for function in (patch_nce, module.patch_nce):
        queries, keys = rows()
        loss = function(queries, keys, images=2)
        results.append((loss, *torch.autograd.grad(loss, queries)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_loads_beside_fastnce_also_from_the_place_of_older_versions(package, monkeypatch):
    variant, name = package / "build" / "torch-xpu", metadata(package, "xpu")["id"]
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    spec = importlib.util.spec_from_file_location("older", variant / "patchnce" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sorted(module.__all__) == sorted(name for name in vars(module) if name in module.__all__)
    assert module.patch_nce is sys.modules[name].patch_nce is not patch_nce
    check_equal(module)


def kernels_library():
    """The installed library. (Without it, `import kernels` finds the folder of this repository.)"""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        pytest.skip("Hugging Face's kernels is not installed (pip install kernels)")
    return importlib.import_module("kernels")


def test_the_library_loads_it_and_replaces_a_forward(package):
    library = kernels_library()
    module = library.get_local_kernel(package)
    assert module.__name__ == metadata(package)["id"]
    check_equal(module)

    @library.use_kernel_forward_from_hub("PatchNCELoss")
    class Published(torch.nn.Module):
        def __init__(self, opt):
            super().__init__()
            self.opt = opt

        def forward(self, feat_q, feat_k):
            raise AssertionError("the published forward runs")

    options = SimpleNamespace(nce_T=0.07, batch_size=2, nce_includes_all_negatives_from_minibatch=False)
    repository = library.LocalLayerRepository(package, layer_name="PatchNCELoss")
    with library.use_kernel_mapping({"PatchNCELoss": {"cpu": repository}}, inherit_mapping=False):
        layer = library.kernelize(Published(options), mode=library.Mode.TRAINING, device="cpu")
    queries, keys = rows()
    assert torch.equal(layer(queries, keys), patch_nce(queries, keys, images=2, reduction="none"))
