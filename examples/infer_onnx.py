"""Translate a picture with onnxruntime alone: an export of the format onnx.

fastnce export runs/mine --format onnx --out exported
python examples/infer_onnx.py exported picture.jpg translated.png

Transparency is left out, and the result has 8 bits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(folder: str, picture: str, result: str) -> None:
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    wanted, channels = config["input"], config["input"]["channels"]
    session = onnxruntime.InferenceSession(Path(folder) / config["file"], providers=["CPUExecutionProvider"])
    if {channels, config["output"]["channels"]} - {1, 3}:
        sys.exit(f"{folder} is not for pictures of 1 or 3 channels, which these lines read and write")
    image = ImageOps.exif_transpose(Image.open(picture))
    deep = image.mode.startswith("I")  # grey of 16 bits, which convert would cut at 255
    image = image if deep else image.convert("L" if channels == 1 else "RGB")
    pixels = np.atleast_3d(np.asarray(image, np.float32)) / (32767.5 if deep else 127.5) - 1
    pixels = np.broadcast_to(pixels, (image.height, image.width, channels))
    sides = [max(side, wanted["smallest"]) for side in (image.height, image.width)]  # pad to sides that the model takes
    more = [side + -side % wanted["multiple"] - old for side, old in zip(sides, pixels.shape, strict=False)]
    mode = "reflect" if more[0] < image.height and more[1] < image.width else "edge"
    padded = np.pad(pixels, [(0, more[0]), (0, more[1]), (0, 0)], mode=mode)
    output = session.run(None, {"images": padded.transpose(2, 0, 1)[None]})[0][0]
    output = output[:, : image.height, : image.width].transpose(1, 2, 0).clip(-1, 1)
    levels = ((output + 1) * 127.5).round().astype(np.uint8)
    Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels).save(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
