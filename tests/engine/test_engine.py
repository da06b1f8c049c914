"""The step, the optimisers, checkpoints, and runs that are interrupted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.config
from PIL import Image

from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.engine import checkpoint, loop
from fastnce.engine.checkpoint import Checkpoints, NotSaved
from fastnce.engine.choices import pick_compile, pick_device, pick_layout, pick_precision, set_tf32
from fastnce.engine.compiled import Compiled
from fastnce.engine.cudagraph import library_settings
from fastnce.engine.distributed import Ranks
from fastnce.engine.grid import save_grid
from fastnce.engine.log import Pace, clock
from fastnce.engine.loop import TrainingFailed, train
from fastnce.engine.optim import LossScale, ParameterGroup, WeightAverage
from fastnce.engine.options import OptimOptions, RunOptions
from fastnce.engine.schedule import linear
from fastnce.engine.step import Step
from fastnce.engine.stored import load_generators, read_state
from fastnce.methods import CUT, Batch, CUTOptions, Draws, NetworkOptions
from fastnce.training import train_run
from tests.forked import Forked
from tests.logs import log_lines
from tests.methods.test_methods_more import build

SMALL = [
    "network.generator=resnet_4blocks",
    "network.width=4",
    "network.discriminator_width=4",
    "loss.nce_layers=0,4,8,12",
    "loss.patches=16",
    "loss.projection=8",
    "data.load_size=36",
    "data.crop_size=32",
    "run.device=cpu",
    "run.threads=1",
    "run.log_every=1",
    "run.sample_every=0",
]


def small_method(**options) -> CUT:
    network = NetworkOptions(generator="resnet_4blocks", width=4, discriminator_width=4)
    return CUT(CUTOptions(nce_layers=[0, 4, 8, 12], patches=16, projection=8, **options), network)


def smaller_method(**options) -> CUT:
    """`small_method` with a smaller discriminator and contrast at two layers: a compiler traces every operation."""
    network = NetworkOptions("resnet_4blocks", width=4, discriminator_width=4, discriminator_layers=1)
    return CUT(CUTOptions(nce_layers=[4, 8], patches=16, projection=8, **options), network)


def small_config(folder: Path, *overrides: str, method: str = "fastcut"):
    config = resolve(method, None, [*SMALL, *overrides])
    config.data.dir = str(folder)
    return config


def random_batch(images: int = 1, dtype=torch.float32) -> Batch:
    return Batch(*(torch.rand(images, 3, 32, 32, dtype=dtype) * 2 - 1 for _ in range(2)))


def training_tensors(run: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(run / "checkpoints").load()
    assert found is not None
    return found[0]


@pytest.mark.parametrize(("full", "decay"), [(200, 200), (150, 50), (3, 0), (0, 4)])
def test_the_schedule_is_the_published_one(full, decay):
    parameter = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.Adam([parameter], lr=2e-4)
    published = torch.optim.lr_scheduler.LambdaLR(adam, lambda e: 1.0 - max(0, e + 1 - full) / float(decay + 1))
    for epoch in range(full + decay):
        assert 2e-4 * linear(epoch, full, decay) == pytest.approx(published.get_last_lr()[0], rel=1e-12)
        adam.step()
        published.step()


def test_a_pool_lies_as_the_pictures_do_also_from_a_checkpoint():
    """Fakes are judged in one batch with real images; another layout would change that of both."""
    methods = [build("cyclegan", pool_size=2, network={"generator": "resnet_4blocks"}).float() for _ in range(2)]
    steps = [Step(method, OptimOptions(), layout=torch.channels_last) for method in methods]
    steps[0].run(random_batch(2), Draws())
    steps[1].load_state({key: tensor.contiguous() for key, tensor in steps[0].state().items()})
    steps[1].run(random_batch(2), Draws())
    for method, step in zip(methods, steps, strict=True):
        assert method.pool_b.pictures.is_contiguous(memory_format=torch.channels_last)
        place = method.pool_b.pictures.data_ptr()
        step.run(random_batch(2), Draws())
        assert method.pool_b.pictures.data_ptr() == place


def test_channels_last_weights_learn_the_same():
    """Fused Adam must not confuse the elements of a gradient whose strides differ from its parameter's."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(3)
        method = small_method().double()
        step = Step(method, OptimOptions(), layout=layout)
        assert next(p for p in method.parameters() if p.dim() == 4).is_contiguous(memory_format=layout)
        for _ in range(2):
            step.run(random_batch(dtype=torch.float64), Draws())
        results.append([p.detach().contiguous() for p in method.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-9)  # 1e-5 of the learning rate


@pytest.mark.parametrize("amx", [True, False, None])
def test_the_layout_that_a_device_wants(amx, monkeypatch):
    if amx is None:
        monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # a later PyTorch may lack it
    else:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    found = [pick_layout(device, dtype) for device in (cpu, gpu) for dtype in (torch.float32, torch.bfloat16)]
    plain, last = torch.contiguous_format, torch.channels_last
    assert found == [plain, last if amx else plain, last, last]
    assert Step(small_method(), OptimOptions(), "bf16").layout is found[1]


def test_a_step_that_is_not_finite_changes_nothing():
    method = small_method()
    step = Step(method, OptimOptions())
    step.run(random_batch(), Draws())
    before = {key: tensor.clone() for key, tensor in step.state().items()}
    broken = random_batch()
    broken.a[0, 0, 0, 0] = float("nan")
    for skipped in (1, 2):
        step.run(broken, Draws())
        assert step.bad_steps.item() == skipped
    for key, tensor in step.state().items():
        if key != "bad_steps":
            assert torch.equal(tensor, before[key]), key
    step.run(random_batch(), Draws())
    assert step.bad_steps.item() == 0
    assert not torch.equal(step.state()["network/G/model.1.weight"], before["network/G/model.1.weight"])


def test_training_ends_when_nothing_is_finite(folder, tmp_path):
    config = small_config(folder, "optim.lr=1e30", "optim.max_bad_steps=3", "run.steps=40")
    with pytest.raises(TrainingFailed, match="steps in a row were not finite at step"):
        train_run(config, tmp_path / "run", quiet=True)


def test_state_there_and_back():
    one, other = Step(small_method(), OptimOptions(ema=0.9)), Step(small_method(), OptimOptions(ema=0.9))
    for _ in range(2):
        one.run(random_batch(), Draws())
    other.load_state({key: tensor.clone() for key, tensor in one.state().items()})
    batch = random_batch()
    for step in (one, other):
        torch.manual_seed(5)
        step.run(batch, Draws())
    assert one.state().keys() == other.state().keys()
    for key, tensor in one.state().items():
        assert torch.equal(tensor, other.state()[key]), key


def test_weight_average():
    network = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(network, 0.75)
    start = network.weight.detach().clone()
    expected = start.clone()
    for value in (1.0, 2.0, 4.0):
        torch.nn.init.constant_(network.weight, value)
        average.update(torch.tensor(False))
        expected = 0.75 * expected + 0.25 * value
    torch.testing.assert_close(average.average["weight"], expected)
    with pytest.raises(ValueError, match=r"optim\.ema must lie between 0 and 1"):
        WeightAverage(network, 1.5)


def test_averaged_weights_are_lent_and_returned():
    step = Step(small_method(), OptimOptions(ema=0.5))
    step.run(random_batch(), Draws())
    own = step.method.generator.model[1].weight.detach().clone()
    with step.averaged():
        lent = step.method.generator.model[1].weight.detach().clone()
    assert torch.equal(lent, step.averages["G"].average["model.1.weight"])
    assert not torch.equal(lent, own)
    assert torch.equal(step.method.generator.model[1].weight, own)


def test_a_group_needs_parameters():
    with pytest.raises(ValueError, match="a group has no parameters to train"):
        ParameterGroup((torch.nn.ReLU(),), 1e-3, (0.5, 0.999))


def test_an_interrupted_run_continues_bit_for_bit(folder, tmp_path):
    """6 steps at once, and 3 steps, a new process, 3 steps: the same weights, moments, averages and losses.

    (`test_recorded_run` stops and continues every preset within a process.)
    """
    method = "fastcut"
    overrides = ["run.save_every=100", "optim.ema=0.9", "optim.n_epochs=1", "optim.n_epochs_decay=2", "run.seed=7"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_run(small_config(folder, "run.steps=6", *overrides, method=method), whole, quiet=True)

    def some(steps: int) -> int:
        torch.seed()  # the random state of this process must not matter
        command = ["train", method, "--data", str(folder), "--out", str(parts), "--quiet", *SMALL, *overrides]
        return main([*command, f"run.steps={steps}"])

    for steps in (3, 6):
        process = Forked(partial(some, steps))
        assert process.end() == 0, process.err.read_text()
    one, other = training_tensors(whole), training_tensors(parts)
    assert one.keys() == other.keys()
    assert any(key.startswith("adam/F/") for key in one)
    assert any(key.startswith("average/G/") for key in one)
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, parts)]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4, 5, 6]
    for first, second in zip(*rows, strict=True):
        assert first["G"] == second["G"]


def test_another_seed_is_another_run(folder, tmp_path):
    for seed in (0, 1):
        train_run(small_config(folder, "run.steps=1", f"run.seed={seed}"), tmp_path / str(seed), quiet=True)
    one, other = training_tensors(tmp_path / "0"), training_tensors(tmp_path / "1")
    assert not torch.equal(one["network/G/model.1.weight"], other["network/G/model.1.weight"])


def test_another_configuration_is_refused(folder, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", "fastcut", "--data", str(folder), "--out", str(run), "--quiet", *SMALL]
    assert main([*arguments, "run.steps=1"]) == 0
    assert main([*arguments, "run.steps=2", "run.log_every=5"]) == 0  # section run may change
    assert main([*arguments, "optim.lr=0.1", "loss.lambda_nce=3"]) == 2
    message = capsys.readouterr().err
    assert "optim.lr: 0.0002, now 0.1" in message
    assert "loss.lambda_nce: 10.0, now 3.0" in message
    assert main(["train", "cut", *arguments[2:]]) == 2
    assert "method: fastcut, now cut" in capsys.readouterr().err


def test_other_pictures_are_noticed(folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    train_run(small_config(folder, "run.steps=1"), tmp_path / "run", quiet=True)
    train_run(small_config(copy, "run.steps=2"), tmp_path / "run", quiet=True)  # a copy is the same data set
    (copy / "trainA" / "3.png").unlink()
    before = (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(ValueError, match="was trained on other pictures"):
        train_run(small_config(copy, "run.steps=3"), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "config.toml").read_text() == before


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"G/w": torch.full((3,), value)}


def test_checkpoints_are_kept_pointed_at_and_verified(tmp_path):
    said: list[str] = []
    store = Checkpoints(tmp_path, keep=2, log=said.append)
    assert store.load() is None
    for step in (1, 2, 3):
        store.save(step, tensors(step), tensors(step), {"generators": ["G"]})
    assert [path.name for path in store.steps()] == ["step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003"
    assert float(load_generators(store.steps()[-1])["G"]["w"][0]) == 3
    damaged = tmp_path / "step-00000003" / "training.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    found = store.load()
    assert found is not None
    assert found[1]["step"] == 2
    assert "training.safetensors is not what was written" in said[0]
    (tmp_path / "step-00000002" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        store.load()


def test_a_killed_save_leaves_the_last_one(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.save(1, tensors(1), tensors(1), {"generators": ["G"]})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "flush_to_disk", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save(2, tensors(2), tensors(2), {"generators": ["G"]})
    assert [path.name for path in store.steps()] == ["step-00000001"]
    assert store.load()[1]["step"] == 1


def test_a_full_disk_is_one_sentence_and_training_goes_on(folder, tmp_path, monkeypatch, capsys):
    real = checkpoint.save_file
    calls = []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 2:
            real(tensors, path)
        else:
            Path(path).write_bytes(b"part of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(NotSaved):
        Checkpoints(tmp_path / "alone").save(1, tensors(1), tensors(1), {"generators": ["G"]})
    run = tmp_path / "run"
    train_run(small_config(folder, "run.steps=2", "run.save_every=1"), run)
    said = capsys.readouterr().out
    assert "step-00000001: no checkpoint of " in said
    assert "training goes on" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000002"]


def test_the_run_folder_holds_what_is_promised(folder, tmp_path):
    run = tmp_path / "run"
    train_run(small_config(folder, "run.steps=2", "run.sample_every=2", "run.samples=2"), run, quiet=True)
    assert {"config.toml", "log.txt", "metrics.jsonl", "samples", "checkpoints"} <= {p.name for p in run.iterdir()}
    grid = Image.open(run / "samples" / "step-00000002.png")
    assert grid.size == (3 * 32 + 4 * 4, 14 + 2 * (32 + 4) + 4)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "G_GAN", "D_real", "D_fake", "NCE", "G", "lr", "epoch", "images_per_second", "data_share"} <= set(
        row
    )
    line, finished = log_lines(run)[-2:]
    assert finished.startswith("finished: step ")
    for part in ("epoch 1/200 step 2/2", "images/s", "data ", "ETA 0:00", "G_GAN"):
        assert part in line


def test_the_learning_rate_decays_with_the_epochs(folder, tmp_path):
    run = tmp_path / "run"
    train_run(small_config(folder, "optim.n_epochs=1", "optim.n_epochs_decay=1", "optim.lr=0.1"), run, quiet=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8  # two epochs of the larger domain
    assert [row["lr"] for row in rows] == pytest.approx([0.1] * 4 + [0.05] * 4)


def test_grid_of_any_channels(tmp_path):
    pictures = {"one": torch.zeros(2, 1, 4, 6), "four": torch.ones(2, 4, 4, 6)}
    save_grid(pictures, tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels[14 + 1, 4 + 1].tolist() == [128, 128, 128]
    assert pixels[14 + 1, 4 + 6 + 4 + 1].tolist() == [255, 255, 255]


def test_pace_and_clock():
    pace = Pace()
    time.sleep(0.02)
    for _ in range(4):
        pace.step(0.001)
    found = pace.read(batch=3, steps_left=10)
    assert 0 < found["images_per_second"] < 12 / 0.02
    assert 0 < found["data_share"] < 0.004 / 0.02 + 1e-9
    assert [clock(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match=r"run\.device=nonsense cannot be used here"):
        pick_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"run\.device=cuda cannot be used here"):
            pick_device("cuda")


class Toy:
    """The members that `DataSet` requires, and no others."""

    steps_per_epoch = 2

    def batch(self, step, *, decaying=False):
        generator = torch.Generator().manual_seed(step)
        return tuple(torch.rand(1, 3, 32, 32, generator=generator) for _ in range(2))

    def samples(self, count):
        return self.batch(0)

    def digest(self):
        return "toy"


def test_the_loop_takes_any_data(tmp_path):
    options = RunOptions(steps=3, log_every=1, sample_every=3, save_every=2)
    assert train(small_method(), Toy(), OptimOptions(), options, tmp_path, quiet=True) == 3
    assert [path.name for path in Checkpoints(tmp_path / "checkpoints").steps()] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_follow_float32(precision):
    """With the same weights and batches, losses agree to the precision; weights stay in float32."""
    methods = [small_method() for _ in range(2)]
    exact, short = Step(methods[0], OptimOptions()), Step(methods[1], OptimOptions(), precision)
    if short.loss_scale is not None:
        short.loss_scale.scale.fill_(256.0)  # the default start, 65,536, overflows at first
    for seed in range(4):
        methods[1].load_state_dict(methods[0].state_dict())  # Adam amplifies rounding to steps of full size
        losses = []
        for step in (exact, short):
            torch.manual_seed(seed)
            losses.append(step.run(random_batch(2), Draws()))
        assert short.bad_steps.item() == 0
        for name, value in losses[0].items():
            assert losses[1][name].dtype == torch.float32
            torch.testing.assert_close(losses[1][name], value, rtol=0.02, atol=0.02)
        assert not torch.equal(losses[1]["NCE"], losses[0]["NCE"])  # it has computed in 16 bits
    assert all(p.dtype == torch.float32 for p in methods[1].parameters())


def test_the_loss_scale_halves_and_doubles():
    scale = LossScale(torch.device("cpu"), start=8.0, interval=3)
    seen = []
    for bad in (0, 0, 0, 1, 0, 1, 0, 0, 0):
        scale.update(torch.tensor(bool(bad)))
        seen.append(scale.scale.item())
    assert seen == [8, 8, 16, 8, 8, 4, 4, 4, 8]


def test_a_scaled_loss_gives_the_same_update():
    parameter = [torch.nn.Linear(3, 2, bias=False) for _ in range(2)]
    parameter[1].load_state_dict(parameter[0].state_dict())
    for module, factor in zip(parameter, (None, torch.tensor(1024.0)), strict=True):
        group = ParameterGroup((module,), 1e-2, (0.5, 0.999))
        gradient = torch.full_like(module.weight, 0.25) * (1.0 if factor is None else factor)
        group.update((gradient,), torch.tensor(False), factor)
    assert torch.equal(parameter[0].weight, parameter[1].weight)


def test_precisions_that_do_not_exist():
    with pytest.raises(ValueError, match=r"run\.precision must be auto, fp32, bf16, fp16, not 'fp8'"):
        Step(small_method(), OptimOptions(), "fp8")
    assert pick_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.usefixtures("one_block")
@pytest.mark.parametrize("method", ["cut", "fastcut"])
def test_a_compiled_step_is_whole_and_the_same(method):
    """No graph break, no recompilation, and the numbers of the eager step. (Traced only; lowering takes minutes.)"""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"nce_idt": False, "flip_equivariance": True} if method == "fastcut" else {}
    eager, compiled = (smaller_method(**options).double() for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    steps = [Step(eager, OptimOptions()), Step(compiled, OptimOptions(), compile=True, backend="aot_eager")]
    graphs = []
    for i in range(6):
        batch, flip = random_batch(dtype=torch.float64), method == "fastcut" and i % 2 == 1
        ids = [[torch.randperm(n)[:16] for n in (32 * 32, 16 * 16)] for _ in range(2)]
        losses = [step.run(batch, Draws(flip, ids if method == "cut" else ids[:1])) for step in steps]
        for name, value in losses[0].items():
            torch.testing.assert_close(losses[1][name], value, rtol=1e-6, atol=1e-9)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs[1:] == [graphs[1]] * 5
    assert graphs[0] == 3


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_the_update_that_a_compiler_traces_is_adams(kind):
    layers = [torch.nn.Linear(5, 3).to(kind) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    groups = [ParameterGroup((layer,), 1e-2, (0.5, 0.999)) for layer in layers]
    groups[1].prepare()
    scale = torch.tensor(1024.0)
    for i in range(5):
        gradients = [torch.randn_like(p) for p in layers[0].parameters()]
        gradients[0][0, 0] = float("inf") if i in (0, 3) else 1e-6  # also at the very first step
        bad = torch.tensor(i in (0, 3))
        groups[0].update((gradients[0] * scale, gradients[1] * scale), bad, scale)
        groups[1].update_traced((gradients[0] * scale, gradients[1] * scale), bad, scale)
        groups[0].set_factor(0.9**i)
        groups[1].set_factor(0.9**i)
        one, other = (group.state() for group in groups)
        for key, tensor in one.items():
            rounding = {"rtol": 1e-6, "atol": 1e-7} if kind is torch.float32 else {"rtol": 1e-12, "atol": 1e-15}
            torch.testing.assert_close(other[key], tensor, **rounding)
        for one, other in zip(*(layer.parameters() for layer in layers), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-9 if kind is torch.float64 else 1e-7)


def test_what_cannot_be_one_graph_is_compiled_in_parts(one_block, monkeypatch):
    with pytest.warns(UserWarning, match=r"in parts, not whole: it is computed in optim\.accumulate=2 parts"):
        step = Step(small_method(), OptimOptions(accumulate=2), compile="whole", backend="eager")
    assert step.whole is None
    assert isinstance(step.generate, Compiled)
    with pytest.warns(UserWarning, match="in parts, not whole: several ranks exchange gradients in it"):
        Step(small_method(), OptimOptions(), compile="whole", ranks=Ranks(world=2))
    step = Step(smaller_method(nce_idt=False), OptimOptions(), compile="whole", backend="eager")

    def refused(*_):
        raise RuntimeError("\nnot this one\n")

    step.whole.compiled = refused
    with pytest.warns(UserWarning, match="the step is compiled in parts, not whole: not this one"):
        losses = step.run(random_batch(), Draws())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.run(random_batch(), Draws())  # no second warning
    assert losses["G"].isfinite()
    monkeypatch.setattr("fastnce.engine.compiled.TRACES_GRADIENTS", "no_such_setting")
    with pytest.warns(UserWarning, match=r"not whole: PyTorch .* does not trace gradients"):
        assert Step(small_method(), OptimOptions(), compile="whole").whole is None


def test_a_compiler_that_fails_later_does_not_end_training():
    """FastCUT's mirrored step is compiled when it first occurs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        if len(graphs) == 2:
            raise RuntimeError("no second kind")
        return graph

    def double_or_halve(x, halve):
        return x / 2 if halve else x * 2

    compiled = Compiled(double_or_halve, backend)
    one = torch.ones(1)
    assert compiled(one, False).item() == 2
    with pytest.warns(UserWarning, match="double_or_halve runs uncompiled: "):
        assert compiled(one, True).item() == 0.5
    assert compiled(one, False).item() == 2


def test_tf32_is_said_and_set():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        assert set_tf32("true", cuda) == "TF32 in float32 products: on, convolutions: on"
        assert torch.backends.cuda.matmul.allow_tf32
        assert set_tf32("false", cuda) == "TF32 in float32 products: off, convolutions: off"
        assert not torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True
        assert set_tf32("auto", cuda) == "TF32 in float32 products: off, convolutions: on"
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert set_tf32("true", cpu) == ""
    with pytest.raises(ValueError, match=r"run\.tf32 must be auto, true or false, not 'yes'"):
        set_tf32("yes", cpu)


def test_tf32_set_by_the_newer_interface_is_read():
    def work() -> int:
        found = []
        for precision in ("ieee", "tf32"):
            torch.set_float32_matmul_precision("high")
            torch.backends.cuda.matmul.fp32_precision = precision
            found.append(library_settings())
            print(set_tf32("auto", torch.device("cuda")))
        return 0 if found[0] != found[1] else 1

    process = Forked(work)  # a process cannot use both interfaces
    assert process.end() == 0, process.err.read_text()
    products = [line.split(",")[0] for line in process.out.read_text().splitlines()]
    assert products == ["TF32 in float32 products: off", "TF32 in float32 products: on"]


@torch._dynamo.config.patch(recompile_limit=2)
def test_a_function_of_too_many_shapes_runs_uncompiled():
    compiled = Compiled(lambda x: x * 2, "eager")
    with pytest.warns(UserWarning, match="runs uncompiled: "):
        sums = [compiled(torch.ones(size)).sum().item() for size in range(2, 7)]
    assert sums == [4, 6, 8, 10, 12]
    assert compiled.compiled is None


@pytest.mark.parametrize(("preprocess", "sizes", "compile"), [("none", 2, False), ("none", 1, True), ("crop", 2, True)])
def test_auto_does_not_compile_for_pictures_of_all_sizes(folder, tmp_path, monkeypatch, preprocess, sizes, compile):
    made = []
    if sizes == 2:
        folder = shutil.copytree(folder, tmp_path / "data")
        Image.new("RGB", (60, 56)).save(folder / "trainA" / "other.png")

    class Stop(Exception):
        pass

    def step(*arguments, **_):
        made.append(arguments[3])
        raise Stop

    monkeypatch.setattr(loop, "Step", step)
    monkeypatch.setattr(loop, "pick_compile", lambda name, device: name == "auto")  # as on a GPU
    config = small_config(folder, "run.compile=auto", f"data.preprocess={preprocess}", "data.batch=1")
    with pytest.raises(Stop):
        train_run(config, tmp_path / "run", quiet=True)
    assert made == [compile]


def test_what_the_compiler_refuses_runs_uncompiled():
    def refused(x):
        torch._dynamo.graph_break()
        return x * 2

    compiled = Compiled(refused, "eager")
    with pytest.warns(UserWarning, match="refused runs uncompiled: "):
        assert compiled(torch.ones(1)).item() == 2
    assert compiled.compiled is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(torch.ones(1)).item() == 2  # no second warning


def test_compiling_is_chosen_by_device():
    assert pick_compile("auto", torch.device("cpu")) is False
    assert pick_compile("auto", torch.device("cuda")) is True
    assert pick_compile("true", torch.device("cpu")) is True
    with pytest.raises(ValueError, match=r"run\.compile must be auto, true, false or whole, not 'yes'"):
        pick_compile("yes", torch.device("cpu"))


def test_a_run_may_be_limited_in_time(tmp_path):
    options = RunOptions(log_every=1000, sample_every=0, minutes=1e-4)
    done = train(small_method(), Toy(), OptimOptions(), options, tmp_path, quiet=True)
    assert 0 < done < 800
    assert Checkpoints(tmp_path / "checkpoints").load()[1]["step"] == done
    assert "0.0001 minutes are over: stopped after step" in (tmp_path / "log.txt").read_text()


def test_options_of_the_step_reach_it(folder, tmp_path, capsys, monkeypatch):
    """By the command line: parts, recomputed blocks, and graphs, which a CPU lacks."""
    made = []
    monkeypatch.setattr("fastnce.engine.step.recompute_blocks", lambda method: made.append(method))
    command = ["train", "fastcut", "--data", str(folder), "--out", str(tmp_path / "run"), "--quiet", *SMALL]
    changes = ["data.batch=2", "optim.accumulate=2", "run.checkpoint_activations=true", "run.steps=1"]
    assert main([*command, *changes]) == 0
    assert len(made) == 1
    assert read_state(Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1])["config"]["optim"]["accumulate"] == 2
    assert main([*command, *changes, "run.steps=2", "run.graph=true"]) == 2
    assert "run.graph=true needs a CUDA device, not cpu" in capsys.readouterr().err
    assert main([*command, *changes, "run.steps=2", "optim.accumulate=1"]) == 0  # the same step, to rounding
    assert read_state(Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1])["config"]["optim"]["accumulate"] == 1
