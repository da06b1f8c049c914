"""Find the shapes that a network returns, without memory for its maps.

Our own networks compute on meta tensors. A user's network computes on fake tensors, which have no values either but
say that they are on the CPU. A constant that it makes on the way, and may keep for later calls, is then a real tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

_FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # never entered: tensors made by a user's code stay real


class ReadsValue(ValueError):
    """A network reads a value of a tensor that has none."""


def is_own(network: nn.Module) -> bool:
    """Whether a module, or one inside of it, is of a user's class."""
    return any(type(module).__module__.partition(".")[0] not in ("fastnce", "torch") for module in network.modules())


def was_traced(value: Any) -> bool:
    """Whether a tensor comes from tracing, so that a user's code must have kept one."""
    return isinstance(value, FakeTensor)


KEPT = (
    "computes with a tensor that your code kept from the check of its shapes: keep tensors that are made from an input "
    "on the module, not in a variable of the file or the class"
)


def empty_images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, own: bool) -> Tensor:
    """Return images without memory: fake tensors for a user's code, meta tensors for ours."""
    return _emptied(torch.empty(shape, dtype=dtype, device="meta"), own)


@contextmanager
def without_memory(network: nn.Module) -> Iterator[None]:
    """Within: fake or meta tensors are in place of the parameters and buffers of a network.

    It is not copied: its attributes may refuse that, and its hooks may refer to it. What these change stays changed.
    """
    own = is_own(network)
    places = [
        (kept, key, tensor)
        for module in network.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # its tensors cannot be replaced, and are accepted
        for kept in (module._parameters, module._buffers)
        for key, tensor in kept.items()
        if tensor is not None
    ]
    empty = {id(tensor): _emptied(tensor, own) for _, _, tensor in places}
    try:
        for kept, key, tensor in places:
            kept[key] = empty[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for kept, key, tensor in places:
            kept[key] = tensor  # type: ignore[assignment]


def _emptied(tensor: Tensor, own: bool) -> Tensor:
    empty = tensor.detach().to("meta")
    if own:
        empty = FakeTensor(_FAKE, empty, torch.device("cpu"))
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def trace_shapes(network: nn.Module, images: int, channels: int, height: int, width: int, **arguments: Any) -> Any:
    """Return the output of `network` for images of this size, as tensors without memory.

    Raises:
        ReadsValue: the network reads a value, which these tensors lack. Its other errors are raised as they are.
    """
    own, dtype = is_own(network), next((p.dtype for p in network.parameters()), torch.float32)
    inputs = empty_images((images, channels, height, width), dtype, own=own)
    with torch.no_grad(), torch.device("cpu" if own else "meta"), without_memory(network):
        if not own:
            return network(inputs, **arguments)
        with _data_pointers_refused():
            try:
                return network(inputs, **arguments)
            except (RuntimeError, UserWarning) as error:
                reads = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
                if reads or ".numpy()" in str(error) or POINTER in str(error):
                    what = "such as by .item(), .numpy(), assert, if tensor: or a boolean index"
                    raise ReadsValue(f"it reads a value of a tensor, {what}") from error
                raise


POINTER = "Accessing the data pointer of FakeTensor"


@contextmanager
def _data_pointers_refused() -> Iterator[None]:
    """Within: to read the address of a fake tensor is an error. PyTorch warns once, and C code would then crash."""
    always = torch.is_warn_always_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real run gives the user's other warnings
        warnings.filterwarnings("error", POINTER)
        torch.set_warn_always(True)
        try:
            yield
        finally:
            torch.set_warn_always(always)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within: new tensors are on the CPU if the default device is meta, and PyTorch's random numbers do not advance.

    For a user's constructors, which may read the values of what they make, while a method is planned.
    """
    if torch.get_default_device().type != "meta":
        yield
        return
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        yield
