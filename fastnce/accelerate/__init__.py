"""Run a checkout of CUT, DCLGAN, DCD-GAN or a fork, unedited, with this library's loss and patch sampler.

python -m fastnce.accelerate train.py --dataroot ./datasets/horse2zebra --name h2z    # inside the checkout
python -m fastnce.accelerate -m package --name h2z                                    # instead of python -m

In a notebook: `import models.patchnce; fastnce.accelerate.patch(models.patchnce)`.
"""

from .replace import patch
from .script import main

__all__ = ["main", "patch"]
