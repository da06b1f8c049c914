"""Makes the package `fastnce.evaluate` callable: `fastnce.evaluate(model, data)` is `fastnce.api.evaluate`.

The package and the function have one name. Python allows a module to have a class of its own for this.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class EvaluatePackage(ModuleType):
    """The package `fastnce.evaluate`, which can be called."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """See `fastnce.api.evaluate`."""
        return importlib.import_module("fastnce.api").evaluate(*arguments, **options)
