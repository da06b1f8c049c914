"""The check at the first use of a kernel: right and wrong kernels, remembered verdicts, when nothing is checked.

`dispatch.is_default` is replaced, so that tensors on the CPU take the path of an accelerator and the kernels run in
Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fastnce.kernels import (
    activate,
    blur,
    common,
    cosine,
    few_outputs,
    nce,
    nce_keys,
    norm_whole,
    project,
    reflect_pad,
    sample,
)
from fastnce.kernels.planned import forget_plans
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnce import PatchNCEHead, patch_nce, project_patches
from fastnce.common import dispatch, first_use, verdicts
from fastnce.common.agreement import Check
from fastnce.nce import patch_nce_layers, which
from fastnce.nce.impl.uses import RowsUse
from fastnce.networks import BlurDown, BlurUp, InstanceNorm
from fastnce.networks.layers import LastConvolution, ReflectionPad

pytestmark = pytest.mark.skipif(not common.INTERPRET.value, reason="made for Triton's interpreter")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def accelerated(monkeypatch, tmp_path):
    """The CPU counts as an accelerator; verdicts are kept in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "is_default", lambda device: True)
    first_use.forget()
    yield
    first_use.forget()


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """The families that were checked, in order."""
    families: list[str] = []
    find = first_use.find_fault

    def counted(use, device, dtype):
        families.append(use.family)
        return find(use, device, dtype)

    monkeypatch.setattr(first_use, "find_fault", counted)
    return families


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def loss_and_gradient(**options) -> tuple[torch.Tensor, torch.Tensor]:
    queries = rows(24, 16).requires_grad_()
    loss = patch_nce(queries, rows(24, 16, seed=1), images=2, **options)
    return loss.detach(), torch.autograd.grad(loss, queries)[0]


def maps() -> list[torch.Tensor]:
    return [torch.randn(2, c, 6, 5, generator=torch.Generator().manual_seed(c)) for c in (3, 8)]


def head_loss(implementation=None) -> torch.Tensor:
    torch.manual_seed(3)
    head = PatchNCEHead([3, 8], dim=16, patches=8, implementation=implementation)
    ids = [torch.arange(8), torch.arange(8, 16)]
    return head([m.requires_grad_() for m in maps()], maps(), patch_ids=ids)


def layer(name: str, implementation=None) -> torch.Tensor:
    layers = {
        "instance_norm": InstanceNorm(8),
        "reflection_pad": ReflectionPad(1),
        "blur_down": BlurDown(8),
        "blur_up": BlurUp(8),
        "few_outputs_convolution": LastConvolution(8, 3, 3),
    }
    torch.manual_seed(1)
    one = layers[name] if name != "activate" else BlurDown(8)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    one.implementation = implementation
    x = torch.randn(1, 8, 12, 10, generator=torch.Generator().manual_seed(2))
    return one.after(x, torch.linspace(-1, 1, 8), 0.2) if name == "activate" else one(x)


CALLS = {
    "patch_nce": lambda implementation=None: loss_and_gradient(implementation=implementation)[0],
    "patch_nce_layers": lambda implementation=None: patch_nce_layers(
        [[rows(8, 16).requires_grad_()]], [[rows(8, 16, seed=1)]], cosine=True, implementation=implementation
    ),
    "project_patches": lambda implementation=None: project_patches(
        maps(), [torch.arange(8), torch.arange(8)], implementation=implementation
    )[1],
    "PatchNCEHead": head_loss,
    **{
        name: (lambda implementation=None, name=name: layer(name, implementation))
        for name in ("instance_norm", "activate", "reflection_pad", "blur_down", "blur_up", "few_outputs_convolution")
    },
}
"""One call per family; each returns a tensor."""

HOSTS = {
    "patch_nce": (nce, "nce_forward"),
    "patch_nce_layers": (cosine, "cosine"),
    "project_patches": (project, "project"),
    "PatchNCEHead": (nce, "mean_by_direction"),
    "instance_norm": (norm_whole, "forward"),
    "activate": (activate, "launch"),
    "reflection_pad": (reflect_pad, "launch"),
    "blur_down": (blur, "launch"),
    "blur_up": (blur, "launch"),
    "few_outputs_convolution": (few_outputs, "packed_weight"),
}
"""A host function of each family's kernels."""


def doubled(result):
    if isinstance(result, torch.Tensor):
        return result * 2 if result.is_floating_point() else result
    return type(result)(doubled(part) for part in result) if isinstance(result, list | tuple) else result


def make_wrong(monkeypatch, family: str) -> None:
    """Let a kernel return wrong numbers: doubled, with another epsilon, or left unwritten by a launch."""
    module, name = HOSTS[family]
    right = getattr(module, name)

    def wrong(*arguments, **options):
        if name == "forward":
            return right(*arguments[:5], 1.0, *arguments[6:])  # another epsilon
        if name != "launch":
            return doubled(right(*arguments, **options))
        for field in arguments[3:5]:
            if isinstance(field, tuple):
                field[0].fill_(0.25)
        return None

    monkeypatch.setattr(module, name, wrong)
    forget_plans()  # they have recorded what was right


def raises(*_, **__):
    raise RuntimeError("out of resource: shared memory\nRequired: 300000")


@triton.jit
def does_not_build(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), undefined_name)  # noqa: F821


def not_the_interpreters() -> None:
    """Leave out what Triton 3.6's interpreter makes NumPy warn of."""
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)


def one_warning(call) -> tuple[torch.Tensor, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        not_the_interpreters()
        result = call()
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1, messages
    return result, messages[0]


def no_warning(call) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        not_the_interpreters()
        return call()


@pytest.mark.parametrize("family", CALLS)
def test_right_kernels_are_used_without_a_warning_and_checked_once(family, checked):
    result = no_warning(CALLS[family])
    assert family in checked
    again, count = no_warning(CALLS[family]), len(checked)
    assert torch.equal(result, again)
    assert torch.equal(result, CALLS[family]("triton"))
    assert len(checked) == count == len(set(checked))
    first_use.forget()  # as another process
    no_warning(CALLS[family])
    assert len(checked) == count


@pytest.mark.parametrize("family", CALLS)
def test_a_wrong_kernel_is_replaced_with_one_warning(family, checked, monkeypatch):
    make_wrong(monkeypatch, family)
    result, message = one_warning(CALLS[family])
    assert f"the kernels of {family} in float32 are wrong on cpu" in message
    assert "has an error of" in message
    assert "fastnce doctor" in message
    assert message.count(". ") <= 1
    torch.testing.assert_close(result, CALLS[family]("eager"))
    count = len(checked)
    assert torch.equal(no_warning(CALLS[family]), result)
    assert len(checked) == count
    first_use.forget()  # another process warns again and does not check
    again, later = one_warning(CALLS[family])
    assert later == message
    assert torch.equal(again, result)
    assert len(checked) == count
    assert family in "\n".join(line for line in first_use.report(CPU, [family]) if "WRONG" in line)


def test_a_wrong_gradient_is_found(monkeypatch):
    right = nce.nce_forward

    def wrong(*arguments, **options):
        *rest, gradients = right(*arguments, **options)
        return *rest, [g * 1.0001 for g in gradients]

    monkeypatch.setattr(nce, "nce_forward", wrong)
    (loss, gradient), message = one_warning(loss_and_gradient)
    assert "the gradient of queries" in message
    assert all(map(torch.equal, (loss, gradient), loss_and_gradient(implementation="eager")))


def test_an_error_on_confident_rows_alone_is_found(monkeypatch):
    """A positive that is rounded to 8 bits changes rows near p = 0.5 and above, and random rows by little."""
    right = nce.nce_forward

    def careless(*arguments, **options):
        loss, negative, positive, gradients = right(*arguments, **options)
        return torch.where(loss < 0.01, loss * 1.5, loss), negative, positive, gradients

    monkeypatch.setattr(nce, "nce_forward", careless)
    _, message = one_warning(loss_and_gradient)
    assert "the loss of confident rows" in message


def test_key_gradients_are_checked_when_they_are_used(checked, monkeypatch):
    no_warning(loss_and_gradient)
    right = nce_keys.nce_key_gradients
    monkeypatch.setattr(nce_keys, "nce_key_gradients", lambda *a, **o: doubled(right(*a, **o)))

    def with_keys(**options):
        keys = rows(24, 16, seed=1).requires_grad_()
        loss = patch_nce(rows(24, 16).requires_grad_(), keys, images=2, detach_keys=False, **options)
        return torch.autograd.grad(loss, keys)[0]

    gradient, message = one_warning(with_keys)
    assert "the gradient of keys" in message
    assert torch.equal(gradient, with_keys(implementation="eager"))
    assert which(CPU, dim=16, rows=12).implementation == "eager"
    loss, _ = no_warning(loss_and_gradient)  # the whole family is replaced
    assert torch.equal(loss, loss_and_gradient(implementation="eager")[0])


@pytest.mark.parametrize("fault", ["raises", "does not build", "NaN"])
def test_a_kernel_that_does_not_run(fault, checked, monkeypatch):
    right = nce.nce_forward
    if fault == "raises":
        monkeypatch.setattr(nce, "launch", raises)
    elif fault == "does not build":
        monkeypatch.setattr(nce, "launch", lambda *_, **__: does_not_build[(1,)](torch.zeros(16), BLOCK=16))
    else:
        monkeypatch.setattr(
            nce, "nce_forward", lambda *a, **o: doubled(doubled(right(*a, **o))) and _nan(right(*a, **o))
        )
    (loss, gradient), message = one_warning(loss_and_gradient)
    expected = {"raises": "RuntimeError: out of resource: shared memory)", "does not build": "undefined_name"}
    assert expected.get(fault, "an error of nan") in message
    assert "\n" not in message
    assert all(map(torch.equal, (loss, gradient), loss_and_gradient(implementation="eager")))
    no_warning(loss_and_gradient)
    assert checked == ["patch_nce"]


def _nan(result):
    loss, *rest = result
    return loss * torch.nan, *rest


def test_a_warning_of_a_right_kernel_is_no_fault(monkeypatch):
    right = nce.nce_forward

    def warns(*arguments, **options):
        warnings.warn("an old interface", DeprecationWarning, stacklevel=1)
        return right(*arguments, **options)

    monkeypatch.setattr(nce, "nce_forward", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DeprecationWarning, match="an old interface"):
            loss_and_gradient()
    assert list(only_place().values()) == [""]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(loss_and_gradient()[0], loss_and_gradient(implementation="triton")[0])


def test_wrong_ids_are_found(monkeypatch):
    monkeypatch.setattr(sample, "launch", lambda kernel, blocks, like, layers, seeds, ids, *_, **__: ids.fill_(3))
    ids, message = one_warning(lambda: PatchNCEHead([3, 8], dim=16, patches=8).draw_ids(maps()))
    assert "drawn twice" in message
    assert all(len(i.unique()) == 8 for i in ids)


def test_explicit_triton_is_neither_checked_nor_replaced(checked, monkeypatch):
    no_warning(lambda: loss_and_gradient(implementation="triton"))
    assert checked == []
    make_wrong(monkeypatch, "patch_nce")
    one_warning(loss_and_gradient)
    wrong, _ = no_warning(lambda: loss_and_gradient(implementation="triton"))
    assert not torch.allclose(wrong, loss_and_gradient()[0])


# ---- the file ----


def only_place() -> dict[str, str]:
    (found,) = json.loads(verdicts.path().read_text())["places"].values()
    return found


def test_the_file_names_device_driver_and_versions():
    loss_and_gradient()
    ((place, found),) = json.loads(verdicts.path().read_text())["places"].items()
    assert f"torch {torch.__version__}" in place
    assert f"triton {triton.__version__}" in place
    assert "driver" in place
    assert "fastnce" in place
    assert "source" in place
    assert list(found.values()) == [""]
    assert next(iter(found)).startswith("patch_nce float32 ")


DAMAGED = ["", "{", "[]", "null", '{"format": 99}', '{"format": 1, "places": 3}', "\x00\xff", "9" * 5000]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_replaced(content, checked):
    verdicts.path().parent.mkdir(parents=True)
    verdicts.path().write_bytes(content.encode("latin1"))
    no_warning(loss_and_gradient)
    assert checked == ["patch_nce"]
    assert list(only_place().values()) == [""]


@pytest.mark.parametrize("content", [{"patch_nce": 3}, {"": "", "x y z": "bad"}, {"patch_nce float32": ["a"]}, []])
def test_foreign_verdicts_are_ignored(content, checked):
    verdicts.path().parent.mkdir(parents=True)
    verdicts.path().write_text(json.dumps({"format": 1, "places": {verdicts.place_of(CPU): content}}))
    no_warning(loss_and_gradient)
    assert checked == ["patch_nce"]


def test_a_folder_that_cannot_be_written(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "write_whole", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    no_warning(loss_and_gradient)
    no_warning(loss_and_gradient)
    assert checked == ["patch_nce"]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(dispatch, "is_default", lambda device: True)
    (tmp_path / "file").write_text("in the way")
    first_use.forget()
    no_warning(loss_and_gradient)
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    first_use.forget()
    no_warning(loss_and_gradient)
    folder.chmod(stat.S_IRWXU)


def test_another_driver_or_source_is_checked_anew(checked, monkeypatch):
    make_wrong(monkeypatch, "patch_nce")
    one_warning(loss_and_gradient)
    for name, value in (("device_and_driver", lambda *_: ("GPU", "999.1")), ("source_digest", lambda: "other")):
        first_use.forget()
        monkeypatch.setattr(verdicts, name, value)
        one_warning(loss_and_gradient)
    assert checked == ["patch_nce"] * 3
    assert len(json.loads(verdicts.path().read_text())["places"]) == 3


def test_few_places_are_kept():
    for i in range(verdicts.MOST_PLACES + 3):
        verdicts.remember(f"place {i}", "patch_nce float32 ()", "")
    places = json.loads(verdicts.path().read_text())["places"]
    assert list(places) == [f"place {i}" for i in range(3, verdicts.MOST_PLACES + 3)]


# ---- what is not checked, and what does not change ----


def test_the_option_switches_checks_off(checked, monkeypatch):
    make_wrong(monkeypatch, "patch_nce")
    with first_use.checks(False):
        wrong, _ = no_warning(loss_and_gradient)
    monkeypatch.setenv("FASTNCE_CHECK_KERNELS", "0")
    no_warning(loss_and_gradient)
    assert checked == []
    assert not verdicts.path().exists()
    monkeypatch.setenv("FASTNCE_CHECK_KERNELS", "1")
    first_use.forget()
    right, message = one_warning(lambda: loss_and_gradient()[0])
    assert "patch_nce" in message
    assert not torch.allclose(wrong, right)


def test_nothing_is_checked_while_something_records_or_traces(checked, monkeypatch):
    queries, keys = rows(24, 16), rows(24, 16, seed=1)
    with FakeTensorMode() as mode:
        patch_nce(mode.from_tensor(queries), mode.from_tensor(keys))
    torch.func.grad(lambda q: patch_nce(q, keys))(queries)
    compiled = torch.compile(lambda q: patch_nce(q, keys), fullgraph=True, backend="eager")
    compiled(queries)
    norm = torch.compile(InstanceNorm(4), fullgraph=True, backend="eager")
    norm(torch.randn(1, 4, 6, 6))

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            patch_nce(queries, keys)
            return gradient

    Inside.apply(torch.ones(1, requires_grad=True)).sum().backward()
    monkeypatch.setattr(first_use, "is_capturing", lambda device: True)
    cuda = torch.device("cuda", 0)
    assert first_use.trusted(RowsUse(16, 8), cuda, torch.float32) is first_use.NOT_CHECKED
    assert not first_use.settled(first_use.NOT_CHECKED)
    assert checked == []
    patch_nce(queries, keys)
    assert checked == ["patch_nce"]


def test_known_verdicts_are_followed_while_tracing(checked, monkeypatch):
    torch._dynamo.reset()  # compiled code keeps the choice that was known when it was compiled
    make_wrong(monkeypatch, "patch_nce")
    one_warning(loss_and_gradient)
    make_wrong(monkeypatch, "instance_norm")
    one_warning(CALLS["instance_norm"])
    keys = rows(24, 16, seed=1)
    eager = patch_nce(rows(24, 16), keys, implementation="eager")
    compiled = torch.compile(lambda q: patch_nce(q, keys), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(rows(24, 16)), eager)
    x = torch.randn(1, 4, 6, 6)
    norm = torch.compile(InstanceNorm(4), fullgraph=True, backend="eager")
    torch.testing.assert_close(norm(x), F.instance_norm(x))
    torch._dynamo.reset()
    first_use.forget()  # a compiler reads the file too
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        torch.testing.assert_close(compiled(rows(24, 16)), eager)
    assert checked == ["patch_nce", "instance_norm"]


def test_a_check_changes_nothing_that_the_caller_sees(checked):
    queries, keys, images = rows(24, 16), rows(24, 16, seed=1), maps()
    head = PatchNCEHead([3, 8], dim=16, patches=8)
    x, norm = torch.randn(1, 8, 12, 10), InstanceNorm(8)
    torch.set_default_dtype(torch.float64)
    before, saved = torch.get_rng_state(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    ids = [torch.arange(8), torch.arange(8)]
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), hooks:
            no_warning(lambda: (patch_nce(queries, keys), norm(x), head(images, images, patch_ids=ids)))
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
    assert checked == ["patch_nce", "instance_norm", "PatchNCEHead"]
    assert torch.equal(torch.get_rng_state(), before)
    assert saved == []


def test_the_first_use_in_inference_mode_and_under_a_default_device(checked):
    with torch.inference_mode(), torch.device("meta"):
        patch_nce(rows_on_cpu(24, 16), rows_on_cpu(24, 16))
    assert checked == ["patch_nce"]
    assert only_place()[next(iter(only_place()))] == ""


def rows_on_cpu(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0.25, device="cpu")


def test_a_failing_comparison_is_no_verdict(monkeypatch):
    """Lack of memory, or a fault of the exact form, says nothing about the kernels."""

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(RowsUse, "measure", no_memory)
    loss, _ = no_warning(loss_and_gradient)
    assert torch.equal(loss, loss_and_gradient(implementation="triton")[0])
    assert not verdicts.path().exists()


def test_a_settled_choice_changes_with_the_epoch(monkeypatch):
    use = RowsUse(16, 12, 2, wanted=(True, False, False))
    choice = first_use.trusted(use, CPU, torch.float32)
    assert choice is dispatch.KERNELS
    assert first_use.settled(choice)
    before = first_use.epoch()
    assert first_use.trusted(use, CPU, torch.float32) is choice
    assert first_use.epoch() == before
    monkeypatch.setattr(RowsUse, "measure", lambda *_: iter([Check("the loss", 1.0, 0.1)]))
    one_warning(lambda: first_use.trusted(use._replace(unit=True), CPU, torch.float32))
    assert first_use.epoch() > before
    assert not first_use.trusted(use, CPU, torch.float32).triton


def test_a_cpu_never_checks_by_itself(checked, monkeypatch):
    monkeypatch.setattr(dispatch, "is_default", lambda device: device.type != "cpu")
    for call in CALLS.values():
        no_warning(call)
    assert checked == []
    assert not verdicts.path().exists()


def test_a_busy_thread_does_not_wait_for_a_check(checked, monkeypatch):
    """The check of another thread may need the backward pass that this thread computes."""
    monkeypatch.setattr(first_use, "is_busy", lambda device: True)
    held, finish = threading.Event(), threading.Event()

    def hold():
        with first_use._lock:
            held.set()
            finish.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    try:
        assert held.wait(60)
        no_warning(loss_and_gradient)
        assert checked == []
    finally:
        finish.set()
        other.join()
    monkeypatch.undo()


def test_convolutions_of_other_shapes_are_checked_apart(checked):
    x = torch.randn(1, 8, 12, 12)
    for outputs, kernel in ((3, 7), (1, 5), (3, 7)):
        LastConvolution(8, outputs, kernel)(x)
    assert checked == ["few_outputs_convolution"] * 2


def test_a_warning_that_is_an_error_leaves_a_wrong_kernel_unused(checked, monkeypatch):
    make_wrong(monkeypatch, "patch_nce")
    one_warning(loss_and_gradient)
    first_use.forget()
    device = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="the kernels of patch_nce in float32 are wrong"):
            first_use.followed("patch_nce", device, torch.float32)
    assert first_use.followed("patch_nce", device, torch.float32).implementation == "eager"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_in_the_place_of_the_file_is_left_alone(checked):
    verdicts.path().parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(verdicts.path())
    no_warning(loss_and_gradient)
    assert checked == ["patch_nce"]
    assert verdicts.path().is_fifo()
