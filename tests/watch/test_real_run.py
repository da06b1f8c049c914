"""The report of a real training: what the loop writes is what the report reads."""

from __future__ import annotations

import re

import pytest

from fastnce.training import train_run
from fastnce.watch import ReportCallback, write_report
from tests.engine.test_validate import config, rainy_set  # noqa: F401  (a fixture)
from tests.watch.made import Page

pytestmark = pytest.mark.usefixtures("few_blocks")


def test_a_training_writes_its_report(rainy_set, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    options = ["run.steps=4", "run.validate_every=2", "run.sample_every=2", "run.samples=2"]
    train_run(config(rainy_set, *options), folder, quiet=True, callbacks=[ReportCallback()])
    page = Page(folder / "report.html")
    head = page.texts["header"]
    assert "finished" in head
    assert "dcdgan · cpu · begun" in head
    assert re.search("Steps 4 of 4", head)
    (found,) = page.data["runs"]
    assert [sample["step"] for sample in found["samples"]] == [2, 4]
    assert [list(row) for row in found["samples"][0]["rows"]] == [["A", "fake_B", "B", "fake_A"]] * 2
    assert found["curves"]["held_out_psnr_y"]["x"] == [2, 4]
    assert found["curves"]["G"]["x"] == [2, 4]
    assert found["best"] in (2, 4)
    assert found["inputs"]["held_out_psnr_y"] > 0
    assert "The run starts on cpu" in page.texts["history"]
    assert "The run is finished" in page.texts["history"]
    assert "torch" in page.texts["machine"]
    assert "network.width" in page.texts["configuration"]
    assert page.html.count('<tr class="changed">') > 10
    changing = r"Written [\d: -]+|Trained for.*?</dd>"
    after = write_report([folder]).read_text()
    assert re.sub(changing, "", page.html) == re.sub(changing, "", after)
