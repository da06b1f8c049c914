"""The operations that kernels use most, computed at once in NumPy: Triton's interpreter spends its time on their types.

Each function here takes the interpreter's own function and gives one that does the same faster. Operands that it does
not know (other types, block pointers, wrong shapes) go to the interpreter's own function. The names used here are
private to Triton: `interpreter.speed_up` leaves the interpreter as it is where they are not there.
"""

from __future__ import annotations

import numpy as np
import triton.language.core as tl
from triton.runtime import interpreter

TensorHandle, load_each = interpreter.TensorHandle, interpreter._interpreter.load

DTYPES = {
    tl.int1: np.dtype(bool),
    tl.int32: np.dtype(np.int32),
    tl.int64: np.dtype(np.int64),
    tl.uint32: np.dtype(np.uint32),
    tl.uint64: np.dtype(np.uint64),
    tl.float16: np.dtype(np.float16),
    tl.float32: np.dtype(np.float32),
    tl.float64: np.dtype(np.float64),
    tl.bfloat16: np.dtype(np.uint16),
}
BY_ID = {id(kind): dtype for kind, dtype in DTYPES.items()}
INTEGERS = {id(kind): (np.iinfo(DTYPES[kind]), kind) for kind in (tl.int32, tl.int64, tl.uint32, tl.uint64)}
SINGLE, BRAIN = tl.float32, tl.bfloat16
NORMAL = np.float32(2**-126)  # a smaller number is a float64 for Triton
EVERYTHING = slice(None)
PLAIN_CACHE = frozenset(("", ".ca", ".cg", ".cv"))
PLAIN_EVICTION = frozenset(("", "evict_last", "evict_first"))
WHOLE = {id(kind) for kind in (tl.int32, tl.int64)}
BITS = {id(kind) for kind in (tl.int1, tl.int32, tl.int64, tl.uint32, tl.uint64)}
ARITHMETIC = {id(kind) for kind in DTYPES if kind not in (tl.int1, BRAIN)}
REAL = {id(SINGLE)}
CONVERTED = {(a, b) for a in BITS | REAL for b in BITS | REAL if b != id(tl.int1)}  # by `astype`
CONVERTED |= {(id(SINGLE), id(tl.float16)), (id(tl.float16), id(SINGLE))}

_blocks: dict[tuple[str, tuple[int, ...]], tl.block_type] = {}
_numbers: dict[tuple[int, type, object], np.ndarray] = {}


def block_of(element, shape: tuple[int, ...]) -> tl.block_type:
    """The one block type of an element type and a shape. Every launch has pointer types of its own, of equal names."""
    key = element.name, shape
    found = _blocks.get(key)
    if found is None:
        found = _blocks[key] = tl.block_type(element, list(shape))
    return found


def handle_of(data: np.ndarray, kind) -> TensorHandle:
    """A handle whose sizes need no check."""
    handle = TensorHandle.__new__(TensorHandle)
    handle.data, handle.dtype, handle.attr = data, kind, {}
    return handle


def value_of(number, element) -> np.ndarray | None:
    """A number as an array of one element of a tensor's type: None if Triton would change the tensor's type."""
    if isinstance(number, tl.constexpr):
        number = number.value
    key = id(element), type(number), number
    if key in _numbers:
        return _numbers[key]
    if type(number) is int and id(element) in INTEGERS:
        limits = INTEGERS[id(element)][0]
        if not limits.min <= number <= limits.max:
            return None
    elif element is not SINGLE or type(number) not in (int, float):
        return None
    if type(number) is int and not -(2**63) <= number < 2**64:  # for Triton an error
        return None
    # -0.0 too is 0.0 for Triton
    value = _numbers[key] = np.array([number or 0], BY_ID[id(element)])
    return value


def operate(plain, calculate, kinds, swapped: bool = False, compares: bool = False):
    """`plain(a, b)` for tensors of one type, or of 32 and 64 bits, or a tensor and a number."""

    def fast(self, other):
        element = self.dtype
        if type(other) is tl.tensor:
            if other.dtype is not element:
                if id(element) not in WHOLE or id(other.dtype) not in WHOLE:
                    return plain(self, other)
                element = tl.int64
            values, block = other.handle.data, type(self.type) is tl.block_type or type(other.type) is tl.block_type
        else:
            values = None if compares and not _compares_alike(other, element) else value_of(other, element)
            if values is None:
                return plain(self, other)
            block = type(self.type) is tl.block_type
        if id(element) not in kinds:
            return plain(self, other)
        try:
            data = calculate(values, self.handle.data) if swapped else calculate(self.handle.data, values)
        except ValueError:  # Triton says what is wrong with the shapes
            return plain(self, other)
        result = tl.int1 if compares else element
        return tl.tensor(handle_of(data, element), block_of(result, data.shape) if block else result)

    return fast


def _compares_alike(number, element) -> bool:
    """A comparison makes a tensor of the number first."""
    if isinstance(number, tl.constexpr):
        number = number.value
    if type(number) is int:
        return -(2**31) <= number < 2**31 and id(element) in WHOLE
    return type(number) is float and (number == 0 or NORMAL <= abs(number) < 2.0**127)


def add(plain):
    """A sum, of a pointer and a number of elements too."""
    numbers = operate(plain, np.add, ARITHMETIC)

    def fast(self, other):
        pointer = self.dtype
        if not isinstance(pointer, tl.pointer_type):
            if type(other) is not tl.tensor or not isinstance(other.dtype, tl.pointer_type):
                return numbers(self, other)
            self, other, pointer = other, self, other.dtype
        if (
            type(other) is not tl.tensor
            or id(other.dtype) not in WHOLE
            or isinstance(pointer.element_ty, tl.block_type)
        ):
            return plain(self, other)
        bytes_each = max(1, pointer.element_ty.primitive_bitwidth // 8)
        try:
            data = self.handle.data + bytes_each * other.handle.data.astype(np.uint64)
        except ValueError:
            return plain(self, other)
        block = type(self.type) is tl.block_type or type(other.type) is tl.block_type
        return tl.tensor(handle_of(data, pointer), block_of(pointer, data.shape) if block else pointer)

    return fast


def whole_quotient(left, right):
    """As C rounds it: towards zero."""
    return (left - np.fmod(left, right)) // right


def select(plain):
    def fast(condition, x, y):
        if type(condition) is not tl.tensor or condition.dtype is not tl.int1:
            return plain(condition, x, y)
        given = [side for side in (x, y) if type(side) is tl.tensor]
        if not given or given[0].dtype is not given[-1].dtype or id(given[0].dtype) not in BY_ID:
            return plain(condition, x, y)
        element = given[0].dtype
        sides = [side.handle.data if type(side) is tl.tensor else value_of(side, element) for side in (x, y)]
        if sides[0] is None or sides[1] is None:
            return plain(condition, x, y)
        try:
            data = np.where(condition.handle.data, *sides)
        except ValueError:
            return plain(condition, x, y)
        block = any(type(each.type) is tl.block_type for each in (condition, *given))
        return tl.tensor(handle_of(data, element), block_of(element, data.shape) if block else element)

    return fast


def new_axes(plain):
    """`x[:, None]` and its like."""

    def fast(self, slices):
        keys = slices if type(slices) is tuple else (slices,)
        if type(self.type) is not tl.block_type or not all(
            key is None or (type(key) is slice and key == EVERYTHING) for key in keys
        ):
            return plain(self, slices)
        try:
            data = self.handle.data[keys]
        except IndexError:
            return plain(self, slices)
        return tl.tensor(handle_of(data, self.handle.dtype.scalar), block_of(self.dtype, data.shape))

    return fast


def brain_float(data: np.ndarray, widen: bool) -> np.ndarray | None:
    """bfloat16 from or to float32, as the interpreter does it (cut off). None where there are subnormal numbers."""
    bits = data if widen else data.view(np.uint32)
    exponents, rest = (np.uint16(0x7F80), np.uint16(0x7F)) if widen else (np.uint32(0x7F800000), np.uint32(0x7FFFFF))
    small = (bits & exponents) == 0
    if small.any() and (bits[small] & rest).any():
        return None
    if widen:
        return np.left_shift(bits, np.uint32(16), dtype=np.uint32, order="C").view(np.float32)
    return np.right_shift(bits, np.uint32(16), order="C").astype(np.uint16)


def convert(plain):
    """`cast(input, dtype)` and `tensor.to(dtype)`."""

    def fast(input, dtype, *rest, **named):
        dtype = dtype.value if isinstance(dtype, tl.constexpr) else dtype
        if rest or named or type(input) is not tl.tensor or id(dtype) not in BY_ID:
            return plain(input, dtype, *rest, **named)
        source, data = input.dtype, input.handle.data
        if source is dtype:
            return input
        if data.dtype is not BY_ID.get(id(source)):
            return plain(input, dtype)  # what a comparison gave
        if source is BRAIN and dtype is SINGLE:
            new = brain_float(data, widen=True)
        elif source is SINGLE and dtype is BRAIN:
            new = brain_float(data, widen=False)
        elif (id(source), id(dtype)) in CONVERTED:
            new = data.astype(BY_ID[id(dtype)])
        else:
            new = None
        if new is None:
            return plain(input, dtype)
        block = type(input.type) is tl.block_type
        return tl.tensor(handle_of(new, dtype), block_of(dtype, new.shape) if block else dtype)

    return fast


class Memory:
    """What `numpy.asarray` makes an array of: the memory from an address on."""

    def __init__(self, address: int, count: int, dtype: np.dtype) -> None:
        place = {"data": (address, True), "shape": (count,), "typestr": dtype.str, "version": 3}
        self.__array_interface__ = place


def gather(places: np.ndarray, mask: np.ndarray | None, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values at addresses, where a mask has True: NumPy's loop is faster for many of them."""
    if places.size < 512:
        mask = np.ones(places.shape, bool) if mask is None else mask
        return load_each(places, mask, np.broadcast_to(other, places.shape), dtype)
    read = places.ravel() if mask is None else places[mask]
    result = np.empty(places.shape, dtype)
    if mask is not None:
        result[...] = other
    if read.size:
        first = int(read.min())
        offsets = (read - np.uint64(first)).view(np.int64)
        if (offsets & (dtype.itemsize - 1)).any():
            mask = np.ones(places.shape, bool) if mask is None else mask
            return load_each(places, mask, np.broadcast_to(other, places.shape), dtype)
        offsets //= dtype.itemsize
        values = np.asarray(Memory(first, int(offsets.max()) + 1, dtype))[offsets]
        if mask is None:
            return values.reshape(places.shape)
        result[mask] = values
    return result


def load(plain):
    def fast(pointer, mask=None, other=None, **rest):
        kind = pointer.dtype if type(pointer) is tl.tensor else None
        if not isinstance(kind, tl.pointer_type) or id(kind.element_ty) not in BY_ID or kind.element_ty is tl.int1:
            return plain(pointer, mask, other, **rest)
        element, data, block = kind.element_ty, pointer.handle.data, type(pointer.type) is tl.block_type
        cached = rest.get("cache_modifier", "") in PLAIN_CACHE and rest.get("eviction_policy", "") in PLAIN_EVICTION
        known = cached and rest.keys() <= {"cache_modifier", "eviction_policy", "volatile"}
        absent = np.zeros(1, BY_ID[id(element)])
        if mask is not None:
            known = known and type(mask) is tl.tensor and mask.dtype is tl.int1 and mask.handle.data.dtype == bool
        if known and type(other) is tl.tensor:
            known, absent = mask is not None and other.dtype is element, other.handle.data
        elif known and other is not None:
            number = other.value if isinstance(other, tl.constexpr) else other
            absent = absent if number == 0 else value_of(number, element)
            known = mask is not None and absent is not None
        if not known:
            return plain(pointer, mask, other, **rest)
        sizes = [each for each in (mask, other) if type(each) is tl.tensor]
        if sizes:
            if not block and any(type(each.type) is tl.block_type for each in sizes):
                return plain(pointer, mask, other, **rest)
            try:
                shape = np.broadcast_shapes(data.shape, *(each.handle.data.shape for each in sizes))
            except ValueError:
                return plain(pointer, mask, other, **rest)
            data = np.broadcast_to(data, shape)
            absent = np.broadcast_to(absent, shape)
        valid = None if mask is None else np.broadcast_to(mask.handle.data, data.shape)
        result = gather(data, valid, absent, BY_ID[id(element)])
        return tl.tensor(handle_of(result, element), block_of(element, result.shape) if block else element)

    return fast


def full(plain):
    def fast(shape, value, dtype, **rest):
        if rest or type(shape) not in (tuple, list) or not shape or not all(type(side) is int for side in shape):
            return plain(shape, value, dtype, **rest)
        number = value.value if isinstance(value, tl.constexpr) else value
        if type(number) not in (int, float) or id(dtype) not in BY_ID:
            return plain(shape, value, dtype)
        data = np.zeros(1, BY_ID[id(dtype)]) if number == 0 else value_of(number, dtype)
        if data is None:
            return plain(shape, value, dtype)
        kind = block_of(dtype, tuple(shape))
        return tl.tensor(handle_of(np.full(tuple(shape), data, BY_ID[id(dtype)]), dtype), kind)

    return fast


METHODS = {
    "__add__": add,
    "__radd__": lambda plain: operate(plain, np.add, ARITHMETIC, swapped=True),
    "__sub__": lambda plain: operate(plain, np.subtract, ARITHMETIC),
    "__rsub__": lambda plain: operate(plain, np.subtract, ARITHMETIC, swapped=True),
    "__mul__": lambda plain: operate(plain, np.multiply, ARITHMETIC),
    "__rmul__": lambda plain: operate(plain, np.multiply, ARITHMETIC, swapped=True),
    "__truediv__": lambda plain: operate(plain, np.divide, REAL),
    "__rtruediv__": lambda plain: operate(plain, np.divide, REAL, swapped=True),
    "__floordiv__": lambda plain: operate(plain, whole_quotient, WHOLE),
    "__mod__": lambda plain: operate(plain, np.fmod, WHOLE),
    "__and__": lambda plain: operate(plain, np.bitwise_and, BITS),
    "__or__": lambda plain: operate(plain, np.bitwise_or, BITS),
    "__xor__": lambda plain: operate(plain, np.bitwise_xor, BITS),
    "__lt__": lambda plain: operate(plain, np.less, ARITHMETIC, compares=True),
    "__le__": lambda plain: operate(plain, np.less_equal, ARITHMETIC, compares=True),
    "__gt__": lambda plain: operate(plain, np.greater, ARITHMETIC, compares=True),
    "__ge__": lambda plain: operate(plain, np.greater_equal, ARITHMETIC, compares=True),
    "__eq__": lambda plain: operate(plain, np.equal, ARITHMETIC, compares=True),
    "__ne__": lambda plain: operate(plain, np.not_equal, ARITHMETIC, compares=True),
    "__getitem__": new_axes,
    "to": convert,
}
FUNCTIONS = {"load": load, "where": select, "cast": convert, "full": full}
