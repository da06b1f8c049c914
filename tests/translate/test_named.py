"""A model that comes with the package, by its name: which is taken beside a path, and what is said of other names."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

import fastnce
from fastnce.models import folder
from fastnce.translate.load import load_generator
from fastnce.translate.named import locate, model_path
from tests.translate.test_exported import SMALL, source_of

pytestmark = pytest.mark.usefixtures("few_blocks", "here")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The empty folder in which names are looked up."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_that_is_no_path_here():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("derain", Path("derain")):
            assert locate(name) == folder("derain")
    loaded = load_generator("derain")
    assert (loaded.name, loaded.options["generator"], loaded.sources[0].parent) == ("G", "restorer", folder("derain"))


def test_a_model_here_comes_first():
    fastnce.export.write_safetensors(source_of(SMALL), Path("derain"))
    with pytest.warns(
        UserWarning, match="^derain is taken as the folder of this name; the model that comes with "
    ) as said:
        loaded = load_generator("derain")
    assert loaded.options["generator"] == "resnet_4blocks"
    assert str(said[0].message).endswith(str(folder("derain")))  # as a path, it can still be taken
    assert load_generator(folder("derain")).options["generator"] == "restorer"


@pytest.mark.parametrize(
    "name", ["checkpoints/step-00000001/x", "config.toml", "model.safetensors", "latest_net_G.pth"]
)
def test_what_may_be_a_model_here_comes_first(name, here):
    (Path("derain") / name).parent.mkdir(parents=True)
    (Path("derain") / name).touch()
    with pytest.warns(UserWarning, match="taken as the folder"):
        assert locate("derain") == here / "derain"  # as a path, it is not looked up and warned of again


def test_a_file_here_comes_first(here):
    Path("derain").write_bytes(b"x")
    with pytest.warns(UserWarning, match="^derain is taken as the file of this name"):
        assert locate("derain") == here / "derain"


def test_a_folder_of_pictures_is_no_model():
    """As `fastnce translate derain PICTURES --out derain` leaves it."""
    Path("derain").mkdir()
    (Path("derain") / "a.png").touch()
    with pytest.warns(
        UserWarning, match=r"^the folder derain holds no model: derain is taken as .*, not as \./derain$"
    ):
        assert locate("derain") == folder("derain")


def test_with_a_slash_it_is_a_path(here):
    assert locate("./derain") == here / "derain"
    assert model_path("./derain") == model_path("derain/") == here / "derain"
    assert locate(model_path("./derain")) == here / "derain"
    for text in ("derain", "./mine", "runs/mine", "/derain"):
        assert model_path(text) == Path(text)
    for use in (fastnce.load, fastnce.hub.HubModel.open, lambda path: fastnce.evaluate(path, "TEST")):
        with pytest.raises(ValueError, match=f"^{re.escape(str(here / 'derain'))}: no such run or file$"):
            use("./derain")


SHIPPED = ", and the models that come with fastnce are: derain"
MEANT = f"{SHIPPED}; did you mean 'derain'?"


@pytest.mark.parametrize(
    ("name", "more"),
    [("derian", MEANT), ("Derain", MEANT), ("mine", SHIPPED), ("runs/derain", ""), ("derain.pth", "")],
)
def test_an_unknown_name(name, more):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: no such run or file{more}')}$"):
        fastnce.load(name)
