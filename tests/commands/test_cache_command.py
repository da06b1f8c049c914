"""`fastnce cache` opens data as `fastnce train` does: the same pictures, the same files, the same errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastnce.commands.main import main
from fastnce.data import cache
from tests.engine.test_engine import SMALL

pytestmark = pytest.mark.usefixtures("few_blocks")


def write(path: Path, seed: int, height: int = 40, width: int = 44) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    for seed, name in enumerate(("trainA/a", "trainB/b", "trainB/c")):
        write(tmp_path / "data" / f"{name}.png", seed, width=48 if name == "trainB/c" else 44)
    return tmp_path / "data"


SCHEDULE = ["optim.n_epochs=1", "optim.n_epochs_decay=1"]


def listed(printed: str) -> dict[str, tuple[str, str]]:
    """Parse the printed lines: domain and time of use -> (megabytes, time of use)."""
    lines = re.findall(r"/(train[AB])-\S+\.bin  ([\d.]+) MiB, [^,]+, read (.*) the learning rate falls", printed)
    return {f"{domain} {when}": (size, when) for domain, size, when in lines}


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ([], {"trainA before", "trainB before", "trainA while", "trainB while"}),
        (["data.rain=1"], {"trainB before", "trainB while"}),
        (["data.rain=0.5"], {"trainA before", "trainB before", "trainA while", "trainB while"}),
        (["data.preprocess=crop"], {"trainA before and while", "trainB before and while"}),
        (["data.preprocess=none"], {"trainA before and while", "trainB before and while"}),
    ],
)
def test_training_decodes_nothing_after_cache(options, files, root, tmp_path, capsys, monkeypatch):
    if options == ["data.rain=1"]:  # needs no rainy pictures
        (root / "trainA" / "a.png").unlink()
        (root / "trainA").rmdir()
    assert main(["cache", "fastcut", "--data", str(root), *SMALL, *SCHEDULE, *options]) == 0
    assert set(listed(capsys.readouterr().out)) == files
    assert len(list((root / ".fastnce-cache").glob("*.bin"))) == len(files)
    monkeypatch.setattr(cache, "decode_all", lambda *_: pytest.fail("training decodes again"))
    run = ["--out", str(tmp_path / "run"), "--quiet"]
    assert main(["train", "fastcut", "--data", str(root), *SMALL, *SCHEDULE, *options, *run]) == 0  # both phases


def test_bytes_and_skipped_pictures_are_printed(root, capsys):
    write(root / "trainA" / "second.png", 9)
    (root / "trainA" / "bad.png").write_bytes(b"no picture")
    options = [*SMALL, "data.load_size=[1024,512]", "data.crop_size=256"]  # 1.5 MiB per picture, then 0.1875
    assert main(["cache", "--data", str(root), *options]) == 2
    assert "bad.png is not a picture" in capsys.readouterr().err
    assert main(["cache", "--data", str(root), *options, "data.skip_bad=true"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("` deletes it") == 1
    assert {key: size for key, (size, _) in listed(printed).items()} == {
        "trainA before": "3.0",
        "trainB before": "3.0",
        "trainA while": "0.4",
        "trainB while": "0.4",
    }
    assert printed.count("skipped ") == 1
    assert f"skipped {root / 'trainA' / 'bad.png'}: " in printed
    assert main(["cache", "--data", str(root), *options, "data.skip_bad=true", "optim.n_epochs_decay=0"]) == 0
    assert set(listed(capsys.readouterr().out)) == {"trainA before", "trainB before"}


def test_the_method_may_be_named_in_three_ways(root, tmp_path, capsys):
    """Presets differ in load_size: 286 for CUT, 512 for DCD-GAN; a picture of 512x512 takes 0.75 MiB."""
    small = [option for option in SMALL if "size" not in option] + ["optim.n_epochs_decay=0"]
    file = tmp_path / "config.toml"
    file.write_text(f'method = "cut"\n[data]\ndir = "{root}"\n')
    for arguments, megabytes in (
        (["dcdgan", "--data", str(root)], "0.8"),
        (["--data", str(root), "--method", "dcdgan"], "0.8"),
        (["--data", str(root)], "0.2"),
        (["--config", str(file)], "0.2"),
    ):
        assert main(["cache", *arguments, *small]) == 0
        assert listed(capsys.readouterr().out)["trainA before"][0] == megabytes
    for arguments, message in (
        (["cut", "--data", str(root), "--method", "dcdgan"], "takes one method, not cut and --method dcdgan"),
        (["cutt", "--data", str(root)], "unknown method 'cutt'; did you mean 'cut'?"),
        (["cut"], "fastnce cache needs --data DIR"),
    ):
        assert main(["cache", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_single_picture_is_not_cached(tmp_path, capsys):
    options = ["data.crop_size=32", "data.batch=2", "network.resolution=32", "network.width=1"]
    options += ["network.discriminator_width=1"]
    for seed, domain in enumerate("AB"):
        write(tmp_path / "data" / f"train{domain}" / "one.png", seed, 80, 90)
    assert main(["cache", "sincut", "--data", str(tmp_path / "data"), *options]) == 0
    assert capsys.readouterr().out == (
        "nothing is cached: data.preprocess=zoom_and_patch reads its two pictures when training starts\n"
    )
    assert not (tmp_path / "data" / ".fastnce-cache").exists()


WRONG = [
    (["data.crop_size=30"], "data.crop_size=30 must have sides that are multiples of 4"),
    (["loss.patches=1"], "nothing to contrast"),
    (["data.load_size=20"], "is too small for data.crop_size"),
    (["data.preprocess=none", "data.batch=2"], "batch=2 should be 1"),
    (["data.preprocess=none", "network.generator=unet_128", "loss.nce_layers=0"], "multiples of 128"),
    (["data.preprocess=zoom_and_patch"], "trainB holds 2 pictures"),
    (["data.rain=2"], "data.rain must be a number from 0 to 1"),
    (["optim.accumulate=2"], "cannot be computed in optim.accumulate=2 equal parts"),
    (["data.cache_dir=/dev/null/here"], "no cache can be written"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG)
def test_cache_and_train_refuse_with_the_same_errors(options, sentence, root, tmp_path, capsys):
    messages = []
    for arguments in (["cache", "fastcut"], ["train", "fastcut", "--out", str(tmp_path / "run")]):
        assert main([*arguments, "--data", str(root), *SMALL, *options]) == 2
        messages.append(capsys.readouterr().err)
    assert messages[0] == messages[1]
    assert sentence in messages[0]
    assert not (tmp_path / "run").exists()
