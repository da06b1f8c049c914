"""experiments/showcase.py: the pictures, tables and facts of a run are those of its files and test pictures."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import fastnce
from experiments import set_measures, showcase
from experiments.curves import Series, draw_curves, smooth, ticks
from experiments.run_facts import command_of, section_of, wrapped, write_section
from experiments.sheets import LARGEST, LINE, MARGIN, jpeg
from experiments.showcase import FILES, spread_evenly
from fastnce.commands import main as commands
from fastnce.data.folder import load_image
from tests.documents.blocks import blocks
from tests.ends import TINY, tiny

SIDE = 16
MORE = (
    "optim.n_epochs=2",
    "optim.n_epochs_decay=1",
    "optim.ema=0.5",
    "optim.lr=0.05",
    "run.keep_epochs=1",
    "run.samples=3",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Test pictures of two colours each, whose order can be seen; one more than the grid shows."""
    root = tmp_path_factory.mktemp("data") / "flat"
    rng = np.random.default_rng(0)
    for name, count in {"trainA": 2, "trainB": 2, "testA": 17, "testB": 3}.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            upper, lower = rng.integers(0, 256, (2, 3), np.uint8)
            pixels = np.array([[upper] * 20] * 10 + [[lower] * 20] * 10)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("runs") / "tiny"
    assert commands.main([*tiny(data, made, *MORE, "run.steps=6", "run.sample_every=2"), "--quiet"]) == 0
    return made


@pytest.fixture(scope="module")
def shown(run, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shown") / "tiny"
    assert showcase.main([str(run), "--data", str(data), "--out", str(out), "--no-measures"]) == 0
    return out


@pytest.fixture(scope="module")
def sheets(run, data, tmp_path_factory) -> dict[str, np.ndarray]:
    """The pixels of the sheets before they become JPEG files, and "labels" of the strip's first row."""
    found: list[Image.Image] = []
    rows: list[list[str]] = []
    draw = showcase.draw_sheet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(showcase, "jpeg", lambda sheet: found.append(sheet) or b"")
        patch.setattr(showcase, "draw_sheet", lambda cells: rows.append([c.label for c in cells[0]]) or draw(cells))
        showcase.show(run, data, tmp_path_factory.mktemp("sheets") / "out", measure=False)
    return {"strip": np.asarray(found[0]), "grid": np.asarray(found[1]), "labels": np.array(rows[0])}


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    left, top = MARGIN + column * (SIDE + MARGIN), MARGIN + LINE + row * (SIDE + MARGIN)
    return sheet[top : top + SIDE, left : left + SIDE]


def levels(picture: torch.Tensor) -> np.ndarray:
    return picture.add(1).mul(127.5).round().permute(1, 2, 0).numpy()


def first_inputs(data: Path, count: int) -> list[torch.Tensor]:
    return [load_image(path, 3, SIDE) for path in sorted((data / "testA").iterdir())[:count]]


def test_all_files_are_written_and_small(shown):
    assert {path.name for path in shown.iterdir()} == set(FILES)
    for name in ("strip.jpg", "grid.jpg"):
        assert 0 < (shown / name).stat().st_size <= LARGEST
        assert Image.open(shown / name).format == "JPEG"
    assert ElementTree.parse(shown / "losses.svg").getroot().tag.endswith("svg")


def test_the_grid_has_the_first_test_pictures_in_order_and_what_the_model_makes_of_them(sheets, run, data):
    model = fastnce.load(run, device="cpu")
    assert sheets["grid"].shape == (MARGIN + LINE + 4 * (SIDE + MARGIN), MARGIN + 8 * (SIDE + MARGIN), 3)
    for place, picture in enumerate(first_inputs(data, 16)):
        row, column = divmod(place, 4)
        assert np.array_equal(cell(sheets["grid"], row, 2 * column), levels(picture)), place
        assert np.array_equal(cell(sheets["grid"], row, 2 * column + 1), levels(model(picture[None])[0])), place


def test_the_strip_shows_the_sample_grids(sheets, run, data):
    strip = sheets["strip"]
    assert strip.shape == (MARGIN + LINE + 3 * (SIDE + MARGIN), MARGIN + 4 * (SIDE + MARGIN), 3)
    assert sheets["labels"].tolist() == ["input", "step 2", "step 4", "step 6"]
    models = [fastnce.load(path, device="cpu") for path in showcase.checkpoints(run).values()]
    for row, picture in enumerate(first_inputs(data, 3)):
        assert np.array_equal(cell(strip, row, 0), levels(picture))
        for column, model in enumerate(models, 1):
            difference = cell(strip, row, column) - levels(model(picture[None])[0])
            assert np.abs(difference).max() <= 1, (row, column)  # the grid is of the run itself


def test_without_sample_grids_the_strip_shows_the_checkpoints(run, data, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "samples")
    kept = showcase.checkpoints(copy)
    model = fastnce.load(copy, device="cpu")
    pictures = showcase.find_pictures(data, showcase.stored_config(copy), 3)
    found = showcase.over_time(fastnce.Run(copy, 6), kept, pictures, model)
    assert list(found) == list(kept) == [2, 4, 6]
    assert all(len(pairs) == 4 for pairs in found.values())
    assert found[4][0][1].tobytes() != found[6][0][1].tobytes()


def test_the_table_has_every_line_of_the_metrics(shown, run):
    with (shown / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = fastnce.Run(run, 6).metrics
    assert len(rows) == len(logged) == 6
    assert "images_per_second" in rows[0]
    for row, line in zip(rows, logged, strict=True):
        assert {name: float(value) for name, value in row.items() if value != ""} == line


def test_the_facts_are_those_of_the_run(shown, run):
    facts = json.loads((shown / "facts.json").read_text())
    expected = {"method": "fastcut", "steps": 6, "steps_planned": 6, "images": 6, "seed": 0, "averaged_weights": True}
    assert {key: facts[key] for key in expected} == expected
    state = json.loads(next(run.glob("checkpoints/step-00000006/state.json")).read_text())
    assert facts["options"]["network.width"] == state["config"]["network"]["width"] == 2
    speeds = sorted(line["images_per_second"] for line in fastnce.Run(run, 6).metrics)
    assert facts["images_per_second"] == pytest.approx((speeds[2] + speeds[3]) / 2, rel=0.01)
    assert facts["hours"] == pytest.approx(6 / facts["images_per_second"] / 3600, rel=0.01)
    assert str(run.parent) not in json.dumps(facts)


def test_commands_lose_the_folders_of_this_machine():
    words = ["/home/me/fastnce/__main__.py", "train", "cut", "--data", "/data/horse2zebra/", "data.cache_dir=/tmp/x"]
    assert command_of([*words, "run.steps=5"]) == "fastnce train cut --data horse2zebra data.cache_dir=x run.steps=5"
    assert command_of([]) == ""


def test_long_commands_are_broken_between_words():
    command = shlex.join(["fastnce", "train", "cut", *(f"network.{'x' * n}={n}" for n in range(20)), "a b=c  d", "e"])
    broken = wrapped(command)
    assert broken.replace(" \\\n    ", " ") == command
    assert len(broken.splitlines()) > 2
    assert max(map(len, broken.splitlines())) < 120


def test_checkpoints_are_compared_with_the_target_domain(run, data, monkeypatch, tmp_path):
    class MeanLevel:
        """Stands for a distance: the difference of the means."""

        def __init__(self):
            self.outputs, self.reference = [], []

        def update(self, outputs=None, reference=None):
            self.outputs += [] if outputs is None else [outputs.mean().item()]
            self.reference += [] if reference is None else [reference.mean().item()]

        def compute(self):
            assert (len(self.outputs), len(self.reference)) == (17, 3)
            return {"level": sum(self.outputs) / 17 - sum(self.reference) / 3}

    monkeypatch.setattr(set_measures, "new_distance", MeanLevel)
    facts = showcase.show(run, data, tmp_path / "out")
    with (tmp_path / "out" / "checkpoints.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    means = {
        name: torch.stack([load_image(path, 3, SIDE).mean() for path in sorted((data / name).iterdir())]).mean()
        for name in ("testA", "testB")
    }
    assert facts["measures_of_the_inputs"]["level"] == pytest.approx(float(means["testA"] - means["testB"]), abs=1e-6)
    model = fastnce.load(run, device="cpu")
    made = [model(picture[None]).mean() for picture in first_inputs(data, 17)]
    assert float(rows[-1]["level"]) == pytest.approx(float(torch.stack(made).mean() - means["testB"]), abs=1e-6)
    assert len({row["level"] for row in rows}) == 3
    one, other = (
        np.stack([levels(picture) for picture in pictures]).astype(float)
        for pictures in (
            [model(picture[None])[0] for picture in first_inputs(data, 17)],
            [load_image(path, 3, SIDE) for path in sorted((data / "testB").iterdir())],
        )
    )
    shift = np.linalg.norm(one.mean((0, 1, 2)) - other.mean((0, 1, 2)))
    assert float(rows[-1]["colour_shift"]) == pytest.approx(shift)
    variety = np.sqrt(one.var(0).mean() / other.var(0).mean())
    assert float(rows[-1]["variety"]) == pytest.approx(variety)
    assert ">level<" in (tmp_path / "out" / "losses.svg").read_text()


def test_one_picture_for_all_inputs_has_no_variety():
    outputs, targets = set_measures.Colours(), set_measures.Colours()
    for level in (-0.5, 0.5):
        outputs.add(torch.full((1, 3, 4, 4), 0.2))
        targets.add(torch.full((1, 3, 4, 4), level))
    found = set_measures.compared(outputs, targets)
    assert found == {"colour_shift": pytest.approx((153 - 127.5) * 3**0.5), "variety": 0}
    assert "variety" not in set_measures.compared(targets, outputs)


def test_single_pictures_are_shown_whole_beside_the_target(tmp_path, capsys):
    rng = np.random.default_rng(1)
    for name, size in (("trainA", (40, 60)), ("trainB", (48, 36))):
        (tmp_path / "pair" / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / "pair" / name / "one.png")
    options = [word for word in TINY if not word.startswith(("data.load_size", "network.disc", "run.sample_every"))]
    run = tmp_path / "run"
    command = ["train", "sincut", "--data", str(tmp_path / "pair"), "--out", str(run), *options, "--quiet"]
    more = ["network.discriminator=n_layers", "network.discriminator_layers=1", "network.discriminator_width=2"]
    assert commands.main([*command, *more, "data.batch=2", "run.steps=2", "run.sample_every=1"]) == 0
    assert showcase.main([str(run), "--data", str(tmp_path / "pair"), "--out", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "grid.jpg") as grid:
        assert grid.size == (60 + 60 + 36 + 4 * MARGIN, LINE + 48 + 2 * MARGIN)
    with Image.open(tmp_path / "out" / "strip.jpg") as strip:  # input, two steps; then the target
        assert strip.size == (60 + 60 + 60 + 4 * MARGIN, 2 * LINE + 40 + 48 + 3 * MARGIN)
    assert "crops of each domain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, data: shutil.rmtree(run), "does not exist: name the folder of a run"),
        (lambda run, data: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet: wait for its first one"),
        (lambda run, data: shutil.rmtree(data / "testA"), "there is no folder testA in"),
        (lambda run, data: (run.parent / "out").write_text(""), "a file is in the way"),
    ],
    ids=["no run", "no checkpoint", "no pictures", "a file"],
)
def test_a_mistake_gets_one_sentence(run, data, change, message, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(data, tmp_path / "data")
    change(tmp_path / "run", tmp_path / "data")
    assert showcase.main([str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("showcase: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").is_dir()


def test_a_page_gets_a_section_once(run, data, tmp_path, capsys):
    page, out = tmp_path / "page.md", tmp_path / "results" / "tiny"
    page.write_text("# Results\n")
    arguments = [str(run), "--data", str(data), "--out", str(out), "--no-measures", "--page", str(page)]
    assert showcase.main([*arguments, "--title", "Tiny pictures"]) == 0
    facts = json.loads((out / "facts.json").read_text())
    body = section_of(facts, "results/tiny")
    assert "(results/tiny/strip.jpg)" in body
    assert "(my%20results/tiny/strip.jpg)" in section_of(facts, "my results/tiny")  # Markdown ends a link at a space
    assert "| steps | 6; 6 images of each domain |" in body
    assert f"```bash\n{wrapped(facts['command'])}\n```" in body
    begin, end = "<!-- shown: tiny -->", "<!-- shown: end -->"
    assert page.read_text() == f"# Results\n\n## Tiny pictures\n\n{begin}\n{body}\n{end}\n"
    assert blocks(page.read_text(), "page.md") == []  # its lines are no markers of code that runs
    page.write_text(f"Before.\n{begin}\nold\n{end}\nAfter.\n")
    write_section(page, out, "unused", facts)
    assert page.read_text() == f"Before.\n{begin}\n{body}\n{end}\nAfter.\n"
    page.write_text(f"{begin}\nold\n")
    with pytest.raises(ValueError, match=f"page.md has {begin}, and no {end} after it"):
        write_section(page, out, "unused", facts)
    page.write_text(f"{begin}\nold\nmine\n<!-- shown: other -->\n{end}\n")
    with pytest.raises(ValueError, match=f"no {end} between {begin} and the next run"):
        write_section(page, out, "unused", facts)
    assert showcase.main([*arguments[:-1], str(tmp_path)]) == 2
    assert "should be a Markdown page in a folder that exists" in capsys.readouterr().err


def test_a_large_sheet_is_made_to_fit():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    packed = jpeg(noise, 20_000)
    assert len(packed) <= 20_000
    with pytest.raises(ValueError, match="a sheet of .* pixels does not fit into 10 bytes"):
        jpeg(noise, 10)


def test_steps_are_chosen_evenly():
    assert spread_evenly(range(1, 15), 7) == [1, 3, 5, 7, 10, 12, 14]
    assert spread_evenly([5, 6], 7) == [5, 6]


def test_curves_are_smoothed_and_drawn_to_scale():
    assert smooth([3.0] * 30).tolist() == pytest.approx([3.0] * 30)
    values = np.arange(100.0)
    assert smooth(values).tolist() == pytest.approx(values.tolist())  # a line stays a line, also at its ends
    assert smooth([0, 3, 0]).tolist() == [0, 1, 0]
    assert ticks(0, 20_000) == [0, 5_000, 10_000, 15_000, 20_000]
    assert ticks(0.09, 0.93) == [0.2, 0.4, 0.6, 0.8]
    drawn = draw_curves([Series("a < b", [1, 2], [1.0, 2.0]), Series("flat", [1, 2], [3.0, 3.0])], "title & more")
    places = re.findall(r'points="([\d., ]+)"', drawn)
    assert places == ["167.0,146.0 290.0,24.0", "167.0,85.0 290.0,85.0"]
    assert "a &lt; b" in drawn
    ElementTree.fromstring(drawn)
