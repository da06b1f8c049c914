"""What kernels are compiled for: forms do not depend on the sizes of images, and keep what makes loads wide."""

from __future__ import annotations

import pytest
import torch
from fastnce.kernels import (
    blur,
    common,
    few_outputs,
    few_outputs_backward,
    instance_norm,
    norm_whole,
    project,
    reflect_pad,
)
from fastnce.kernels.planes import as_map
from fastnce.kernels.specialise import ANY, BEYOND_32_BITS, Address, specialised

MODULES = (blur, few_outputs, few_outputs_backward, instance_norm, norm_whole, project, reflect_pad)


def plain(value):
    """A stand-in as a value that can be compared."""
    if isinstance(value, Address):
        return value.dtype, value.data_ptr()
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


@pytest.fixture
def forms(monkeypatch) -> dict[str, set]:
    """The forms of each kernel that is launched on tensors without memory, as if on an H100."""
    found: dict[str, set] = {}

    def kept(kernel, blocks, like, *args, **options):
        stand_ins = tuple(map(plain, specialised(kernel, args, lambda tensor: True)))
        found.setdefault(kernel.fn.__name__, set()).add((stand_ins, *sorted(options.items())))

    for module in MODULES:
        monkeypatch.setattr(module, "launch", kept)
        monkeypatch.setattr(module, "architecture", lambda device: "sm_90", raising=False)
    return found


def a_map(channels: int, height: int, width: int, channels_last: bool, images: int = 1) -> torch.Tensor:
    x = torch.empty(images, channels, height, width, dtype=torch.bfloat16, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


SIZES = [(h, w) for h in (64, 65, 70, 96, 128, 250, 256) for w in (64, 66, 81, 112, 256, 301)]


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [3, 64])
def test_sizes_of_images_do_not_multiply_the_forms(forms, channels, channels_last, images):
    """With channels-last there is one form for all sizes; along the pixels, one more for multiples of 16."""
    for height, width in SIZES:
        x = a_map(channels, height, width, channels_last, images)
        blur.blur_up(x, 2 * height, 2 * width)
        reflect_pad.reflect_pad(x, height + 6, width + 6)
        reflect_pad.reflect_pad_backward(x, height - 2, width - 2)
        blur.blur_down(x, (height + 1) // 2, (width + 1) // 2)
    most = {"blur_kernel": 2, "reflect_pad_kernel": 1, "reflect_pad_backward_kernel": 1}  # blurs up and down
    for kernel, found in forms.items():
        each = 1 if channels_last and channels == 64 else 4  # two maps, each with or without multiples of 16
        assert len(found) <= most[kernel] * each, kernel


def test_forms_of_a_norm(forms):
    """A norm has forms for one or several tiles in a part, and for few or many parts; whole planes for their size."""
    for height, width in SIZES:
        x = a_map(64, height, width, True)
        instance_norm.instance_norm(x, None, 1e-5, 0.0, 1)
    assert len(forms["normalise_kernel"]) <= 4
    assert len(forms["moments_kernel"]) <= 2
    assert all(len(found) <= 8 for found in forms.values())


def test_forms_of_the_last_convolution(forms):
    weight = torch.empty(3, 64, 7, 7, device="meta")
    for height, width in SIZES:
        x = a_map(64, height, width, True)
        gradient = torch.empty(1, 3, height - 6, width - 6, device="meta")
        few_outputs.few_outputs(x, weight, torch.empty(3, device="meta"), 0)
        few_outputs_backward.few_outputs_backward(gradient, x, weight, 0, True, True, True)
    assert len(forms["few_outputs_kernel"]) <= 2  # the output is float32 and has its own strides
    assert all(len(found) <= 4 for found in forms.values())


def test_forms_of_the_projection(forms):
    for height, width in SIZES:
        maps = [a_map(3, height, width, True), a_map(128, height // 2, width // 2, True)]
        ids = [torch.empty(1, 256, dtype=torch.int64, device="meta") for _ in maps]
        project.project(maps, ids, [], torch.bfloat16, 2)
    assert len(forms["project_kernel"]) <= 2  # three channels: rows may be multiples of 16


def test_wide_loads_keep_their_promises():
    """Strides of 1 and of multiples of 16 are promised, and aligned addresses."""
    x = a_map(64, 65, 66, True)
    (found,) = specialised(_Kernel("x"), [as_map(x)], lambda tensor: True)
    assert (found.channel, found.x, found.y, found.image) == (1, 16, 16, 16)
    assert found.data.data_ptr() == 0
    (found,) = specialised(_Kernel("x"), [as_map(a_map(3, 64, 64, True))], lambda tensor: False)
    assert (found.channel, found.x, found.y) == (1, ANY, ANY)  # together: pixels of three channels are not aligned
    assert found.data.data_ptr() % 16


def test_numbers_beyond_32_bits_stay_wide():
    found = specialised(_Kernel("pixels", "row", "rows"), [2**33, 2**31 + 1, 5], lambda tensor: True)
    assert found == [BEYOND_32_BITS + ANY, BEYOND_32_BITS + ANY, ANY]


class _Kernel:
    def __init__(self, *names: str):
        self.arg_names = names


def test_only_named_arguments_lose_their_promise():
    found = specialised(_Kernel("channels", "dim", "width", "tiles"), [64, 1, 64, 1], lambda tensor: True)
    assert found == [16, 1, ANY, 1]
    assert specialised(_Kernel("eps", "flag"), [1e-5, True], lambda tensor: True) == [1e-5, True]
    assert common.INTERPRET.value is not None
