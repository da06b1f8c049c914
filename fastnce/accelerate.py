"""Run an existing CUT, DCLGAN or DCD-GAN checkout, unedited, with this library's loss and patch sampler.

python -m fastnce.accelerate train.py --dataroot ./datasets/horse2zebra --name h2z    # inside the checkout

Every module that the script imports is looked at once it has been executed, before anything can import from it. A class
called `PatchNCELoss...` or `PatchSampleF` is replaced only after it was tried on small random data and its numbers and
gradients turned out to be those of the replacement: a fork that changed the mathematics is left alone, and that is
said. What was replaced is printed on stderr; checkpoints have the same keys with and without.

In a notebook: `import models.patchnce; fastnce.accelerate.patch(models.patchnce)`.

Processes that the script starts afresh (`spawn`) are not looked at: data loaders need nothing here, but
`torch.multiprocessing.spawn` of training itself runs the published classes.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.machinery
import io
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnce

__all__ = ["main", "patch"]

USAGE = "usage: python -m fastnce.accelerate SCRIPT [arguments of the script]"


def patch(module: types.ModuleType) -> list[str]:
    """Replace the published loss and sampler classes of a module, and everything that was imported from it already.

    Args:
        module: usually `models.patchnce` or `models.networks` of a checkout.

    Returns:
        the replaced names, such as `["models.patchnce.PatchNCELoss", "models.cut_model.PatchNCELoss"]`; empty when
        there is nothing to replace, so that calling it twice is harmless.
    """
    replaced, _ = _patch(module)
    return [name for names in replaced.values() for name in names]


def _patch(module: types.ModuleType) -> tuple[dict[str, list[str]], list[str]]:
    """({what a replacement computes: names that now mean it}, [why a class was left alone])."""
    replaced: dict[str, list[str]] = {}
    left: list[str] = []
    for published in _candidates(module):
        where = f"{published.__module__}.{published.__qualname__}"
        try:
            with _undisturbed():
                replacement, what = _replacement(published)
        except Exception as error:  # a class of the user's: whatever it raises means that it is not the published one
            left.append(f"{where} is left as it is: {str(error) or type(error).__name__}")
            continue
        for attribute in ("__module__", "__qualname__", "__name__"):
            setattr(replacement, attribute, getattr(published, attribute))
        replaced.setdefault(f"{where}: {what}", []).extend(_rebind(published, replacement))
    return replaced, left


def _candidates(module: types.ModuleType) -> list[type[nn.Module]]:
    found: list[type[nn.Module]] = []
    for value in list(vars(module).values()):
        if (
            isinstance(value, type)
            and (value.__name__.startswith("PatchNCELoss") or value.__name__ == "PatchSampleF")
            and issubclass(value, nn.Module)
            and not issubclass(value, (fastnce.PatchNCELoss, fastnce.PatchSampleF))
            and value not in found
        ):
            found.append(value)
    return found


def _rebind(published: type, replacement: type) -> list[str]:
    """Let every imported module's names for the class mean the replacement."""
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
    """DCLGAN's loss: cosines, that is, rows of unit length whatever comes in; negatives always from the whole batch."""

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
    """A sampler with the published defaults, whose MLPs are made and initialised by the published code itself."""

    class Sampler(fastnce.PatchSampleF):
        """The published sampler: same call, same state_dict."""

        def __init__(self, use_mlp=False, init_type="normal", init_gain=0.02, nc=256, gpu_ids=()):
            super().__init__(use_mlp, nc=nc)
            # the checkout's own init_net reads these, and may know more of them
            self.init_type, self.init_gain, self.gpu_ids = init_type, init_gain, gpu_ids

        def create_mlp(self, feats: Sequence[Tensor]) -> None:
            # Same order of random draws and the checkout's own init_net: from one seed, the same weights.
            published.create_mlp(self, feats)

        def forward(self, feats, num_patches=64, patch_ids=None):
            rows, ids = super().forward(feats, num_patches, patch_ids)
            no_ids: list[list[int]] = [[] for _ in feats]
            return rows, ids if num_patches > 0 else no_ids

    return Sampler


def _check_loss(published, replacement) -> None:
    """Raise unless both give the same rows and query gradients, and none to the keys, for both groupings."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(3, 16, 8, generator=generator, dtype=torch.float64)
    lengths = torch.linspace(0.3, 1.0, 16, dtype=torch.float64)[:, None]  # not unit: cosine and product must differ
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
    """Raise unless both make the same weights, rows and gradients; with and without MLPs, sampled and whole."""
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
    """Whatever the trial draws or prints, the script sees the random states and the stdout that it would have."""
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        np.random.set_state(numpy_state)


class _Hook:
    """Meta path finder: modules are found as ever, and shown to `seen` as soon as they have been executed."""

    def __init__(self, seen: Callable[[types.ModuleType], None]):
        self.seen = seen

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                break
        else:
            return None
        loader = spec.loader
        if isinstance(loader, (importlib.machinery.SourceFileLoader, importlib.machinery.SourcelessFileLoader)):
            execute = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                self.seen(module)

            # On the instance, which serves this one module: type and other methods of the loader stay as they are.
            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _say(sentence: str) -> None:
    print(f"fastnce: {sentence}", file=sys.stderr, flush=True)


def _run_as_main(script: Path, arguments: list[str]) -> None:
    """What `python SCRIPT arguments` does: argv, path, and a fresh `__main__`."""
    path = str(script.absolute())
    sys.argv = arguments
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    main_module = types.ModuleType("__main__")
    main_module.__dict__.update(
        __file__=path,
        __builtins__=builtins,
        __loader__=importlib.machinery.SourceFileLoader("__main__", path),
        __cached__=None,
    )
    sys.modules["__main__"] = main_module
    exec(compile(script.read_bytes(), path, "exec", dont_inherit=True), main_module.__dict__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script named first in `argv`; returns 2 when there is none, else what the script makes of it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if not arguments:
        print(f"no script was given; {USAGE}", file=sys.stderr)
        return 2
    script = Path(arguments[0])
    if not script.is_file():
        print(f"there is no script {str(script)!r} in {Path.cwd()}; {USAGE}", file=sys.stderr)
        return 2

    count = 0
    said: set[str] = set()

    def seen(module: types.ModuleType) -> None:
        nonlocal count
        replaced, left = _patch(module)
        for what in replaced:
            count += 1
            _say(f"replaced {what}")
        for sentence in left:
            if sentence not in said:  # seen again in every module that imports the class
                said.add(sentence)
                _say(sentence)

    hook = _Hook(seen)
    sys.meta_path.insert(0, hook)
    try:
        _run_as_main(script, arguments)
    finally:
        sys.meta_path.remove(hook)
        if count == 0:
            _say("nothing was replaced: the script imported no class PatchNCELoss or PatchSampleF of CUT's or DCLGAN's")
    return 0


if __name__ == "__main__":
    # one copy of this module, whichever name it was started under
    from fastnce.accelerate import main as _main

    sys.exit(_main())
