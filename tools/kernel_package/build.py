"""Write the kernel package: the source tree for kernel-builder, and built variants that `kernels` loads.

Layout and metadata follow the pages "Kernel requirements" and "Writing kernels" of Hugging Face's kernels (0.17).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

from fastnce.common.writing import named, partial_name
from tools.kernel_package.sources import NAME, ROOT, SOURCE, package_files

OPS = '''"""The PyTorch operators of this build."""

import torch

_OPS_NAME = "{identifier}"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the name of an operator with the namespace of this build."""
    return f"{{_OPS_NAME}}::{{op_name}}"
'''

OLD_PLACE = '''"""Where older versions of `kernels` look for the package: the same module as the folder above."""

import importlib.util
import sys
from pathlib import Path

if "{identifier}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{identifier}", Path(__file__).resolve().parents[1] / "__init__.py")
    sys.modules["{identifier}"] = _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
_module = sys.modules["{identifier}"]
__all__ = _module.__all__
globals().update({{name: getattr(_module, name) for name in __all__}})
'''


def write(out: Path) -> list[Path]:
    """Write the package into a new folder, whole or not at all; return its variants.

    Raises:
        ValueError: `out` exists, or a file of the package cannot be copied as it is.
        OSError: the disk.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists: give a new folder")
    files = package_files()
    contents = {f"torch-ext/{NAME}/{path}": content for path, content in files.items()}
    contents |= {name: (SOURCE / name).read_bytes() for name in ("build.toml", "flake.nix", "CARD.md")}
    contents["LICENSE"] = (ROOT / "LICENSE").read_bytes()
    variants = []
    for variant, path, content in built(files):
        contents[f"build/{variant}/{path}"] = content
        variants += [out / "build" / variant] * (path == "metadata.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(partial_name())
    try:
        for path, content in contents.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_bytes(content)
        os.rename(partial, out)
    except OSError as error:
        raise named(error, out) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return variants


def built(files: dict[str, bytes]) -> Iterator[tuple[str, str, bytes]]:
    """Yield (variant, path, content) of every file of the built variants: one per backend of build.toml."""
    general = tomllib.loads((SOURCE / "build.toml").read_text())["general"]
    unique = identity(files)
    for backend in general["backends"]:
        name = f"_{NAME}_{backend}_{unique}"
        variant = files | {
            "_ops.py": OPS.format(identifier=name).encode(),
            f"{NAME}/__init__.py": OLD_PLACE.format(identifier=name).encode(),
        }
        metadata = {
            "name": general["name"],
            "id": name,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": {path: _digest(variant[path]) for path in sorted(variant)}},
        }
        variant["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
        for path, content in variant.items():
            yield f"torch-{backend}", path, content


def identity(files: dict[str, bytes]) -> str:
    """Return ten hexadecimal digits that change with every change of a file: builds side by side have own operators."""
    whole = hashlib.sha256()
    for path, content in sorted(files.items()):
        whole.update(f"{path} {len(content)} ".encode() + content)
    return whole.hexdigest()[:10]


def _digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()
