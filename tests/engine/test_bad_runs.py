"""Consecutive bad steps end a run as soon as there are too many, however seldom it logs."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch

from fastnce.engine import loop
from fastnce.engine.bad_steps import BadStepCount
from fastnce.engine.distributed import ranks_of_launcher
from fastnce.engine.loop import TrainingFailed, train
from fastnce.engine.options import OptimOptions, RunOptions
from fastnce.engine.step import Step
from fastnce.methods import CUT, Batch, CUTOptions, Draws, NetworkOptions
from tests.engine.test_distributed import as_rank, finish, free_port
from tests.engine.test_engine import Toy, small_method, training_tensors

pytestmark = pytest.mark.usefixtures("few_blocks")


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("late", [False, True])
def test_a_row_is_seen_within_its_length(limit, late):
    """The row may begin at any step. Shorter rows do not count, however many there are."""
    for first in range(2 * limit + 1):
        counter = torch.zeros(())
        count = BadStepCount(counter, limit, late=late)
        counts = [0]
        for done in itertools.count(1):
            # rows of limit - 1 up to `first`, then one without an end
            bad = done > first or (limit > 1 and done % limit != 0)
            counts.append(counts[-1] + 1 if bad else 0)
            counter.fill_(counts[-1])
            found, step = count.read(done)
            assert found == (counts[step] if step else 0)
            if found >= limit:
                break
        begun = max(i for i, count in enumerate(counts) if count == 0)
        assert done - begun <= (limit + 2 * max(1, limit // 4) - 1 if late else limit)
        assert counts[-1] >= limit


class Breaks(Toy):
    """Images are NaN in `length` steps from `first` on, counted from 1."""

    def __init__(self, first: int, length: int = 1000):
        self.first, self.last = first, first + length - 1

    def batch(self, step, *, decaying=False):
        a, b = super().batch(step)
        return (a * float("nan"), b) if self.first <= step + 1 <= self.last else (a, b)


def begin(run: Path, data: Toy, steps: int, limit: int = 5, **options) -> int:
    torch.manual_seed(0)
    options = RunOptions(steps=steps, sample_every=0, save_every=2, **options)
    return train(small_method(), data, OptimOptions(max_bad_steps=limit), options, run, quiet=True)


@pytest.mark.parametrize(("log_every", "late", "saved"), [(100, False, 6), (0, False, 6), (100, True, 8)])
def test_a_run_ends_within_the_row(tmp_path, monkeypatch, log_every, late, saved):
    """Steps 4 to 8 are bad. Checkpoints of these hold the state after step 3; the one before is known to be good."""
    monkeypatch.setattr(loop, "BadStepCount", functools.partial(BadStepCount, late=late))
    said = r"^5 steps in a row were not finite at step 8, none of them was applied; the last good .*step-00000002;"
    with pytest.raises(TrainingFailed, match=said):
        begin(tmp_path / "run", Breaks(4), 60, log_every=log_every)
    begin(tmp_path / "short", Toy(), 3, log_every=log_every)
    one, other = (training_tensors(tmp_path / name) for name in ("run", "short"))
    assert one.pop("bad_steps").item() == saved - 3
    assert other.pop("bad_steps").item() == 0
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def test_the_log_counts_them_and_a_limit_of_0_ends_nothing(tmp_path):
    assert begin(tmp_path, Breaks(2, 2), 5, limit=0, log_every=1) == 5
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 0, 0]
    said = [" 2 steps in a row not finite: none was applied" in line for line in (tmp_path / "log.txt").open()]
    assert said.count(True) == 1


def two_ranks(folder: Path) -> int:
    """Only the second rank has images and losses that are not finite."""

    def method() -> CUT:
        torch.manual_seed(0)
        network = NetworkOptions(generator="resnet_4blocks", width=2, discriminator="pixel", discriminator_width=2)
        return CUT(CUTOptions(nce_layers=[0, 4], patches=8, projection=4), network)

    class Data:
        steps_per_epoch = 100
        digest = samples = lambda *_: ""

        def batch(self, step, *, decaying=False):
            bad = step >= 2 and ranks.rank == 1
            return torch.rand(1, 3, 16, 16) * (float("nan") if bad else 1.0), torch.rand(1, 3, 16, 16)

    loop.BadStepCount = functools.partial(BadStepCount, late=True)
    with ranks_of_launcher("cpu") as ranks:
        step, batch = Step(method(), OptimOptions(), ranks=ranks), Batch(*Data().batch(0))
        step.run(batch, Draws())
        before = {key: tensor.clone() for key, tensor in step.state().items()}
        good = step.phases
        for number in range(2):
            if ranks.rank == 1:
                ill = good[number]._replace(loss=lambda *args, n=number: (good[n].loss(*args)[0] * float("inf"), {}))
                step.phases = (*good[:number], ill, *good[number + 1 :])
            step.run(batch, Draws())
            assert step.bad_steps.item() == number + 1
            assert all(torch.equal(t, before[key]) for key, t in step.state().items() if key != "bad_steps")
        try:
            options = RunOptions(device="cpu", steps=30, sample_every=0, monitor_every=0)
            train(method(), Data(), OptimOptions(max_bad_steps=8), options, folder, quiet=True, ranks=ranks)
        except TrainingFailed as error:
            print(error)
            return 7
    return 0


def test_two_ranks_agree_on_what_is_bad_and_when_to_end(tmp_path):
    port = free_port()
    for code, out, err in finish([as_rank(rank, 2, port, lambda: two_ranks(tmp_path)) for rank in range(2)]):
        assert code == 7, err
        assert out.startswith("8 steps in a row were not finite at step 10, none of them was applied"), out
