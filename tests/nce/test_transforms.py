"""`torch.func` over `patch_nce`: `vmap` gives the loop's numbers; what is not supported says so in one sentence."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from fastnce import patch_nce
from fastnce.nce import Weights
from tests.oracle import DEVICE

grad, vmap = torch.func.grad, torch.vmap
HOW = pytest.mark.parametrize("how", ["eager", "triton"])


def examples():
    rows = torch.randn(2, 2, 8, 6, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3))
    return F.normalize(rows, dim=-1).unbind()


def close(ours, loop):
    torch.testing.assert_close(ours, torch.stack(list(loop)), rtol=1e-5, atol=1e-6)


@HOW
def test_vmap(how):
    q, k = examples()
    f = partial(patch_nce, images=2, implementation=how)
    close(vmap(f)(q, k), map(f, q, k))
    close(vmap(f, in_dims=(2, 2))(q.movedim(0, 2), k.movedim(0, 2)), map(f, q, k))
    if how == "eager":  # the same rule twice
        close(vmap(vmap(f, in_dims=(0, None)), in_dims=(None, 0))(q, k), (vmap(f, in_dims=(0, None))(q, b) for b in k))
    weights = Weights(torch.randn(2, 4, 4, device=DEVICE), None, torch.rand(8, device=DEVICE))
    for more in ({"extra_keys": k[1]}, {"weights": weights}, {"reduction": "none"}, {"symmetric": True}):
        g = partial(f, **more)
        close(vmap(g, in_dims=(0, None))(q, k[0]), (g(a, k[0]) for a in q))


@HOW
def test_gradients_and_vmap(how):
    q, k = examples()
    f = partial(patch_nce, images=2, implementation=how)
    loop = [grad(f)(a, b) for a, b in zip(q, k, strict=True)]
    close(vmap(grad(f))(q, k), loop)
    close(grad(lambda q: vmap(f)(q, k).sum())(q), loop)
    leaf = q.clone().requires_grad_()
    vmap(f)(leaf, k).sum().backward()
    close(leaf.grad, loop)
    rows = partial(f, reduction="none")
    close(torch.func.jacrev(rows)(q[0], k[0]), (grad(lambda a, i=i: rows(a, k[0])[i])(q[0]) for i in range(8)))
    t = torch.tensor(0.2, device=DEVICE)
    of_t = grad(lambda t, a, b: f(a, b, temperature=t))
    close(vmap(of_t, in_dims=(None, 0, 0))(t, q, k), (of_t(t, a, b) for a, b in zip(q, k, strict=True)))
    total = grad(lambda t: vmap(lambda a, b: f(a, b, temperature=t))(q, k).sum())(t)
    torch.testing.assert_close(total, sum(of_t(t, a, b) for a, b in zip(q, k, strict=True)))


def test_vmap_over_temperatures():
    (q, *_), (k, *_) = examples()
    many = torch.tensor([0.1, 0.3], device=DEVICE)
    close(vmap(lambda t: patch_nce(q, k, temperature=t, implementation="eager"))(many),
          (patch_nce(q, k, temperature=float(t), implementation="eager") for t in many))  # fmt: skip
    with pytest.raises(ValueError, match="one temperature for all examples of vmap: use implementation='eager'"):
        vmap(lambda t: patch_nce(q, k, temperature=t, implementation="triton"))(many)


@HOW
def test_what_is_not_supported(how):
    q, k = examples()
    f = partial(patch_nce, implementation=how)
    one = "vmap over patch_nce gives no gradient to keys, nor to queries with symmetric=True: pass the rows of all"
    with pytest.raises(ValueError, match=one):
        vmap(grad(partial(f, detach_keys=False), argnums=1))(q, k)
    with pytest.raises(ValueError, match=one):
        vmap(grad(partial(f, symmetric=True)))(q, k)
    of_one, t = partial(f, keys=k[0]), torch.tensor(0.2, device=DEVICE)

    def dual():
        with forward_ad.dual_level():
            of_one(forward_ad.make_dual(q[0], q[0]))

    for forward in (
        lambda: torch.func.jvp(of_one, (q[0],), (q[0],)),
        lambda: torch.func.jvp(lambda t: f(q[0], k[0], temperature=t), (t,), (t,)),
        lambda: torch.func.jacfwd(of_one)(q[0]),
        lambda: torch.func.hessian(of_one)(q[0]),
        dual,
    ):
        with pytest.raises(ValueError, match="no forward-mode derivative .*: use grad, vjp or jacrev"):
            forward()
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad(lambda a: grad(of_one)(a).sum())(q[0])
