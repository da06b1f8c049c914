"""A user's own data set, named by `data.dataset`."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..common.imports import CodeError, first_line, load_object
from ..common.messages import shown

MEMBERS = ("steps_per_epoch", "batch", "samples", "digest")
"""The members that `fastnce.engine.contracts.DataSet` requires."""
MARGIN = 1e-3
"""How far values may lie outside [-1, 1]."""
SEE = "see fastnce.engine.contracts.DataSet"


class OwnData:
    """A user's data set. Every batch is checked on the host; values are read from the device for the first one only.

    All other attributes are those of the user's object.

    Args:
        data: the user's object.
        key: the option with its value, for messages.
        batch: images of each domain in a batch.
        channels: of an image.
        device: of the run.
        exchanged: the user's B is the run's A (`data.direction=BtoA`). Messages name the user's domains.

    Raises:
        CodeError: a member is missing, fails or returns a wrong value.
    """

    def __init__(
        self, data: Any, key: str, *, batch: int, channels: int, device: torch.device, exchanged: bool = False
    ) -> None:
        self._data, self._key, self._count, self._channels = data, key, batch, channels
        self._exchanged = exchanged
        self._device = torch.empty(0, device=device).device  # with its index
        missing = [name for name in MEMBERS if not _tried(key, name, partial(hasattr, data, name))]
        if missing:
            raise CodeError(f"{key} lacks {', '.join(missing)}: {SEE}")
        self.steps_per_epoch = _steps(key, _tried(key, "steps_per_epoch", lambda: data.steps_per_epoch))
        self._one_size = self._optional("one_size", "True or False", lambda value: isinstance(value, bool), True)
        for name in ("size_a", "size_b"):
            self._optional(name, "a whole number", lambda value: isinstance(value, int), 0)
        self._optional("skipped", "a list of (path, reason)", _pairs, ())
        self._digest = _tried(key, "digest()", lambda: data.digest())
        if not isinstance(self._digest, str):
            raise CodeError(f"{key}: digest() must return a text, not {shown(self._digest)}")
        call = "batch(0, decaying=False)"
        images = _tried(key, call, lambda: data.batch(0, decaying=False))
        self._check(images, call, batch)
        self._check_values(images, call)
        self._first_sizes = [one.shape[2:] for one in images]

    @property
    def first_sizes(self) -> tuple[torch.Size, torch.Size]:
        """(height, width) of the first batch's A and B."""
        return self._ordered(self._first_sizes)

    def _ordered(self, both: Any) -> Any:
        """Return what belongs to the user's A and B as that of the run's."""
        return (both[1], both[0]) if self._exchanged else both

    def __getattr__(self, name: str) -> Any:
        if name in ("size_a", "size_b") and object.__getattribute__(self, "_exchanged"):
            name = "size_b" if name == "size_a" else "size_a"
        return getattr(object.__getattribute__(self, "_data"), name)

    def digest(self) -> str:
        """Return the digest that the data set had when it was opened, and whether the domains are exchanged."""
        return f"{self._digest} BtoA" if self._exchanged else self._digest

    def batch(self, step: int, *, decaying: bool = False) -> tuple[Tensor, Tensor]:
        """Return the user's batch of one step.

        Raises:
            CodeError: its number of images, channels, dtype, device or size differs from the first batch's.
        """
        images = self._data.batch(step, decaying=decaying)
        self._check(images, step, self._count)
        if self._one_size and (sizes := [one.shape[2:] for one in images]) != self._first_sizes:
            first, now = (" and ".join(f"{width}x{height}" for height, width in s) for s in (self._first_sizes, sizes))
            raise CodeError(
                f"{self._key}: batch({step}) returns A and B of {now}, batch(0) of {first}: return images of one "
                f"size, or set one_size = False"
            )
        return self._ordered(images)

    def samples(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the user's sample images.

        Raises:
            CodeError: the call fails, or its result is not what the contract says.
        """
        call = f"samples({count})"
        images = _tried(self._key, call, lambda: self._data.samples(count))
        self._check(images, call, None)
        if len(images[0]) != len(images[1]):
            number = f"{len(images[0])} of A and {len(images[1])} of B"
            raise CodeError(f"{self._key}: {call} must return as many images of A as of B, not {number}")
        self._check_values(images, call)
        return self._ordered(images)

    def _optional(self, name: str, wanted: str, fits: Callable[[Any], bool], default: Any) -> Any:
        value = _tried(self._key, name, lambda: getattr(self._data, name, default))
        if not fits(value):
            raise CodeError(f"{self._key}: {name} must be {wanted}, not {shown(value)}")
        return value

    def _check(self, images: Any, call: str | int, count: int | None) -> None:
        """Refuse what is not two float32 tensors of the run's shape and device. This reads no values.

        Args:
            call: the call for messages; a number is the step of a batch.
            count: the number of images per domain; None accepts at least one.
        """
        if isinstance(images, tuple | list) and len(images) == 2:
            for one in images:
                if not (
                    isinstance(one, Tensor)
                    and one.dtype == torch.float32
                    and one.device == self._device
                    and one.dim() == 4
                    and one.shape[1] == self._channels
                    and (len(one) > 0 if count is None else len(one) == count)
                    and one.numel() > 0
                ):
                    break
            else:
                return
        call = call if isinstance(call, str) else f"batch({call})"
        number = "images" if count is None else count
        wanted = f"two float32 tensors ({number}, {self._channels}, height, width) on {self._device}"
        if not isinstance(images, tuple | list) or len(images) != 2:
            raise CodeError(f"{self._key}: {call} must return A and B, {wanted}, not {shown(images)}")
        found = ", ".join(f"{domain} is {shown(one)}" for domain, one in zip("AB", images, strict=True))
        raise CodeError(f"{self._key}: {call} must return {wanted}; {found}")

    def _check_values(self, images: tuple[Tensor, Tensor], call: str) -> None:
        for domain, one in zip("AB", images, strict=True):
            low, high = torch.stack(one.detach().aminmax()).tolist()
            if not math.isfinite(low) or not math.isfinite(high):
                raise CodeError(f"{self._key}: {call} must return finite numbers; {domain} has NaN or infinite ones")
            if low < -1 - MARGIN or high > 1 + MARGIN:
                raise CodeError(
                    f"{self._key}: {call} must return images in [-1, 1]; {domain} ranges from {low:g} to {high:g}"
                )


def open_own(
    name: str,
    options: Any,
    *,
    channels: int,
    batch: int,
    seed: int,
    rank: int,
    world: int,
    device: torch.device,
    exchanged: bool = False,
) -> OwnData:
    """Build `Name(options, channels=..., seed=..., rank=..., world=..., device=...)` and check its first batch.

    Args:
        name: import path of the class, such as mydata.py:MyData.
        options: the section `data` of the configuration.
        batch: images of each domain in a batch.
        exchanged: its B is the run's A.

    Raises:
        CodeError: a member is missing, fails or returns a wrong value.
    """
    key = f"data.dataset={name}"
    found = _find(name)
    call = f"{name.rpartition(':')[2]}(options, channels=, seed=, rank=, world=, device=)"
    data = _tried(
        key, call, lambda: found(options, channels=channels, seed=seed, rank=rank, world=world, device=device)
    )
    return OwnData(data, key, batch=batch, channels=channels, device=device, exchanged=exchanged)


def check_class(name: str) -> None:
    """Import the class of a data set and check the members that it shows, without building the data set.

    Raises:
        CodeError: it cannot be imported or called, or a member is missing or wrong.
    """
    key, found, absent = f"data.dataset={name}", _find(name), object()
    if not isinstance(found, type):  # a function that builds the data set
        return
    members = {member: inspect.getattr_static(found, member, absent) for member in MEMBERS}
    missing = [member for member, value in members.items() if value is absent and not _assigned(found, member)]
    if missing:
        raise CodeError(f"{key} lacks {', '.join(missing)}: {SEE}")
    for member, value in members.items():
        if value is absent or (hasattr(value, "__get__") and not isinstance(value, FunctionType)):
            continue  # only an instance shows its value, such as that of a property
        if member == "steps_per_epoch":
            _steps(key, value)
        elif not callable(value):
            raise CodeError(f"{key}: {member} must be a method, not {shown(value)}")


def _find(name: str) -> Any:
    found = load_object(name, "data.dataset")
    if not callable(found):
        raise CodeError(f"data.dataset={name} must be a class, not {shown(found)}: {SEE}")
    return found


def _assigned(found: type, member: str) -> bool:
    """Return whether an instance may have a member that its class lacks: a method names it, or `__getattr__` exists."""
    functions = [f for base in found.__mro__ for f in vars(base).values() if isinstance(f, FunctionType)]
    named = any(member in f.__code__.co_names or member in f.__code__.co_consts for f in functions)
    return named or hasattr(found, "__getattr__")


def _steps(key: str, value: Any) -> int:
    try:
        steps = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        steps = 0
    if steps < 1:
        raise CodeError(f"{key}: steps_per_epoch must be a whole number of at least 1, not {shown(value)}")
    return steps


def _pairs(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(one, tuple | list) and len(one) == 2 for one in value)


def _tried(key: str, call: str, function: Callable[[], Any]) -> Any:
    """Return what a user's function returns. Its errors become a CodeError that names the call."""
    try:
        return function()
    except (MemoryError, torch.OutOfMemoryError):  # `fastnce train` says how to need less
        raise
    except CodeError:
        raise
    except Exception as error:
        raise CodeError(f"{key}: {call} fails: {first_line(error)}") from error
