"""The notebook of the first ten minutes: a real kernel runs it from top to bottom."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "first_ten_minutes.ipynb"

needs_kernel = pytest.mark.skipif(
    not (find_spec("nbclient") and find_spec("ipykernel")), reason="nbclient or ipykernel (extra docs) is not installed"
)


def test_it_is_stored_without_outputs_and_its_links_exist():
    content = json.loads(NOTEBOOK.read_text())
    for cell in content["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        for target in re.findall(r"\]\(([^)#]+)", "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""):
            assert (NOTEBOOK.parent / target).is_file(), target
    assert "widgets" not in content["metadata"]


@needs_kernel
def test_it_runs_and_shows_the_run(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    for name, value in {
        "JUPYTER_PLATFORM_DIRS": "1",
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    place = tmp_path / "work"
    place.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:  # fewer steps: what is shown depends on none of them
        for many, few in (
            ('"run.steps": 40', '"run.steps": 4'),
            ('every": 10', 'every": 1'),
            ('every": 20', 'every": 2'),
        ):
            cell.source = cell.source.replace(many, few)
    client = NotebookClient(
        notebook, timeout=300, startup_timeout=300, kernel_name="python3", resources={"metadata": {"path": str(place)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    (page,) = [one.data["text/html"] for one in outputs if one.output_type == "display_data"]
    assert "step 4 of 4" in page
    assert "finished" in page
    assert "<figcaption>fake_B</figcaption>" in page
    assert (place / "runs" / "first" / "report.html").is_file()
    shown = [one.data for one in outputs if one.output_type == "execute_result"]
    assert any("runs/first/report.html</a>" in one.get("text/html", "") for one in shown)
    assert len([one for one in shown if "image/png" in one]) == 2  # a scene, and a translated one
    assert "6 pictures: Y " in "".join(one.text for one in outputs if one.output_type == "stream")
