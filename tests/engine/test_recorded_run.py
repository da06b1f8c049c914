"""Train every method with a recorded step: sampled, validated, saved, stopped and continued between replays.

No tensor that a recording reads or writes may move, and no step may be recorded twice. On the CPU, a recorder replaces
CUDA's (see test_cudagraph.py), and a run that was stopped is bit-equal to one that was not.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.config import resolve
from fastnce.engine import loop
from fastnce.engine.checkpoint import Checkpoints
from fastnce.engine.cudagraph import WARM_UP, CudaRecorder
from fastnce.engine.step import Step
from fastnce.methods.presets import PRESETS
from fastnce.training import train_run
from tests.engine.test_cudagraph import Tape
from tests.vgg import narrow_vgg

SIDE = 32
EVERY = WARM_UP + 2
STOP, STEPS = EVERY + 1, 2 * EVERY + 1
"""Both parts of a run warm up, record, replay, sample, measure, save, and replay again."""

SMALL = [
    "network.width=4",
    "network.discriminator_width=4",
    "network.init_type=normal",
    "network.init_gain=0.1",
    f"data.load_size={SIDE + 4}",
    f"data.crop_size={SIDE}",
    "optim.ema=0.9",
    "optim.n_epochs=1",
    "optim.n_epochs_decay=40",
    "run.compile=false",
    "run.threads=1",
    "run.log_every=1",
    "run.samples=2",
    f"run.sample_every={EVERY}",
    f"run.monitor_every={EVERY}",
    f"run.validate_every={EVERY}",
    f"run.save_every={EVERY}",
]
TERMS = {"patches": 8, "projection": 8, "pool_size": 3}
NETWORKS = ["network.generator=resnet_4blocks", "network.discriminator=n_layers", "network.discriminator_layers=1"]
OF_PRESET = {
    "sincut": [
        *("network.width=1", "network.discriminator_width=1", f"network.resolution={SIDE}", "data.batch=4"),
        "loss.nce_layers=0,2,3",
    ],
    "fastcut": ["data.batch=2", "optim.accumulate=2"],
    "dcdgan-plus": ["data.batch=2", "loss.nce_layers=4,8", "loss.rendered_rain=layers=1"],
}
OF_CHANGE = {
    "bank": ["loss.external=bank", "loss.bank_size=24"],
    "fp16": ["run.precision=fp16"],
    "": [],
}
CASES = [*PRESETS, "cut fp16", "dcdgan bank"]
RECORDED_HERE = [case for case in CASES if case not in ("cut", "dcdgan")]
"""Those on the CPU: "cut fp16" and "dcdgan bank" are these two with more state, and "fastcut" is CUT in float32."""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three images per domain and two pairs; `one` has a single image per domain, larger than its crops."""
    numbers = np.random.default_rng(0)
    for name, count, side in (
        *(("set/trainA", 3, 40), ("set/trainB", 3, 40), ("set/test/rain", 2, 44), ("set/test/norain", 2, 44)),
        *(("one/trainA", 1, 200), ("one/trainB", 1, 200)),
    ):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(numbers.integers(0, 256, (side, side + 4, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def configured(preset: str, pictures: Path, *overrides: str):
    options, network = PRESETS[preset].options(), PRESETS[preset].sections.get("network", {})
    terms = [f"loss.{name}={value}" for name, value in TERMS.items() if hasattr(options, name)]
    if hasattr(options, "vgg_weights"):
        terms.append(f"loss.vgg_weights={narrow_vgg()}")
    if "generator" not in network:
        terms += NETWORKS
        if hasattr(options, "nce_layers"):
            terms.append("loss.nce_layers=0,4,8")
    config = resolve(preset, None, [*SMALL, *terms, *OF_PRESET.get(preset, []), *overrides])
    config.data.dir = str(pictures / ("one" if preset == "sincut" else "set"))
    config.data.validate = str(pictures / "set" / "test")
    return config


def lies(step: Step) -> dict[str, int]:
    """The addresses of all tensors that a step reads or writes and that outlive it."""
    tensors = dict(step.state()) | {f"buffer/{name}": tensor for name, tensor in step.method.named_buffers()}
    for name, group in step.groups.items():
        tensors[f"lr/{name}"] = group.lr
    assert step.graphs is not None
    if step.graphs.inputs is not None:
        tensors |= {f"input/{i}": picture for i, picture in enumerate(step.graphs.inputs)}
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


class Watch:
    """A recorder that notes all addresses when it records, and checks them later."""

    def __init__(self, recorder: Any):
        self.recorder = recorder
        self.step: Step | None = None
        self.lay: dict[str, int] = {}
        self.recorded = self.replayed = self.closed = 0

    def warm(self, function: Callable) -> Any:
        return self.recorder.warm(function)

    def record(self, function: Callable) -> Any:
        self.recorded += 1
        graph, losses = self.recorder.record(function)
        self.lay = lies(self.step)
        return (graph, losses), losses

    def replay(self, recorded: Any) -> None:
        graph, losses = recorded
        self.replayed += 1
        assert lies(self.step) == self.lay
        self.recorder.replay(graph)
        assert all(loss.numel() == 1 for loss in losses.values())

    def close(self, graphs: Any) -> None:
        assert lies(self.step) == self.lay  # also after the last samples, validation and checkpoint
        self.closed += len(graphs)
        self.recorder.close([graph for graph, _ in graphs])


def train(config: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Train with a watched recorder; warnings are errors."""
    found: list[Watch] = []

    def watched(method: torch.nn.Module, *arguments: Any, graph: bool, **options: Any) -> Step:
        device = next(method.parameters()).device
        tape = CudaRecorder(device) if device.type == "cuda" else Tape()
        watch = Watch(tape)
        watch.step = Step(method, *arguments, graph=watch, **options)
        if isinstance(tape, Tape):
            tape.step = watch.step
        found.append(watch)
        return watch.step

    monkeypatch.setattr(loop, "Step", watched)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the step is recorded anew|.*uncaptured|.*uncompiled")
        train_run(config, out, quiet=True)
    (watch,) = found
    assert watch.step is not None
    assert watch.step.graphs is not None
    assert not watch.step.graphs.failed
    return watch


def saved(run: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(run / "checkpoints").load()
    assert found is not None
    return found[0]


def rows(run: Path) -> dict[int, dict[str, float]]:
    """The logged losses of every step."""
    found: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "lr" in row:
            found[row["step"]] = {key: value for key, value in row.items() if key[0].isupper() or key.startswith("idt")}
    return found


def lengths(preset: str) -> tuple[int, int]:
    """FastCUT's two kinds of steps occur at random."""
    return (13, 26) if preset == "fastcut" else (STOP, STEPS)


def check_run(preset: str, watch: Watch, run: Path, last: int) -> None:
    assert watch.recorded == watch.closed == (2 if preset == "fastcut" else 1)
    assert watch.replayed >= 2
    assert (run / "samples" / f"step-{EVERY * (last // EVERY):08d}.png").exists()
    logged = list(rows(run).values())
    assert len(logged) == last
    assert all(row["G"] != next_["G"] for row, next_ in itertools.pairwise(logged))  # none overwritten


@pytest.mark.usefixtures("fewest_blocks")
@pytest.mark.parametrize("case", RECORDED_HERE)
def test_a_recorded_run_that_was_stopped_is_the_run(case, pictures, tmp_path, monkeypatch):
    preset, _, change = case.partition(" ")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["run.device=cpu", *OF_CHANGE[change]]
    for run, steps in ((whole, lengths(preset)[1]), *((parts, steps) for steps in lengths(preset))):
        watch = train(configured(preset, pictures, f"run.steps={steps}", *options), run, monkeypatch)
        check_run(preset, watch, run, steps)
    one, other = saved(whole), saved(parts)
    assert one.keys() == other.keys()
    assert any(key.startswith("average/") for key in one)
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key
    assert rows(whole) == rows(parts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("case", CASES)
def test_a_run_recorded_by_cuda_holds_still(case, pictures, tmp_path, monkeypatch):
    """Not bit-equal as above: backward passes use atomics, whose order differs between runs."""
    preset, _, change = case.partition(" ")
    options = ["run.device=cuda", "run.graph=true", *OF_CHANGE[change]]
    run = tmp_path / "run"
    for steps in lengths(preset):
        watch = train(configured(preset, pictures, f"run.steps={steps}", *options), run, monkeypatch)
        check_run(preset, watch, run, steps)
        kept = saved(run)
        for key, tensor in watch.step.state().items():  # the checkpoint follows the last replay
            assert tensor.cpu().contiguous().numpy().tobytes() == kept[key].numpy().tobytes(), key
