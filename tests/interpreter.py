"""A faster interpreter for Triton's kernels: the same results, with less bookkeeping.

The interpreter spends most of its time on the types of values, not on the values. The names used here are private:
where a version of Triton lacks one, its interpreter is left as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import triton.language as language
import triton.language.core as tl
from triton.language import random
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

CHANGES: dict[tuple[bool, bool], list[tuple[object, str, object]]] = {}
"""What a launch patches, for functions that see `triton.language.core`, `triton.language` or both."""


def speed_up() -> None:
    """Change the interpreter of this process. A second call changes nothing."""
    if getattr(interpreter, "_fastnce_is_faster", False):
        return
    interpreter._fastnce_is_faster = True  # type: ignore[attr-defined]
    changes = [patch_once_a_launch, skip_unread_overflow, operate_on_equal_types_at_once, draw_at_once, remember_types]
    if not interpreter.interpreter_builder.options.debug:
        changes.append(call_at_once)
    for change in changes:
        with contextlib.suppress(AttributeError):
            change()


def patch_once_a_launch() -> None:
    """The interpreter inspects and patches the whole language again at every call of a device function.

    Within a launch, once for each module with such functions is enough; and what to patch is found out once.
    """
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()
    found = CHANGES

    def patch_once(function):
        names = function.__globals__
        if id(names) in patched:
            return None  # what a device function is given back it does not use
        patched.add(id(names))
        key = any(value is tl for value in names.values()), any(value is language for value in names.values())
        if key not in found:
            known = [change for changes in found.values() for change in changes]
            scope = patch(function)
            changed = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
            # Triton passes over what is patched now, within another function's launch. A later launch has to patch it.
            owners = {id(tl.tensor), id(tl.tensor_descriptor_base)}
            owners |= {id(owner) for here, owner in zip(key, (tl, language), strict=True) if here}
            owners |= {id(language.math)} if key[1] else set()
            there = {(id(owner), name) for owner, name, _ in changed}
            found[key] = changed + [c for c in known if id(c[0]) in owners and (id(c[0]), c[1]) not in there]
            return scope
        scope = interpreter._LangPatchScope()
        for owner, name, new in found[key]:
            if owner.__dict__.get(name) is not new:
                scope.set_attr(owner, name, new)
        return scope

    def run_anew(self, *args, **options):
        patched.clear()
        return run(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run_anew


def call_at_once() -> None:
    """Between a kernel and a function of the language stand two others. The most used go to NumPy."""
    from tests import operators

    own = tl.load.__code__  # what `triton.language.core.builtin` puts around each function

    def patch(owner, name, member, builder, scope):
        member = member.__wrapped__ if getattr(member, "__code__", None) is own else member

        def call(*args, **options):
            options["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **options)

        faster = (operators.METHODS if owner is tl.tensor else operators.FUNCTIONS).get(name)
        scope.set_attr(owner, name, faster(call) if faster else call)

    interpreter._patch_attr = patch


def skip_unread_overflow() -> None:
    """Every integer operation is also done in 64 bits for a check of its overflow, which only `debug` reads."""
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def operate_on_equal_types_at_once() -> None:
    """Operands of one type and shape need no promotion and no broadcast."""
    plain = TritonSemantic.binary_op_type_checking_impl

    def check(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        alike = (
            isinstance(lhs, tl.tensor)
            and isinstance(rhs, tl.tensor)
            and lhs.dtype is rhs.dtype
            and lhs.shape is rhs.shape
            and not div_or_mod
            and not isinstance(lhs.dtype, tl.pointer_type)
        )
        return (
            (lhs, rhs) if alike else plain(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
        )

    TritonSemantic.binary_op_type_checking_impl = check


def draw_at_once() -> None:
    """Philox (Salmon et al., 2011) in NumPy: in Triton, each of its 120 operations passes through the interpreter."""
    plain = random.philox_impl
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    key_a, key_b, round_a, round_b = (np.uint64(x) for x in (0x9E3779B9, 0xBB67AE85, 0xD2511F53, 0xCD9E8D57))

    def philox(c0, c1, c2, c3, k0, k1, n_rounds=random.N_ROUNDS_DEFAULT):
        given = (c0, c1, c2, c3, k0, k1)
        if c0.dtype != tl.uint32:
            return plain(*given, n_rounds)
        s0, s1, s2, s3, key0, key1 = np.broadcast_arrays(*(x.handle.data.astype(np.uint64) for x in given))
        for _ in range(getattr(n_rounds, "value", n_rounds)):
            a, b = round_a * s0, round_b * s2
            s0, s1, s2, s3 = (b >> half) ^ s1 ^ key0, b & low, (a >> half) ^ s3 ^ key1, a & low
            key0, key1 = (key0 + key_a) & low, (key1 + key_b) & low
        kind = next((x.type for x in given if x.type.is_block()), c0.type)
        kind = tl.block_type(tl.uint32, kind.shape) if kind.is_block() else tl.uint32
        return tuple(
            tl.tensor(interpreter.TensorHandle(s.astype(np.uint32), tl.uint32), kind) for s in (s0, s1, s2, s3)
        )

    random.philox_impl = philox


def remember_types() -> None:
    """Types and shapes are built anew for every value, and each shape is a tuple of constants with types of its own."""
    interpreter._get_np_dtype = _by_type(interpreter._get_np_dtype)
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
