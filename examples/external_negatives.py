"""Negatives from other images in your own loop: a memory bank, as for DCD-GAN's external negatives.

python examples/external_negatives.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastnce import NegativeBank, PatchSampleF, patch_nce

CHANNELS = [16, 32]  # of the feature maps of two layers


def main(steps: int = 3) -> list[float]:
    torch.manual_seed(0)
    sampler = PatchSampleF(nc=32, in_channels=CHANNELS)
    bank = NegativeBank(128, [32] * len(CHANNELS))  # the latest 128 codes of each layer
    losses = []
    for step in range(steps):
        # Features of one input image and of its translation. In practice your networks compute them.
        keys = [torch.randn(1, channels, 16, 16) for channels in CHANNELS]
        queries = [key + 0.3 * torch.randn_like(key) for key in keys]

        query_rows, ids = sampler(queries, num_patches=64)
        with torch.no_grad():
            key_rows, _ = sampler(keys, num_patches=64, patch_ids=ids)
        layers = zip(query_rows, key_rows, bank.keys(), strict=True)
        loss = torch.stack([patch_nce(q, k, extra_keys=old) for q, k, old in layers]).mean()
        loss.backward()  # then an optimiser step
        bank.enqueue(key_rows)
        losses.append(loss.item())
        similarity = F.cosine_similarity(query_rows[0], key_rows[0]).mean()
        print(f"step {step}: loss {loss.item():.3f}, similarity of pairs {similarity:.2f}")
    return losses


if __name__ == "__main__":
    main()
