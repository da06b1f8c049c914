"""Every option of the four published repositories: it is in the table, and its row does what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastnce.common.toml import format_value
from fastnce.config import resolve
from fastnce.config.config import from_preset, keys_of
from fastnce.methods.presets import PRESETS
from fastnce.published import FLAGS, convert, read_source
from fastnce.published.flag import REPOSITORIES
from fastnce.published.table import as_markdown

MIGRATION = Path(__file__).resolve().parents[2] / "docs" / "migration.md"

BASE = """dataroot name gpu_ids checkpoints_dir model input_nc output_nc ngf ndf netD netG n_layers_D init_type
init_gain no_dropout dataset_mode direction serial_batches num_threads batch_size load_size crop_size max_dataset_size
preprocess no_flip display_winsize epoch verbose suffix"""
BASE_CUT = "easy_label normG normD no_antialias no_antialias_up random_scale_max stylegan2_G_num_downsampling"
TRAIN = """display_freq display_ncols display_id display_server display_env display_port update_html_freq print_freq
no_html save_latest_freq save_epoch_freq save_by_iter continue_train epoch_count phase n_epochs n_epochs_decay beta1 lr
gan_mode pool_size lr_policy lr_decay_iters"""
TRAIN_CUT = "evaluation_freq pretrained_name beta2"
TEST = "results_dir phase eval num_test"
NCE = """lambda_GAN lambda_NCE nce_idt nce_layers nce_includes_all_negatives_from_minibatch netF netF_nc nce_T
num_patches flip_equivariance"""
CYCLE = "lambda_A lambda_B lambda_identity"
TEMPLATE = "lambda_regression new_dataset_option"
DCD = "DCD_mode lambda_IDT lambda_L1 cyc_L1 lambda_feat"
OF_CYCLEGAN = "norm load_iter use_wandb wandb_project_name aspect_ratio lambda_L1 model_suffix"
OPTION_FILES = {
    "CUT": [BASE, BASE_CUT, TRAIN, TRAIN_CUT, TEST, NCE, CYCLE, TEMPLATE, "CUT_mode lambda_R1"],
    "DCLGAN": [BASE, BASE_CUT, TRAIN, TRAIN_CUT, TEST, NCE, CYCLE, TEMPLATE, "DCL_mode lambda_IDT lambda_SIM"],
    "DCD-GAN": [BASE, BASE_CUT, TRAIN, TRAIN_CUT, TEST, NCE, CYCLE, TEMPLATE, DCD],
    "CycleGAN": [BASE, TRAIN, TEST, CYCLE, TEMPLATE, OF_CYCLEGAN],
}
"""The options that the files of each repository define, as read there."""


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_the_table_has_every_option_of_the_option_files(repository):
    wanted = " ".join(OPTION_FILES[repository]).split()
    assert sorted({flag.name for flag in FLAGS if repository in flag.where}) == sorted(set(wanted))


CUT = "python train.py --dataroot d --name n --CUT_mode CUT"
CYCLEGAN = "python train.py --dataroot d --name n --model cycle_gan --norm instance"
DCL = "python train.py --dataroot d --name n --model dcl"
SINCUT = "python train.py --dataroot d --name n --model sincut"

ROWS = [
    (CUT, "dataroot", "./data sets/x", {"data.dir": "./data sets/x"}),
    (CUT, "gpu_ids", "-1", {"run.device": "cpu"}),
    (CUT, "gpu_ids", "3", {"run.device": "cuda:3"}),
    (CUT, "gpu_ids", "0", {"run.device": "auto"}),
    (CUT, "input_nc", "1", {"network.in_channels": 1}),
    (CUT, "output_nc", "1", {"network.out_channels": 1}),
    (CUT, "ngf", "32", {"network.width": 32}),
    (CUT, "ndf", "16", {"network.discriminator_width": 16}),
    (CUT, "netD", "n_layers", {"network.discriminator": "n_layers"}),
    (CUT, "netD", "patch", {"network.discriminator": "patch"}),
    (CUT, "netD", "tilestylegan2", {"network.discriminator": "tilestylegan2"}),
    (CUT, "netG", "resnet_6blocks", {"network.generator": "resnet_6blocks"}),
    (CUT, "netG", "smallstylegan2", {"network.generator": "smallstylegan2"}),
    (CUT, "netG", "resnet_cat", {"network.generator": "resnet_cat"}),
    (CUT, "n_layers_D", "4", {"network.discriminator_layers": 4}),
    (CYCLEGAN, "norm", "batch", {"network.norm": "batch"}),
    (CUT, "normG", "batch", {"network.norm": "batch", "network.discriminator_norm": "instance"}),
    (CUT, "normD", "none", {"network.discriminator_norm": "none", "network.norm": "instance"}),
    (CUT, "normD", "instance", {"network.discriminator_norm": "", "network.norm": "instance"}),
    (CUT, "init_type", "kaiming", {"network.init_type": "kaiming"}),
    (CUT, "init_gain", "0.05", {"network.init_gain": 0.05}),
    (CUT, "no_dropout", "False", {"network.dropout": True}),
    (CUT, "no_dropout", None, {"network.dropout": False}),
    (CYCLEGAN, "no_dropout", None, {"network.dropout": False}),
    (CUT, "no_antialias", None, {"network.antialias": False, "network.antialias_up": True}),
    (CUT, "no_antialias_up", None, {"network.antialias_up": False, "network.antialias": True}),
    (CUT, "direction", "BtoA", {"data.direction": "BtoA"}),
    (CUT, "serial_batches", None, {"data.shuffle": False}),
    (CUT, "batch_size", "4", {"data.batch": 4}),
    (CUT, "load_size", "300", {"data.load_size": 300}),
    (CUT, "crop_size", "128", {"data.crop_size": 128, "network.resolution": 64}),
    (SINCUT, "crop_size", "128", {"data.crop_size": 128, "network.resolution": 128}),
    (CUT, "max_dataset_size", "100", {"data.max_images": 100}),
    (CUT, "max_dataset_size", "inf", {"data.max_images": 0}),
    (CUT, "preprocess", "scale_width_and_crop", {"data.preprocess": "scale_width_and_crop"}),
    (CUT, "preprocess", "scale_width", {"data.preprocess": "scale_width"}),
    (CUT, "preprocess", "crop_then_resize", {"data.preprocess": "resize_and_crop"}),
    (CUT, "no_flip", None, {"data.flip": False}),
    (SINCUT, "random_scale_max", "2.0", {"data.random_scale_max": 2.0}),
    (f"{CUT} --continue_train", "epoch", "20", {"run.start_from": "checkpoints/n/20"}),
    (f"{CYCLEGAN} --continue_train", "load_iter", "500", {"run.start_from": "checkpoints/n/iter_500"}),
    (f"{CUT} --continue_train --ngf 32", "suffix", "{ngf}_x", {"run.start_from": "checkpoints/n_32_x"}),
    (CUT, "stylegan2_G_num_downsampling", "2", {"network.stylegan2_downsampling": 2}),
    (CYCLEGAN, "use_wandb", None, {"run.track": "wandb"}),
    (CUT, "update_html_freq", "500", {"run.sample_every": 500}),
    (CUT, "print_freq", "50", {"run.log_every": 50}),
    (f"{CUT} --batch_size 16", "print_freq", "100", {"run.log_every": 25}),
    (CUT, "no_html", None, {"run.report": False}),
    (CUT, "save_latest_freq", "2000", {"run.save_every": 2000}),
    (CUT, "save_epoch_freq", "20", {"run.keep_epochs": 20}),
    (CUT, "evaluation_freq", "3000", {"run.validate_every": 3000, "run.metrics": "fid"}),
    (CUT, "continue_train", None, {"run.start_from": "checkpoints/n"}),
    (CUT, "epoch_count", "5", {"optim.first_epoch": 5}),
    (CUT, "phase", "val", {"data.phase": "val"}),
    (f"{CUT} --continue_train", "pretrained_name", "other", {"run.start_from": "checkpoints/other"}),
    (CUT, "n_epochs", "30", {"optim.n_epochs": 30}),
    (CUT, "n_epochs_decay", "40", {"optim.n_epochs_decay": 40}),
    (CUT, "beta1", "0.4", {"optim.beta1": 0.4}),
    (CUT, "beta2", "0.99", {"optim.beta2": 0.99}),
    (CUT, "lr", "3e-4", {"optim.lr": 3e-4}),
    (CUT, "gan_mode", "vanilla", {"loss.gan_mode": "vanilla", "loss.lambda_gp": 10.0}),
    (CUT, "gan_mode", "wgangp", {"loss.gan_mode": "wgangp", "loss.lambda_gp": 0.0}),
    (CUT, "gan_mode", "hinge", {"loss.gan_mode": "hinge", "loss.saturating": True}),
    (CYCLEGAN, "pool_size", "10", {"loss.pool_size": 10}),
    (CUT, "pool_size", "10", {"loss.pool_size": 10}),
    (CUT, "lr_policy", "cosine", {"optim.schedule": "cosine"}),
    (CYCLEGAN, "lr_policy", "lambda", {"optim.schedule": "linear"}),
    (CUT, "lr_decay_iters", "20", {"optim.decay_every": 20}),
    (CUT, "lambda_GAN", "2.0", {"loss.lambda_gan": 2.0}),
    (CUT, "lambda_NCE", "3.0", {"loss.lambda_nce": 3.0}),
    (DCL, "lambda_IDT", "0.5", {"loss.lambda_idt": 0.5}),
    ("python train.py --model simdcl --name n", "lambda_SIM", "5", {"loss.lambda_sim": 5.0}),
    (CYCLEGAN, "lambda_identity", "0.7", {"loss.lambda_identity": 0.7}),
    (SINCUT, "lambda_identity", "0.7", {"loss.lambda_identity": 0.7}),
    (CYCLEGAN, "lambda_A", "5", {"loss.lambda_a": 5.0, "loss.lambda_b": 10.0}),
    (CYCLEGAN, "lambda_B", "5", {"loss.lambda_b": 5.0, "loss.lambda_a": 10.0}),
    (SINCUT, "lambda_R1", "0.5", {"loss.lambda_r1": 0.5}),
    (CUT, "nce_idt", "False", {"loss.nce_idt": False}),
    (CUT.replace("CUT_mode CUT", "CUT_mode FastCUT"), "nce_idt", None, {"loss.nce_idt": True}),
    (CUT, "nce_layers", "0,8", {"loss.nce_layers": [0, 8]}),
    (CUT, "nce_includes_all_negatives_from_minibatch", None, {"loss.negatives": "batch"}),
    (CUT, "nce_includes_all_negatives_from_minibatch", "no", {"loss.negatives": "image"}),
    (CUT, "netF", "sample", {"loss.projector": "sample"}),
    (CUT, "netF_nc", "64", {"loss.projection": 64}),
    (CUT, "nce_T", "0.1", {"loss.temperature": 0.1}),
    (CUT, "num_patches", "64", {"loss.patches": 64}),
    (CUT, "flip_equivariance", "True", {"loss.flip_equivariance": True}),
    (DCL, "flip_equivariance", None, {"loss.flip_equivariance": True}),
]
"""A published command, one more option, and the values that the configuration then has."""
SETS_NO_KEY = {"dataset_mode", "num_test", "model_suffix"}
"""Options that are converted only to be checked."""


def test_every_option_with_a_key_has_a_row_here():
    keyed = {flag.name for flag in FLAGS if flag.convert is not None} - SETS_NO_KEY
    assert keyed == {name for _, name, _, _ in ROWS}
    with_values = {(flag.name, flag.ours) for flag in FLAGS if "." in flag.ours}
    assert {name for name, _ in with_values} <= {name for _, name, _, _ in ROWS}


@pytest.mark.parametrize(
    ("command", "name", "text", "wanted"), ROWS, ids=[f"{name}-{text}-{n}" for n, (_, name, text, _) in enumerate(ROWS)]
)
def test_a_row_gives_its_values(command, name, text, wanted, tmp_path):
    words = [*command.split(), f"--{name}", *([] if text is None else [text])]
    result = convert(read_source(words), "cut" if "CUT" in command else "")
    line = next(line for line in result.lines if line.startswith(f"--{name}"))
    assert ": same, " in line or ": renamed, " in line
    for key, value in wanted.items():
        section, _, option = key.partition(".")
        found = getattr(getattr(result.config, section), option)
        assert found == value, f"{key} is {found}"
        assert type(found) is type(value)
    said = [f"{key} = {format_value(value)}" in line for key, value in wanted.items() if key in result.flags]
    assert any(said) or not said or name == "suffix"
    # the file and the command line both give this configuration
    file = tmp_path / "mine.toml"
    file.write_text(result.as_toml())
    assert resolve("", file) == result.config
    (run,) = result.commands()
    words = [word for word in shlex.split(run) if re.match(r"(data|network|loss|optim|run)\.", word)]
    again = resolve(result.config.method, None, words)
    again.data.dir = result.config.data.dir
    assert again == result.config


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.kind == "not supported"], ids=lambda flag: flag.name)
def test_an_option_without_an_equal_says_why(flag):
    assert flag.remark
    assert flag.convert is None
    if flag.models and set(flag.models) <= {"template", "pix2pix"}:
        return  # there is no preset for these models
    word = {"CUT": "cut", "DCLGAN": "dclgan", "DCD-GAN": "dcdgan", "CycleGAN": "cyclegan"}[flag.where[0]]
    program = "test.py" if flag.phase == "test" else "train.py"
    value = "" if flag.takes == "switch" else " 1"
    result = convert(read_source([f"python {program} --dataroot d --{flag.name}{value}"]), word)
    assert f"--{flag.name}{value}: not supported: {flag.remark}" in result.lines


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_key_of_the_table_exists(flag):
    if "." in flag.ours:
        known = {key for preset in PRESETS for key in keys_of(from_preset(preset, PRESETS[preset]))}
        assert flag.ours in known
    else:
        assert flag.ours in ("", "--out", "METHOD")


REFUSED_VALUES = [
    ("python train.py --model simdcl --name n --lambda_NCE 3", "SimDCL's code never multiplies with it"),
    ("python train.py --model dcd --name n --lambda_identity 3", "never adds it to its loss"),
    ("python train.py --model dcl --name n --nce_idt False", "without it the published code fails"),
    (
        "python train.py --model dcl --name n --nce_includes_all_negatives_from_minibatch",
        "always takes the whole batch",
    ),
    ("python train.py --model cycle_gan --normG batch --beta2 0.9", "its Adam has 0.999"),
    (f"{CUT} --dataset_mode aligned", "aligned is not unpaired training"),
    (f"{CUT} --pretrained_name x", "with --continue_train only"),
    (f"{CUT} --lambda_A 3", "and this is cut"),
    (f"{CUT} --preprocess fixsize", "the published data sets do not give"),
    (f"{CUT} --random_scale_max 2", "with --preprocess zoom_and_patch only"),
    (f"{SINCUT} --serial_batches", "are drawn at random"),
    (f"{CUT} --num_test 3", "it is no option of this program"),
]


@pytest.mark.parametrize(("command", "reason"), REFUSED_VALUES, ids=lambda text: text[-30:])
def test_a_value_without_an_equal_says_why(command, reason):
    lines = convert(read_source([command])).lines
    assert any("not supported" in line and reason in line for line in lines), lines


def test_the_document_has_this_table():
    assert as_markdown() in MIGRATION.read_text()
