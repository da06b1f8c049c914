"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.callbacks import RunInfo
from .tracking import Tracker, flat


class TensorBoardTracker(Tracker):
    """Writes scalars, pictures, hyperparameters and warnings. TensorBoard hides what a continued run repeats."""

    name = "tensorboard"

    def open(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # purge_step hides what an earlier process wrote for the steps that are repeated now
        first = run.step + 1 if run.step else 0
        self.board: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=first, flush_secs=10)
        options = flat(run.config)
        for summary in hparams(options, {}):  # add_hparams would make a run of its own
            self.board._get_file_writer().add_summary(summary)
        rows = [f"| {key} | {value} |" for key, value in options.items()]
        self.board.add_text("configuration", "\n".join(["| option | value |", "|---|---|", *rows]), first)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def pictures(self, step: int, strips: dict[str, np.ndarray]) -> None:
        for name, picture in strips.items():
            self.board.add_image(f"samples/{name}", picture, step, dataformats="HWC")

    def text(self, step: int, sentence: str) -> None:
        self.board.add_text("warnings", sentence, step)

    def close(self, state: str) -> None:
        self.board.close()
