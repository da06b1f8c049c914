"""Implementations of the contrastive operation: the definition, plain PyTorch, Triton kernels."""
