"""Short names of kernels for the launch table."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable

from tools.standin.log import Event, count

INDUCTOR = {
    "poi": "pointwise",
    "red": "reduction",
    "per": "persistent reduction",
    "for": "foreach",
    "tem": "template",
    "split": "split scan",
}
"""What a kernel of Inductor is, by the second part of its name. Its other parts number and describe it: they vary."""

_LANGUAGE = "void const char int unsigned lambda operator true false std array"
_NAMESPACES = "at native cuda detail memory binary_internal templates anonymous namespace c10"
_WRAPPERS = "gpu_kernel_impl gpu_kernel_impl_nocast ReduceOp func_wrapper_t"
_ARGUMENTS = (
    "TensorIterator TensorIteratorBase TensorListMetadata FusedOptimizerTensorListMetadata TensorSizeStride Scalar "
    "OffsetCalculator TrivialOffsetCalculator OpaqueType CatArrInputTensorMetadata NormType CUDAGeneratorImpl"
)
NOISE = frozenset(f"{_LANGUAGE} {_NAMESPACES} {_WRAPPERS} {_ARGUMENTS}".split())
"""Words of a demangled name that do not distinguish one kernel from another."""
WORDS = 4
"""The number of words of a short name: the kernel, then the functors and types that it is made from."""


def short_torch_name(demangled: str) -> str:
    """Return the words of a demangled kernel name that tell what it computes: "reduce_kernel float MeanOps"."""
    words = re.findall(r"\b[A-Za-z_]\w+", demangled)
    return " ".join(list(dict.fromkeys(word for word in words if word not in NOISE))[:WORDS])


def short_triton_name(name: str) -> str:
    """Return the name of one of the project's kernels, or the sort of a kernel that Inductor wrote."""
    sort = re.match(r"triton_([a-z]+)_", name)
    return f"inductor {INDUCTOR.get(sort[1], sort[1])}" if sort else name


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Return C++ names as a reader writes them, by the mangled name."""
    mangled = sorted(set(names))
    run = subprocess.run(["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True)
    return dict(zip(mangled, run.stdout.splitlines(), strict=True))


def table(events: Iterable[Event]) -> Counter[str]:
    """Return the number of launches by kind and short name, such as "triton blur_kernel"."""
    launches = count(events)
    readable = demangle(name for kind, name in launches if kind == "torch")
    found: Counter[str] = Counter()
    for (kind, name), number in launches.items():
        if kind == "torch":
            name = short_torch_name(readable[name])
        elif kind == "triton":
            name = short_triton_name(name)
        found[f"{kind} {name}"] += number
    return found
