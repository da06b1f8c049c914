"""Run an existing CUT, DCLGAN or DCD-GAN checkout, unedited, with this library's loss and patch sampler.

python -m fastnce.accelerate train.py --dataroot ./datasets/horse2zebra --name h2z    # inside the checkout

Each module that the script imports is inspected right after it has been executed, before anything imports from it. A
class named `PatchNCELoss...` or `PatchSampleF` is first run on small random data. It is replaced only if its values and
gradients equal those of the replacement. A class with other mathematics, as in a fork, is kept. Both outcomes are
printed on stderr. Checkpoints have the same keys with and without the replacement.

In a notebook: `import models.patchnce; fastnce.accelerate.patch(models.patchnce)`.

Processes that the script starts with `spawn` are not inspected. Data loaders do not need it, but training that is
started by `torch.multiprocessing.spawn` runs the published classes.
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
    """Replace the published loss and sampler classes of a module, also where they have already been imported.

    Args:
        module: usually `models.patchnce` or `models.networks` of a checkout.

    Returns:
        the replaced names, such as `["models.patchnce.PatchNCELoss", "models.cut_model.PatchNCELoss"]`. The list is
        empty if there is nothing to replace; a second call does nothing.
    """
    replaced, _ = _patch(module)
    return [name for names in replaced.values() for name in names]


def _patch(module: types.ModuleType) -> tuple[dict[str, list[str]], list[str]]:
    """Patch a module; return ({description of a replacement: replaced names}, [why a class was kept])."""
    replaced: dict[str, list[str]] = {}
    left: list[str] = []
    for published in _candidates(module):
        where = f"{published.__module__}.{published.__qualname__}"
        try:
            with _undisturbed():
                replacement, what = _replacement(published)
        except Exception as error:  # a user's class may raise anything: then it is not the published one
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


class _Hook:
    """Meta path finder that finds modules as usual and calls `executed` with each module after its execution."""

    def __init__(self, executed: Callable[[types.ModuleType], None]):
        self.executed = executed

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
                self.executed(module)

            # Patch the instance, which serves only this module: the loader's type and other methods stay unchanged.
            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _report(sentence: str) -> None:
    print(f"fastnce: {sentence}", file=sys.stderr, flush=True)


def _run_as_main(script: Path, arguments: list[str]) -> None:
    """Run a script as `python SCRIPT arguments` does: set argv, path and a new `__main__`."""
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
    """Run the script that `argv` names first; return 2 if there is none, else 0. The script may end the process."""
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
    reported: set[str] = set()

    def executed(module: types.ModuleType) -> None:
        nonlocal count
        replaced, left = _patch(module)
        for what in replaced:
            count += 1
            _report(f"replaced {what}")
        for sentence in left:
            if sentence not in reported:  # every module that imports the class gives it again
                reported.add(sentence)
                _report(sentence)

    hook = _Hook(executed)
    sys.meta_path.insert(0, hook)
    try:
        _run_as_main(script, arguments)
    finally:
        sys.meta_path.remove(hook)
        if count == 0:
            _report(
                "nothing was replaced: the script imported no class PatchNCELoss or PatchSampleF of CUT's or DCLGAN's"
            )
    return 0


if __name__ == "__main__":
    # Use the imported module, so that there is one copy of it, not a second one named __main__.
    from fastnce.accelerate import main as _main

    sys.exit(_main())
