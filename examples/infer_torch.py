"""Translate a picture with PyTorch alone: an export of the format torch or aoti.

fastnce export runs/mine --format torch --out exported
python examples/infer_torch.py exported picture.jpg translated.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def main(folder: str, picture: str, result: str) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    path, wanted = str(Path(folder) / config["file"]), config["input"]
    if config["format"] == "aoti":
        model = torch._inductor.aoti_load_package(path)
    else:
        model = torch.export.load(path).module()
    image = Image.open(picture).convert({1: "L", 3: "RGB"}[wanted["channels"]])
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, -1) / 127.5 - 1
    sides = [max(side, wanted["smallest"]) for side in (image.height, image.width)]  # pad to sides that the model takes
    more = [side + -side % wanted["multiple"] - old for side, old in zip(sides, pixels.shape, strict=False)]
    padded = np.pad(pixels, [(0, more[0]), (0, more[1]), (0, 0)], mode="reflect")
    with torch.no_grad():
        output = model(torch.from_numpy(padded.transpose(2, 0, 1)[None].copy()))[0].numpy()
    output = output[:, : image.height, : image.width].transpose(1, 2, 0).clip(-1, 1)
    Image.fromarray(((output + 1) * 127.5).round().astype(np.uint8).squeeze()).save(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
