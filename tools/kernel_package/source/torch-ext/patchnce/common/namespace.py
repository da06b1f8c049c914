"""The namespace of the kernels' PyTorch operators: its own for each build."""

from .._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
