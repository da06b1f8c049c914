"""The display of a run in a notebook. `tests/documents/test_notebook.py` shows it in a real one."""

from __future__ import annotations

import base64
import io
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.api import Run
from fastnce.engine.callbacks import Callbacks, RunInfo
from fastnce.evaluate.report import Report
from fastnce.methods import NetworkOptions
from fastnce.translate.translator import Translator
from fastnce.watch import notebook
from fastnce.watch.notebook import NotebookCallback, in_notebook
from tests.watch.made import grid


class Handle:
    """In place of IPython's: keeps every page that is shown."""

    def __init__(self) -> None:
        self.pages: list[str] = []
        self.displays = 0

    def display(self, page: str, display_id: bool) -> Handle:
        assert display_id
        self.displays += 1
        self.update(page)
        return self

    def update(self, page: str) -> None:
        self.pages.append(page)


@pytest.fixture
def handle(monkeypatch) -> Handle:
    made = Handle()
    module = types.ModuleType("IPython.display")
    vars(module).update(HTML=str, display=made.display)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(notebook, "EVERY", 0.0)
    return made


def begun(folder: Path) -> NotebookCallback:
    callback = NotebookCallback()
    callback.begin(RunInfo(folder, {}, 0, 2000, "cpu", 1))
    return callback


def test_one_output_shows_the_newest_values(tmp_path, handle):
    callback = begun(tmp_path / "a<b")
    assert "step 0 of 2,000" in handle.pages[-1]
    callback.log(1000, {"G": 1.23456, "NCE": 2.0, "epoch": 3, "lr": 2e-4, "images_per_second": 12.34})
    page = handle.pages[-1]
    assert "epoch 3, step 1,000 of 2,000, 12.3 images/s" in page
    assert "G 1.235  NCE 2.000" in page
    assert '<progress value="1000" max="2000"' in page
    assert "lr" not in re.sub("<[^>]*>", "", page)
    assert "a&lt;b" in page
    callback.log(1000, {"held_out_psnr_y": 21.5, "held_out_seconds": 3.0})
    assert "held out: psnr_y 21.500<" in handle.pages[-1]
    assert "G 1.235" in handle.pages[-1]  # both are shown
    callback.warn(1000, "D <has> won")
    assert "warning: step 1,000: D &lt;has&gt; won" in handle.pages[-1]
    callback.end(1500, "stopped", "Ctrl-C")
    assert "step 1,500 of 2,000, 12.3 images/s, stopped: Ctrl-C" in handle.pages[-1]
    assert handle.displays == 1


def test_the_newest_samples_are_columns(tmp_path, handle):
    callback = begun(tmp_path)
    for value in (0.0, 1.0):
        callback.samples(5, {"A": torch.full((2, 3, 8, 16), value), "fake_B": torch.full((2, 1, 8, 16), -value)})
    found = re.findall(
        r'<figcaption>(\w+)</figcaption><img alt="\w+" src="data:image/jpeg;base64,([^"]+)"', handle.pages[-1]
    )
    assert [name for name, _ in found] == ["A", "fake_B"]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for _, content in found]
    assert [picture.shape for picture in pictures] == [(16, 16, 3)] * 2
    assert [int(picture.mean()) for picture in pictures] == [255, 0]
    assert "repeat(auto-fill,96px)" in handle.pages[-1]  # wide enough for the captions
    callback.samples(6, {"A": torch.zeros(1, 3, 8, 256)})
    assert "repeat(auto-fill,256px)" in handle.pages[-1]


def test_the_time_left(tmp_path, handle, monkeypatch):
    callback = begun(tmp_path)
    monkeypatch.setattr(notebook.time, "monotonic", lambda: 0.0)
    callback.log(500, {"G": 1.0})
    assert " left<" not in handle.pages[-1]  # no pace yet
    monkeypatch.setattr(notebook.time, "monotonic", lambda: 100.0)
    callback.log(1000, {"G": 1.0})
    assert "step 1,000 of 2,000, 3:20 left<" in handle.pages[-1]  # 500 steps took 100 seconds
    callback.end(2000, "finished", "")
    assert " left<" not in handle.pages[-1]


def test_the_link_to_the_report(tmp_path, handle, monkeypatch):
    folder = tmp_path / "runs" / "a b&c"
    folder.mkdir(parents=True)
    callback = begun(folder)
    assert "<a " not in handle.pages[-1]  # there is none yet
    (folder / "report.html").write_text("")
    callback.log(1, {"G": 1.0})
    assert f'<a href="{(folder / "report.html").as_uri().replace("&", "&amp;")}" ' in handle.pages[-1]
    monkeypatch.chdir(tmp_path)
    callback.log(2, {"G": 1.0})
    assert '<a href="runs/a%20b%26c/report.html" ' in handle.pages[-1]
    assert "a b&amp;c/report.html</a>" in handle.pages[-1]


def test_a_run_shows_its_samples_only_without_a_report(tmp_path):
    grid(tmp_path / "samples" / "step-00000003.png", 1)
    run = Run(tmp_path, 3)
    assert "data:image/png;base64," in run._repr_html_()
    (tmp_path / "report.html").write_text("")
    shown = run._repr_html_()
    assert "3 steps" in shown
    assert "report.html</a>" in shown
    assert "<img" not in shown


def test_short_texts_of_a_model_and_of_measures(tmp_path):
    network = NetworkOptions(width=8).build_generator()
    translator = Translator(network)
    assert repr(translator) == "Translator(ResnetGenerator, 3 to 3 channels, cpu)"
    folder = tmp_path / "checkpoints" / "step-00000012"
    translator.sources = (folder / "state.json", folder / "generator.safetensors")
    assert repr(translator) == f"Translator(ResnetGenerator, 3 to 3 channels, cpu, from {folder})"
    translator.sources = (tmp_path / "latest_net_G.pth",)
    assert repr(translator).endswith(f"from {tmp_path / 'latest_net_G.pth'})")
    means = {"psnr_y": 21.5, "ssim_y": 0.5, "psnr_rgb": 20.0, "ssim_rgb": 0.25}
    report = Report("TEST", means, {}, [{"name": str(i), **means} for i in range(100)], "last", 40)
    line = "100 pictures: Y 21.50 dB / 0.5000, RGB 20.00 dB / 0.2500"
    assert repr(report) == f"Report(TEST: last (step 40):  {line})"
    report.best = Report("TEST", means, {}, report.pictures, "best", 20)
    assert repr(report) == f"Report(TEST: last (step 40):  {line}; best (step 20):  {line})"


def test_the_display_changes_seldom(tmp_path, handle, monkeypatch):
    monkeypatch.setattr(notebook, "EVERY", 1e9)
    callback = begun(tmp_path)
    callback._changed = notebook.time.monotonic()
    for step in range(1, 50):
        callback.log(step, {"G": 1.0})
    assert len(handle.pages) == 1
    callback.end(50, "finished", "")
    assert "step 50 of 2,000" in handle.pages[-1]


def test_a_display_that_fails_is_one_warning(tmp_path, handle, monkeypatch):
    said: list[str] = []
    callbacks = Callbacks([NotebookCallback()], say=said.append)
    monkeypatch.setattr(handle, "update", lambda page: 1 / 0)
    callbacks.begin(RunInfo(tmp_path, {}, 0, 10, "cpu", 1))
    callbacks.end(1, "finished", "")
    assert said == ["NotebookCallback fails (ZeroDivisionError: division by zero): training goes on without it"]


def test_this_is_no_notebook(monkeypatch):
    assert not in_notebook()
    shell = types.ModuleType("IPython")
    monkeypatch.setitem(sys.modules, "IPython", shell)
    vars(shell)["get_ipython"] = lambda: types.SimpleNamespace()  # on a terminal
    assert not in_notebook()
    vars(shell)["get_ipython"] = lambda: types.SimpleNamespace(kernel=object())
    assert in_notebook()
