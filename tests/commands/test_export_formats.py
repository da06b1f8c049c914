"""`fastnce export --format` on a trained run: what is written, and what other programs compute with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.export import graph_formats, torch_format
from fastnce.networks.published import read_weights
from fastnce.translate import load_translator
from tests.programs import ROOT, run_program

pytestmark = pytest.mark.usefixtures("few_blocks")


@pytest.fixture(scope="module")
def run(folder, few_blocks, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("export") / "run"
    small = ["network.generator=resnet_4blocks", "network.width=2", "network.discriminator_width=2", "run.steps=1"]
    small += ["data.load_size=36", "data.crop_size=32", "run.device=cpu", "run.sample_every=0", "optim.lr=0.01"]
    assert main(["train", "cyclegan", "--data", str(folder), "--out", str(run), "--quiet", *small]) == 0
    return run


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (37, 30, 3), np.uint8)).save(path)
    return path


def translated(script: str, folder: Path, picture: Path, out: Path) -> np.ndarray:
    """What an example computes where fastnce cannot be imported."""
    code = f"""
import runpy, sys
sys.modules["fastnce"] = None  # an import of it fails
runpy.run_path({str(ROOT / "examples" / script)!r})["main"]({str(folder)!r}, {str(picture)!r}, {str(out)!r})
assert not [name for name in sys.modules if name.startswith("fastnce.")]
"""
    done = run_program(["-c", code], cwd=out.parent, anew=["fastnce"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    return np.asarray(Image.open(out)).astype(int)


def compare(script: str, run: Path, folder: Path, picture: Path, out: Path) -> None:
    found = translated(script, folder, picture, out)
    wanted = np.asarray(load_translator(run, generator="G_B").translate(Image.open(picture))).astype(int)
    assert found.shape == wanted.shape == (37, 30, 3)
    assert abs(found - wanted).max() <= 1
    assert (found != wanted).mean() < 0.01


def test_torch(run, picture, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), "--format", "torch", "--generator", "G_B"]) == 0
    said = capfd.readouterr()
    assert said.out.startswith(f"{out / 'model.pt2'} (")
    assert " MB, G_B). Loaded again by torch.export.load and compared with G_B in float32 on pictures of" in said.out
    assert said.out.endswith("the largest difference is 0, and 0.0001 is allowed.\n")
    assert said.out.count("\n") == 1
    assert said.err == ""
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.pt2"]
    details = json.loads((out / "config.json").read_text())
    assert (details["method"], details["generator"], details["reverse"]) == ("cyclegan", "G_B", True)
    card = (out / "README.md").read_text()
    assert said.out.partition("). ")[2] in card
    assert 'model = torch.export.load("model.pt2").module()' in card
    names = {str(node.target) for node in torch.export.load(out / "model.pt2").graph.nodes if node.op != "placeholder"}
    assert all(name.startswith("aten.") for name in names - {"output"}), names
    compare("infer_torch.py", run, out, picture, tmp_path / "b.png")


def test_onnx(run, picture, tmp_path, capfd):
    pytest.importorskip("onnxruntime", reason="onnxruntime (extra export) is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx (extra export) is not installed")
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), "--format", "onnx", "--generator", "G_B"]) == 0
    said = capfd.readouterr()
    assert said.out.startswith(f"{out / 'model.onnx'} (")
    assert " MB, G_B). Loaded again by onnxruntime and compared with G_B in float32 on pictures of" in said.out
    assert said.out.count("\n") == 1
    assert said.err == ""
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.onnx"]
    model = onnx.load(out / "model.onnx")
    assert {opset.domain for opset in model.opset_import} == {""}
    assert not model.functions
    for value, name in ((model.graph.input[0], "images"), (model.graph.output[0], "translated")):
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        assert (value.name, axes) == (name, ["images", 3, "height", "width"])
    content = (out / "model.onnx").read_bytes()
    assert b"fastnce" not in content
    assert b".py" not in content
    compare("infer_onnx.py", run, out, picture, tmp_path / "b.png")


def test_published_has_a_card_and_is_all_or_nothing(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), "--label", "3", "--generator", "G_B"]) == 0
    printed = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    networks = [f"3_net_{name}.pth" for name in ("D_A", "D_B", "G_A", "G_B")]
    assert sorted(printed) == sorted(path.name for path in out.iterdir()) == [*networks, "README.md", "config.json"]
    assert json.loads((out / "config.json").read_text())["file"] == "3_net_G_B.pth"
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def other(path):
        return {key: tensor + 1 for key, tensor in read_weights(path).items()}

    monkeypatch.setattr("fastnce.export.published_format.read_weights", other)
    with pytest.raises(RuntimeError, match="read again with other weights"):
        main(["export", str(run), "--out", str(out), "--label", "3"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_published_is_translated_as_config_json_says(run, picture, tmp_path, capsys):
    def found(*words: str) -> bytes:
        out = tmp_path / "translated"
        assert main(["translate", *words, str(picture), "--out", str(out), "--device", "cpu"]) == 0
        return (out / "a.png").read_bytes()

    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), "--label", "3", "--generator", "G_B"]) == 0
    g_a, g_b = found(str(run)), found(str(run), "--generator", "G_B")
    assert g_a != g_b
    assert (
        found(str(out))
        == found(str(out), "--generator", "G_B")
        == found(str(out), "--epoch", "3", "--generator", "G_B")
    )
    assert found(str(out)) == g_b
    assert found(str(out), "--epoch", "3", "--generator", "G_A") == g_a
    whole = (out / "config.json").read_text()
    (out / "config.json").write_text('{"model_type": "of another program"}')
    assert found(str(out), "--epoch", "3") == g_a
    (out / "config.json").write_text(whole[:99])
    assert main(["translate", str(out), str(picture), "--out", str(out), "--device", "cpu"]) == 2
    assert "config.json is no JSON" in capsys.readouterr().err


REFUSED = {
    "onnx --dtype bfloat16": "ONNX has no convolutions in bfloat16",
    "torch --label 3": "--label 3 is for --format published",
    "torch --generator G_C": "no generator 'G_C', it holds G_A, G_B",
    "published --dtype float16": "--dtype float16 is not for --format published",
}


@pytest.mark.parametrize("words", REFUSED)
def test_one_sentence(words, run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--format", *words.split()]) == 2
    said = capsys.readouterr().err
    assert REFUSED[words] in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", ["README.md", "config.json"])
def test_files_of_other_programs_stay(there, run, tmp_path, capsys):
    (tmp_path / there).write_text("{}")
    for form in ("published", "safetensors", "torch"):
        assert main(["export", str(run), "--out", str(tmp_path), "--format", form]) == 2
        assert "take another folder for --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "{}"


MODELS = {"published": "latest_net_D_A.pth", "safetensors": "model.safetensors", "torch": "model.pt2"}


@pytest.mark.parametrize("form", MODELS)
def test_the_model_of_another_program_stays(form, run, tmp_path, capsys):
    there = tmp_path / MODELS[form]
    there.write_text("mine")
    assert main(["export", str(run), "--out", str(tmp_path), "--format", form]) == 2
    assert f"{there} is of no export" in capsys.readouterr().err
    assert [(path, path.read_text()) for path in tmp_path.iterdir()] == [(there, "mine")]


def test_published_needs_all_networks(run, tmp_path, capsys):
    assert main(["export", str(run / "checkpoints" / "latest"), "--out", str(tmp_path / "one")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "two"), "--format", "safetensors"]) == 0
    for source in (tmp_path / "one", tmp_path / "one" / "latest_net_G_A.pth", tmp_path / "two"):
        capsys.readouterr()
        assert main(["export", str(source), "--out", str(tmp_path / "out"), "--format", "published"]) == 2
        assert f"needs a run, which has all networks: {source} holds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/step-00000001"])
@pytest.mark.parametrize("form", ["published", "safetensors", "torch"])
def test_a_run_gets_no_export_into_it(form, place, run, capsys):
    before = sorted(run.rglob("*"))
    assert main(["export", str(run), "--out", str(run / place), "--format", form]) == 2
    assert f"{run / place} belongs to a run" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_or_full_disk_leaves_nothing(error, run, tmp_path, monkeypatch, capsys):
    def fail(program, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(graph_formats, "trace", lambda *_: None)
    monkeypatch.setattr(torch_format, "write", fail)
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), "--format", "torch"]) == (
        2 if isinstance(error, OSError) else 130
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert isinstance(error, KeyboardInterrupt) or f"{out / 'model.pt2'}: No space left" in said
    assert not out.exists()
