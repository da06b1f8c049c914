"""Find the shapes that a network returns, without memory for its maps.

Our own networks compute on meta tensors. A user's network computes on fake tensors, which have no values either but
say that they are on the CPU. A constant that it makes on the way, and may keep for later calls, is then a real tensor.
"""

from __future__ import annotations

import copy
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


def is_own(network: nn.Module) -> bool:
    """Whether a module, or one inside of it, is of a user's class."""
    return any(type(module).__module__.partition(".")[0] not in ("fastnce", "torch") for module in network.modules())


def empty_images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, own: bool) -> Tensor:
    """Return images without memory: fake tensors for a user's code, meta tensors for ours."""
    images = torch.empty(shape, dtype=dtype, device="meta")
    return FakeTensor(_FAKE, images, torch.device("cpu")) if own else images


def without_memory(network: nn.Module) -> nn.Module:
    """Return a copy of the modules with fake or meta tensors in place of parameters and buffers.

    A network of ours that is on the meta device is returned itself.
    """
    own, tensors = is_own(network), [*network.parameters(), *network.buffers()]
    if not own and all(tensor.is_meta for tensor in tensors):
        return network
    with warnings.catch_warnings():
        # a hook may have kept a fake tensor of an earlier trace in the network
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        return copy.deepcopy(network, {id(tensor): _emptied(tensor, own) for tensor in tensors})


def _emptied(tensor: Tensor, own: bool) -> Tensor:
    empty = tensor.detach().to("meta")
    if own:
        empty = FakeTensor(_FAKE, empty, torch.device("cpu"))
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def trace_shapes(network: nn.Module, images: int, channels: int, height: int, width: int, **arguments: Any) -> Any:
    """Return the output of `network` for images of this size, as tensors without memory.

    Raises:
        ValueError: the network reads a value, which these tensors lack. Its other errors are raised as they are.
    """
    own, dtype = is_own(network), next((p.dtype for p in network.parameters()), torch.float32)
    inputs = empty_images((images, channels, height, width), dtype, own=own)
    with torch.no_grad(), torch.device("cpu" if own else "meta"):
        try:
            return without_memory(network)(inputs, **arguments)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                "it reads a value of a tensor, such as by .item(), if tensor: or a boolean index"
            ) from error


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
