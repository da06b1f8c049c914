"""Check kernels at their first use on a device, and use plain PyTorch instead of a kernel that is wrong there.

    choice = choose(implementation, device, dtype)
    if choice is KERNELS:
        choice = trusted(use, device, dtype)

A `Use` describes a call. At the first call of its kind, its kernels run on made-up data of about the same shapes and
are compared with exact results. A wrong number, a failed build or a failed launch means plain PyTorch for this family
of kernels and this dtype from then on, and one warning. Later calls cost one look-up. Verdicts are kept for later
processes (see the module `verdicts`).

Nothing is checked while a CUDA graph is recorded, while a compiler or a transform traces, within a backward pass, or if
FASTNCE_CHECK_KERNELS=0 is set: a kernel that is not known is then used as it is.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from . import dispatch, verdicts
from .agreement import Check, KernelFailed, wait
from .dispatch import KERNELS, Choice


class Use(Protocol):
    """How a call uses a family of kernels."""

    @property
    def family(self) -> str:
        """The kernels that a verdict is about, as a user knows them: "patch_nce"."""

    def form(self) -> Hashable:
        """What decides which kernels are compiled, such as the padded width. Calls of one form are checked once."""

    def measure(self, device: torch.device, dtype: torch.dtype) -> Iterable[Check]:
        """Run the kernels on data of about these shapes and compare them with exact results.

        Raises:
            KernelFailed: see `agreement.run_kernels`.
        """


T = TypeVar("T")

NOT_CHECKED = Choice("triton", "the kernels support this device, dtype and size; they have not been checked here")

Key = tuple[str, Hashable, torch.device, torch.dtype]

_settled: dict[Key, Choice] = {}
_wrong: dict[tuple[str, str, int | None, torch.dtype], Choice] = {}
"""By family, device and dtype."""
_assumed: set[Key] = set()
"""Settled without a check; forgotten when checks are switched."""
_loaded: dict[tuple[str, int | None], tuple[str, dict[str, str]]] = {}
"""The place of each device and its verdicts in the file."""
_lock = threading.RLock()
_epoch = 0
_switched_on = True


def trusted(use: Use, device: torch.device, dtype: torch.dtype) -> Choice:
    """Return the choice for a call whose kernels can run on its device: the kernels, unless they are wrong there.

    The first call of a form checks its kernels, which takes up to two seconds beside compilation.
    """
    if torch.compiler.is_compiling():
        return followed(use.family, device, dtype)
    found = _settled.get((use.family, use.form(), device, dtype))
    return _first(use, device, dtype) if found is None else found


def followed(family: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Return the choice that the known verdicts lead to, without a check. It can be traced."""
    reason = _reason_not_to(family, device.type, device.index, dtype)
    return NOT_CHECKED if not reason else Choice("eager", reason)


def settled(choice: Choice) -> bool:
    """Whether a choice stays as it is until `epoch` changes, so that it may be kept.

    It is then a function of the family, form, device and dtype alone.
    """
    return choice is not NOT_CHECKED


def epoch() -> int:
    """Return a number that changes whenever a settled choice may have changed."""
    return _epoch


def _reason_not_to(family: str, kind: str, index: int | None, dtype: torch.dtype) -> str:
    """Return why kernels are known to be wrong, or ""."""
    found = _wrong.get((family, kind, index, dtype))
    if found is not None:
        return found.reason
    if (kind, index) in _loaded or not _enabled():
        return ""
    try:
        with _lock:
            if index is None and kind != "cpu":
                return _reason_not_to(family, kind, torch.accelerator.current_device_index(), dtype)
            _load(torch.device(kind, index) if index is not None else torch.device(kind))
            return _reason_not_to(family, kind, index, dtype)
    except Warning:  # made an error by the caller
        raise
    except Exception:  # the device may be one that is not here
        return ""


# A compiler calls the function as it is and keeps its result. (The decorator of this attribute imports the compiler.)
_reason_not_to._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _enabled() -> bool:
    return _switched_on and os.environ.get("FASTNCE_CHECK_KERNELS", "1") != "0"


@contextmanager
def checks(on: bool) -> Iterator[None]:
    """Within: kernels are checked at their first use, or not, in all threads."""
    global _switched_on
    before = _switched_on
    _switch(on and before)
    try:
        yield
    finally:
        _switch(before)


def _switch(on: bool) -> None:
    global _switched_on
    if on != _switched_on:
        _switched_on = on
        with _lock:
            for key in _assumed:
                _settled.pop(key, None)
            _assumed.clear()
            _changed()


def forget() -> None:
    """Forget all verdicts of this process; those in the file stay."""
    with _lock:
        for known in (_settled, _wrong, _assumed, _loaded):
            known.clear()
        _changed()


def _changed() -> None:
    global _epoch
    _epoch += 1


def _first(use: Use, device: torch.device, dtype: torch.dtype) -> Choice:
    """`trusted` for a form that is not settled."""
    key: Key = (use.family, use.form(), device, dtype)
    wrong_here = (use.family, device.type, device.index, dtype)
    if not _enabled():
        return _settle(key, _wrong.get(wrong_here, KERNELS), assumed=True)
    busy = is_busy(device)
    if not _lock.acquire(blocking=not busy):  # a check in another thread may need this backward pass to end
        return NOT_CHECKED
    try:
        if (found := _settled.get(key)) is not None:  # another thread has checked it
            return found
        known = _load(device)
        if (wrong := _wrong.get(wrong_here)) is not None:
            return _settle(key, wrong)
        name = _name(use, device, dtype)
        if known.get(name) == "":
            return _settle(key, KERNELS)
        if busy:
            return NOT_CHECKED
        with warnings.catch_warnings(record=True) as caught:  # a warning that the caller made an error is no fault
            warnings.simplefilter("always")
            reason = in_own_thread(lambda: find_fault(use, device, dtype))
        if reason is None:
            return _settle(key, KERNELS, assumed=True)
        verdicts.remember(_loaded[device.type, device.index][0], name, reason)
        known[name] = reason
        for warning in caught:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if not reason:
            return _settle(key, KERNELS)
        return _settle(key, _distrust(use.family, device, dtype, reason))
    finally:
        _lock.release()


def _settle(key: Key, choice: Choice, *, assumed: bool = False) -> Choice:
    with _lock:
        _settled[key] = choice
        if assumed:
            _assumed.add(key)
    return choice


def _distrust(family: str, device: torch.device, dtype: torch.dtype, reason: str) -> Choice:
    """Use plain PyTorch for all forms of a family from now on, and warn once."""
    choice = Choice("eager", f"the kernels are wrong on this device: {reason}")
    _wrong[family, device.type, device.index, dtype] = choice
    for key in list(_settled):
        if (key[0], *key[2:]) == (family, device, dtype):
            _settled[key] = choice
    _changed()
    warnings.warn(
        f"the kernels of {family} in {str(dtype).removeprefix('torch.')} are wrong on {device} ({reason}), so plain "
        f"PyTorch is used in their place. Please report this with the output of `fastnce doctor`.",
        stacklevel=2,
    )
    return choice


def _load(device: torch.device) -> dict[str, str]:
    """Return the verdicts of a device in the file. Wrong kernels become known, with their warnings."""
    spot = device.type, device.index
    if spot not in _loaded:
        place = verdicts.place_of(device)
        _loaded[spot] = place, verdicts.read(place)
        for name, reason in _loaded[spot][1].items():
            family, dtype = _parsed(name)
            if reason and dtype is not None and (family, *spot, dtype) not in _wrong:
                _distrust(family, device, dtype, reason)
    return _loaded[spot][1]


def _name(use: Use, device: torch.device, dtype: torch.dtype) -> str:
    """Name a form in the file: "patch_nce bfloat16 (256, True)". TF32 is another form of float32."""
    allowed = ""
    if dtype == torch.float32 and device.type == "cuda":
        libraries = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
        allowed = " ".join(library.fp32_precision for library in libraries)
    return f"{use.family} {str(dtype).removeprefix('torch.')} {allowed}{use.form()}"


def _parsed(name: str) -> tuple[str, torch.dtype | None]:
    family, _, rest = name.partition(" ")
    dtype = getattr(torch, rest.partition(" ")[0], None)
    return family, dtype if isinstance(dtype, torch.dtype) else None


def may_check(device: torch.device) -> bool:
    """Whether kernels on this device are checked at their first use."""
    return _enabled() and dispatch.is_default(device) and dispatch.obstacle(device, torch.float32) is None


def is_busy(device: torch.device) -> bool:
    """Whether nothing may be launched or waited for now: a recording, a trace, a transform or a backward pass.

    A check within a backward pass would need the thread that computes it.
    """
    if device.type == "cuda" and is_capturing(device):
        return True
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0  # FakeTensorMode among them
        or torch._C._are_functorch_transforms_active()
        or torch._C._current_graph_task_id() != -1
    )


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is being recorded in a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


def in_own_thread(function: Callable[[], T]) -> T:
    """Call a function in a new thread, which has none of the caller's modes: grad, autocast, streams, hooks."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="fastnce check", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def find_fault(use: Use, device: torch.device, dtype: torch.dtype) -> str | None:
    """Measure a use; return "" if it is right, what is wrong, or None if it could not be measured.

    It cannot be measured if the device has failed before, has no memory left, or cannot compute the exact result.
    """
    try:
        wait(device)  # an error of earlier work is not the kernels' fault
        for check in use.measure(device, dtype):
            if not check.ok:
                return f"{check.name} has an error of {check.error:.1e}, the limit is {check.gate:.0e}"
    except KernelFailed as error:
        return str(error)[:300]
    except Exception:
        return None
    return ""


def report(device: torch.device, families: Iterable[str]) -> Iterator[str]:
    """Yield one line per family: the verdicts of this device in the file."""
    found = verdicts.read(verdicts.place_of(device))
    for family in families:
        states: dict[str, str] = {}
        for name, reason in found.items():
            of, dtype = _parsed(name)
            if of == family and dtype is not None:
                short = str(dtype).removeprefix("torch.")
                states[short] = reason or states.get(short, "")
        words = [f"{name} {'WRONG (' + reason + ')' if reason else 'right'}" for name, reason in states.items()]
        yield f"{family}: {', '.join(words) or 'not checked yet'}"
