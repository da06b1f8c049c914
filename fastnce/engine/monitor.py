"""Detect that training fails: outputs that ignore their input, a discriminator that has won, a lost identity.

Nothing here changes training. A warning is given once, and again only after a recovery.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..methods.base import Batch, Method
from ..methods.translation import translate

RESPONSE_LEAST = 0.1
"""The least spread of the outputs over different inputs, relative to the spread of the inputs."""
DISCRIMINATOR_LEAST = 0.02
"""The least loss of a discriminator. At chance it is 0.25 (lsgan), 0.69 (vanilla) or 1 (hinge)."""
IDENTITY_FALL = 3.0
"""The fall of identity, in dB, that is a warning."""
IDENTITY_ENOUGH = 28.0
"""The identity, in dB, above which a fall is no warning: a generator that starts as the identity has to leave it."""


class Alarm:
    """A warning that is raised after several consecutive bad readings, and withdrawn after as many good ones.

    Args:
        sentence: the sign, a colon, and what to do about it.
        patience: the number of consecutive readings.
    """

    def __init__(self, sentence: str, patience: int):
        self.sentence, self.patience = sentence, patience
        self.up = False
        self._against = 0

    def read(self, bad: bool) -> str:
        """Take a reading; returns a message if the warning is raised or withdrawn, else an empty text."""
        self._against = self._against + 1 if bad != self.up else 0
        if self._against < self.patience:
            return ""
        self.up, self._against = bad, 0
        return f"warning: {self.sentence}" if bad else f"recovered: {self.sentence.split(':')[0]} no longer"


class Monitor:
    """Watches one run. A run that is continued starts without history.

    Args:
        discriminators: as `Method.discriminator_losses`.
        identity: as `Method.identity_losses`.
        pictures: samples of both domains that stay the same; None watches the discriminators only.
    """

    def __init__(
        self,
        discriminators: Mapping[str, Sequence[str]] | None = None,
        identity: Sequence[str] = (),
        pictures: Batch | None = None,
    ):
        self.discriminators, self.identity_losses, self.pictures = discriminators or {}, identity, pictures
        self.response = math.nan
        self.identity = math.nan
        self._identity_best = -math.inf
        self.keeps_identity = False
        """Whether a logged loss keeps identity. Without one, as in FastCUT, the generator may change images of B."""
        self._ignores = Alarm(
            "the outputs hardly depend on the input: the generator has collapsed; try a lower optim.lr or a higher "
            "weight of the contrast, cycle or identity",
            patience=2,
        )
        self._forgets = Alarm(
            f"clean pictures are changed: identity fell by more than {IDENTITY_FALL:g} dB; raise the weight of the "
            f"identity loss or lower optim.lr",
            patience=2,
        )
        self._beaten: dict[str, Alarm] = {}

    def look(self, method: Method) -> list[str]:
        """Translate the samples and check the results; returns messages.

        The method is left in evaluation mode.
        """
        if self.pictures is None:
            return []
        method.eval()
        with torch.no_grad():
            made, kept = (
                [
                    translate(method, picture.clone()).float() for picture in column.split(1)
                ]  # no more memory than a step
                if column.shape[1] == self.pictures.a.shape[1]
                else []  # images of B that the generator cannot take
                for column in self.pictures
            )
        messages = []
        if len(made) > 1:  # one image has no other to compare with
            self.response = response(made, self.pictures.a.split(1))
            messages.append(self._ignores.read(not self.response >= RESPONSE_LEAST))
        if kept and kept[0].shape == self.pictures.b[:1].shape:
            errors = [(k - b).square().mean() for k, b in zip(kept, self.pictures.b.split(1), strict=True)]
            self.identity = min(10 * math.log10(4 / max(float(torch.stack(errors).mean()), 1e-10)), 99.0)
            self._identity_best = max(self._identity_best, min(self.identity, IDENTITY_ENOUGH))
            fell = not self.identity >= self._identity_best - IDENTITY_FALL
            messages.append(self._forgets.read(fell and self.keeps_identity))
        return [message for message in messages if message]

    def judge(self, losses: dict[str, float]) -> list[str]:
        """Check the losses of a progress line; returns messages."""
        messages = []
        self.keeps_identity = any(name in losses for name in self.identity_losses)
        for name, parts in self.discriminators.items():
            if not losses.keys() >= set(parts):
                continue
            value = sum(losses[part] for part in parts)
            alarm = self._beaten.setdefault(
                name,
                Alarm(
                    f"the loss of {name} stays at 0: the discriminator has won and teaches nothing; try a smaller one, "
                    f"or a lower optim.lr",
                    patience=5,
                ),
            )
            messages.append(alarm.read(0 <= value < DISCRIMINATOR_LEAST))
        return [message for message in messages if message]

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl: response and identity_psnr (dB) if they were measured, and the number of open warnings."""
        found = {"response": self.response, "identity_psnr": self.identity}
        return {key: value for key, value in found.items() if not math.isnan(value)} | {"warnings": len(self._up())}

    def short(self) -> str:
        """The open warnings, for the progress line."""
        up = self._up()
        return f"WARNING: {', '.join(up)}" if up else ""

    def _up(self) -> list[str]:
        short = {"output ignores input": self._ignores, "identity falls": self._forgets}
        short |= {f"{name} at 0": alarm for name, alarm in self._beaten.items()}
        return [words for words, alarm in short.items() if alarm.up]


def response(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> float:
    """How much the outputs differ between images, relative to the inputs: about 1 in a healthy training.

    Args:
        outputs, inputs: two or more of (1, channels, height, width), of one size.

    Returns:
        the root of the ratio of their variances over images, each averaged over pixels.
    """
    made, given = (torch.cat(list(pictures)).float().var(dim=0).mean() for pictures in (outputs, inputs))
    return float((made / given.clamp_min(1e-12)).sqrt())
