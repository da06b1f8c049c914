"""How an exported graph is run, for its model card."""

from __future__ import annotations

LINES = {
    "torch": ("import torch", 'model = torch.export.load("{file}").module()', "translated = model(images)"),
    "aoti": ("import torch", 'model = torch._inductor.aoti_load_package("{file}")', "translated = model(images)"),
    "onnx": (
        "import onnxruntime",
        'model = onnxruntime.InferenceSession("{file}")',
        '(translated,) = model.run(None, {{"images": images}})',
    ),
}


def graph_usage(format: str, file: str) -> str:
    """A section of the card, or nothing for other formats. Images are as the table above it says."""
    if format not in LINES:
        return ""
    code = "\n".join(LINES[format]).format(file=file)
    kind = "a NumPy array" if format == "onnx" else "a tensor"
    return f"## Use\n\nWithout fastnce, with `images` as {kind} of the input above:\n\n```python\n{code}\n```\n"
