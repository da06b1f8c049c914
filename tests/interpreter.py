"""A faster interpreter for Triton's kernels: the same checks and results, with less bookkeeping.

The interpreter spends most of its time on the types of values, not on the values. What depends on a type alone is
computed once here. The names are private: where a version of Triton lacks one, the interpreter is left as it is.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import triton.language.core as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Change the interpreter of this process. A second call changes nothing."""
    if getattr(interpreter, "_fastnce_is_faster", False):
        return
    interpreter._fastnce_is_faster = True  # type: ignore[attr-defined]
    patch_once_a_launch()
    remember_types()
    skip_unread_overflow()


def patch_once_a_launch() -> None:
    """The interpreter patches the whole language again at every call of a device function: a third of its time.

    Within a launch, once for each module with such functions is enough.
    """
    patch, run = getattr(interpreter, "_patch_lang", None), interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            return patch(function)
        return None  # what a device function is given back it does not use

    def run_anew(self, *args, **options):
        patched.clear()
        return run(self, *args, **options)

    if patch is not None:
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run_anew


def skip_unread_overflow() -> None:
    """Every integer operation is also done in 64 bits for a check of its overflow, which only `debug` reads."""
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if options is not None and not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def remember_types() -> None:
    """Types and shapes are built anew for every value, and each shape is a tuple of constants with a type of its own."""
    plain = getattr(interpreter, "_get_np_dtype", None)
    if plain is not None:
        interpreter._get_np_dtype = _by_type(plain)
    tl.block_type.__init__ = _block_type(tl.block_type.__init__)  # type: ignore[method-assign]
    tl.tensor.__init__ = _tensor(tl.tensor.__init__)  # type: ignore[method-assign]


def _by_type(plain):
    known: dict[tuple[bool, str], np.dtype] = {}

    def np_dtype(kind):
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        key = (isinstance(element, tl.pointer_type), element.name)
        if key not in known:
            known[key] = plain(kind)
        return known[key]

    return np_dtype


def _block_type(plain):
    known: dict[tuple[int, ...], tuple[object, int, str]] = {}

    def init(self, element_ty, shape):
        key = tuple(s.value if isinstance(s, tl.constexpr) else s for s in shape)
        found = known.get(key)
        if found is None:
            plain(self, element_ty, shape)
            known[key] = self.shape, self.numel, self.name[1 : self.name.rindex(",")]
            return
        self.element_ty = element_ty
        self.shape, self.numel, sides = found
        self.name = f"<{sides}, {element_ty}>"

    return init


def _tensor(plain):
    known: dict[int, tuple[object, object, object]] = {}

    def init(self, handle, type):
        shape = type.shape if type.is_block() else ()
        found = known.get(id(shape))
        if found is None:
            plain(self, handle, type)
            known[id(shape)] = shape, self.shape, self.numel  # the shape is kept, so its id stays its own
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.shape, self.numel = found

    return init
