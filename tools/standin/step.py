"""Run one case: build the step of a preset on the stand-in device, warm it up, capture it and replay it.

python -m tools.standin.step CASE RESULT.json, in the environment that `install.environment` returns. The variable
STANDIN_LOG names the log, in which a mark precedes each step. `matrix.py` runs this and `verdict.py` judges it.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.step import build, obstacle, pictures
from fastnce.engine import cudagraph
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws
from tools.standin.cases import FORMS, Case, find
from tools.standin.log import mark_of_step

REPLAYS = 2
"""Steps after the one that is captured; that one is replayed too."""


def kinds(step: Step) -> tuple[bool, ...]:
    """Return the values of `Draws.flip` that the method draws: each has its own graph."""
    return (False, True) if getattr(step.method.options, "flip_equivariance", False) else (False,)


def show_reason() -> None:
    """Print the traceback of a capture that fails, of which the engine keeps only the first line."""
    give_up = cudagraph.Graphs._give_up

    def explain(self: cudagraph.Graphs, error: Exception) -> None:
        traceback.print_exception(error)
        give_up(self, error)

    cudagraph.Graphs._give_up = explain  # type: ignore[method-assign]


def run(case: Case) -> dict[str, Any]:
    """Run all steps of a case; return what the log does not contain."""
    runtime = ctypes.CDLL("libcudart.so.13")
    device, variant = torch.device("cuda"), case.variant
    size, form = variant.size, {"compile": FORMS[case.form], "graph": True}
    show_reason()
    step = build(variant.preset, size.network, device, case.precision, form, variant.options, variant.optim)
    batch = Batch(*pictures(size.images, size.side, device))
    seconds = []
    for number in range(cudagraph.WARM_UP + 1 + REPLAYS):
        for flip in kinds(step):
            began = time.perf_counter()
            runtime.standin_mark(mark_of_step(number, cudagraph.WARM_UP, flip).encode())
            step.run(batch, Draws(flip=flip))
            seconds.append(round(time.perf_counter() - began, 3))
    runtime.standin_mark(b"end")
    return {
        "obstacle": obstacle(step),
        "captured": step.graphs is not None and not step.graphs.failed and bool(step.graphs.kinds),
        "kinds": len(kinds(step)),
        "step_seconds": seconds,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def main() -> None:
    case, file = find(sys.argv[1]), Path(sys.argv[2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(case)
    for warning in caught:
        print(warnings.formatwarning(warning.message, warning.category, warning.filename, warning.lineno))
    own = [str(w.message) for w in caught if not {".capture", "site-packages"} & set(Path(w.filename).parts)]
    file.write_text(json.dumps(result | {"warnings": own}))


if __name__ == "__main__":
    main()
