"""The format torch: model.pt2, which `torch.export.load("model.pt2").module()` runs with PyTorch alone."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from .graph import Run, quiet

FILE = "model.pt2"
LOADED_BY = "torch.export.load"


def missing(dtype: str) -> str:
    """Why this format cannot be written or checked here; empty if it can."""
    return ""


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write the program; its example pictures are left out."""
    program._example_inputs = None
    packed = io.BytesIO()  # PyTorch's file writer hides the errors of the disk
    with quiet():
        torch.export.save(program, packed)
    path.write_bytes(packed.getvalue())


def load(path: Path) -> Run:
    """Load the file as a user does."""
    with quiet():
        return torch.export.load(path).module()
