"""Steps that need less memory: a batch in parts, and recomputed residual blocks."""

from __future__ import annotations

import pytest
import torch

from fastnce.engine import accumulate
from fastnce.engine.options import OptimOptions
from fastnce.engine.recompute import BLOCKS, recompute_blocks
from fastnce.engine.step import Step
from fastnce.methods import Batch, Draws
from tests.engine.test_engine import random_batch, small_method, smaller_method
from tests.methods.test_methods_more import build, pictures

IDS = (38 * 38, 32 * 32, 16 * 16, 8 * 8)


def given_ids(calls: int) -> list[list[torch.Tensor]]:
    return [[torch.randperm(n)[:16] for n in IDS] for _ in range(calls)]


def parts_and_whole(make, parts: int, precision: str = "fp32") -> list[Step]:
    whole, shared = make(), make()
    shared.load_state_dict(whole.state_dict())
    return [Step(whole, OptimOptions(), precision), Step(shared, OptimOptions(accumulate=parts), precision)]


def assert_alike(steps: list[Step], tolerance: float) -> None:
    one, other = (step.state() for step in steps)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        if key.startswith("network/"):
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=tolerance, msg=key)


@pytest.mark.parametrize(("parts", "flip"), [(2, False), (4, True)])
def test_cut_in_parts_is_cut(parts, flip):
    """The same losses and weights over steps, in float64, where Adam does not amplify rounding."""
    steps = parts_and_whole(lambda: small_method(nce_idt=not flip, flip_equivariance=flip).double(), parts)
    for _ in range(3):
        batch, ids = random_batch(4, torch.float64), given_ids(1 if flip else 2)
        expected, found = (step.run(batch, Draws(flip, ids)) for step in steps)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert_alike(steps, 2e-9)  # 1e-5 of the learning rate


def test_the_gradients_of_parts_in_float32():
    """Errors against float64, in Adam's first moment, are at most twice those of the whole batch."""
    exact = Step(small_method().double(), OptimOptions())
    steps = parts_and_whole(small_method, 4)
    batch, ids = random_batch(4), given_ids(2)
    for step in steps:
        step.method.load_state_dict(exact.method.state_dict())
        step.run(batch, Draws(patch_ids=ids))
    exact.method.load_state_dict({key: t.float().double() for key, t in exact.method.state_dict().items()})
    exact.run(Batch(*(pictures.double() for pictures in batch)), Draws(patch_ids=ids))
    for group in ("D", "G", "F"):
        found = []
        for step in (exact, *steps):
            state = step.state()
            keys = [key for key in state if key.startswith(f"adam/{group}/") and key.endswith("exp_avg")]
            found.append(torch.cat([state[key].flatten().double() for key in keys]))
        whole, parts = (torch.linalg.vector_norm(moment - found[0]) for moment in found[1:])
        assert parts <= 2 * whole, group
        assert whole <= 1e-4 * torch.linalg.vector_norm(found[0]), group


@pytest.mark.parametrize("preset", ["cyclegan", "dclgan", "dcdgan", "sincut"])
def test_every_order_of_phases_in_parts(preset):
    """CycleGAN updates its generators first; its discriminators still judge images from before the update."""
    changes = {"pool_size": 0, "negatives": "image"} | ({"patches": 16} if preset == "sincut" else {})
    steps = parts_and_whole(lambda: build(preset, **changes).eval(), 2)  # eval mode: SinCUT draws noise otherwise
    method = steps[0].method
    calls = {"cyclegan": 0}.get(preset, 2)
    for _ in range(2):
        batch = pictures(4)
        with torch.no_grad():
            generator = getattr(method, "generator", None) or method.generator_a
            maps = generator(batch.a, method.layers, True) if calls else []
        ids = [[torch.randperm(m.shape[2] * m.shape[3])[:16] for m in maps] for _ in range(calls)]
        expected, found = (step.run(batch, Draws(patch_ids=ids or None)) for step in steps)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert_alike(steps, 2e-9)


def test_ids_of_each_picture_go_with_it():
    ids = torch.arange(12).view(4, 3)
    batch = random_batch(4)
    found = accumulate.split(batch, Draws(True, [[ids, ids[0]]]), 2)
    assert [draws.flip for _, draws in found] == [True, True]
    assert torch.equal(found[1][0].b, batch.b[2:])
    assert torch.equal(found[1][1].patch_ids[0][0], ids[2:])
    assert torch.equal(found[1][1].patch_ids[0][1], ids[0])


def test_a_part_that_is_not_finite_skips_the_step():
    step = Step(small_method(), OptimOptions(accumulate=2), "fp16")
    step.loss_scale.scale.fill_(4.0)
    step.run(random_batch(2), Draws())
    assert step.bad_steps.item() == 0
    before = {key: tensor.clone() for key, tensor in step.state().items()}
    batch = random_batch(2)
    batch.a[1, 0, 0, 0] = batch.b[1, 0, 0, 0] = float("nan")
    step.run(batch, Draws())
    assert step.bad_steps.item() == 1
    assert step.loss_scale.scale.item() == 2.0
    for key, tensor in step.state().items():
        if key.startswith(("network/", "adam/")):
            assert torch.equal(tensor, before[key]), key


def test_what_looks_at_the_whole_batch_is_refused():
    options = OptimOptions(accumulate=2)
    for method, reason in (
        (small_method(negatives="batch"), r"loss\.negatives=batch contrasts pictures of the whole batch"),
        (build("dclgan", negatives="image", external="bank"), r"loss\.external=bank would show a part"),
        (build("cut", network={"norm": "batch"}), "batch norm takes its statistics over the whole batch"),
    ):
        with pytest.raises(ValueError, match=rf"optim\.accumulate=2 would change what is computed: {reason}"):
            Step(method, options)
        Step(method, OptimOptions())
    with pytest.raises(ValueError, match=r"data\.batch=3 cannot be computed in optim\.accumulate=2 equal parts"):
        Step(small_method(), options).run(random_batch(3), Draws())
    with pytest.raises(ValueError, match=r"optim\.accumulate must be at least 1, not 0"):
        Step(small_method(), OptimOptions(accumulate=0))


def kept_bytes(step: Step, batch: Batch) -> int:
    """The peak of bytes that autograd keeps between forward and backward, each storage counted once."""
    kept: dict[int, int] = {}
    now, most = [0], [0]

    class Held:
        def __init__(self, tensor: torch.Tensor):
            self.tensor = tensor
            self.key = tensor.untyped_storage().data_ptr()
            kept[self.key] = kept.get(self.key, 0) + 1
            if kept[self.key] == 1:
                now[0] += tensor.untyped_storage().nbytes()
                most[0] = max(most[0], now[0])

        def __del__(self):
            kept[self.key] -= 1
            if kept[self.key] == 0:
                now[0] -= self.tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        step.run(batch, Draws(patch_ids=given_ids(2)))
    return most[0]


def test_parts_and_recomputed_blocks_keep_less():
    batch = random_batch(4)
    found = {}
    for name, parts, recompute in (("plain", 1, False), ("parts", 4, False), ("blocks", 1, True), ("both", 4, True)):
        torch.manual_seed(0)
        step = Step(small_method(), OptimOptions(accumulate=parts), recompute=recompute)
        found[name] = kept_bytes(step, batch)
    weights = sum(p.numel() * 4 for p in small_method().parameters())
    assert found["parts"] - weights < 0.3 * (found["plain"] - weights)
    assert found["blocks"] < 0.9 * found["plain"]
    assert found["both"] < found["parts"]


@pytest.mark.parametrize("preset", ["cut", "sincut", "cut-dropout", "cut-restorer"])
def test_recomputed_blocks_give_the_same_gradients(preset):
    network = {"cut-dropout": {"dropout": True}, "cut-restorer": {"generator": "restorer"}}.get(preset, {})
    layers = {"nce_layers": [0, 1]} if preset == "cut-restorer" else {}
    methods = [build(preset.split("-")[0], network=network, patches=4, **layers) for _ in range(2)]
    methods[1].load_state_dict(methods[0].state_dict())
    batch = pictures(2)
    results = []
    for method, recompute in zip(methods, (False, True), strict=True):
        calls: list[int] = []
        step = Step(method, OptimOptions(), recompute=recompute)
        block = next(m for m in method.generator.modules() if isinstance(m, BLOCKS))
        inner = next(m for m in block.modules() if not list(m.children()))
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(5)
        losses = step.run(batch, Draws())
        results.append((losses, step.state(), len(calls)))
    for name, value in results[0][0].items():
        assert torch.equal(results[1][0][name], value), name
    for key, tensor in results[0][1].items():
        assert torch.equal(results[1][1][key], tensor), key
    assert results[1][2] > results[0][2]  # the blocks were recomputed


def test_recomputing_does_not_ruin_a_compiled_step(one_block):
    methods = [smaller_method(nce_idt=False).double() for _ in range(2)]
    methods[1].load_state_dict(methods[0].state_dict())
    plain = Step(methods[0], OptimOptions())
    compiled = Step(methods[1], OptimOptions(), compile=True, backend="aot_eager", recompute=True)
    for _ in range(2):
        batch, ids = random_batch(dtype=torch.float64), [given_ids(1)[0][1:3]]  # those of its two layers
        expected, found = (step.run(batch, Draws(patch_ids=ids)) for step in (plain, compiled))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)
    assert all(part.compiled is not None for part in (compiled.generate, *(phase.loss for phase in compiled.phases)))


def test_generators_without_blocks_are_named():
    method = build("cyclegan", network={"generator": "unet_128", "width": 2})
    with pytest.raises(ValueError, match=r"run\.checkpoint_activations: UnetGenerator has no residual blocks"):
        recompute_blocks(method)
