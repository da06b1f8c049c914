"""The commands of docs/transcript.md, run in small: what they say of options is what the document shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from fastnce.commands.main import main

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "transcript.md"
SMALLER = {
    "--n_epochs 2 --n_epochs_decay 1": "--n_epochs 1 --n_epochs_decay 0",
    "--ngf 8 --ndf 8": "--ngf 2 --ndf 2",
    "--n_epochs 2: same, optim.n_epochs = 2": "--n_epochs 1: same, optim.n_epochs = 1",
    "--n_epochs_decay 1: same, optim.n_epochs_decay = 1": "--n_epochs_decay 0: same, optim.n_epochs_decay = 0",
    "--ngf 8: renamed, network.width = 8": "--ngf 2: renamed, network.width = 2",
    "--ndf 8: renamed, network.discriminator_width = 8": "--ndf 2: renamed, network.discriminator_width = 2",
}
"""The document's words, and those of a run of a second."""


def test_the_transcript(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for side in ("trainA", "trainB", "testA", "testB"):
        folder = tmp_path / "datasets/cat2dusk" / side
        folder.mkdir(parents=True)
        for number in range(1, 4 if "test" in side else 3):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03}.png")
    text = DOCUMENT.read_text()
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    blocks = "\n".join(re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    parts = re.split(r"^\$ fastnce ", blocks, flags=re.MULTILINE)[1:]
    assert [part.split()[0] for part in parts] == ["import-options", "train", "train", "import-options", "translate"]
    for part in parts:
        command, _, shown = part.partition("\n")
        assert main(shlex.split(command)) == 0, command
        said = capsys.readouterr().out
        if not command.startswith("train"):
            assert said.strip() == shown.strip()
    results = tmp_path / "results/cat2dusk/test_latest"
    assert sorted(path.name for path in (results / "images/fake_B").iterdir()) == ["001.png", "002.png", "003.png"]
    assert (results / "index.html").is_file()
    # the command that the user began with is the one that is imported
    begun = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert begun is not None
    imported = shlex.split(parts[0].partition("\n")[0])[1]
    assert shlex.split(begun[1].replace("\\\n", " ")) == shlex.split(imported)
