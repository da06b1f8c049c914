"""Pictures beyond the limit of pixels: each command names its option, and takes it."""

from __future__ import annotations

import pytest
from PIL import Image

from fastnce.commands.main import main
from tests.ends import left, one_sentence, tiny, write

PIXELS = 12 * 16


@pytest.fixture
def low_limit(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    monkeypatch.delenv("FASTNCE_MAX_PIXELS", raising=False)


@pytest.mark.parametrize("command", ["translate", "evaluate", "rain", "unpair"])
def test_max_pixels(command, low_limit, model, photos, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = {
        "translate": [model, photos, "--device", "cpu", "--out", out],
        "evaluate": ["--inputs-only", "--data", pairs, "--device", "cpu"],
        "rain": [photos, "--out", out],
        "unpair": [pairs, "--out", out],
    }
    line = [command, *(str(argument) for argument in arguments[command])]
    assert main(line) == 2
    message = capsys.readouterr().err
    assert (
        f"{PIXELS} pixels exceed the limit of 100; make it smaller, or accept it with --max-pixels {PIXELS}" in message
    )
    assert "FASTNCE" not in message
    assert not out.exists() or left(out) == []
    assert main([*line, "--max-pixels", str(PIXELS)]) == 0
    assert Image.MAX_IMAGE_PIXELS == 50
    capsys.readouterr()
    for wrong in ("0", "-5", "many", "1e9", "9" * 40, ""):
        with pytest.raises(SystemExit) as end:
            main([*line, f"--max-pixels={wrong}"])
        assert end.value.code == 2
        assert "--max-pixels: must be a whole number of pixels above 0, not" in capsys.readouterr().err


def test_training_and_cache_take_it_from_the_configuration(low_limit, tmp_path, capsys):
    """A run may continue with another limit, as it changes no result."""
    data = write(tmp_path / "data", "trainA/a.png", "trainB/b.png")
    steps = ["run.steps=1", "--quiet"]
    cache = ["cache", "fastcut", "--data", str(data), *tiny(data, tmp_path)[6:]]
    for line in (cache, tiny(data, tmp_path / "run", *steps)):
        assert main(line) == 2
        message = capsys.readouterr().err
        assert f"accept it with data.max_pixels={PIXELS} (as RGB it takes 0.0 MiB" in message
        assert "--max-pixels" not in message
    for line in (cache, tiny(data, tmp_path / "run", *steps)):
        assert main([*line, f"data.max_pixels={PIXELS}"]) == 0
    assert Image.MAX_IMAGE_PIXELS == 50
    assert main(tiny(data, tmp_path / "run", "run.steps=2", "--quiet", f"data.max_pixels={2 * PIXELS}")) == 0
    capsys.readouterr()
    assert main([*cache, "data.max_pixels=-1"]) == 2
    assert "data.max_pixels must be" in one_sentence(capsys)
