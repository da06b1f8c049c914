"""Run a user's class so that nothing is left behind, with options that know what they were asked for."""

from __future__ import annotations

import contextlib
import ctypes
import io
import random
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SECONDS = 10.0
"""A trial that lasts longer is ended. A usual one takes a few hundredths of a second."""

OPTIONS = ("nce_T", "batch_size", "nce_includes_all_negatives_from_minibatch")


class Late(BaseException):
    """A trial lasts too long. Code that catches every Exception does not catch this."""


class Lacking(AttributeError):
    """A class reads an option that the published losses do not have."""


class Options:
    """An options object as CUT's parser makes it, which remembers what it lacks and was asked for.

    A class that asks for any other option, also by `getattr` with a default or by `vars`, may compute something else
    when a user sets that option.
    """

    def __init__(self, nce_T: float, batch_size: int, every: bool, **more: Any):
        given = dict(zip(OPTIONS, (nce_T, batch_size, every), strict=True)) | {"gpu_ids": [], **more}
        object.__setattr__(self, "_given", given)
        object.__setattr__(self, "_asked", set())

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Options
        given = object.__getattribute__(self, "_given")
        if name in given:
            return given[name]
        object.__getattribute__(self, "_asked").add(name)
        raise Lacking(f"the options have no {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__getattribute__(self, "_asked").add(name)
        object.__getattribute__(self, "_given")[name] = value


def asked(options: Options) -> set[str]:
    """Return the options that a class asked for, or set, beyond the known ones."""
    return object.__getattribute__(options, "_asked")


def become(options: Options, other: Mapping[str, Any]) -> None:
    """Change the values of options without a record of it."""
    object.__getattribute__(options, "_given").update(other)


class _OnTheCPU(TorchFunctionMode):
    """Keeps tensors on the CPU that the code would put on a device: the trial takes no memory of a GPU."""

    MOVES = frozenset({Tensor.cuda, Tensor.xpu})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.MOVES:
            return args[0]
        kwargs = {name: _on_the_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_the_cpu, args), **kwargs)


def _on_the_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type != "cpu":
        return torch.device("cpu")
    if isinstance(value, str) and value.partition(":")[0] in ("cuda", "xpu", "mps"):
        return "cpu"
    return value


@contextlib.contextmanager
def isolated(seconds: float = SECONDS) -> Iterator[None]:
    """Run a trial on the CPU, in silence and for a limited time; then restore all random states.

    Raises:
        ValueError: the trial was too long, or it ended the process.
    """
    states, dtype = (random.getstate(), np.random.get_state()), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(torch.device("cpu"))
            stack.enter_context(_OnTheCPU())
            stack.enter_context(_limited(seconds))
            yield
    except Late:
        raise ValueError(f"its trial took more than {seconds:g} seconds") from None
    except SystemExit:
        raise ValueError("its trial ended the process") from None
    finally:
        torch.set_default_dtype(dtype)
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise Late in this thread, between two steps of Python, once the seconds have passed.

    A signal would do in the main thread only, and would take the user's alarm.
    """
    thread, over, sending = ctypes.c_ulong(threading.get_ident()), threading.Event(), threading.Lock()
    sent = False

    def watch() -> None:
        nonlocal sent
        wait = seconds
        while not over.wait(wait):
            with sending:
                if not over.is_set():
                    sent = True
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Late))
            wait = 0.1  # again, if the code catches even this

    def close() -> None:
        with sending:
            over.set()
        if sent:
            for _ in range(1000):  # what is on its way arrives here
                pass

    threading.Thread(target=watch, name="fastnce-trial", daemon=True).start()
    try:
        yield
    finally:
        try:
            close()
        except Late:
            close()
            raise


def state_of(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds, in a form that can be compared: a changed attribute, buffer or parameter differs."""
    found: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                found[f"{prefix}.{name}"] = _values(value)
            elif isinstance(value, Options):
                found[f"{prefix}.{name}"] = id(value)
            elif name not in ("_modules", "_parameters", "_buffers", "training"):
                found[f"{prefix}.{name}"] = _shown(value)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        found[name] = _values(tensor)
    return found


def _values(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tuple(tensor.detach().flatten().tolist())


def _shown(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_shown(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _shown(part) for key, part in value.items()}
    if isinstance(value, Tensor):
        return _values(value)
    if isinstance(value, Options) or type(value).__repr__ is object.__repr__:
        return id(value)
    return repr(value)
