"""Every option of the four published repositories: the table of docs/migration.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import own
from .flag import (
    CONTRASTIVE,
    CYCLEGAN,
    DCDGAN,
    DCLGAN,
    REPOSITORIES,
    Converter,
    Flag,
    images,
    no,
    number,
    whole,
    wholes,
    word,
)

ALL, C3, CG = REPOSITORIES, CONTRASTIVE, (CYCLEGAN,)
RUNS = "the folder of a run is one path: --out"
VISDOM = "there is no visdom: RUN/report.html shows the run, run.track=wandb or tensorboard logs it to a server"
OPPOSITE = "the opposite"
UNREAD = "the published code never reads it"
EXAMPLE = "it belongs to a template that is there to be copied"
CUTS = ("cut", "fastcut", "sincut")
NCE = (*CUTS, "dcl", "simdcl", "dcd")
CYCLE = ("cycle_gan",)


def _as(
    make: Callable[[str], Converter], name: str, where: tuple[str, ...], default: str, key: str, *more: Any, **rest: Any
) -> Flag:
    """A flag whose value becomes that of one key, by a converter of `fastnce.published.flag`."""
    return Flag(name, where, default, key, make(key), *more, **rest)


_BOTH = (
    _as(word, "dataroot", ALL, "placeholder", "data.dir", "also --data DIR", "DATA", example="./data"),
    Flag("name", ALL, "experiment_name", "--out", None, "runs/NAME, or CHECKPOINTS_DIR/NAME if that is given", "RUN"),
    Flag("easy_label", C3, "experiment_name", remark=UNREAD),
    Flag("gpu_ids", ALL, "0", "run.device", own.devices, "several GPUs: --nproc N", "--device", example="1"),
    Flag("checkpoints_dir", ALL, "./checkpoints", "--out", None, RUNS, "RUN"),
    Flag("model", ALL, "cut", "METHOD", None, "the names of presets: fastnce methods", "RUN"),
    _as(whole, "input_nc", ALL, "3", "network.in_channels", example="1"),
    _as(whole, "output_nc", ALL, "3", "network.out_channels", example="1"),
    _as(whole, "ngf", ALL, "64", "network.width", example="32"),
    _as(whole, "ndf", ALL, "64", "network.discriminator_width", example="32"),
    _as(word, "netD", ALL, "basic", "network.discriminator", example="n_layers"),
    _as(word, "netG", ALL, "resnet_9blocks", "network.generator", example="resnet_6blocks"),
    _as(whole, "n_layers_D", ALL, "3", "network.discriminator_layers", example="4"),
    _as(word, "norm", CG, "instance", "network.norm", "syncbatch is not supported", example="batch"),
    _as(word, "normG", C3, "instance", "network.norm", example="batch"),
    Flag(
        "normD",
        C3,
        "instance",
        "network.discriminator_norm",
        own.discriminator_norm,
        "the same as normG: empty",
        example="none",
    ),
    _as(word, "init_type", ALL, "xavier", "network.init_type", example="kaiming"),
    _as(number, "init_gain", ALL, "0.02", "network.init_gain", example="0.05"),
    _as(no, "no_dropout", C3, "True", "network.dropout", OPPOSITE, takes="boolean", example="False"),
    _as(no, "no_dropout", CG, "False", "network.dropout", OPPOSITE, takes="switch"),
    Flag("no_antialias", C3, "False", "network.antialias", own.antialias, OPPOSITE, takes="switch", example="True"),
    Flag(
        "no_antialias_up",
        C3,
        "False",
        "network.antialias_up",
        own.antialias_up,
        OPPOSITE,
        takes="switch",
        example="True",
    ),
    Flag("dataset_mode", ALL, "unaligned", "METHOD", own.dataset, "unaligned, or singleimage with sincut"),
    _as(word, "direction", ALL, "AtoB", "data.direction", "", "--direction", example="BtoA"),
    Flag("serial_batches", ALL, "False", "data.shuffle", own.serial, OPPOSITE, takes="switch", example="True"),
    Flag("num_threads", ALL, "4", remark="no loader processes: images are decoded once, into a cache"),
    Flag("batch_size", ALL, "1", "data.batch", own.batch, "with several GPUs: the batch of one process", example="4"),
    _as(whole, "load_size", ALL, "286", "data.load_size", "", "--load-size", example="300"),
    Flag("crop_size", ALL, "256", "data.crop_size", own.crop, "", "--load-size", example="128"),
    Flag("max_dataset_size", ALL, "inf", "data.max_images", own.most, "inf is 0 here", "--num", example="100"),
    Flag(
        "preprocess",
        ALL,
        "resize_and_crop",
        "data.preprocess",
        own.preprocess,
        "",
        "--load-size",
        example="crop",
    ),
    _as(no, "no_flip", ALL, "False", "data.flip", OPPOSITE, takes="switch", example="True"),
    Flag("display_winsize", ALL, "256", remark="pages scale pictures to the window"),
    Flag("random_scale_max", C3, "3.0", "data.random_scale_max", own.zoom, "SinCUT only", example="2.0"),
    Flag("epoch", ALL, "latest", "run.start_from", own.start, "only with --continue_train", "--epoch"),
    Flag("load_iter", CG, "0", "run.start_from", own.start, "only with --continue_train"),
    Flag("verbose", ALL, "False", remark="fastnce methods describes the networks", takes="switch"),
    Flag("suffix", ALL, "", "--out", own.suffixed, "it is part of the name of the run", "RUN", example="{netG}"),
    Flag(
        *("stylegan2_G_num_downsampling", C3, "1", "network.stylegan2_downsampling"),
        whole("network.stylegan2_downsampling"),
        example="2",
    ),
    Flag("use_wandb", CG, "False", "run.track", own.wandb, takes="switch", example="True"),
    Flag("wandb_project_name", CG, "CycleGAN-and-pix2pix", remark="wandb's own WANDB_PROJECT names the project"),
)
"""base_options.py"""

_TRAIN = (
    Flag("display_freq", ALL, "400", remark=VISDOM),
    Flag("display_ncols", ALL, "4", remark=VISDOM),
    Flag("display_id", ALL, "None", remark=VISDOM),
    Flag("display_server", ALL, "http://localhost", remark=VISDOM),
    Flag("display_env", ALL, "main", remark=VISDOM),
    Flag("display_port", ALL, "8097", remark=VISDOM),
    _as(images, "update_html_freq", ALL, "1000", "run.sample_every", example="500"),
    Flag(
        "print_freq",
        ALL,
        "100",
        "run.log_every",
        images("run.log_every"),
        "in images there, in steps here",
        example="50",
    ),
    Flag("no_html", ALL, "False", "run.report", own.page, OPPOSITE, takes="switch", example="True"),
    _as(images, "save_latest_freq", ALL, "5000", "run.save_every", "in steps here", example="2000"),
    _as(whole, "save_epoch_freq", ALL, "5", "run.keep_epochs", example="20"),
    Flag(
        "evaluation_freq",
        C3,
        "5000",
        "run.validate_every",
        own.evaluation,
        f"{UNREAD}; here FID and KID of testA and testB, which need torch-fidelity",
        example="3000",
    ),
    Flag(
        "save_by_iter",
        ALL,
        "False",
        remark="checkpoints have their step in the name; run.keep is how many",
        takes="switch",
    ),
    Flag(
        *("continue_train", ALL, "False", "run.start_from", own.start),
        "not needed here: the same command continues a run. With published files a new run begins",
        takes="switch",
        example="True",
    ),
    _as(
        whole,
        "epoch_count",
        ALL,
        "1",
        "optim.first_epoch",
        "for a new run; a continued run knows its epoch",
        example="5",
    ),
    Flag("phase", ALL, "train", "data.phase", own.phase, example="val", phase="train"),
    Flag(
        "pretrained_name", C3, "None", "run.start_from", own.pretrained, "only with --continue_train", example="other"
    ),
    _as(whole, "n_epochs", ALL, "200", "optim.n_epochs", example="30"),
    _as(whole, "n_epochs_decay", ALL, "200", "optim.n_epochs_decay", example="40"),
    _as(number, "beta1", ALL, "0.5", "optim.beta1", example="0.4"),
    Flag("beta2", C3, "0.999", "optim.beta2", own.second_moment, "CycleGAN always has 0.999", example="0.99"),
    _as(number, "lr", ALL, "0.0002", "optim.lr", example="0.0003"),
    Flag(
        "gan_mode",
        ALL,
        "lsgan",
        "loss.gan_mode",
        own.gan_mode,
        "the published wgangp has no penalty: loss.lambda_gp=0",
        example="vanilla",
    ),
    _as(
        whole,
        "pool_size",
        ALL,
        "50",
        "loss.pool_size",
        "CUT's code never reads it, and here it has its effect",
        example="10",
    ),
    Flag(
        "lr_policy",
        ALL,
        "linear",
        "optim.schedule",
        own.policy,
        "linear is called lambda in earlier versions",
        example="cosine",
    ),
    _as(whole, "lr_decay_iters", ALL, "50", "optim.decay_every", "in epochs", example="20"),
)
"""train_options.py"""

_MODELS = (
    Flag("CUT_mode", ("CUT",), "CUT", "METHOD", None, "cut or fastcut", models=("cut", "sincut"), example="FastCUT"),
    Flag("DCL_mode", (DCLGAN,), "DCL", "METHOD", None, "dclgan or simdcl", models=("dcl", "simdcl")),
    Flag("DCD_mode", (DCDGAN,), "DCD", "METHOD", None, "dcdgan-released", models=("dcd",)),
    _as(number, "lambda_GAN", C3, "1.0", "loss.lambda_gan", models=NCE, example="2.0"),
    Flag(
        "lambda_NCE",
        C3,
        "1.0",
        "loss.lambda_nce",
        own.lambda_nce,
        "SimDCL's code does not apply it",
        models=NCE,
        example="3.0",
    ),
    Flag(
        *("lambda_IDT", (DCLGAN, DCDGAN), "1.0", "loss.lambda_idt", own.lambda_idt),
        "its cut and fastcut never read it",
        models=("cut", "fastcut", "dcl", "dcd"),
        example="0.5",
    ),
    Flag(
        "lambda_SIM", (DCLGAN,), "10.0", "loss.lambda_sim", number("loss.lambda_sim"), models=("simdcl",), example="5.0"
    ),
    Flag("lambda_L1", (DCDGAN,), "1.0", remark="its code computes this term and never adds it", models=("dcd",)),
    Flag("lambda_L1", CG, "100.0", remark="it is a weight of pix2pix, which trains on pairs", models=("pix2pix",)),
    Flag("cyc_L1", (DCDGAN,), "1.0", remark="its code computes this term and never adds it", models=("dcd",)),
    Flag("lambda_feat", (DCDGAN,), "1.0", remark="its code computes this term and never adds it", models=("dcd",)),
    Flag(
        *("lambda_identity", ALL, "0.5", "loss.lambda_identity", own.lambda_identity),
        "DCD-GAN's code never adds its term",
        models=(*CYCLE, "sincut", "dcd"),
        example="0.7",
    ),
    _as(number, "lambda_A", ALL, "10.0", "loss.lambda_a", models=CYCLE, example="5.0", phase="train"),
    _as(number, "lambda_B", ALL, "10.0", "loss.lambda_b", models=CYCLE, example="5.0", phase="train"),
    _as(number, "lambda_R1", ("CUT",), "1.0", "loss.lambda_r1", models=("sincut",), example="0.5"),
    Flag(
        *("nce_idt", C3, "False", "loss.nce_idt", own.nce_idt, "dclgan and dcdgan: loss.lambda_idt"),
        models=NCE,
        takes="boolean",
        example="False",
    ),
    _as(wholes, "nce_layers", C3, "0,4,8,12,16", "loss.nce_layers", models=NCE, example="0,8"),
    Flag(
        *("nce_includes_all_negatives_from_minibatch", C3, "False", "loss.negatives", own.negatives),
        "batch or image; dclgan, simdcl and dcdgan-released always have batch",
        models=NCE,
        takes="boolean",
        example="True",
    ),
    _as(word, "netF", C3, "mlp_sample", "loss.projector", models=NCE, example="sample"),
    _as(whole, "netF_nc", C3, "256", "loss.projection", models=NCE, example="64"),
    _as(number, "nce_T", C3, "0.07", "loss.temperature", models=NCE, example="0.1"),
    _as(whole, "num_patches", C3, "256", "loss.patches", models=NCE, example="64"),
    Flag(
        *("flip_equivariance", C3, "False", "loss.flip_equivariance", own.flip_equivariance),
        "the code of DCLGAN, SimDCL and DCD-GAN never reads it, and here it has its effect",
        models=NCE,
        takes="boolean",
        example="True",
    ),
    Flag("lambda_regression", ALL, "1.0", remark=EXAMPLE, models=("template",)),
    Flag("new_dataset_option", ALL, "1.0", remark=EXAMPLE, models=("template",)),
    Flag("model_suffix", CG, "", "", own.model_suffix, "G_A or G_B", "--generator", models=("test",), phase="test"),
)
"""The options of the models, in cut_model.py and others."""

_TEST = (
    Flag("results_dir", ALL, "./results/", "", None, "", "--out", phase="test"),
    Flag("phase", ALL, "test", "", own.phase, "", "--phase", phase="test"),
    Flag(
        *("eval", ALL, "False", "", None, "eval mode is the default here; test.py without --eval is --train-mode"),
        "--train-mode",
        takes="switch",
        phase="test",
    ),
    Flag("num_test", ALL, "50", "", own.pictures, "left out: all here, 50 there", "--num", phase="test"),
    Flag(
        "aspect_ratio", CG, "1.0", remark="pictures are written with the sides that the generator gives", phase="test"
    ),
)
"""test_options.py"""


def _in_training(flag: Flag) -> Flag:
    return flag if flag.phase == "train" else Flag(**{**vars(flag), "phase": "train"})


FLAGS: tuple[Flag, ...] = (*_BOTH, *map(_in_training, _TRAIN), *_MODELS, *_TEST)
"""All of them, in the order of the published files."""

OLD_NAMES = {
    "niter": "n_epochs",
    "niter_decay": "n_epochs_decay",
    "batchSize": "batch_size",
    "loadSize": "load_size",
    "fineSize": "crop_size",
    "nThreads": "num_threads",
    "resize_or_crop": "preprocess",
    "which_direction": "direction",
    "which_model_netG": "netG",
    "which_model_netD": "netD",
    "which_epoch": "epoch",
    "how_many": "num_test",
}
"""Names of earlier versions of the published code."""


def flags_of(repository: str, model: str, test: bool) -> dict[str, Flag]:
    """The options that a published command accepts, by name."""
    apart = "train" if test else "test"
    return {
        flag.name: flag
        for flag in FLAGS
        if repository in flag.where and flag.phase != apart and (not flag.models or model in flag.models)
    }


def named(name: str) -> list[Flag]:
    """Every flag of this name: options of one name may differ between repositories."""
    name = OLD_NAMES.get(name, name)
    return [flag for flag in FLAGS if flag.name == name]


def as_markdown() -> str:
    """The table of docs/migration.md."""
    lines = ["| published | in | training here | `fastnce translate` | |", "|---|---|---|---|---|"]
    for flag in FLAGS:
        where = "all" if flag.where == ALL else ", ".join(flag.where)
        models = f" ({', '.join(flag.models)})" if flag.models else ""
        none = "" if flag.ours or flag.test else "not supported"
        ours, test = (f"`{text}`" if text else "" for text in (flag.ours, flag.test))
        remark = flag.remark or ("the same" if flag.kind == "same" else "")
        lines.append(f"| `--{flag.name}` | {where}{models} | {ours or none} | {test} | {remark} |")
    return "\n".join(lines) + "\n"
