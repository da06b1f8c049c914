"""The habits of the published test.py: its layout, its page, its sizes and modes, and checkpoints of epochs."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.commands.main import main
from fastnce.evaluate.gallery import Gallery
from fastnce.networks import ResnetGenerator
from fastnce.networks.published import save_published
from fastnce.translate.chosen import chosen_model
from tests.ends import write


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save_published({"G": ResnetGenerator(width=2, blocks=1)}, tmp_path_factory.mktemp("published"))[0]


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data", *(f"testA/{n}.png" for n in "cab"), *(f"testB/{n}.png" for n in "yx"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class Page(HTMLParser):
    """Every address of a page, and its headings."""

    def __init__(self, file: Path):
        super().__init__()
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        assert tag != "script"
        self.addresses += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, text):
        self.text.append(text)


def test_the_published_layout_of_a_data_set(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["translate", str(model), str(data), "--phase", "test", "--layout", "published", "--out", str(out)]) == 0
    )
    wanted = [f"images/{label}/{name}.png" for label in ("fake_B", "real_A", "real_B") for name in "abc"]
    assert files(out) == [*wanted, "index.html"]
    assert str(out / "index.html") in capsys.readouterr().out
    for name, truth in zip("abc", "xyx", strict=True):  # serial order: testB begins again
        assert (pixels(out / f"images/real_A/{name}.png") == pixels(data / f"testA/{name}.png")).all()
        assert (pixels(out / f"images/real_B/{name}.png") == pixels(data / f"testB/{truth}.png")).all()
    assert main(["translate", str(model), str(data / "testA"), "--out", str(tmp_path / "plain")]) == 0
    for name in "abc":
        assert (pixels(out / f"images/fake_B/{name}.png") == pixels(tmp_path / f"plain/{name}.png")).all()
    page = Page(out / "index.html")
    shown = [address for address in page.addresses if "fake_B" in address]
    assert shown[::2] == [f"images/fake_B/{name}.png" for name in "abc"]
    assert all((out / address).is_file() for address in page.addresses)
    assert not any(re.match(r"\w+:|/", address) for address in page.addresses)


def test_the_direction_and_the_number(model, data, tmp_path):
    words = ["translate", str(model), str(data), "--phase", "test", "--direction", "BtoA", "--num", "1"]
    assert main([*words, "--out", str(tmp_path / "o"), "--layout", "published"]) == 0
    assert (pixels(tmp_path / "o/images/real_A/x.png") == pixels(data / "testB/x.png")).all()
    assert (pixels(tmp_path / "o/images/real_B/x.png") == pixels(data / "testA/a.png")).all()
    assert len(files(tmp_path / "o")) == 4


def test_a_page_beside_our_own_layout(model, tmp_path):
    odd = 'a&<b>"%20 ü#?.png'
    source = write(tmp_path / "in", odd, f"sub/{odd}")
    assert main(["translate", str(model), str(source), "--index", "--out", str(tmp_path / "o")]) == 0
    assert files(tmp_path / "o") == sorted(
        [odd, f"sub/{odd}", f"images/real_A/{odd}", f"images/real_A/sub/{odd}", "index.html"]
    )
    page = Page(tmp_path / "o/index.html")
    assert all((tmp_path / "o" / unquote(address)).is_file() for address in page.addresses)
    assert odd.removesuffix(".png") in page.text
    assert "<b>" not in (tmp_path / "o/index.html").read_text()


def test_several_pictures_and_folders(model, data, tmp_path):
    words = ["translate", str(model), str(data / "testA/a.png"), str(data / "testB"), str(data / "testA/b.png")]
    assert main([*words, "--out", str(tmp_path / "o")]) == 0
    assert files(tmp_path / "o") == ["a.png", "b.png", "x.png", "y.png"]
    same = write(tmp_path / "other", "a.png")
    assert main(["translate", str(model), str(data / "testA/a.png"), str(same), "--out", str(tmp_path / "p")]) == 0
    assert files(tmp_path / "p") == ["a.png", "a.png.png"]


def test_the_size_is_that_of_the_published_transform(model, data, tmp_path):
    """The published one is PIL's bicubic resize to load_size x load_size."""
    words = ["translate", str(model), str(data / "testA"), "--layout", "published", "--load-size", "32"]
    assert main([*words, "--out", str(tmp_path / "o")]) == 0
    for name in "abc":
        wanted = Image.open(data / f"testA/{name}.png").convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        wanted.save(tmp_path / f"{name}.png")
        assert (pixels(tmp_path / f"o/images/real_A/{name}.png") == np.asarray(wanted)).all()
        assert main(["translate", str(model), str(tmp_path / f"{name}.png"), "--out", str(tmp_path / "w.png")]) == 0
        assert (pixels(tmp_path / f"o/images/fake_B/{name}.png") == pixels(tmp_path / "w.png")).all()


def test_train_mode_takes_the_statistics_of_the_image(tmp_path):
    torch.manual_seed(1)
    network = ResnetGenerator(width=2, blocks=1, norm="batch")
    (file,) = save_published({"G": network}, tmp_path / "m")
    source = write(tmp_path / "in", "a.png") / "a.png"
    results = {}
    for mode in ([], ["--train-mode"]):
        out = tmp_path / f"{len(mode)}.png"
        assert main(["translate", str(file), str(source), "--out", str(out), *mode]) == 0
        results[len(mode)] = pixels(out)
    x = torch.from_numpy(pixels(source).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        wanted = {1: network.train()(x), 0: ResnetGenerator.eval(_again(file))(x)}
    for count, result in wanted.items():
        levels = ((result[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
        assert np.abs(levels - results[count]).max() <= 1
    assert (results[0] != results[1]).any()


def _again(file: Path) -> ResnetGenerator:
    network = ResnetGenerator(width=2, blocks=1, norm="batch")
    network.load_state_dict(torch.load(file))
    return network


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--load-size", "30"], "must be a multiple of 4"),
        (["--load-size", "100000"], "--load-size 100000 must be at most 16,384 pixels"),
        (["--direction", "BtoA"], "add --phase test"),
        (["--train-mode", "--tiles", "fast"], "--train-mode takes each picture whole"),
        (["--layout", "published", "--format", "jpg"], "the published layout has PNG files"),
        (["--index", "--format", "npy"], "a page cannot show npy"),
        (["--phase", "val"], "there is no folder valA"),
        (["--phase", "../data/test"], "--phase ../data/test must begin the names of folders in the data set"),
        (["--epoch", "3"], "chooses a checkpoint of a run"),
        (["--epoch", "x"], "--epoch must be last, best or the number of an epoch, not x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(words, said, model, data, tmp_path, capsys):
    assert main(["translate", str(model), str(data), *words, "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_sources_are_not_replaced_by_the_layout(model, tmp_path, capsys):
    source = write(tmp_path / "o/images/real_A", "a.png")
    before = (source / "a.png").read_bytes()
    words = ["translate", str(model), str(source), "--layout", "published", "--out", str(tmp_path / "o")]
    assert main(words) == 2
    assert "is read by this command and would be replaced" in capsys.readouterr().err
    assert (source / "a.png").read_bytes() == before
    assert files(tmp_path / "o") == ["images/real_A/a.png"]


@pytest.mark.parametrize("words", [["--layout", "published"], ["--index"]], ids=" ".join)
def test_what_is_in_the_way_of_the_page_is_said_first(words, model, data, tmp_path, capsys):
    out = tmp_path / "o"
    for name, said in (("index.html", "a folder is in the way"), ("images", "a file is in the way")):
        path = out / name
        path.mkdir(parents=True) if name == "index.html" else path.write_text("mine")
        assert main(["translate", str(model), str(data / "testA"), *words, "--out", str(out)]) == 2
        assert (
            capsys.readouterr().err == f"fastnce: {path}: {said}, a {'file' if path.is_dir() else 'folder'} is needed\n"
        )
        assert os.listdir(out) == [name]
        path.rmdir() if name == "index.html" else path.unlink()


@pytest.mark.parametrize("made", ["<!doctype html>my own page", "", None])
def test_a_page_of_somebody_else_is_not_replaced(made, model, data, tmp_path, capsys):
    """Neither a file nor a pipe, and nothing is written beside it. A page of ours is replaced."""
    out = tmp_path / "o"
    out.mkdir()
    os.mkfifo(out / "index.html") if made is None else (out / "index.html").write_text(made)
    pairs = write(tmp_path / "pairs", "rain/1.png", "norain/1.png")
    lines = [
        ["translate", str(model), str(data / "testA"), "--layout", "published", "--out", str(out)],
        ["translate", "no model", str(data / "testA"), "--index", "--out", str(out)],  # said before it is looked for
        ["evaluate", str(model), "--data", str(pairs), "--index", str(out)],
    ]
    for line in lines:
        assert main(line) == 2
        said = f"fastnce: {out}/index.html exists and is no page of fastnce: move it away, or write to another place\n"
        assert capsys.readouterr().err == said
        assert os.listdir(out) == ["index.html"]
    assert made is None or (out / "index.html").read_text() == made
    os.remove(out / "index.html")
    for line in (lines[0], lines[2], lines[0]):
        assert main(line) == 0


def test_the_pictures_of_an_earlier_page_are_no_inputs(model, tmp_path):
    source = write(tmp_path / "in", "a.png", "s/b.png")
    for _ in range(2):
        words = ["translate", str(model), str(source), "--layout", "published", "--out", str(source)]
        assert main(words) == 0
        wanted = [f"images/{label}/{name}" for label in ("fake_B", "real_A") for name in ("a.png", "s/b.png")]
        assert files(source) == sorted(["a.png", "s/b.png", *wanted, "index.html"])


def test_the_checkpoint_of_an_epoch(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("step-00000005/state.json", "best", "epoch-5", "epoch-10"):
        (run / "checkpoints" / name).parent.mkdir(exist_ok=True)
        (run / "checkpoints" / name).write_text("step-00000005")
    assert chosen_model(run, "10", "G_B") == (run / "checkpoints/epoch-10", "G_B")
    assert chosen_model(run, "best") == (run / "checkpoints/best", "")
    assert chosen_model(run, "latest") == chosen_model(run, "last") == chosen_model(run) == (run, "")
    with pytest.raises(ValueError, match=r"no checkpoint of epoch 7: it has 5, 10"):
        chosen_model(run, "7")
    os.remove(run / "checkpoints/best")
    with pytest.raises(ValueError, match="has no best checkpoint"):
        chosen_model(run, "best")


def test_the_files_of_an_epoch_in_a_published_folder(tmp_path):
    for name in ("latest_net_G_A", "latest_net_G_B", "20_net_G_A", "20_net_D_A"):
        (tmp_path / f"{name}.pth").touch()
    assert chosen_model(tmp_path) == (tmp_path / "latest_net_G_A.pth", "")
    assert chosen_model(tmp_path, "20") == (tmp_path / "20_net_G_A.pth", "")
    assert chosen_model(tmp_path, "", "G_B") == (tmp_path / "latest_net_G_B.pth", "")
    with pytest.raises(ValueError, match=r"has no 30_net_G\.pth or 30_net_G_A\.pth: it holds 20_net_G_A\.pth"):
        chosen_model(tmp_path, "30")


def test_evaluate_writes_the_same_page(model, tmp_path, capsys):
    pairs = write(tmp_path / "pairs", *(f"{side}/{n}.png" for n in (1, 2, 3) for side in ("rain", "norain")))
    words = ["evaluate", str(model), "--data", str(pairs), "--num", "2", "--index", str(tmp_path / "o")]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("2 pictures: ")
    wanted = [f"images/{label}/{n}.png" for label in ("fake_B", "real_A", "real_B") for n in (1, 2)]
    assert files(tmp_path / "o") == [*wanted, "index.html"]
    assert (pixels(tmp_path / "o/images/real_B/1.png") == pixels(pairs / "norain/1.png")).all()
    assert main(["evaluate", str(model), "--data", str(pairs), "--index", str(pairs)]) == 0
    for folder in (pairs / "rain", pairs / "norain/new"):  # the next evaluation would measure what is written there
        assert main(["evaluate", str(model), "--data", str(pairs), "--index", str(folder)]) == 2
        assert "whose pictures are measured: write to another place" in capsys.readouterr().err
        assert files(folder) == ([] if folder.name == "new" else ["1.png", "2.png", "3.png"])
    assert main(["evaluate", "--inputs-only", "--data", str(pairs), "--phase", "../pairs/test"]) == 2
    assert "--phase ../pairs/test must begin the names" in capsys.readouterr().err
    assert main(["evaluate", "--inputs-only", "--data", str(pairs), "--epoch", "2"]) == 2
    assert "--epoch has no effect with --inputs-only" in capsys.readouterr().err


def test_a_gallery_keeps_its_order(tmp_path):
    gallery = Gallery(tmp_path / "o", "x")
    for name in ("b", "a"):
        gallery.save(name, 0, torch.zeros(3, 4, 4))
    page = gallery.write(["a", "b", "never written"])
    assert [text for text in Page(page).text if text in ("a", "b")] == ["a", "b"]
