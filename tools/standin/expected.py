"""What is known of cases: those in which PyTorch cannot compile something, and those without a launch table so far.

Where PyTorch cannot compile a part of the step, or the whole of it, the engine runs that part uncompiled, or the step
in parts, with a warning. Such a case must show exactly these problems, and meet all other conditions. A case that is
listed here and compiles fails too, so that the list stays true.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

PART = "the compiler refused a part of the step"
WHOLE = "the compiler refused the whole step"
IN_PARTS = "a warning: the step is compiled in parts, not whole: "
D_LOSS = "a warning: d_loss runs uncompiled: Unsupported Tensor.requires_grad_() call"


@dataclass(frozen=True)
class Fallback:
    """Cases that match a pattern, the beginnings of the problems that they must have, and the reason."""

    cases: str
    problems: tuple[str, ...]
    why: str


R1 = "PyTorch 2.11 does not trace requires_grad_(), which R1 needs"
FOREACH = "Inductor 2.11 writes a foreach kernel that reads an argument which it does not have"
FALLBACKS = (
    Fallback("cut/*/whole", (WHOLE, f"{IN_PARTS}CompilationError"), FOREACH),
    Fallback("fastcut/*/whole", (WHOLE, f"{IN_PARTS}CompilationError"), FOREACH),
    Fallback("sincut/*/parts", (PART, D_LOSS), R1),
    Fallback("sincut/*/whole", (PART, IN_PARTS, D_LOSS), R1),
)

NEW = ("negcut", "fsesim", "lsesim", "qsattn")
UNRECORDED = (
    *("*/fp16/whole", "*/fp32/whole"),
    *(
        f"{preset}/bf16/whole"
        for preset in ("cyclegan", "dclgan", "dclgan-paper", "simdcl", "dcdgan", "dcdgan-released", "hneg-src", *NEW)
    ),
    *(f"{preset}/{precision}/parts" for preset in ("negcut", "fsesim", "lsesim") for precision in ("fp16", "fp32")),
    "dclgan+options/bf16/parts",
)
"""Cases that have no launch table so far: their launches are not compared until --write records them."""


def is_recorded(case: str) -> bool:
    """Return whether the launch table has to have the case."""
    return not any(fnmatch.fnmatchcase(case, pattern) for pattern in UNRECORDED)


def settle(case: str, problems: list[str]) -> tuple[list[str], str]:
    """Return the problems that are not expected, and why the case falls back (empty if it does not)."""
    fallback = next((each for each in FALLBACKS if fnmatch.fnmatchcase(case, each.cases)), None)
    if fallback is None:
        return problems, ""
    absent = [sign for sign in fallback.problems if not any(problem.startswith(sign) for problem in problems)]
    if absent:
        return [*problems, f"expected.py lists it ({fallback.why}), but it lacks: {'; '.join(absent)}"], ""
    return [problem for problem in problems if not problem.startswith(fallback.problems)], fallback.why
