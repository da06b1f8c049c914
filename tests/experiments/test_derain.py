"""The deraining experiment at its smallest size, and unpaired sets made from pairs."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import derain
from fastnce.commands.main import main
from fastnce.config import resolve
from fastnce.data import load_image
from fastnce.evaluate.pairs import find_pairs


def picture(seed: int, height: int = 36, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Five scenes, the first with two kinds of rain."""
    root = tmp_path / "pairs"
    for name in ("rain", "norain"):
        (root / name).mkdir(parents=True)
    for i, scene in enumerate(("1", "2", "3", "4", "5")):
        Image.fromarray(picture(i)).save(root / "norain" / f"{scene}.png")
        for j, ending in enumerate(("_1", "_2") if scene == "1" else ("",)):
            Image.fromarray(picture(10 + 5 * j + i)).save(root / "rain" / f"{scene}{ending}.png")
    return root


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.iterdir())


def test_no_scene_is_in_both_domains(pairs, tmp_path, capsys):
    out = tmp_path / "set"
    assert main(["unpair", str(pairs), "--out", str(out), "--test", str(pairs)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"written to {out}: 6 in test/norain, 6 in test/rain, 4 in trainA, 2 in trainB\n")
    assert names(out / "trainA") == ["1_1", "1_2", "3", "5"]
    assert names(out / "trainB") == ["2", "4"]
    assert torch.equal(load_image(out / "trainA" / "3.png"), load_image(pairs / "rain" / "3.png"))
    assert torch.equal(load_image(out / "trainB" / "4.png"), load_image(pairs / "norain" / "4.png"))
    again = {pair.name: pair.load() for pair in find_pairs(out)}
    for pair in find_pairs(pairs):
        for one, other in zip(pair.load(), again[pair.name], strict=True):
            assert torch.equal(one, other)


def test_mistakes_write_nothing(pairs, tmp_path, capsys):
    out = tmp_path / "set"
    assert main(["unpair", str(pairs / "rain"), "--out", str(out)]) == 2
    assert "is not a paired test set" in capsys.readouterr().err
    for scene in "2345":
        (pairs / "rain" / f"{scene}.png").unlink()
        (pairs / "norain" / f"{scene}.png").unlink()
    assert main(["unpair", str(pairs), "--out", str(out)]) == 2
    assert "at least two" in capsys.readouterr().err
    assert not out.exists()
    (out / "trainB").mkdir(parents=True)
    Image.fromarray(picture(9)).save(pairs / "norain" / "2.png")
    Image.fromarray(picture(8)).save(pairs / "rain" / "2.png")
    assert main(["unpair", str(pairs), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["trainB"]


def test_the_experiment_at_its_smallest(pairs, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "set", tmp_path / "results"
    assert main(["unpair", str(pairs), "--out", str(data), "--test", str(pairs)]) == 0
    monkeypatch.setattr(sys, "argv", ["derain.py", "--quick"])
    wanted = ["plus", "resnet", derain.PAIRED]
    arguments = ["--quick", "--steps", "2", "--pictures", "2", "--held-out", "2", "--train", str(data)]
    arguments += ["--test", str(data / "test"), str(pairs), "--pairs", str(pairs), "--out", str(out)]
    assert derain.main([*arguments, "--only", *wanted]) == 0
    found = json.loads((out / "results.json").read_text())
    assert [row["variant"] for row in found["rows"]] == wanted
    assert found["machine"]["torch"] == torch.__version__
    inputs = [row["set psnr_y"] - row["set gain psnr_y"] for row in found["rows"]]
    assert inputs == pytest.approx([inputs[0]] * 3, abs=2e-4)
    assert found["rows"][0]["pairs psnr_y"] > 0
    with (out / "results.csv").open() as file:
        assert [line["variant"] for line in csv.DictReader(file)] == wanted
    with (out / "curves.csv").open() as file:
        steps = [(line["variant"], int(line["step"])) for line in csv.DictReader(file)]
    assert steps == [(name, step) for name in wanted for step in (0, 1, 2)]
    capsys.readouterr()
    # finished runs are not repeated
    monkeypatch.setattr(derain, "train_run", lambda *args, **kw: pytest.fail("a finished run was repeated"))
    assert derain.main([*arguments, "--only", "plus"]) == 0
    assert derain.main([*arguments, "--seeds", "0", "1", "--collect"]) == 0
    collected = json.loads((out / "results.json").read_text())["rows"]
    assert sorted(row["variant"] for row in collected) == sorted(wanted)
    with pytest.raises(SystemExit):
        derain.main([*arguments, "--only", "magic"])
    assert "no variant 'magic'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        derain.main([*arguments, "--only", "plus", "--options", "loss.magic=1"])
    assert "--options: unknown key 'loss.magic'" in capsys.readouterr().err
    # a run with other options is not a finished run of the variant itself
    finished = out / "runs/plus-0/row.json"
    finished.write_text(json.dumps({**json.loads(finished.read_text()), "options": "optim.lr=1e-4"}))
    with pytest.raises(pytest.fail.Exception, match="a finished run was repeated"):
        derain.main([*arguments, "--only", "plus"])
    written = (out / "results.json").read_text()
    with pytest.raises(SystemExit):
        derain.main([*arguments, "--only", "plus", "--collect"])
    assert "has finished with these settings" in capsys.readouterr().err
    assert (out / "results.json").read_text() == written


def test_variants_are_configurations(tmp_path):
    """Each variant has a configuration of its own."""
    seen = {}
    for name, overrides in derain.VARIANTS.items():
        settings = resolve("dcdgan-plus", None, [*derain.SMALL, *overrides]).as_dict()
        assert settings not in seen.values(), name
        seen[name] = settings
    assert seen["paper"]["loss"]["lambda_rendered"] == 0 < seen["plus"]["loss"]["lambda_rendered"]


def test_paired_crops_have_one_position(pairs):
    crops = derain.PairedCrops(find_pairs(pairs), 8, 4, seed=0)
    crops.pairs = [(rainy, rainy + 5) for rainy, _ in crops.pairs]
    a, b = crops.batch(3)
    assert a.shape == (4, 3, 8, 8)
    torch.testing.assert_close(b, a + 5)
    assert torch.equal(a, crops.batch(3)[0])
    assert not torch.equal(a, crops.batch(4)[0])
