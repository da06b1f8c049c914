"""Pictures out of sample grids: cut as the layout says, within a budget, made once, damaged grids left out."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fastnce.watch import strips
from fastnce.watch.strips import Strips, distinct, layout, spread
from tests.watch.made import COLUMNS, grid

BUDGET = 3_000_000


def opened(uri: str) -> Image.Image:
    kind, _, packed = uri.partition(";base64,")
    assert kind in ("data:image/webp", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(packed)))


def solid(path, colours, side=32, text=None):
    """A grid of two columns and one row of single colours."""
    canvas = Image.new("RGB", (3 * 4 + 2 * side, 18 + side + 4), (255, 255, 255))
    for place, colour in enumerate(colours):
        canvas.paste(colour, (4 + place * (side + 4), 14, 4 + place * (side + 4) + side, 14 + side))
    info = PngImagePlugin.PngInfo()
    columns = [{"name": n, "left": 4 + i * (side + 4), "width": side} for i, n in enumerate(("A", "fake_B"))]
    info.add_text("fastnce", text or json.dumps({"columns": columns, "rows": [{"top": 14, "height": side}]}))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, pnginfo=info)


def test_pictures_are_cut_as_the_layout_says(tmp_path):
    solid(tmp_path / "samples" / "step-00000007.png", [(200, 0, 0), (0, 0, 200)])
    (sample,) = Strips(BUDGET).read(tmp_path)
    assert sample.step == 7
    (row,) = sample.pictures
    assert list(row) == ["A", "fake_B"]
    for name, colour in (("A", (200, 0, 0)), ("fake_B", (0, 0, 200))):
        picture = opened(row[name])
        assert picture.size == (32, 32)
        assert np.abs(np.asarray(picture.convert("RGB"), int) - colour).max() < 12  # no white margin


def test_input_output_and_the_other_direction(tmp_path):
    names = ("A", "fake_B", "rec_A", "B", "fake_A", "rec_B")
    grid(tmp_path / "samples" / "step-00000001.png", 1, names=names)
    (sample,) = Strips(BUDGET).read(tmp_path)
    assert [list(row) for row in sample.pictures] == [["A", "fake_B", "B", "fake_A"]] * 2
    grid(tmp_path / "samples" / "step-00000001.png", 1, names=("A", "fake_B", "B", "idt_B"))
    (sample,) = Strips(BUDGET).read(tmp_path)
    assert [list(row) for row in sample.pictures] == [["A", "fake_B"]] * 2
    grid(tmp_path / "samples" / "step-00000001.png", 1, names=("photo", "drawing"))  # a user's own method
    (sample,) = Strips(BUDGET).read(tmp_path)
    assert [list(row) for row in sample.pictures] == [["photo", "drawing"]] * 2


def test_inputs_are_kept_once(tmp_path):
    for step in (1, 2, 3):
        grid(tmp_path / "samples" / f"step-{step:08d}.png", step)
    samples = Strips(BUDGET).read(tmp_path)
    images, places = distinct(samples)
    assert len(images) == len(places) == 2 * 2 + 3 * 2 * 2  # the inputs of two rows, and the outputs of every step
    assert samples[0].pictures[0]["A"] == samples[2].pictures[0]["A"]
    assert samples[0].pictures[0]["fake_B"] != samples[2].pictures[0]["fake_B"]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "no JSON",
        "[]",
        '{"columns": [{"name": "A", "left": 0, "width": 99999}], "rows": [{"top": 0, "height": 5}]}',
        '{"columns": [{"name": "A", "left": -4, "width": 8}], "rows": [{"top": 0, "height": 5}]}',
        '{"columns": [{"name": "A", "left": 1, "width": 0}], "rows": [{"top": 0, "height": 5}]}',
        '{"columns": 5, "rows": [1]}',
        '{"columns": [{"name": "A", "left": 1e999, "width": 3}], "rows": [{"top": 0, "height": 5}]}',
        "[" * 50_000,
    ],
)
def test_a_grid_of_unknown_layout_is_shown_whole(tmp_path, text):
    grid(tmp_path / "samples" / "step-00000001.png", 1, text=text)
    size = Image.open(tmp_path / "samples" / "step-00000001.png").size
    (sample,) = Strips(BUDGET).read(tmp_path)
    ((whole,),) = (row.values() for row in sample.pictures)
    assert list(sample.pictures[0]) == [""]
    assert opened(whole).size == size


def test_damaged_grids_are_left_out(tmp_path):
    folder = tmp_path / "samples"
    for step in (1, 2, 3):
        grid(folder / f"step-{step:08d}.png", step)
    (folder / "step-00000002.png").write_bytes((folder / "step-00000002.png").read_bytes()[:300])
    (folder / "step-00000004.png").write_bytes(b"")
    (folder / "step-00000005.png").mkdir()
    (folder / "step-x.png").write_bytes(b"no step")
    assert [sample.step for sample in Strips(BUDGET).read(tmp_path)] == [1, 3]
    assert Strips(BUDGET).read(tmp_path / "nowhere") == []


def test_huge_grids_are_left_out(tmp_path, monkeypatch):
    grid(tmp_path / "samples" / "step-00000001.png", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3_000)
    assert Strips(BUDGET).read(tmp_path) == []


@pytest.mark.parametrize("count", [0, 1, 2, 24, 25, 100, 1_000, 1_001])
def test_steps_are_spread(count):
    steps = [10 * i for i in range(1, count + 1)]
    found = spread(steps, 24)
    assert len(found) <= 24
    assert set(found) <= set(steps)
    if count:
        assert {found[0], found[-1]} == {steps[0], steps[-1]}
    if count > 24:
        assert len(found) > 12
        gaps = np.diff(found)
        assert gaps.max() == gaps[0]
        assert (gaps[:-1] == gaps[0]).all()


def test_a_longer_run_makes_few_pictures_anew(tmp_path, monkeypatch):
    maker, made = Strips(BUDGET), []
    original = Strips._cut
    monkeypatch.setattr(Strips, "_cut", lambda self, path, step: made.append(step) or original(self, path, step))
    for step in range(1, 60):
        grid(tmp_path / "samples" / f"step-{step:08d}.png", step, rows=1, side=8)
        found = maker.read(tmp_path)
        assert found[-1].step == step
    assert len(made) == 59  # each one when it was the newest
    grid(tmp_path / "samples" / "step-00000059.png", 3, side=16)  # written again
    maker.read(tmp_path)
    assert made[-1] == 59
    assert len(made) == 60


def test_a_time_limit_goes_on_at_the_next_call(tmp_path):
    for step in range(1, 10):
        grid(tmp_path / "samples" / f"step-{step:08d}.png", step)
    ticks = iter(range(10_000))
    maker = Strips(BUDGET, seconds=2.5, now=lambda: float(next(ticks)))  # every look at the clock takes a second
    counts = []
    while not counts or counts[-1] < 9:
        counts.append(len(found := maker.read(tmp_path)))
        if len(counts) == 1:
            assert {1, 9} <= {sample.step for sample in found}
            assert len(found) < 9
        assert len(counts) < 9
    assert counts == sorted(counts)


@pytest.mark.parametrize("runs", [1, 20])
def test_the_budget_is_kept_with_noise(tmp_path, runs):
    """Noise is the worst case of every codec."""
    for step in range(1, 26):
        grid(tmp_path / "samples" / f"step-{step:08d}.png", step, side=96, rows=4, names=("A", "fake_B", "B", "fake_A"))
    budget = 400_000
    samples = Strips(budget, runs=runs).read(tmp_path)
    images, _ = distinct(samples)
    assert sum(map(len, images)) <= budget / runs
    assert {samples[0].step, samples[-1].step} == {1, 25}
    assert len(samples) >= 5


def test_inputs_that_change_have_no_room_for_all_steps(tmp_path, monkeypatch):
    for step in range(1, 11):
        grid(tmp_path / "samples" / f"step-{step:08d}.png", step, names=("A", "fake_B"))
    whole = Strips(BUDGET)
    everything = sum(map(len, distinct(whole.read(tmp_path))[0]))
    tight = Strips(BUDGET)
    tight.budget = everything // 2
    samples = tight.read(tmp_path)
    assert sum(map(len, distinct(samples)[0])) <= tight.budget
    assert samples[0].step == 1
    assert samples[-1].step == 10


def test_layout_of_a_grid():
    text = json.dumps({"columns": [{"name": "A", "left": 4, "width": 8}], "rows": [{"top": 14, "height": 6}]})
    (box,) = layout(text, (20, 30))
    assert (box.column, box.row, box.area) == ("A", 0, (4, 14, 12, 20))
    assert layout(text, (11, 30)) == []
    assert len(COLUMNS) > len(strips.SHOWN)
