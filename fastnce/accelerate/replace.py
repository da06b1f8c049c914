"""Replace the published loss and sampler classes of a module, where they compute the same."""

from __future__ import annotations

import contextlib
import io
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnce


def patch(module: types.ModuleType) -> list[str]:
    """Replace the published loss and sampler classes of a module, also where they have already been imported.

    Args:
        module: usually `models.patchnce` or `models.networks` of a checkout.

    Returns:
        the replaced names, such as `["models.patchnce.PatchNCELoss", "models.cut_model.PatchNCELoss"]`. The list is
        empty if there is nothing to replace; a second call does nothing.
    """
    return [name for published in candidates(module) for name in replace(published).names]


@dataclass(frozen=True)
class Outcome:
    """What became of a published class.

    Args:
        what: a sentence: the replacement, or why the class is kept.
        names: the names that now refer to the replacement; empty if the class is kept.
        unready: its trial used a name that its module has not defined yet. A later trial may succeed.
    """

    what: str
    names: list[str]
    unready: bool = False


def replace(published: type[nn.Module]) -> Outcome:
    """Run a class on small random data. If it computes what a class of this library computes, replace it everywhere."""
    where = f"{published.__module__}.{published.__qualname__}"
    try:
        with _undisturbed():
            replacement, what = _replacement(published)
    except Exception as error:  # a user's class may raise anything: then it is not the published one
        why = str(error) or type(error).__name__
        return Outcome(f"{where} is left as it is: {why}", [], isinstance(error, NameError))
    for attribute in ("__module__", "__qualname__", "__name__"):
        setattr(replacement, attribute, getattr(published, attribute))
    return Outcome(f"replaced {where}: {what}", _rebind(published, replacement))


def is_candidate(name: str) -> bool:
    """Whether a class of this name may be a published loss or sampler."""
    return name.startswith("PatchNCELoss") or name == "PatchSampleF"


def candidates(module: types.ModuleType) -> list[type[nn.Module]]:
    """Return the classes of a module, defined or imported there, whose names are those of published ones."""
    found: list[type[nn.Module]] = []
    for value in list(vars(module).values()):
        if (
            isinstance(value, type)
            and is_candidate(value.__name__)
            and issubclass(value, nn.Module)
            and not issubclass(value, (fastnce.PatchNCELoss, fastnce.PatchSampleF))
            and value not in found
        ):
            found.append(value)
    return found


def _rebind(published: type, replacement: type) -> list[str]:
    """Rebind every module's names for the published class to the replacement."""
    names = []
    for module_name, module in list(sys.modules.items()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is published:
                setattr(module, name, replacement)
                names.append(f"{module_name}.{name}")
    return names


def _replacement(published: type[nn.Module]) -> tuple[type[nn.Module], str]:
    if published.__name__ == "PatchSampleF":
        sampler = _sampler_like(published)
        _check_sampler(published, sampler)
        return sampler, "sampling on the device, only the sampled rows are read"
    wrong = []
    for replacement, what in _LOSSES:
        try:
            _check_loss(published, replacement)
        except ValueError as error:
            wrong.append(str(error))
        else:
            return type(published.__name__, (replacement,), {"__doc__": replacement.__doc__}), what
    raise ValueError(f"it computes neither CUT's loss ({wrong[0]}) nor DCLGAN's ({wrong[1]})")


class _CosineLoss(fastnce.PatchNCELoss):
    """DCLGAN's loss: cosine similarities, with negatives always from the whole batch."""

    def __init__(self, opt):
        super().__init__(temperature=opt.nce_T, negatives="batch")
        self.opt = opt

    def forward(self, feat_q: Tensor, feat_k: Tensor, images: int | None = None) -> Tensor:
        # torch.nn.CosineSimilarity divides by max(|x|, 1e-8)
        return super().forward(F.normalize(feat_q, eps=1e-8), F.normalize(feat_k.detach(), eps=1e-8), images=1)


_LOSSES: tuple[tuple[type[fastnce.PatchNCELoss], str], ...] = (
    (fastnce.PatchNCELoss, "one pass, CUT: inner products"),
    (_CosineLoss, "one pass, DCLGAN: cosines, whole batch"),
)


def _sampler_like(published) -> type[fastnce.PatchSampleF]:
    """Make a sampler class with the published defaults. The published code itself makes and initialises its MLPs."""

    class Sampler(fastnce.PatchSampleF):
        """A sampler with the calls and the state_dict of the published one."""

        def __init__(self, use_mlp=False, init_type="normal", init_gain=0.02, nc=256, gpu_ids=()):
            super().__init__(use_mlp, nc=nc)
            # The checkout's init_net reads these and may accept other values.
            self.init_type, self.init_gain, self.gpu_ids = init_type, init_gain, gpu_ids

        def create_mlp(self, feats: Sequence[Tensor]) -> None:
            # The published code draws the weights: the same seed gives the same weights.
            published.create_mlp(self, feats)

        def forward(self, feats, num_patches=64, patch_ids=None):
            rows, ids = super().forward(feats, num_patches, patch_ids)
            no_ids: list[list[int]] = [[] for _ in feats]
            return rows, ids if num_patches > 0 else no_ids

    return Sampler


def _check_loss(published, replacement) -> None:
    """Raise ValueError unless both give the same rows and query gradients, and no key gradients, for both groupings."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(3, 16, 8, generator=generator, dtype=torch.float64)
    lengths = torch.linspace(0.3, 1.0, 16, dtype=torch.float64)[:, None]  # not 1, so that cosine and product differ
    queries, keys = (F.normalize(rows, dim=1) * lengths for rows in data[:2])
    upstream = data[2, :, 0]
    for whole_batch in (False, True):
        opt = types.SimpleNamespace(nce_T=0.07, batch_size=2, nce_includes_all_negatives_from_minibatch=whole_batch)
        results = []
        for cls in (published, replacement):
            q, k = queries.clone().requires_grad_(), keys.clone().requires_grad_()
            rows = cls(opt)(q, k)
            (rows * upstream).sum().backward()
            if k.grad is not None and k.grad.abs().max() > 0:
                raise ValueError("its keys receive a gradient")
            results.append((rows, q.grad))
        for name, theirs, ours in zip(("rows", "query gradients"), *results, strict=True):
            if theirs.shape != ours.shape:
                raise ValueError(f"{name} of shape {tuple(theirs.shape)} where {tuple(ours.shape)} is expected")
            difference = (theirs - ours).abs().max().item()
            if not difference <= 1e-8 * ours.abs().max().item():
                raise ValueError(f"{name} differ by {difference:.1e} on random data")


def _check_sampler(published, replacement) -> None:
    """Raise ValueError unless both give the same weights, rows and gradients, with and without MLPs and sampling."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, c, 4, 5, generator=generator) for c in (3, 6)]
    ids = [np.arange(19, 3, -3), np.arange(7)]
    for use_mlp, num_patches in ((False, 6), (True, 6), (False, 0), (True, 0)):
        results = []
        for cls in (published, replacement):
            torch.manual_seed(0)
            sampler = cls(use_mlp=use_mlp, init_type="normal", init_gain=0.5, nc=8, gpu_ids=[])
            feats = [m.clone().requires_grad_() for m in maps]
            rows, _ = sampler(feats, num_patches, ids)
            sum((r * r.cos()).sum() for r in rows).backward()
            results.append((sampler.state_dict(), [*rows, *(f.grad for f in feats)]))
        (their_state, theirs), (our_state, ours) = results
        if list(their_state) != list(our_state):
            raise ValueError(f"its state_dict holds {list(their_state)} where {list(our_state)} is expected")
        pairs = [*zip(their_state.values(), our_state.values(), strict=True), *zip(theirs, ours, strict=True)]
        if not all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs):
            raise ValueError(f"its rows or gradients differ (use_mlp={use_mlp}, num_patches={num_patches})")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Isolate the trial: restore the random states, and discard what it prints."""
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        np.random.set_state(numpy_state)
