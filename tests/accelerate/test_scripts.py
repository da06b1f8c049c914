"""`python -m fastnce.accelerate` on small checkouts with the published layout."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from fastnce import accelerate
from tests.accelerate.checkouts import DOT_LOSS, NETWORKS, printed, run, run_forked, write_checkout
from tests.forked import Forked


@pytest.mark.parametrize("flavour", ["cut", "dclgan"])
def test_same_losses_and_checkpoints_with_and_without(tmp_path, flavour, imported):
    folder = write_checkout(tmp_path / "checkout", flavour)
    plain = printed(run_forked(folder, "train.py", "plain.pth", accelerated=False))
    finished = (run if flavour == "cut" else run_forked)(
        folder, "train.py", "fast.pth", "plain.pth"
    )  # saves fast.pth and loads plain.pth
    fast = printed(finished)

    assert "replaced models.patchnce.PatchNCELoss" in finished.stderr
    assert ("cosines" in finished.stderr) == (flavour == "dclgan")
    assert "replaced models.networks.PatchSampleF" in finished.stderr
    assert fast["losses"] == pytest.approx(plain["losses"], rel=2e-6)
    assert plain["losses"][0] > plain["losses"][-1]  # the loss decreases, so gradients were compared too
    assert fast["argv"] == ["train.py", "fast.pth", "plain.pth"]
    for same in ("path", "file", "folder", "criterion", "keys"):
        assert fast[same] == plain[same]

    saved = {name: torch.load(folder / f"{name}.pth") for name in ("plain", "fast")}
    assert list(saved["plain"]) == list(saved["fast"]) == plain["keys"]
    for key, value in saved["plain"].items():
        torch.testing.assert_close(saved["fast"][key], value, rtol=1e-4, atol=1e-6)
    unpatched = imported(flavour, "networks")[0].PatchSampleF(use_mlp=True, nc=16)
    unpatched.create_mlp([torch.zeros(1, 5, 2, 2), torch.zeros(1, 7, 2, 2)])
    unpatched.load_state_dict(saved["fast"])


def test_a_script_with_nothing_to_replace_runs_with_a_message(tmp_path):
    (tmp_path / "script.py").write_text("import sys, json\nprint(json.dumps(sys.argv))\nsys.exit(7)\n")
    finished = run_forked(tmp_path, "script.py", "a", "--b")
    assert finished.returncode == 7
    assert json.loads(finished.stdout) == ["script.py", "a", "--b"]
    assert "nothing was replaced" in finished.stderr


def test_errors_of_the_script_are_passed_on(tmp_path):
    (tmp_path / "script.py").write_text("raise RuntimeError('from the script')\n")
    finished = run_forked(tmp_path, "script.py")
    assert finished.returncode == 1
    assert "RuntimeError: from the script" in finished.stderr


ENDS = {
    "raise RuntimeError('x')": "before the script ended with RuntimeError",
    "def f(": "before the script ended with SyntaxError",
    "import missing_module_of_mine": "before the script ended with ModuleNotFoundError",
    "import argparse; argparse.ArgumentParser().parse_args(['--help'])": "before the script ended with exit code 0",
    "import argparse; argparse.ArgumentParser().parse_args(['--no'])": "before the script ended with exit code 2",
    "raise SystemExit('a text')": "before the script ended with exit code 1",
    "print(1)": "nothing was replaced: the script has no class that may be a loss",
}


@pytest.mark.parametrize(("text", "sentence"), ENDS.items())
def test_the_last_line_says_how_the_script_ended(tmp_path, text, sentence):
    (tmp_path / "script.py").write_text(f"{text}\n")
    (line,) = [x for x in run_forked(tmp_path, "script.py").stderr.splitlines() if x.startswith("fastnce: ")]
    assert sentence in line
    assert ("imports none" in line) == (text == "print(1)")


def test_an_error_after_a_replacement_blames_nothing(tmp_path):
    folder = write_checkout(tmp_path / "checkout", "cut")
    (folder / "script.py").write_text("import models.patchnce\nraise RuntimeError('later')\n")
    finished = run_forked(folder, "script.py")
    lines = [x for x in finished.stderr.splitlines() if "fastnce:" in x]
    assert lines[0].startswith("fastnce: replaced models.p")
    assert lines[1:] == ["fastnce: 1 replaced, 0 kept"]
    assert "RuntimeError: later" in finished.stderr


WRONG = [
    ([], "no script was given"),
    (["missing.py"], "there is no script 'missing.py'"),
    (["-m"], "no module was given"),
    (["-m", "missing_package"], "there is no module 'missing_package' that can be run"),
    (["-m", "missing_package.train"], "there is no module 'missing_package.train' that can be run"),
    (["-m", ".train"], "there is no module '.train' that can be run"),
    (["-m", "json"], "there is no module 'json' that can be run"),
    (["-m", "json.decoder.more"], "there is no module 'json.decoder.more' that can be run"),
    (["-m", "__main__"], "there is no module '__main__' that can be run"),
    (["-m", ""], "there is no module '' that can be run"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG)
def test_a_missing_script_is_one_sentence(capsys, arguments, sentence):
    assert accelerate.main(arguments) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert message.startswith(sentence)


FACTS = """
import json, os, sys
from . import models
from .models.patchnce import PatchNCELoss
facts = dict(argv=sys.argv, path=sys.path[0], file=__file__, package=__package__, spec=__spec__.name, doc=__doc__)
if __name__ == "__main__":
    print(json.dumps(dict(facts, fast=hasattr(PatchNCELoss.forward, "__wrapped__"))))
"""


@pytest.mark.parametrize("module", ["work.train", "work"])
def test_a_module_runs_as_python_m_does(tmp_path, module):
    folder = write_checkout(tmp_path / "work", "cut")
    (folder / "__init__.py").write_text("")
    (folder / ("train.py" if module == "work.train" else "__main__.py")).write_text(f'"""Text."""{FACTS}')
    finished = run_forked(tmp_path, "-m", module, "a", "--b")
    fast, slow = printed(finished), printed(run_forked(tmp_path, "-m", module, "a", "--b", accelerated=False))
    assert (fast.pop("fast"), slow.pop("fast")) == (True, False)
    assert fast == slow
    assert fast["argv"][1:] == ["a", "--b"]
    assert "replaced work.models.patchnce.PatchNCELoss" in finished.stderr


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("import missing_module_of_mine", "ModuleNotFoundError: No module named 'missing_module_of_mine'"),
        ("from json import missing", "ImportError: cannot import name 'missing' from 'json'"),
        ("raise ValueError('own error')", "ValueError: own error"),
    ],
)
@pytest.mark.parametrize("module", ["broken", "broken.train"])
def test_errors_of_a_package_are_passed_on(line, sentence, module, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text(f"{line}\n")
    for name in ("__main__", "train"):
        (tmp_path / "broken" / f"{name}.py").write_text("print(1)\n")
    finished = run_forked(tmp_path, "-m", module)
    assert finished.returncode == 1
    assert sentence in finished.stderr
    assert "fastnce: " not in finished.stderr


OWN_CLASSES = """
from __future__ import annotations
import pickle
import sys
import torch
from torch import nn
import numpy as np
if len(sys.argv) < 99:
    {loss}
{sampler}
class Other:
    "A class of another name stays."
{helper}
model = PatchNCELoss
class Mine(PatchNCELoss):
    pass
def later():
    class PatchNCELoss9(nn.Module):
        pass
    return PatchNCELoss9
if __name__ == "__main__":
    assert pickle.loads(pickle.dumps(PatchNCELoss)) is PatchNCELoss
    assert __doc__ is None, __doc__
    kinds = [PatchNCELoss, PatchSampleF, model, Mine, later(), Other]
    print([hasattr(getattr(kind, "forward", None), "__wrapped__") for kind in kinds])
"""


def own_script(path: Path, loss: str = DOT_LOSS.format(name="PatchNCELoss", extra="")) -> Path:
    """Write a script with both classes: the loss in an `if`, and the sampler before the function that it uses."""
    helper, sampler = NETWORKS[NETWORKS.index("def init_net") :].split("class PatchSampleF")
    loss = loss.strip().replace("\n", "\n    ")
    path.write_text(OWN_CLASSES.format(loss=loss, sampler=f"class PatchSampleF{sampler}", helper=helper))
    return path


def test_classes_of_the_script_itself_are_replaced(tmp_path):
    own_script(tmp_path / "script.py")
    finished = run_forked(tmp_path, "script.py")
    assert finished.stdout.strip() == "[True, True, True, True, False, False]", finished.stderr
    assert "replaced __main__.PatchNCELoss: one pass, CUT" in finished.stderr
    assert "replaced __main__.PatchSampleF" in finished.stderr
    assert "left as it is" not in finished.stderr


def test_other_classes_of_the_script_are_kept_and_named_once(tmp_path):
    own_script(tmp_path / "script.py", DOT_LOSS.format(name="PatchNCELoss", extra=" * 1.5"))
    finished = run_forked(tmp_path, "script.py")
    assert finished.stdout.strip() == "[False, True, False, False, False, False]", finished.stderr
    assert finished.stderr.count("__main__.PatchNCELoss is left as it is") == 1


def test_a_class_that_stays_incomplete_is_named_at_the_end(tmp_path):
    loss = DOT_LOSS.format(name="PatchNCELoss", extra="").replace("torch.arange", "missing_function")
    (tmp_path / "script.py").write_text(f"import torch\nfrom torch import nn\n{loss}\nprint(1)\n")
    *_, row = run_forked(tmp_path, "script.py").stderr.splitlines()
    assert row.split()[:2] == ["PatchNCELoss", "__main__"]
    assert row.endswith("kept: name 'missing_function' is not defined")


def test_line_numbers_of_errors_are_those_of_the_script(tmp_path):
    path = own_script(tmp_path / "script.py")
    path.write_text(f"{path.read_text()}\n\nraise RuntimeError('here')\n")
    number = len(path.read_text().splitlines())
    assert f'script.py", line {number}, in <module>' in run_forked(tmp_path, "script.py").stderr


@pytest.mark.parametrize(
    "line", ["import helper", "raise KeyError('x')", "def f(:", "try: 1 / 0\nexcept ZeroDivisionError: import helper"]
)
def test_the_traceback_is_the_scripts(tmp_path, line):
    """What Python prints at the end is what it prints for the script alone."""
    (tmp_path / "helper.py").write_text("raise ValueError('mine')\n")
    (tmp_path / "my script.py").write_text(f"{line}\n")

    def work(accelerated: bool) -> int:
        os.chdir(tmp_path)
        sys.argv, sys.path[:0] = ["fastnce", "my script.py"], [str(tmp_path)]
        try:
            if accelerated:
                runpy.run_module("fastnce.accelerate", run_name="__main__", alter_sys=True)
            path = str(tmp_path / "my script.py")
            exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), {"__name__": "__main__"})
        except Exception as error:
            while error.__traceback__ and error.__traceback__.tb_frame.f_code.co_filename in (__file__, runpy.__file__):
                error.__traceback__ = error.__traceback__.tb_next
            sys.excepthook(type(error), error, error.__traceback__)
            return 1
        return 0

    told = []
    for accelerated in (True, False):
        process = Forked(lambda accelerated=accelerated: work(accelerated))
        assert process.end() == 1
        lines = process.err.read_text().splitlines()
        told.append([line for line in lines if not line.startswith("fastnce: ")])
    assert told[0] == told[1]
    assert told[0]


def test_a_script_from_the_standard_input(tmp_path, monkeypatch):
    script = "import sys\nprint(sys.argv, sys.path[0], __name__, '__file__' in globals())\n"
    loss = DOT_LOSS.format(name="Mine", extra="")
    (tmp_path / "text").write_text(f"{script}import torch\nfrom torch import nn\n{loss}")
    with (tmp_path / "text").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        finished = run_forked(tmp_path, "-", "--name", "x")
    assert finished.stdout.strip() == "['-', '--name', 'x']  __main__ False", finished.stderr
    assert "replaced __main__.Mine" in finished.stderr


def test_a_pool_of_a_script_with_a_space_in_its_name(tmp_path):
    """Processes that are spawned import the script by its path."""
    (tmp_path / "my script.py").write_text(
        "import multiprocessing as mp, sys\n"
        "def twice(x): return 2 * x\n"
        "if __name__ == '__main__':\n"
        "    with mp.get_context('spawn').Pool(1) as pool: print(pool.map(twice, [-1, 2]))\n"
        "    sys.exit(3)\n"
    )
    finished = run_forked(tmp_path, "my script.py")
    assert finished.stdout.strip() == "[-2, 4]", finished.stderr
    assert finished.returncode == 3
