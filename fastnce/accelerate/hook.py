"""Where the inspection gets its turn: after each imported module, and between the statements of a script."""

from __future__ import annotations

import ast
import importlib.machinery
import sys
import types
from collections.abc import Callable

INSPECT = "__fastnce_inspect__"
"""Name in the script's namespace. A call of it follows each definition of a class that may be replaced."""


class Hook:
    """Meta path finder that finds modules as usual and calls `executed` with each module after its execution."""

    def __init__(self, executed: Callable[[types.ModuleType], None]):
        self.executed = executed

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                break
        else:
            return None
        loader = spec.loader
        if isinstance(loader, (importlib.machinery.SourceFileLoader, importlib.machinery.SourcelessFileLoader)):
            execute = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                self.executed(module)

            # Patch the instance, which serves only this module: the loader's type and other methods stay unchanged.
            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def compiled(source: str | bytes, path: str) -> types.CodeType:
    """Compile a script. If it defines a class with a base, calls of the inspection are put between."""
    try:
        tree = ast.parse(source, path)
    except SyntaxError as error:
        raise error.with_traceback(None) from None  # Python shows no frame of a parser
    if not _with_calls(tree.body, after_all=True):
        return compile(source, path, "exec", dont_inherit=True)
    return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


def _with_calls(statements: list[ast.stmt], after_all: bool = False) -> bool:
    """Put a call of the inspection after each class with a base, also inside of if, try, with and loops.

    Args:
        statements: changed in place.
        after_all: call it after every statement that follows the first such class, too.

    Returns:
        whether there is such a class.
    """
    found, changed = False, []
    for statement in statements:
        here = isinstance(statement, ast.ClassDef) and bool(statement.bases)
        if not isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            parts = [statement, *getattr(statement, "handlers", []), *getattr(statement, "cases", [])]
            blocks = [getattr(part, name, []) for part in parts for name in ("body", "orelse", "finalbody")]
            here = sum(_with_calls(block) for block in blocks) > 0  # `any` would leave blocks unchanged
        found |= here
        changed.append(statement)
        if here or (found and after_all):
            changed.append(ast.copy_location(ast.Expr(ast.Call(ast.Name(INSPECT, ast.Load()), [], [])), statement))
    statements[:] = changed
    return found
