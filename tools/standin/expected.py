"""The cases that PyTorch cannot compile whole, and why.

They must fall back to parts, with the warning of the engine, and then be captured like any other. A case that is listed
here and does not fall back fails too, so that the list stays true.
"""

from __future__ import annotations

import fnmatch

FALLS_BACK = {
    "cut/*/whole": "Inductor 2.11 writes a foreach kernel that reads an argument which it does not have",
    "sincut/*/whole": "Dynamo 2.11 does not trace the second derivative of R1",
}
"""The reason by the pattern of cases."""

SIGNS = ("the compiler refused the whole step", "a warning: the step is compiled in parts, not whole: ")
"""How the problems begin that a case has if it falls back."""


def fallback(case: str) -> str:
    """Return why a case falls back to parts; empty if it must not."""
    return next((why for pattern, why in FALLS_BACK.items() if fnmatch.fnmatchcase(case, pattern)), "")


def without_fallback(case: str, problems: list[str]) -> tuple[list[str], str]:
    """Return the problems that are not expected, and why the case falls back (empty if it does not)."""
    why = fallback(case)
    if not why:
        return problems, ""
    signs = [[problem for problem in problems if problem.startswith(sign)] for sign in SIGNS]
    if not all(signs):
        return [*problems, f"listed in expected.py ({why}), but it did not fall back: remove it there"], ""
    return [problem for problem in problems if not problem.startswith(SIGNS)], why
