"""The wheel and the sdist build, contain every package and the type marker, and import from any folder."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_listed_packages_are_those_on_disk():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fastnce").rglob("*.py")}
    assert listed == found | {"fastnce.kernels"}
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Build dist/ from a copy of the package, so that the source tree is not written to."""
    import shutil

    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("fastnce", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return folder / "dist"


def names_inside(dist: Path) -> dict[str, set[str]]:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as tar:
        in_sdist = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    return {"wheel": in_wheel, "sdist": in_sdist}


def test_every_module_is_inside(built):
    inside = names_inside(built)
    for path in [*(ROOT / "fastnce").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        relative = path.relative_to(ROOT).as_posix()
        assert relative in inside["sdist"], relative
        in_wheel = f"fastnce/{relative}" if relative.startswith("kernels/") else relative
        assert in_wheel in inside["wheel"], in_wheel
    models = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastnce" / "models").glob("*/*.*")}
    assert {path.rpartition("/")[2] for path in models} >= {"README.md", "config.json", "model.safetensors"}
    for names in inside.values():
        assert {"fastnce/py.typed", "fastnce/watch/page.css", "fastnce/watch/page.js"} | models <= names
    assert not any(name.startswith("kernels/") for name in inside["wheel"])


def test_the_wheel_imports_from_anywhere(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # another package named kernels must not be imported
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "common.py").write_text("raise ImportError('not ours')")
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import fastnce, torch\n"
        "from fastnce import PatchNCELoss\n"
        "from importlib.util import find_spec\n"
        f"assert fastnce.__file__.startswith({str(site)!r}), fastnce.__file__\n"
        f"assert find_spec('fastnce.kernels.common').origin.startswith({str(site)!r})\n"
        "print(PatchNCELoss()(torch.eye(4), torch.eye(4)).shape)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "torch.Size([4])"


def test_a_checkout_imports_from_outside(tmp_path):
    program = "from importlib.util import find_spec; import fastnce; print(find_spec('fastnce.kernels.common').origin)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()) == ROOT / "kernels" / "common.py"
