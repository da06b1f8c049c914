"""The format onnx: model.onnx, written by PyTorch's dynamo exporter and checked by onnxruntime."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from .graph import Run, quiet

FILE = "model.onnx"
LOADED_BY = "onnxruntime"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing(dtype: str) -> str:
    """Why this format cannot be written or checked here; empty if it can."""
    if absent := [name for name in PACKAGES if find_spec(name) is None]:
        return f"--format onnx needs {' and '.join(absent)}: pip install {' '.join(absent)} (the extra export)"
    if dtype == "bfloat16":
        return (
            "ONNX has no convolutions in bfloat16 in the operator set that PyTorch writes: take --dtype float16, or "
            "--format torch"
        )
    return ""


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write the program as one file, with the axes images, height and width, and without lines of code."""
    import onnx

    with quiet(), torch.no_grad():
        written = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["translated"]
        )
        assert written is not None
        model = written.model_proto
    graph = model.graph
    del graph.value_info[:]  # shapes in the symbols of the tracer, which a reader infers by itself
    for value in (*graph.input, *graph.output):
        for place, name in ((0, "images"), (2, "height"), (3, "width")):
            value.type.tensor_type.shape.dim[place].dim_param = name
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]  # names of Python's modules and lines
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def load(path: Path) -> Run:
    """Load the file with onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        (found,) = session.run(None, {"images": x.numpy()})
        return torch.from_numpy(found)

    return run
