"""Loss classes: what this library computes for them, the trial of a class, and the forward that replaces its own."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nce import Weights, patch_nce
from .trial import OPTIONS, Options, asked, become, state_of
from .unchanged import Reads, Unchanged


class Settings(NamedTuple):
    """The three options of a published loss."""

    temperature: float
    images: int
    every: bool


@dataclass(frozen=True)
class Formula:
    """One of the losses that this library computes.

    Args:
        cosine: cosines, as DCLGAN, instead of inner products.
        negatives: "option": as `nce_includes_all_negatives_from_minibatch` says; else always "image" or "batch".
        decoupled: hDCE's value and gradient.
        reduction: "none" returns one loss per row.
        weighted: whether the call may also pass `weight`, which multiplies the logits of the negatives.
    """

    what: str
    cosine: bool = False
    negatives: Literal["option", "image", "batch"] = "option"
    decoupled: bool = False
    reduction: Literal["none", "mean", "sum"] = "none"
    weighted: bool = False

    def groups(self, settings: Settings) -> int:
        """Return the number of groups whose rows are contrasted with each other."""
        whole = settings.every if self.negatives == "option" else self.negatives == "batch"
        return 1 if whole else settings.images

    def __call__(self, q: Tensor, k: Tensor, settings: Settings, weight: Tensor | None = None) -> Tensor:
        """Return the losses of two (rows, dim)."""
        if self.cosine:  # torch.nn.CosineSimilarity divides by max(|x|, 1e-8)
            q, k = F.normalize(q, eps=1e-8), F.normalize(k.detach(), eps=1e-8)
        images, temperature = self.groups(settings), settings.temperature
        if weight is None and not self.decoupled:
            return patch_nce(q, k, images=images, temperature=temperature, reduction=self.reduction)
        size = q.shape[0] // images
        pairs = None if weight is None else weight.expand(images, size, size)
        weights = Weights(pair_weight=pairs, decoupled=self.decoupled)
        if not self.decoupled:
            return patch_nce(q, k, images=images, temperature=temperature, weights=weights, reduction=self.reduction)
        # hDCE's code shows the loss with the positive, and differentiates the mean without it.
        rows = patch_nce(q, k, images=images, temperature=temperature, weights=weights, reduction="none")
        mean = rows.mean()
        rows = F.softplus(rows).detach() + (mean - mean.detach())
        return rows if self.reduction == "none" else getattr(rows, self.reduction)()


FORMULAS = (
    Formula("one pass, CUT: inner products"),
    Formula("one pass, DCLGAN: cosines, whole batch", cosine=True, negatives="batch"),
    Formula("one pass, inner products, within each image", negatives="image"),
    Formula("one pass, inner products, whole batch", negatives="batch"),
    Formula("one pass, cosines, within each image", cosine=True, negatives="image"),
    Formula("one pass, cosines", cosine=True),
    Formula("one pass, hDCE: without the positive", decoupled=True),
)
"""The first formula that agrees is used. CUT's and DCLGAN's come first: messages name them."""


class _Case(NamedTuple):
    """One call of the trial, and what the class returned: its losses and the gradient of the queries."""

    q: Tensor
    k: Tensor
    settings: Settings
    weight: Tensor | None
    out: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Agreed:
    """What the trial of a loss class found.

    Args:
        kept_in: the attribute in which instances keep their options. "" if they copy the values when they are made.
        unchanged: compares an instance with those of the trial.
    """

    formula: Formula
    kept_in: str
    unchanged: Unchanged


def try_loss(cls: type[nn.Module], reads: Reads) -> Agreed:
    """Run a class on small random data and return the formula that it computes.

    Args:
        reads: what its code reads.

    Raises:
        ValueError: it computes none of them, or may compute something else at another time.
    """
    first, then = Settings(0.07, 2, False), Settings(0.2, 3, True)
    options = Options(*first)
    loss = cls(options)
    if any(True for _ in loss.parameters()):
        raise ValueError("it has parameters of its own")
    weighted = "weight" in list(inspect.signature(cls.forward).parameters)[3:]
    data, made = _data(16, 8), [loss]
    before = state_of(loss)
    cases = [_call(loss, first, *data), _call(loss.eval(), first, *data), _call(loss.train(), first, *data)]
    if state_of(loss) != before:
        raise ValueError("its forward changes its own state")
    if not all(torch.equal(case.out, cases[0].out) for case in cases):
        raise ValueError("two calls with the same rows differ")
    for settings, rows, dim in ((first._replace(every=True), 16, 8), (Settings(0.5, 1, False), 300, 4), (then, 15, 3)):
        more = Options(*settings)
        made.append(cls(more))
        cases.append(_call(made[-1], settings, *_data(rows, dim)))
        _known_only(more)
    _known_only(options)
    formula = _agreeing(cases)
    for devices in ([0], [0, 1]):  # a script on one GPU or more; the cases before are those of a CPU
        settings = Settings(0.2, 4, False)
        made.append(cls(Options(*settings, gpu_ids=devices)))
        if _difference(formula, _call(made[-1], settings, *_data(16, 8))) is not None:
            raise ValueError("it may depend on opt.gpu_ids")
    become(options, dict(zip(OPTIONS, then, strict=True)))
    changed = _call(loss, first, *_data(12, 5))
    live = _difference(formula, changed._replace(settings=then)) is None
    kept_in = next((name for name, value in vars(loss).items() if value is options), "") if live else ""
    if not kept_in and (live or _difference(formula, changed) is not None):
        raise ValueError("it keeps its options in a way of its own")
    become(options, dict(zip(OPTIONS, first, strict=True)))
    if weighted:
        case = _call(loss, first, *data, weight=torch.rand(1, 8, 8, dtype=torch.float64))
        formula = replace(formula, weighted=_difference(formula, case) is None)
    return Agreed(formula, kept_in, Unchanged(reads, made))


def _data(rows: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and the gradient of the losses. Lengths differ from 1: products and cosines differ."""
    generator = torch.Generator().manual_seed(rows)
    both = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64)
    lengths = torch.linspace(0.3, 1.0, rows, dtype=torch.float64)[:, None]
    q, k = F.normalize(both, dim=2) * lengths
    return q, k, torch.randn(rows, generator=generator, dtype=torch.float64)


def _call(
    loss: nn.Module, settings: Settings, q: Tensor, k: Tensor, upstream: Tensor, weight: Tensor | None = None
) -> _Case:
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    with contextlib.redirect_stdout(io.StringIO()) as out_text, contextlib.redirect_stderr(out_text):
        out = loss(q, k) if weight is None else loss(q, k, weight=weight.clone())
    if out_text.getvalue():
        raise ValueError("its forward prints")
    if not isinstance(out, Tensor):
        raise ValueError(f"it returns a {type(out).__name__} where a tensor is expected")
    if out.shape not in ((), upstream.shape):
        raise ValueError(f"rows of shape {tuple(out.shape)} where {tuple(upstream.shape)} is expected")
    if not out.requires_grad:
        raise ValueError("its queries receive no gradient")
    (out * (upstream if out.dim() else 1.0)).sum().backward()
    if k.grad is not None and k.grad.abs().max() > 0:
        raise ValueError("its keys receive a gradient")
    assert q.grad is not None
    return _Case(q.detach(), k.detach(), settings, weight, out.detach(), q.grad)


def _known_only(options: Options) -> None:
    if others := sorted(asked(options)):
        raise ValueError(f"it may depend on {', '.join(f'opt.{name}' for name in others)}")


def _agreeing(cases: list[_Case]) -> Formula:
    reductions: tuple[Any, ...] = ("none",) if cases[0].out.dim() else ("mean", "sum")
    wrong = []
    for plain in FORMULAS:
        for reduction in reductions:
            formula = replace(plain, reduction=reduction)
            found = next(filter(None, (_difference(formula, case) for case in cases)), None)
            if found is None:
                what = plain.what if reduction == "none" else f"{plain.what}, {reduction} of the rows"
                return replace(formula, what=what)
            wrong.append(found)
    cut, dclgan = wrong[0], wrong[len(reductions)]
    raise ValueError(f"it computes neither CUT's loss ({cut}) nor DCLGAN's ({dclgan}), nor another of this library's")


def _difference(formula: Formula, case: _Case) -> str | None:
    """Return how the formula differs from what the class returned, or None if it does not."""
    q = case.q.clone().requires_grad_()
    if case.q.shape[0] % formula.groups(case.settings):
        return "rows that are not divided among the images"
    upstream = _data(*case.q.shape)[2] if case.out.dim() else torch.ones((), dtype=torch.float64)
    out = formula(q, case.k, case.settings, case.weight)
    (out * upstream).sum().backward()
    assert q.grad is not None
    for name, theirs, ours in (("rows", case.out, out.detach()), ("query gradients", case.grad, q.grad)):
        if theirs.dtype != ours.dtype:
            return f"{name} of {theirs.dtype} for rows of {ours.dtype}"
        difference = (theirs - ours).abs().max().item()
        if not difference <= 1e-8 * ours.abs().max().item():
            return f"{name} differ by {difference:.1e} on random data"
    return None


_COPIED: weakref.WeakKeyDictionary[nn.Module, tuple[Settings, dict[str, Any]]] = weakref.WeakKeyDictionary()
"""The options of instances whose class copies them when they are made, and the attributes that follow from them."""


def install(cls: type[nn.Module], agreed: Agreed) -> None:
    """Give a class the forward of this library. Calls that it does not cover run the class's own forward."""
    original: Callable[..., Tensor] = cls.forward
    formula, signature = agreed.formula, inspect.signature(original)

    @functools.wraps(original)
    def forward(self, *arguments, **named):
        if torch.compiler.is_compiling():  # the checks of an instance cannot be traced
            return original(self, *arguments, **named)
        q, k, weight = _rows(signature, formula, self, arguments, named)
        # A subclass may change what the class's own forward calls.
        if q is not None and type(self) is cls and (settings := _settings(self, agreed)) is not None:
            groups = formula.groups(settings)
            if groups > 0 and q.shape[0] % groups == 0:
                return formula(q, k, settings, weight)
        return original(self, *arguments, **named)

    cls.forward = forward
    if agreed.kept_in:
        return
    made, constructor = cls.__init__, inspect.signature(cls.__init__)

    @functools.wraps(made)
    def init(self, *arguments, **named):
        made(self, *arguments, **named)
        given = list(constructor.bind(self, *arguments, **named).arguments.values())
        if type(self) is cls and len(given) > 1 and (settings := _read(given[1], formula)) is not None:
            _COPIED[self] = settings, agreed.unchanged.chosen(self)

    cls.__init__ = init  # type: ignore[method-assign]


def _rows(
    signature: inspect.Signature, formula: Formula, loss: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Tensor | None, Any, Any]:
    """Return queries, keys and weight of a call; None for the queries if the call is not covered."""
    nothing = None, None, None
    weight = None
    if named or len(arguments) != 2:
        try:
            given = signature.bind(loss, *arguments, **named).arguments
        except TypeError:
            return nothing  # the class's own forward raises it
        parameters = list(signature.parameters.values())[1:]
        if any(name.name not in given for name in parameters[:2]):
            return nothing
        arguments = tuple(given[name.name] for name in parameters[:2])
        for parameter in parameters[2:]:
            value = given.get(parameter.name, parameter.default)
            if parameter.name == "weight" and formula.weighted:
                weight = value
            elif value is not parameter.default and parameter.name in given:
                return nothing
    q, k = arguments
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == 2 and q.shape == k.shape and q.numel()):
        return nothing
    if weight is not None and (not isinstance(weight, Tensor) or weight.requires_grad or weight.dim() > 3):
        return nothing
    return q, k, weight


def _settings(loss: nn.Module, agreed: Agreed) -> Settings | None:
    """Return the settings of an instance; None if they are not known, or if something else has changed."""
    if not agreed.kept_in:
        settings, chosen = _COPIED.get(loss, (None, {}))
        return settings if agreed.unchanged.holds(loss, chosen) else None
    return _read(vars(loss).get(agreed.kept_in), agreed.formula) if agreed.unchanged.holds(loss) else None


def _read(options: Any, formula: Formula) -> Settings | None:
    needed = {"option": OPTIONS, "image": OPTIONS[:2], "batch": OPTIONS[:1]}[formula.negatives]
    values = {name: getattr(options, name, None) for name in needed}
    temperature, images = values["nce_T"], values.get("batch_size", 1)
    if None in values.values() or type(images) is not int:
        return None
    if not isinstance(temperature, int | float):
        return None
    return Settings(float(temperature), images, bool(values.get(OPTIONS[2])))


def own_calls(cls: type[nn.Module], agreed: Agreed) -> str:
    """Say which calls run the class's own forward."""
    names = list(inspect.signature(cls.forward).parameters)[3:]
    names = [name for name in names if not (name == "weight" and agreed.formula.weighted)]
    return f"; calls with {' or '.join(names)} run as before" if names else ""
