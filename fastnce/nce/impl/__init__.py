"""How the contrastive operation is computed: the definition, plain PyTorch, Triton kernels."""
