"""The model card: front matter that the hub takes, and what it says of a model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastnce.export import card, details
from fastnce.export.card import as_json
from fastnce.methods import NetworkOptions
from tests.export.networks import Small, source_of
from tests.export.test_folder import made

FACTS = {
    "method": "cut",
    "step": 12_000,
    "epoch": 3,
    "seen": 12_000,
    "data": {"name": "horse2zebra", "A": 1_067, "B": 1},
    "config": 'method = "cut"\n\n[loss]\ntemperature = 0.07\n',
    "figures": {"psnr_y": 23.456789, "ssim_y": 1},
}
FILES = ["model.safetensors"]


def hub_data(text: str) -> dict:
    """The front matter as the hub's library reads it."""
    library = pytest.importorskip("huggingface_hub", reason="huggingface_hub (extra hub) is not installed")
    return library.ModelCard(text).data.to_dict()


def test_the_front_matter_is_what_the_hub_reads():
    found = hub_data(card(made(**FACTS), "safetensors", FILES, "float32"))
    assert found == {
        "library_name": "fastnce",
        "pipeline_tag": "image-to-image",
        "license": "unknown",  # the hub's own word for a licence that is not stated
        "tags": ["fastnce", "unpaired-image-translation", "cut"],
    }


@pytest.mark.parametrize("method", ["mypaper.py:Mine", "", '"]\n- x: {', "---"])
def test_the_front_matter_holds_with_any_method(method):
    found = hub_data(card(made(method=method), "safetensors", FILES, "float32"))
    assert found["license"] == "unknown"
    assert found["tags"][2:] == ([] if ":" in method or not method else [method])


def test_the_licence_is_a_field_to_fill():
    text = card(made(**FACTS), "safetensors", FILES, "float32")
    (line,) = [line for line in text.splitlines() if line.startswith("license:")]
    assert line.startswith("license: unknown  # replace: ")
    filled = hub_data(text.replace(line, "license: cc-by-nc-4.0"))
    assert filled["license"] == "cc-by-nc-4.0"
    assert "## Licence\n\nNot stated yet" in text


def test_what_the_card_says_of_a_run():
    text = card(made(**FACTS), "safetensors", FILES, "float16", "Compared on 2 sizes.")
    for line in (
        "| method | cut |",
        "| input | (images, 3, height, width), float32 in [-1, 1]; sides that are multiples of 4, at least 8 |",
        "| files | model.safetensors: safetensors, weights in float16 |",
        "Compared on 2 sizes.",
        "| data folder | horse2zebra: 1,067 images of A and 1 image of B |",
        "| steps | 12,000 |",
        "| psnr_y | 23.4568 |",
        "temperature = 0.07",
    ):
        assert f"\n{line}\n" in text
    numbers = sum(parameter.numel() for parameter in made().network.parameters())
    assert f"G (resnet_4blocks, width 2), from A to B, {numbers:,} parameters" in text


def test_a_card_of_a_file_of_which_nothing_is_known():
    text = card(made(), "safetensors", FILES, "float32")
    assert "| method | not known |" in text
    for title in ("Training", "Measured", "Configuration"):
        assert f"## {title}" not in text


def test_what_a_model_is_said_to_be_goes_along():
    """As an exported folder says it in config.json."""
    about = {"what": "removes rain", "trained_on": "photographs <of> mine", "license": "apache-2.0"}
    source = made(**FACTS, about=about)
    text = card(source, "onnx", ["model.onnx"], "float32")
    assert hub_data(text)["license"] == "apache-2.0"
    assert "\nremoves rain\n" in text
    assert "## Licence\n\napache-2.0. Trained on photographs &lt;of> mine.\n" in text
    assert "Replace this line" not in text
    assert details(source, "onnx", ["model.onnx"], "float32")["about"] == about


def test_a_licence_that_the_hub_would_not_read_is_stated_below():
    text = card(made(about={"license": "ask me\nfirst: now"}), "safetensors", FILES, "float32")
    assert hub_data(text)["license"] == "unknown"
    assert "## Licence\n\nask me first: now.\n" in text


def test_a_format_that_fastnce_does_not_read_again_has_no_example():
    assert "fastnce.load(" in card(made(), "safetensors", FILES, "float32")
    assert "fastnce.load(" not in card(made(), "onnx", ["model.onnx"], "float32")


def test_names_cannot_break_the_table_or_the_text():
    data = {"name": "a|b\n# <script>\udcff", "A": 1}
    text = card(made(**FACTS | {"data": data, "config": "```\n<b>"}), "safetensors", FILES, "float32")
    assert "| data folder | a\\|b # &lt;script>?: 1 image of A |" in text
    assert "```\n<b>" not in text


def test_config_json():
    found = json.loads(as_json(details(made(**FACTS), "onnx", ["model.onnx", "more"], "float16")))
    assert found["input"] == {
        "channels": 3,
        "multiple": 4,
        "smallest": 8,
        "range": [-1, 1],
        "dtype": "float32",
    }
    assert (found["output"], found["weights"]) == ({"channels": 3}, {"dtype": "float16"})
    assert (found["format"], found["file"], found["method"], found["generator"]) == ("onnx", "model.onnx", "cut", "G")
    assert NetworkOptions(**found["network"]).width == 2
    assert found["training"]["figures"] == FACTS["figures"]


def test_folders_of_the_users_code_are_left_out():
    own = "/home/ann/nets.py:Net"
    mine = made()
    for source in (source_of(Small(), own=own), replace(mine, options={**mine.options, "generator": own}, own=own)):
        text = card(source, "torch", ["model.pt2"], "float32")
        assert "G (nets.py:Net" in text
        assert "ann" not in text
        assert "## Use" in text
        # its weights say nothing without its code
        assert "fastnce.load" not in card(source, "published", ["latest_net_G.pth"], "float32")


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_and_b_are_those_of_the_data_folder(reverse, direction):
    text = card(source_of(Small(), reverse=reverse, facts={"direction": direction}), "torch", ["model.pt2"], "float32")
    assert ("from B to A" if reverse != (direction == "BtoA") else "from A to B") in text
