"""MLflow: the server or database that `MLFLOW_TRACKING_URI` names, else MLflow's own default."""

from __future__ import annotations

import logging
import os
import re
import time
from typing import Any

import numpy as np

from ..engine.callbacks import RunInfo
from .tracking import Tracker, flat

STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflowTracker(Tracker):
    """Logs to the experiment `MLFLOW_EXPERIMENT_NAME`, or "fastnce"."""

    name = "mlflow"

    def open(self, run: RunInfo) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports every migration of a new database
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.metric: Any = Metric
        self.client = mlflow.MlflowClient()
        known: dict[str, str] = {}
        if self.stored:
            self.run_id = str(self.stored.get("run_id"))
            known = self.client.get_run(self.run_id).data.params
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            made = self.client.create_run(self._experiment(), run_name=run.folder.resolve().name)
            self.run_id = made.info.run_id
        options = {_key(key): str(value)[:6000] for key, value in flat(run.config).items()}
        new = [Param(key, value) for key, value in options.items() if key not in known]
        for start in range(0, len(new), 100):  # at most 100 in one call
            self.client.log_batch(self.run_id, params=new[start : start + 100])
        for key, value in options.items():
            if known.get(key, value) != value:  # a parameter cannot change
                self.client.set_tag(self.run_id, f"{key} from step {run.step}", value)
        self.stored = {"run_id": self.run_id}
        self._warnings: dict[int, list[str]] = {}

    def _experiment(self) -> str:
        if named := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return named
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fastnce"
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found is not None else self.client.create_experiment(name)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self.metric(_key(name), value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def pictures(self, step: int, strips: dict[str, np.ndarray]) -> None:
        for name, picture in strips.items():
            self.client.log_image(self.run_id, picture, key=_key(f"samples {name}"), step=step, synchronous=True)

    def text(self, step: int, sentence: str) -> None:
        self._warnings.setdefault(step, []).append(sentence)
        self.client.log_text(self.run_id, "\n".join(self._warnings[step]), f"warnings/step-{step:08d}.txt")

    def close(self, state: str) -> None:
        self.client.set_terminated(self.run_id, STATES[state])


def _key(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. ]", "_", name, flags=re.ASCII)[:250]
