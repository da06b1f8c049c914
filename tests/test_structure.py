"""The order of the packages: import direction, no circles, no definitions in `__init__.py`, short files."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = [
    {"kernels"},
    {"common"},
    {"data", "models", "networks", "nce.impl"},
    {"evaluate", "nce"},
    {"methods"},
    {"engine"},
    {"config"},
    {"translate", "accelerate", "watch", "published"},
    {"training", "export"},
    {"api", "hub"},
    {"commands"},
    {"__main__"},
]
"""The packages from the lowest floor up: a package may import from lower floors and from itself."""

PUBLIC = {
    "fastnce": {"DerainingMetrics", "NegativeBank", "PatchNCEHead", "PatchNCELoss", "PatchSampleF", "__version__"}
    | {"patch_nce", "project_patches", "sample_patch_ids", "train", "load", "evaluate", "Run", "RunInfo", "Callback"}
    | {"StopTraining", "TrainingFailed"},
    "fastnce.api": {"train", "load", "evaluate", "Run", "RunInfo", "Callback", "StopTraining", "TrainingFailed"},
    "fastnce.nce": {"NegativeBank", "PatchNCEHead", "PatchNCELoss", "PatchSampleF", "patch_nce", "patch_nce_layers"}
    | {"project_patches", "sample_patch_ids", "products", "which", "Choice", "Weights", "Weighting", "WEIGHTINGS"}
    | {"monce", "hdce"},
    "fastnce.nce.variants": {"LearnedNegatives", "ascend", "diversity", "only_external", "attention_patch_ids"}
    | {"dense_patch_ids", "asp_query_weight", "hdce_pair_weight", "monce_log_weight", "Weighting"},
    "fastnce.networks": {"ResnetGenerator", "UnetGenerator", "StyleGAN2Generator", "Restorer", "PatchGAN", "PixelGAN"}
    | {"StyleGAN2Discriminator", "Generator", "Discriminator", "GENERATORS", "DISCRIMINATORS", "build_generator"}
    | {"build_discriminator", "InstanceNorm", "AffineInstanceNorm", "BlurDown", "BlurUp", "Norm", "channels_last"}
    | {"init_weights", "fuse_neighbours", "leave_out_biases", "set_implementation", "MUNITGenerator", "TilePatchGAN"},
    "fastnce.methods": {"Method", "Batch", "Draws", "Group", "Phase", "NetworkOptions", "option", "PRESETS", "Preset"}
    | {"find_preset", "CUT", "CUTOptions", "CycleGAN", "CycleGANOptions", "DCLGAN", "DCLGANOptions", "SimDCL"}
    | {"SimDCLOptions", "SinCUT", "SinCUTOptions", "DCDGAN", "DCDGANOptions"},
    "fastnce.models": {"folder", "names"},
    "fastnce.data": {"UnpairedData", "DataError", "build_cache", "find_images", "load_image", "save_image"},
    "fastnce.evaluate": {"DerainingMetrics", "FeatureDistance", "luma", "psnr", "ssim"},
    "fastnce.translate": {"Translator", "load_translator", "translate_files"},
    "fastnce.config": {"Config", "resolve"},
    "fastnce.training": {"train_run"},
    "fastnce.accelerate": {"main", "patch"},
    "fastnce.export": {"DTYPES", "GRAPHS", "Source", "Written", "card", "details", "open_source", "save_weights"}
    | {"write_folder", "write_graph", "write_published", "write_safetensors"},
    "fastnce.hub": {"HubModel", "push"},
    "fastnce.watch": {"NotebookCallback", "ReportCallback", "write_report"},
}
"""Names that users import: removing one needs a line in CHANGELOG.md and a deprecation first."""


def modules() -> dict[str, Path]:
    """Return the path of every module and package, by its name without "fastnce."."""
    found = {}
    for folder, prefix in ((ROOT / "fastnce", ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


@functools.cache
def imported(name: str) -> list[tuple[str, int, bool]]:
    """Return (imported module, line, whether inside a function) for every import of fastnce in a module."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    tree = ast.parse(path.read_text())
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            targets = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastnce":
            base = node.module.split(".")[1:]
            targets = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name.removeprefix("fastnce.") for alias in node.names if alias.name.startswith("fastnce.")]
        for target in targets:
            while target not in MODULES:  # a name that is defined in a module
                target = target.rpartition(".")[0]
            found.append((target, node.lineno, id(node) in inner))
    return found


def floor_of(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def room_of(module: str) -> str:
    """Return the package of a module: the longest name on a floor that the module name starts with."""
    rooms = [room for floor in FLOORS for room in floor if module == room or module.startswith(f"{room}.")]
    assert rooms, f"{module} is on no floor: add it to FLOORS"
    return max(rooms, key=len)


ROOT_PACKAGE = ("", "_version")
"""`fastnce/__init__.py` imports its names at first use, and every module may import `__version__`."""


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ROOT_PACKAGE])
def test_imports_point_downward(name):
    for target, line, _ in imported(name):
        if target in ROOT_PACKAGE:
            continue
        same = room_of(target) == room_of(name)
        assert same or floor_of(target) < floor_of(name), f"{MODULES[name]}:{line} imports {target}, which is not below"


def test_the_drawing_shows_every_package():
    drawing = (ROOT / "docs" / "figures" / "rooms.svg").read_text()
    packages = {path.parent.name for path in (ROOT / "fastnce").glob("*/__init__.py")} | {"kernels"}
    assert packages == set(re.findall(r">(\w+)/<", drawing))


def test_imports_form_no_circle():
    graph = {name: {target for target, *_ in imported(name)} - {name, ""} for name in MODULES if name}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert len(done) >= 100


ON_PURPOSE = {"__main__": "commands.main"}
"""Allowed imports inside a function: Ctrl-C while PyTorch is imported must print one line."""


@pytest.mark.parametrize("name", MODULES)
def test_no_import_is_inside_a_function(name):
    hidden = [f"{target} (line {line})" for target, line, inside in imported(name) if inside]
    assert [one.split()[0] for one in hidden] == ([ON_PURPOSE[name]] if name in ON_PURPOSE else []), hidden


CALLED = ("import sys", "sys.modules[__name__].__class__ = EvaluatePackage")
"""`fastnce.evaluate` is a package and a function."""
PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py" and name]


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_only_re_export(name):
    for node in ast.parse(MODULES[name].read_text()).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]
        called = name == "evaluate" and ast.unparse(node) in CALLED
        assert text or names or called or isinstance(node, ast.ImportFrom), f"{MODULES[name]}:{node.lineno} defines"


def test_files_are_short_and_the_package_has_few_of_them():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {name: length for name, length in lengths.items() if length > 355} == {}
    loose = [path.name for path in (ROOT / "fastnce").glob("*.py")]
    assert len(loose) <= 8, loose
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    found = importlib.import_module(module)
    assert set(found.__all__) == PUBLIC[module]
    for name in found.__all__:
        assert getattr(found, name) is not None


def test_docs_name_the_public_modules():
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text[text.index("Public names") :]
    missing = [module for module in PUBLIC if f"`{module}`" not in section]
    assert missing == []


def test_tests_and_benchmarks_are_not_in_the_package():
    """In a source checkout only `fastnce.kernels` is imported from beside the package."""
    for name in ("tests", "benchmarks", "experiments", "examples", "tools"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"fastnce.{name}")
    kernels = importlib.import_module("fastnce.kernels.common")
    assert Path(kernels.__file__) == ROOT / "kernels" / "common.py"


def test_fast_paths_do_not_import_the_reference():
    users = [name for name in MODULES if any(target == "nce.impl.reference" for target, *_ in imported(name))]
    assert users == ["commands.doctor"]
