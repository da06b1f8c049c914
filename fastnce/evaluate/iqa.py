"""Measures of image quality through pyiqa (extra ``iqa``): LPIPS, DISTS, NIQE, BRISQUE, MUSIQ, FSIM, VIF and others.

LPIPS: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018. NIQE: Mittal
et al., "Making a completely blind image quality analyzer", SPL 2013. pyiqa's model cards name the papers of the others.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..common.imports import first_line
from ..common.messages import nearest
from .networks import SETS
from .quality import to_levels

OWN = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "l1", *SETS)
"""Measures that need no pyiqa."""
INSTALL = "pip install 'pyiqa>=0.1.14'"
NOT_OF_ONE_IMAGE = ("fid", "fid_dinov2", "sfid", "inception_score", "clipscore")
"""pyiqa's measures of folders, or of images and texts."""


def names() -> list[str]:
    """Return the measures that pyiqa offers for one image, with or without a truth.

    Raises:
        ImportError, RuntimeError: pyiqa cannot be imported; RuntimeError if torchvision was built for another PyTorch.
    """
    import pyiqa

    return [name for name in pyiqa.list_models() if name not in NOT_OF_ONE_IMAGE]


def load(name: str, key: str, device: torch.device | str) -> tuple[Callable[..., Any], bool, bool]:
    """Load one of pyiqa's measures with its weights.

    Args:
        name: as pyiqa names it, such as "lpips" or "niqe".
        key: the option that holds the name, for messages.
        device: where it computes.

    Returns:
        (measure, whether it needs the truth, whether a higher value is better). The measure takes one or two images,
        float32 (1, channels, height, width) in [-1, 1], which it clips and rounds to 8 bits as in a file. If one is not
        finite, neither is the result.

    Raises:
        ValueError: pyiqa is not installed, has no such measure, or its weights are not available.
    """
    try:
        known = names()
    except ImportError as error:
        raise ValueError(
            f"{key}: {name} is none of {', '.join(OWN)}{nearest(name, [*OWN, 'lpips', 'niqe'])}; lpips, niqe and "
            f"others need pyiqa: {INSTALL} ({error})"
        ) from None
    except RuntimeError as error:
        raise ValueError(
            f"{key}: {name} needs pyiqa with a torchvision that was built for PyTorch {torch.__version__} "
            f"({first_line(error)})"
        ) from None
    if name not in known:
        raise ValueError(
            f"{key}: there is no measure {name}: take {', '.join(OWN)}, one of pyiqa's for single pictures (lpips, "
            f"niqe, ...), or your own (mymetrics.py:distance){nearest(name, [*OWN, *known])}"
        )
    import pyiqa

    said = _Tee(sys.stderr)
    logging.getLogger("pyiqa").setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            made = pyiqa.create_metric(name, device=torch.device(device))
    except Exception as error:
        raise ValueError(f"{key}: {_missing(name, said.getvalue(), error)}") from None

    def measure(*pictures: Tensor) -> Any:
        if not all(picture.isfinite().all() for picture in pictures):
            return float("nan")
        return made(*((to_levels(picture.clamp(-1, 1)).float() / 255).expand(-1, 3, -1, -1) for picture in pictures))

    return measure, made.metric_mode == "FR", not made.lower_better


class _Tee(io.StringIO):
    """Keeps what is written, and shows it from the first download on: large weights take minutes to arrive."""

    def __init__(self, shown: TextIO):
        super().__init__()
        self.shown = shown

    def write(self, text: str) -> int:
        written = super().write(text)
        if "Downloading" in self.getvalue():
            self.shown.write(text)
        return written


def _missing(name: str, said: str, error: Exception) -> str:
    """Why a measure cannot be loaded. pyiqa and torch.hub print what they download, and where to."""
    found = re.findall(r'Downloading: "([^"]+)" to (.+)', said)
    if not found:
        return f"pyiqa cannot load {name} ({first_line(error)})"
    source, place = found[-1]
    file = Path(place.strip())
    return (
        f"{name} needs the file {file.name}, which pyiqa could not fetch ({first_line(error)}): fetch {source} and put "
        f"it into {file.parent}"
    )
