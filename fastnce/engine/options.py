"""The sections `optim` and `run` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.options import option
from ..evaluate.metrics import METRIC_HELP, METRIC_NAMES
from .choices import PRECISIONS


@dataclass
class OptimOptions:
    """Learning rate, its schedule, and the average of weights."""

    lr: float = option(2e-4, "Adam's learning rate during the first n_epochs", low=1e-12, high=1e38)
    beta1: float = option(0.5, "Adam's first moment; 0.5 as in every paper here", low=0, below=1)
    beta2: float = option(0.999, "Adam's second moment", low=0, below=1)
    n_epochs: int = option(200, "epochs at the full learning rate; an epoch is the larger domain once", low=0)
    n_epochs_decay: int = option(200, "epochs over which the rate falls linearly towards 0", low=0)
    ema: float = option(0.0, "decay of the generator's averaged weights, e.g. 0.999; 0 keeps none", low=0, below=1)
    accumulate: int = option(
        1, "parts that a rank's batch is computed in, one after another: less memory, the same step", low=1
    )
    max_bad_steps: int = option(20, "end the job after this many steps in a row that were not finite; 0 never", low=0)


@dataclass
class RunOptions:
    """How a run goes, apart from what it learns."""

    seed: int = option(0, "of everything random; the same seed gives the same run", low=0, high=2**64 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, xpu, ...", anything=True)
    precision: str = option(
        "auto",
        "fp32, bf16, fp16; auto: bf16 on GPUs that compute in it, else fp32",
        choices=("auto", *PRECISIONS),
    )
    compile: str = option(
        "auto",
        "true, false, whole (the step as one graph); auto: true on accelerators (a first step of minutes, then faster)",
        choices=("auto", "true", "false", "whole"),
    )
    graph: str = option(
        "auto",
        "record the step in CUDA graphs: one launch a step; true, false; auto: on CUDA devices",
        choices=("auto", "true", "false"),
    )
    tf32: str = option(
        "auto",
        "true, false: TF32 in float32 products and convolutions; auto: the library's choice",
        choices=("auto", "true", "false"),
    )
    checkpoint_activations: bool = option(
        False, "compute the generators' residual blocks again in the backward pass: less memory, more time"
    )
    steps: int = option(0, "stop after this many steps in all; 0 runs the whole schedule", low=0)
    change_batch: bool = option(
        False, "continue with another data.batch times processes: the place in the epochs is kept, optim.lr is as it is"
    )
    minutes: float = option(0.0, "save and stop after this time, to be continued; 0 sets no limit", low=0)
    log_every: int = option(100, "steps between progress lines (losses are read only then); 0: one at the end", low=0)
    sample_every: int = option(1000, "steps between sample grids; 0 makes none", low=0)
    samples: int = option(4, "pictures in a sample grid; 0 makes none", low=0, high=1_000)
    monitor_every: int = option(500, "steps between checks of what the generator does to the samples; 0 never", low=0)
    validate_every: int = option(0, "steps between measures of held-out pairs (see data.validate); 0 never", low=0)
    validate_pictures: int = option(25, "so many pairs at most, spread over the set; 0 takes all", low=0)
    metric: str = option("psnr_y", METRIC_HELP, choices=METRIC_NAMES, imports=True)
    save_every: int = option(1000, "steps between checkpoints; 0: one at the end, or where it is stopped", low=0)
    keep: int = option(2, "checkpoints to keep", low=2)
    threads: int = option(0, "CPU threads; 0 leaves the library's choice", low=0, high=1_024)
    tensorboard: bool = option(False, "also write TensorBoard events")
