"""Weights & Biases: files in RUN/wandb, sent to the server unless it is offline."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..engine.callbacks import RunInfo
from .tracking import Tracker, flat


class WandbTracker(Tracker):
    """Logs to the project `WANDB_PROJECT`, or "fastnce". Without a login the run is offline; nothing asks for one."""

    name = "wandb"
    wait = 45.0
    """Seconds to wait for the server, at the start and at the end."""

    def open(self, run: RunInfo) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or "online"
        key = os.environ.get("WANDB_API_KEY")  # login would print that it is there
        if mode == "online" and not (key or wandb.login(prompt=False, verify=False)):
            mode = "offline"
            self.hint = (
                f"Weights & Biases: not logged in, so the run is written to {run.folder / 'wandb'} alone; "
                f"`wandb login`, then `wandb sync` on its folders there, sends it"
            )
        settings = wandb.Settings(
            silent=True,
            console="off",  # log.txt has the lines
            init_timeout=self.wait,
            finish_timeout=self.wait,
            finish_timeout_raises=True,
        )
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fastnce",
            name=run.folder.resolve().name,
            dir=str(run.folder),
            id=self.stored.get("id"),
            resume="allow" if mode == "online" and self.stored else None,  # offline, the same id is enough
            config=flat(run.config),
            allow_val_change=True,
            mode=mode,
            reinit="create_new",  # a run of the user's own goes on
            settings=settings,
        )
        self.stored = {"id": self.run.id, "project": self.run.project}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def pictures(self, step: int, strips: dict[str, np.ndarray]) -> None:
        self.run.log({f"samples/{name}": self.wandb.Image(picture) for name, picture in strips.items()}, step=step)

    def text(self, step: int, sentence: str) -> None:
        self.run.alert(title=f"{self.run.name}, step {step:,}", text=sentence, level="WARN")

    def close(self, state: str) -> None:
        self.run.finish(exit_code=1 if state == "failed" else 0)
