"""The interpreter that the tests make faster draws what Triton's own draws."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from fastnce.kernels import common

pytestmark = pytest.mark.skipif(not common.INTERPRET.value, reason="Triton's interpreter is off")


@triton.jit
def philox_kernel(out, seed, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    a, b, c, d = tl.randint4x(seed, place)
    tl.store(out + place, a)
    tl.store(out + SIZE + place, b)
    tl.store(out + 2 * SIZE + place, c)
    tl.store(out + 3 * SIZE + place, d)


def philox(seed: int, place: int) -> list[int]:
    """Philox-4x32 with ten rounds, from its definition (Salmon et al., 2011), in whole numbers."""
    state, keys = [place, 0, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * state[0], 0xCD9E8D57 * state[2]
        state = [b >> 32 ^ state[1] ^ keys[0], b % 2**32, a >> 32 ^ state[3] ^ keys[1], a % 2**32]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return state


def test_the_definition_has_the_published_numbers():
    """The first known answer of Random123 (kat_vectors)."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 3, 2**40 + 12345])
def test_random_numbers_are_those_of_the_definition(seed):
    out = torch.zeros(4, 8, dtype=torch.int32)
    philox_kernel[(1,)](out, seed, SIZE=8)
    drawn = out.long() % 2**32
    assert drawn.T.tolist() == [philox(seed, place) for place in range(8)]
