"""The namespace of the kernels' PyTorch operators. A kernel package for the hub puts its own in place of this file."""

NAMESPACE = "fastnce"
