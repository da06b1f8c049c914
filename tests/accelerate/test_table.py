"""The table at the end, and modules that scripts import late, again, or by other names."""

import textwrap
from pathlib import Path

from fastnce.accelerate.inspection import table
from fastnce.accelerate.replace import Outcome
from tests.accelerate.checkouts import DOT_LOSS, run_forked

FORK = "import torch\nfrom torch import nn\n" + DOT_LOSS.format(name="Contrast", extra="")


def rows(text: str) -> list[list[str]]:
    """The rows of the table: class, module and the first word of what was done."""
    lines = text.splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith("  class "))
    return [line.split()[:3] for line in lines[start + 1 :]]


def test_a_table_lists_what_was_replaced_first():
    text = table(
        [
            Outcome("PatchHDCELoss", "models.hDCE", "its keys receive a gradient"),
            Outcome("Loss", "models.patchnce", "one pass, CUT: inner products", replaced=True),
        ]
    )
    assert text == textwrap.dedent(
        """\
        fastnce: 1 replaced, 1 kept
          class          module           what was done
          Loss           models.patchnce  replaced: one pass, CUT: inner products
          PatchHDCELoss  models.hDCE      kept: its keys receive a gradient"""
    )


def fork(folder: Path, script: str) -> Path:
    (folder / "work" / "parts").mkdir(parents=True)
    for name in ("work", "work/parts"):
        (folder / name / "__init__.py").write_text("")
    (folder / "work" / "parts" / "contrast.py").write_text(FORK)
    (folder / "work" / "parts" / "other.py").write_text(FORK.replace("/ self.opt.nce_T", "/ self.opt.nce_T * 2"))
    (folder / "work" / "__main__.py").write_text(textwrap.dedent(script))
    return folder


def test_every_way_to_a_class_is_found_and_told_once(tmp_path):
    script = """
        import importlib, sys
        from types import SimpleNamespace
        import torch
        from .parts.contrast import Contrast as Loss
        from work.parts import contrast

        def later():
            from .parts.other import Contrast
            return Contrast

        class Mine(Loss):
            pass

        if __name__ == "__main__":
            options = SimpleNamespace(nce_T=0.07, batch_size=1, nce_includes_all_negatives_from_minibatch=False)
            loss, again = Loss(options), importlib.reload(contrast).Contrast
            assert again is not Loss
            print([hasattr(c.forward, "__wrapped__") for c in (Loss, type(loss), again, later(), Mine)], sys.argv[1:])
    """
    finished = run_forked(fork(tmp_path, script), "-m", "work", "--name", "x")
    assert finished.stdout.splitlines() == ["[True, True, True, False, True] ['--name', 'x']"], finished.stderr
    assert rows(finished.stderr) == [
        ["Contrast", "work.parts.contrast", "replaced:"],
        ["Mine", "__main__", "replaced:"],
        ["Contrast", "work.parts.other", "kept:"],
    ]
    assert finished.stderr.count("fastnce: replaced work.parts.contrast.Contrast") == 2  # loaded again


def test_the_table_comes_after_an_error_too(tmp_path):
    script = "from .parts import contrast\nraise RuntimeError('later')\n"
    finished = run_forked(fork(tmp_path, script), "-m", "work")
    assert finished.returncode == 1
    table_at, error_at = (
        finished.stderr.index(text) for text in ("fastnce: 1 replaced, 0 kept", "RuntimeError: later")
    )
    assert table_at < error_at
