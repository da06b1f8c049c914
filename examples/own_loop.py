"""The contrastive loss in your own training loop: FastCUT's terms in plain PyTorch.

python examples/own_loop.py
"""

from __future__ import annotations

import torch
from pictures import picture
from torch import Tensor

from fastnce import PatchNCEHead
from fastnce.methods.losses import gan_loss
from fastnce.networks import build_discriminator, build_generator

LAYERS = [0, 4, 8]


def images(warm: bool) -> Tensor:
    """Return (2, 3, 32, 32) in [-1, 1]."""
    pixels = [torch.from_numpy(picture(seed, warm, side=32)) for seed in (0, 1)]
    return torch.stack(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def main(steps: int = 3) -> list[float]:
    torch.manual_seed(0)
    generator = build_generator("resnet_4blocks", width=8)
    discriminator = build_discriminator("basic", width=8)
    head = PatchNCEHead(generator.feature_channels(LAYERS), dim=32, patches=64, temperature=0.07)
    adam_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    adam_g = torch.optim.Adam([*generator.parameters(), *head.parameters()], lr=2e-4, betas=(0.5, 0.999))
    losses = []
    for step in range(steps):
        real_a, real_b = images(warm=False), images(warm=True)
        fake_b, keys = generator(real_a, LAYERS)  # the features of the input are the keys

        judged = discriminator(fake_b.detach()), discriminator(real_b)
        loss_d = 0.5 * (gan_loss(judged[0], False, "lsgan") + gan_loss(judged[1], True, "lsgan"))
        adam_d.zero_grad()
        loss_d.backward()
        adam_d.step()

        queries = generator(fake_b, LAYERS, encode_only=True)
        nce = head(queries, [key.detach() for key in keys])
        loss_g = gan_loss(discriminator(fake_b), True, "lsgan", for_generator=True) + 10 * nce
        adam_g.zero_grad()
        loss_g.backward()
        adam_g.step()
        losses.append(nce.item())
        print(f"step {step}: D {loss_d.item():.3f}, NCE {nce.item():.3f}")
    return losses


if __name__ == "__main__":
    main()
