"""Experiments: training in 16 bits against float32, and the ablation of DCD-GAN."""
