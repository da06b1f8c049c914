"""Which losses are found by what they compute, what their calls return afterwards, and which are kept."""

import copy
import types

import pytest
import torch

from fastnce import accelerate
from fastnce.accelerate import losses
from tests.accelerate.checkouts import COSINE_LOSS, DOT_LOSS, module_of

LOSS = """
class {name}(nn.Module):
    def __init__(self, {options}):
        super().__init__()
        {init}

    def forward(self, feat_q, feat_k{more}):
        every, images = {every}, {images}
        groups = 1 if every else images
        q = {q}.reshape(groups, -1, feat_q.shape[1])
        k = {k}.reshape(groups, -1, feat_q.shape[1])
        logits = q @ k.transpose(1, 2)
        {logits}
        logits = (logits / {temperature}).flatten(0, 1)
        target = torch.arange(q.shape[1]).repeat(groups)
        rows = nn.functional.cross_entropy(logits, target, reduction="none")
        return {out}
"""

USUAL = {
    "name": "Contrast",
    "options": "opt",
    "init": "self.opt = opt",
    "more": "",
    "every": "self.opt.nce_includes_all_negatives_from_minibatch",
    "images": "self.opt.batch_size",
    "q": "feat_q",
    "k": "feat_k.detach()",
    "logits": "",
    "temperature": "self.opt.nce_T",
    "out": "rows",
}


def loss_class(**changes: str) -> type[torch.nn.Module]:
    module = module_of(LOSS.format(**USUAL | changes))
    (cls,) = (value for value in vars(module).values() if isinstance(value, type))
    accelerate.patch(module)
    return cls


def replaced(cls: type) -> bool:
    return hasattr(cls.forward, "__wrapped__")


def options(**changes) -> types.SimpleNamespace:
    usual = {"nce_T": 0.1, "batch_size": 2, "nce_includes_all_negatives_from_minibatch": False}
    return types.SimpleNamespace(**usual | changes)


def rows(seed: int = 0, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.nn.functional.normalize(torch.randn(2, count, 6, generator=generator, dtype=torch.float64), dim=2)
    return q.requires_grad_(), k.requires_grad_()


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """What this library's loss is called with."""
    found: list[dict] = []

    def patch_nce(*arguments, **named):
        found.append(named)
        return original(*arguments, **named)

    original = losses.patch_nce
    monkeypatch.setattr(losses, "patch_nce", patch_nce)
    return found


def assert_same(loss, *arguments, **named) -> None:
    """A call returns what the class's own forward returns, with the same gradient of the queries."""
    original = type(loss).forward.__wrapped__
    results = []
    for call in (loss, lambda *a, **n: original(loss, *a, **n)):
        q, k = rows()
        out = call(q, k, *arguments, **named)
        (out * torch.arange(1.0, out.numel() + 1).reshape(out.shape)).sum().backward()
        assert k.grad is None or not k.grad.any()
        results.append((out, q.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


COPIES = "self.T, self.images, self.every = opt.nce_T, opt.batch_size, opt.nce_includes_all_negatives_from_minibatch"
FOUND = {
    "another name": {"name": "Contrast"},
    "other names of its arguments": {"options": "args", "init": "self.args = args", "every": "False"}
    | {"images": "self.args.batch_size", "temperature": "self.args.nce_T"},
    "options that it copies": {"init": COPIES, "every": "self.every", "images": "self.images", "temperature": "self.T"},
    "always within an image": {"every": "False"},
    "always the whole batch": {"every": "True"},
    "a mean": {"out": "rows.mean()"},
    "a sum": {"out": "rows.sum()"},
    "an option of its constructor": {"options": "opt, verbose=False"},
    "cosines within an image": {"every": "False", "q": "nn.functional.normalize(feat_q, eps=1e-8)"}
    | {"k": "nn.functional.normalize(feat_k.detach(), eps=1e-8)"},
}


@pytest.mark.parametrize("changes", FOUND.values(), ids=FOUND)
def test_a_loss_is_found_by_what_it_computes(changes, calls):
    cls = loss_class(**changes)
    assert replaced(cls)
    calls.clear()
    for opt in (options(), options(nce_T=0.3, batch_size=4, nce_includes_all_negatives_from_minibatch=True)):
        assert_same(cls(opt))
    assert [call["temperature"] for call in calls] == [0.1, 0.3]


KEPT = {
    "a factor": ({"out": "rows * 1.5"}, "it computes neither CUT's loss (rows differ by"),
    "a gradient to the keys": ({"k": "feat_k"}, "its keys receive a gradient"),
    "no gradient": ({"q": "feat_q.detach()"}, "its queries receive no gradient"),
    "negatives of one kind dropped": ({"logits": "logits[:, :, 0] = 0.5"}, "it computes neither"),
    "another option": ({"temperature": "self.opt.tau"}, "it does not read opt.nce_T"),
    "one more option": ({"out": "rows * getattr(self.opt, 'lambda_q', 1)"}, "it may depend on opt.lambda_q"),
    "an option that is missing": ({"out": "rows * self.opt.lambda_q"}, "the options have no lambda_q"),
    "the images of one of several GPUs": (
        {"images": "self.opt.batch_size // max(1, len(self.opt.gpu_ids))"},
        "it may depend on opt.gpu_ids",
    ),
    "a GPU that a trial lacks": (
        {"images": "self.opt.batch_size // len(self.opt.gpu_ids)"},
        "its trial ended with ZeroDivisionError: integer",
    ),
    "values instead of options": (
        {"options": "nce_T=0.07, batch_size=1", "init": "self.nce_T, self.images = nce_T, batch_size"}
        | {"temperature": "self.nce_T", "images": "self.images", "every": "False"},
        "its constructor does not take (opt)",
    ),
    "a parameter": ({"init": "self.opt, self.w = opt, nn.Parameter(torch.ones(1))"}, "it has parameters of its own"),
    "a counter": (
        {"init": "self.opt, self.calls = opt, 0", "logits": "self.calls += 1"},
        "its forward changes its own state",
    ),
    "a hidden counter": (
        {"init": "self.opt, self.c = opt, iter(range(100))", "out": "rows + (next(self.c) > 1)"},
        "two calls with the same rows differ",
    ),
    "training alone": ({"out": "rows if self.training else rows * 0 + 1"}, "two calls with the same rows differ"),
    "many rows": ({"out": "rows if len(rows) < 100 else rows * 2"}, "it computes neither"),
    "half of its options copied": (
        {"init": "self.opt, self.T = opt, opt.nce_T", "temperature": "self.T"},
        "it keeps its options in a way of its own",
    ),
    "two results": ({"out": "rows, logits"}, "it returns a tuple where a tensor is expected"),
    "other rows": ({"out": "rows[:-1]"}, "rows of shape (15,) where (16,) is expected"),
    "float32": ({"out": "rows.float()"}, "it computes neither CUT's loss (rows of torch.float32"),
}


@pytest.mark.parametrize(("changes", "sentence"), KEPT.values(), ids=KEPT)
def test_a_loss_that_may_differ_is_kept(changes, sentence):
    module = module_of(LOSS.format(**USUAL | {"name": "MyNCE"} | changes))
    (candidate,) = accelerate.replace.candidates(module)
    outcome = accelerate.replace.replace(candidate)
    assert not outcome.replaced
    assert outcome.what.startswith(sentence)
    assert not replaced(candidate.value)


def test_options_may_change_after_construction(calls):
    cls = loss_class()
    opt = options()
    loss = cls(opt)
    opt.nce_T, opt.nce_includes_all_negatives_from_minibatch = 0.5, True
    calls.clear()
    assert_same(loss)
    assert calls == [{"images": 1, "temperature": 0.5, "reduction": "none"}]
    copied = loss_class(**FOUND["options that it copies"])(opt)
    opt.nce_T = 0.9
    assert_same(copied)
    assert calls[-1]["temperature"] == 0.5


def test_instances_made_before_are_reached_and_keep_their_options(calls):
    module = module_of(LOSS.format(**USUAL))
    Alias = module.Contrast
    before = Alias(options(nce_T=0.2))
    accelerate.patch(module)
    calls.clear()
    for loss in (before, Alias(options(nce_T=0.2)), copy.deepcopy(before)):
        assert_same(loss)
    assert len(calls) == 3


def test_instances_that_copied_their_options_before_run_as_before(calls):
    module = module_of(LOSS.format(**USUAL | FOUND["options that it copies"]))
    before = module.Contrast(options())
    accelerate.patch(module)
    calls.clear()
    assert_same(before)
    assert not calls


@pytest.mark.parametrize("change", ["more", "rank", "rows", "temperature", "keyword"])
def test_calls_that_are_not_covered_run_as_before(change, calls):
    cls = loss_class(more=", scale=1.0", out="rows * scale")
    loss = cls(options(nce_T=torch.tensor(0.1)) if change == "temperature" else options())
    q, k = rows()
    calls.clear()
    if change == "more":
        torch.testing.assert_close(loss(q, k, 3.0), 3 * loss(q, k))
    elif change == "rank":
        assert loss(q[None].reshape(2, 4, 6), k.reshape(2, 4, 6)[..., :6]).numel() > 0
    elif change == "rows":
        with pytest.raises(RuntimeError, match="shape"):  # the class's own error
            loss(q[:7], k[:7])
    elif change == "temperature":
        loss(q, k)
    else:
        with pytest.raises(TypeError, match="unknown"):
            loss(q, k, unknown=1)
    assert len(calls) == (change == "more")


def test_keywords_of_the_class_itself_are_understood(calls):
    cls = loss_class()
    q, k = rows()
    calls.clear()
    loss = cls(options())
    torch.testing.assert_close(loss(feat_k=k, feat_q=q), loss(q, k))
    assert len(calls) == 2


def test_a_subclass_with_its_own_part_is_not_replaced_by_its_base():
    source = LOSS.format(**USUAL | {"logits": "logits = self.shape(logits)"})
    source += "    def shape(self, logits):\n        return logits\n"
    source += "class Other(Contrast):\n    def shape(self, logits):\n        return logits * 2\n"
    source += "class Same(Contrast):\n    pass\n"
    module = module_of(source)
    names = accelerate.patch(module)
    assert [name.rpartition(".")[2] for name in names] == ["Contrast", "Same"]
    q, k = rows()
    loss, other, same = (cls(options())(q, k) for cls in (module.Contrast, module.Other, module.Same))
    torch.testing.assert_close(same, loss)
    doubled = module.Contrast(options(nce_T=0.05))(q, k)
    torch.testing.assert_close(other, doubled)


HDCE = """
class PatchHDCELoss(nn.Module):
    def __init__(self, opt):
        super().__init__()
        self.opt = opt

    def forward(self, feat_q, feat_k, weight=None):
        groups = 1 if self.opt.nce_includes_all_negatives_from_minibatch else self.opt.batch_size
        q = feat_q.reshape(groups, -1, feat_q.shape[1])
        k = feat_k.detach().reshape(groups, -1, feat_q.shape[1])
        logits = q @ k.transpose(1, 2)
        positive = logits.diagonal(dim1=1, dim2=2)
        if weight is not None:
            logits = logits * weight
        diagonal = torch.eye(q.shape[1], dtype=torch.bool)
        logits = logits.masked_fill(diagonal, -10.0)
        decoupled = torch.logsumexp((logits - positive[:, :, None]) / self.opt.nce_T, 2).flatten()
        both = torch.cat([positive[:, :, None], logits], 2).flatten(0, 1) / self.opt.nce_T
        shown = nn.functional.cross_entropy(both, torch.zeros(len(both), dtype=torch.long), reduction="none")
        return decoupled.mean() - decoupled.mean().detach() + shown.detach()
"""


def test_weights_of_negatives_are_part_of_two_losses(calls):
    weight = torch.rand(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weighted = {"more": ", weight=None"}
    weighted["logits"] = "eye = torch.eye(q.shape[1]).bool(); off = 1 if weight is None else weight.masked_fill(eye, 1)"
    for source in (HDCE, LOSS.format(**USUAL | weighted).replace("logits / ", "logits * off / ")):
        module = module_of(source)
        (name,) = accelerate.patch(module)
        loss = getattr(module, name.rpartition(".")[2])(options())
        calls.clear()
        assert_same(loss)
        assert_same(loss, weight)
        assert_same(loss, weight=weight)
        assert len(calls) == 3
        loss(*rows(), weight=weight.clone().requires_grad_())  # its gradient is the class's own affair
        assert len(calls) == 3


def test_both_losses_of_dclgan_are_found():
    module = module_of(COSINE_LOSS + DOT_LOSS.format(name="PatchNCELoss2", extra=""))
    names = accelerate.patch(module)
    assert [name.rpartition(".")[2] for name in names] == ["PatchNCELoss", "PatchNCELoss2"]
    assert replaced(module.PatchNCELoss)
    assert replaced(module.PatchNCELoss2)
