"""Translate a picture with onnxruntime alone: an export of the format onnx.

fastnce export runs/mine --format onnx --out exported
python examples/infer_onnx.py exported picture.jpg translated.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def main(folder: str, picture: str, result: str) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    wanted = config["input"]
    session = onnxruntime.InferenceSession(Path(folder) / config["file"], providers=["CPUExecutionProvider"])
    image = Image.open(picture).convert({1: "L", 3: "RGB"}[wanted["channels"]])
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, -1) / 127.5 - 1
    sides = [max(side, wanted["smallest"]) for side in (image.height, image.width)]  # pad to sides that the model takes
    more = [side + -side % wanted["multiple"] - old for side, old in zip(sides, pixels.shape, strict=False)]
    padded = np.pad(pixels, [(0, more[0]), (0, more[1]), (0, 0)], mode="reflect")
    output = session.run(None, {"images": padded.transpose(2, 0, 1)[None]})[0][0]
    output = output[:, : image.height, : image.width].transpose(1, 2, 0).clip(-1, 1)
    Image.fromarray(((output + 1) * 127.5).round().astype(np.uint8).squeeze()).save(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
