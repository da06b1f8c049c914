"""Makes a published training script repeatable, without a change of its files.

Python imports this file at its start where the folder is on `PYTHONPATH`. It seeds, and offers stand-ins for packages
that the script imports and does not use. A patch sampler that the script calls without locations gets the same ones in
every run: the published code draws them on the host, and this library on the device.
"""

import inspect
import os
import random
import sys

import numpy as np
import torch
from torch import nn

from benchmarks import published

SETTINGS = os.environ["FASTNCE_OUTSIDE"].split()  # float64, ids, norm
UNUSED = "blitz dgl ipdb matplotlib nibabel piq pylab sklearn wget".split()  # noqa: SIM905


def _by_the_script() -> bool:
    """Whether the caller's caller is a file of the checkout: a trial of fastnce must see what the code does."""
    return sys._getframe(2).f_code.co_filename.startswith(os.getcwd())


torch.set_num_threads(1)
random.seed(0)
np.random.seed(0)
torch.manual_seed(0)
sys.meta_path.append(published._StandIns([*published.OPTIONAL, *UNUSED]))
published._Missing.__mro_entries__ = lambda self, bases: ()  # a class may name a stand-in as its base
if (
    "torchvision" in published._broken()
):  # it lacks its operators, which no step uses: naming two lets the rest be imported
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
if not hasattr(torch, "rfft"):
    torch.rfft = published._rfft
if "float64" in SETTINGS:
    # Adam's first step is the sign of the gradient, which amplifies float32 rounding differences
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = lambda self: self.double() if _by_the_script() else self.to(torch.float32)
if "cpu" in SETTINGS:  # for scripts that call these whatever --gpu_ids says
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *_: self
    torch.cuda.synchronize = lambda *_: None

_call = nn.Module.__call__
_ids = np.random.RandomState(1)


def _with_ids(self, *arguments, **named):
    """Call a module. A sampler that the script itself calls without locations is given some."""
    net = self.module if isinstance(self, nn.DataParallel) else self
    signature = inspect.signature(type(net).forward)
    parameters = signature.parameters
    if {"num_patches", "patch_ids"} <= set(parameters) and _by_the_script():
        bound = signature.bind(net, *arguments, **named)
        bound.apply_defaults()
        given = bound.arguments
        feats = given[list(parameters)[1]]
        if given["patch_ids"] is None and given["num_patches"] > 0:
            ids = [_ids.permutation(feat[0, 0].numel())[: given["num_patches"]] for feat in feats]
            bound.arguments["patch_ids"] = [torch.as_tensor(each) for each in ids]
        arguments, named = bound.args[1:], bound.kwargs
    return _call(self, *arguments, **named)


def _instance_norm(x, *_, eps=1e-5, **__):
    centred = x - x.mean((2, 3), keepdim=True)
    return centred / (centred.square().mean((2, 3), keepdim=True) + eps).sqrt()


if "ids" in SETTINGS:
    nn.Module.__call__ = _with_ids
if (
    "norm" in SETTINGS
):  # at batch 1 on a CPU, PyTorch's own is wrong for the gradients that only the published sampler sends
    torch.nn.functional.instance_norm = _instance_norm

_step = torch.optim.Adam.step
_seen = []


def _saving_step(self, *arguments, **named):
    """Save the gradients of an optimiser's first step."""
    if self not in _seen:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = {str(number): p.grad.clone() for number, p in enumerate(parameters)}
        torch.save(gradients, os.path.join(os.environ["FASTNCE_GRADIENTS"], f"{len(_seen)}.pth"))
        _seen.append(self)
    return _step(self, *arguments, **named)


if "FASTNCE_GRADIENTS" in os.environ:
    torch.optim.Adam.step = _saving_step
