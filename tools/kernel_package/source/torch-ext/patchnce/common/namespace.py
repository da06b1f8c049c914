"""The namespace of the kernels' PyTorch operators: unique to this build, beside other builds and an installed fastnce."""

from .._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
