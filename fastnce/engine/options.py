"""The sections `optim` and `run` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.options import option
from ..evaluate.metrics import AUTO, BEST_HELP, FEATURE_WEIGHTS_HELP, METRICS_HELP
from .choices import PRECISIONS

SCHEDULES = ("linear", "step", "plateau", "cosine", "constant")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""The names that `run.track` takes, which are also those of the packages."""


@dataclass
class OptimOptions:
    """Learning rate, its schedule, and the average of weights."""

    lr: float = option(2e-4, "Adam's learning rate during the first n_epochs", low=1e-12, high=1e38)
    beta1: float = option(0.5, "Adam's first moment; 0.5 as in every paper here", low=0, below=1)
    beta2: float = option(0.999, "Adam's second moment", low=0, below=1)
    optimizer: str = option("adam", "adam, as in every paper here, or adamw", choices=("adam", "adamw"))
    weight_decay: float = option(
        0.0,
        "adamw: decay of all weights (not of a learned temperature), times the rate; adam: as a gradient (L2)",
        low=0,
        high=100,
    )
    n_epochs: int = option(200, "epochs at the full learning rate; an epoch is the larger domain once", low=0)
    n_epochs_decay: int = option(200, "epochs after these; with optim.schedule=linear the rate falls to 0", low=0)
    schedule: str = option(
        "linear",
        "linear, step (a tenth every decay_every epochs), plateau (a fifth where the generators' loss stands still), "
        "cosine (to 0 over n_epochs), constant",
        choices=SCHEDULES,
    )
    decay_every: int = option(50, "epochs between two cuts of optim.schedule=step", low=1)
    warmup: float = option(0.0, "epochs over which the rate rises at the beginning, step by step", low=0, high=1e6)
    first_epoch: int = option(1, "a new run begins with this epoch of the schedule; later ones keep their place", low=1)
    ema: float = option(0.0, "decay of the generator's averaged weights, e.g. 0.999; 0 keeps none", low=0, below=1)
    accumulate: int = option(
        1, "parts of a rank's batch that are computed one after another: less memory, the same step", low=1
    )
    max_bad_steps: int = option(20, "end the run after this many consecutive steps that are not finite; 0 never", low=0)


@dataclass
class RunOptions:
    """The device, precision, length and output of a run."""

    seed: int = option(0, "seed of all random numbers; the same seed gives the same run", low=0, high=2**64 - 1)
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
        "record the step in CUDA graphs, one launch per step: true, false; auto: on CUDA devices",
        choices=("auto", "true", "false"),
    )
    streams: bool = option(
        False, "compute independent work of a step at the same time on a CUDA device; parts that are compiled do not"
    )
    tf32: str = option(
        "auto",
        "TF32 in float32 products and convolutions: true, false; auto: the library's choice",
        choices=("auto", "true", "false"),
    )
    checkpoint_activations: bool = option(
        False, "recompute the generators' residual blocks in the backward pass: less memory, more time"
    )
    start_from: str = option(
        "",
        "begin with the weights of a run, a checkpoint, a published .pth file or a folder of them, an export, or a "
        "model that comes with fastnce (derain)",
        anything=True,
    )
    start_networks: str = option(
        "", "networks that take them, such as G,D; empty: all that are found there", anything=True
    )
    steps: int = option(0, "stop after this many steps in total; 0 runs the whole schedule", low=0)
    change_batch: bool = option(
        False,
        "allow another data.batch times processes when continuing; the place in the epochs and optim.lr are kept",
    )
    minutes: float = option(0.0, "save and stop after this time; the same command continues; 0 sets no limit", low=0)
    log_every: int = option(100, "steps between progress lines, which alone read the losses; 0: one at the end", low=0)
    sample_every: int = option(1000, "steps between sample grids; 0 makes none", low=0)
    samples: int = option(4, "images in a sample grid; 0 makes none", low=0, high=1_000)
    monitor_every: int = option(500, "steps between checks of the translated samples; 0 never", low=0)
    validate_every: int = option(0, "steps between measures of held-out images (see data.validate); 0 never", low=0)
    validate_pictures: int = option(25, "so many held-out images at most, spread over the set; 0 takes all", low=0)
    best: str = option(AUTO, BEST_HELP, anything=True)
    metrics: str = option("", METRICS_HELP, anything=True)
    feature_weights: str = option("", FEATURE_WEIGHTS_HELP, anything=True)
    save_every: int = option(1000, "steps between checkpoints; 0: one at the end, or where it is stopped", low=0)
    keep: int = option(2, "checkpoints to keep", low=2)
    keep_epochs: int = option(0, "keep the checkpoint at the end of every so many epochs for good; 0: of none", low=0)
    check_kernels: bool = option(True, "compare each kernel with plain PyTorch at its first use on a device")
    check_every: int = option(
        0, "steps between comparisons of the kernels with plain PyTorch on the step's data; 0 never", low=0
    )
    threads: int = option(0, "CPU threads; 0 leaves the library's choice", low=0, high=1_024)
    report: bool = option(True, "write RUN/report.html while training and at the end: curves, samples, configuration")
    track: str = option(
        "",
        f"log to trackers too: any of {', '.join(TRACKERS)}, separated by commas; each is a package to install",
        anything=True,
    )
