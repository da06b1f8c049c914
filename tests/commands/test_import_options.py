"""`fastnce import-options`, and published words given to other commands."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from fastnce.commands.main import main
from fastnce.config import resolve

PRINTOUTS = Path(__file__).resolve().parents[1] / "published" / "printouts"
COMMAND = "python train.py --dataroot ./datasets/cat --name cat --CUT_mode FastCUT --ngf 32 --display_port 1"


def test_the_file_and_the_words_on_the_terminal(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    assert main(["import-options", COMMAND, "--out", str(file)]) == 0
    out = capsys.readouterr().out.splitlines()
    config = resolve("", file)
    assert (config.method, config.network.width, config.data.dir) == ("fastcut", 32, "./datasets/cat")
    assert out[0] == "model cut of CUT is the preset fastcut here"
    assert "--ngf 32: renamed, network.width = 32" in out
    assert any(line.startswith("--display_port 1: not supported: there is no visdom") for line in out)
    assert out[-1] == f"fastnce train --config {file} --out runs/cat"
    assert os.listdir(tmp_path) == ["mine.toml"]


def test_what_is_printed_is_toml(tmp_path, capsys):
    assert main(["import-options", *COMMAND.split()]) == 0
    out = capsys.readouterr().out
    (tmp_path / "mine.toml").write_text(out)
    config = resolve("", tmp_path / "mine.toml")
    assert (config.method, config.network.width) == ("fastcut", 32)
    run = next(line for line in out.splitlines() if "fastnce train" in line).lstrip("# ")
    assert main([*shlex.split(run)[1:], "--dry-run"]) == 0
    assert "width = 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        [COMMAND],
        COMMAND.split(),
        [COMMAND.replace(" --", " \\\n  --")],
        ["CUDA_VISIBLE_DEVICES=0 " + COMMAND + " > log.txt 2>&1 &"],
        [COMMAND.replace("--ngf 32", "--ngf=32")],
        [COMMAND.replace("--dataroot", "--datar")],
        [COMMAND.removeprefix("python train.py ")],
        [COMMAND.replace("train.py", "-m train")],
    ],
    ids=["a text", "words", "continued lines", "a shell's line", "equals", "shortened", "options alone", "a module"],
)
def test_ways_to_write_a_command(words, capsys):
    assert main(["import-options", *words]) == 0
    out = capsys.readouterr().out
    assert "network.width=32" in out
    assert "fastnce train fastcut --data ./datasets/cat --out runs/cat" in out


def test_earlier_names(capsys):
    words = (
        "python train.py --name n --model cycle_gan --niter 30 --niter_decay 40 --loadSize 300 --which_direction AtoB"
    )
    assert main(["import-options", words]) == 0
    assert "data.load_size=300 optim.n_epochs=30 optim.n_epochs_decay=40" in capsys.readouterr().out


def test_a_printout_of_a_fork_names_what_the_fork_added(tmp_path, capsys):
    text = (PRINTOUTS / "cut-cut.txt").read_text().replace("  ngf: 64", "  ngf: 48").replace("verbose:", "my_weight:")
    text = text.replace("48                            ", "48                            \t[default: 64]")
    (tmp_path / "train_opt.txt").write_text(text)
    assert main(["import-options", str(tmp_path / "train_opt.txt")]) == 0
    out = capsys.readouterr().out
    assert "# --ngf 48: renamed, network.width = 48" in out
    assert "# --my_weight: unknown: no published code has it" in out


def test_several_gpus_are_processes(capsys):
    assert main(["import-options", f"{COMMAND} --gpu_ids 2,3 --batch_size 8"]) == 0
    out = capsys.readouterr().out
    assert "CUDA_VISIBLE_DEVICES=2,3 fastnce train fastcut" in out
    assert " --nproc 2 data.batch=4 " in out


def test_a_test_becomes_translations(capsys):
    words = "python test.py --dataroot d --name n --model cycle_gan --num_test 7 --epoch 20 --gpu_ids -1"
    assert main(["import-options", words]) == 0
    out = [line.lstrip("# ") for line in capsys.readouterr().out.splitlines()]
    wanted = (
        "fastnce translate runs/n d --out results/n/test_20 --layout published --phase test --num 7 --load-size 256 "
        "--epoch 20"
    )
    assert f"{wanted} --device cpu" in out
    assert f"{wanted.replace('test_20', 'test_20_G_B')} --generator G_B --device cpu" in out  # a page of its own
    assert "--num_test 7: renamed, --num" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs SOURCE"),
        (["nothing.txt"], "nothing.txt: no such file"),
        (["python", "eval.py", "--name", "n"], "neither a file such as train_opt.txt nor a command"),
        (["python train.py --dataroot d --name n"], "--from cut or dclgan or dcdgan or cyclegan"),
        ([f"{COMMAND} --lamda_NCE 3"], "did you mean '--lambda_NCE'?"),
        ([f"{COMMAND} --batch_size"], "--batch_size needs a value"),
        ([f"{COMMAND} --batch_size x"], "--batch_size 'x' must be a whole number"),
        ([f"{COMMAND} --netG resnet9"], "--netG resnet9: network.generator must be one of"),
        ([f"{COMMAND} --no_flip=1"], "--no_flip takes no value"),
        ([f"{COMMAND} --crop_size 300"], "data.load_size=286 is too small"),
        ([f"{COMMAND} --gpu_ids 0,1 --batch_size 3"], "--batch_size '3' must be a multiple of 2"),
        (["python train.py --model pix2pix --name n"], "--model pix2pix has no equal here: it trains on pairs"),
        (["python train.py --model cutt --name n"], "did you mean 'cut'?"),
        ([COMMAND, "--from", "cot"], "did you mean 'cut'?"),
        ([f"{COMMAND} 'open"], "the command cannot be split into words: no closing quotation"),
        (["python test.py --dataroot d --CUT_mode CUT", "--out", "x.toml"], "this is a test: leave --out out"),
        ([COMMAND, "--out", "nowhere/x.toml"], "there is no folder"),
        ([f"{COMMAND} --CUT_mode DCL"], "--CUT_mode DCL must be CUT or FastCUT"),
        ([""], "needs SOURCE"),
        ([f"{COMMAND} --print_freq 0"], "--print_freq '0' must be a whole number of at least 1"),
        ([f"{COMMAND} --evaluation_freq -1"], "--evaluation_freq '-1' must be a whole number of at least 1"),
        ([f"{COMMAND} --gpu_ids ²"], "--gpu_ids '²' must be numbers of GPUs"),
        ([f"{COMMAND} --suffix {{netG.nothing}}"], "must be a text with the names of options in braces"),
        ([f"{COMMAND} --suffix {{netG:>1000}}"], "must be shorter: the name of the run has 1,004 characters"),
        (["python", "train.py", "--model", "cut", "--name", "a\nb"], r"--name 'a\nb' has a character that cannot be"),
        (["python", "train.py", "--model", "cut", "--name", "caf\udce9"], "is not UTF-8"),
        (["python test.py --model cut --name n --num_test inf"], "--num_test 'inf' must be a whole number of at least"),
        (["python test.py --model cut --name n --phase ../x"], "--phase '../x' must be the beginning of the names of"),
        ([f"{COMMAND} --phase /x"], "--phase '/x' must be the beginning of the names of folders in the data set"),
        (["python test.py --model cut --name n --load_size 255"], "--load_size 255 must be a multiple of 4"),
        (["python test.py --model test --name n --model_suffix B"], "--model_suffix 'B' must be _A or _B"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_refused_in_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import-options", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    assert os.listdir(tmp_path) == []


def test_the_source_is_not_replaced(tmp_path, capsys):
    file = tmp_path / "train_opt.txt"
    file.write_bytes((PRINTOUTS / "cut-cut.txt").read_bytes())
    before = file.read_bytes()
    assert main(["import-options", str(file), "--out", str(file)]) == 2
    assert "would be replaced" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_file_that_may_be_edited_is_not_replaced(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    command = ["import-options", COMMAND, "--out", str(file)]
    assert main(command) == main(command) == 0  # the same file again
    file.write_text(file.read_text() + "[optim]\nlr = 1e-4\n")
    before = file.read_bytes()
    assert main(command) == 2
    assert "exists already and may have changes of yours" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_printout_may_begin_with_a_mark_of_its_encoding(tmp_path):
    file = tmp_path / "train_opt.txt"
    text = (PRINTOUTS / "cut-cut.txt").read_bytes().replace(b"\n", b"\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + text)
    assert main(["import-options", str(file)]) == 0
    file.write_bytes(text.replace(b"dataroot: placeholder", b"dataroot: caf\xe9"))
    assert main(["import-options", str(file)]) == 2


def test_values_of_a_suffix_have_their_published_types(capsys):
    """Format codes of numbers work, and values are written as Python writes them."""
    suffix = "lr{lr:.1e}_{lambda_NCE}_{ngf:03d}_{nce_idt}"
    words = ["--lr", "1e-4", "--lambda_NCE", "5", "--nce_idt", "t", "--suffix", suffix]
    assert main(["import-options", *COMMAND.split(), *words]) == 0
    assert "--out runs/cat_lr1.0e-04_5.0_032_True" in capsys.readouterr().out


def test_a_test_on_several_gpus_takes_the_first(capsys):
    words = "python test.py --name n --model cut --gpu_ids 01,2 --preprocess scale_width"
    assert main(["import-options", words]) == 0
    out = capsys.readouterr().out
    assert "fastnce translate runs/n DIR --out" in out
    assert "--device cuda:1" in out
    assert "--preprocess scale_width: not supported: pictures are translated at their own size" in out


def test_no_printout(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("loss: 3\n")
    assert main(["import-options", str(tmp_path / "a.txt")]) == 2
    assert "is no printout of published options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "--dataroot", "d", "--CUT_mode", "CUT"],
            "--dataroot is --data DIR here, --CUT_mode is the argument",
        ),
        (["train", "cut", "--name=x"], "--name is --out runs/x here"),
        (["train", "cut", "--batch-size", "3"], "--batch-size is data.batch=3 here"),
        (["train", "cut", "--nce-T=0.1"], "--nce-T is loss.temperature=0.1 here"),
        (["train", "cut", "--data-root", "d"], "--data-root is --data DIR here"),
        (["evaluate", "x", "--data", "y", "--num-test", "3"], "--num-test is --num here"),
        (["train", "cut", "--ngf", "32"], "--ngf is network.width=32 here"),
        (["train", "cut", "--no_flip"], "--no_flip is data.flip=false here"),
        (["train", "cut", "--nce_layers", "0,8"], "--nce_layers is loss.nce_layers=0,8 here"),
        (["train", "cut", "--lr", "x"], "--lr is optim.lr here"),
        (["train", "cut", "--display_id", "-1"], "--display_id is not supported: there is no visdom"),
        (["train", "cut", "--num_test", "3"], "--num_test is --num of fastnce translate"),
        (["train", "cut", "--out", "o", "nce_T=0.1"], "nce_T is loss.temperature=0.1 here"),
        (["train", "--out", "o", "--change", "lambda_NCE=2"], "lambda_NCE is loss.lambda_nce here"),
        (["train", "cut", "--continue_train"], "--continue_train is not needed: the same command continues a run"),
        (["translate", "r", "d", "--out", "o", "--num_test", "3"], "--num_test is --num here"),
        (["translate", "--dataroot", "d", "--name", "n"], "--dataroot is DATA here, --name is a part of RUN here"),
        (["translate", "r", "d", "--out", "o", "--ngf", "3"], "--ngf is part of the trained model here"),
        (["evaluate", "r", "--dataroot=d"], "--dataroot is --data TEST here"),
        (["evaluate", "r", "--data", "d", "--load-size", "256"], "--load-size is --load-size of fastnce translate"),
        (["evaluate", "r", "--data", "d", "--eval"], "--eval is the default here, and --train-mode"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_published_words_are_answered_with_ours(words, said, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastnce: {said}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["translate", "x"], "fastnce translate needs --out"),
        (["evaluate"], "fastnce evaluate needs --data"),
        (["train", "cut", "--out"], "argument --out: expected one argument"),
        (["cache", "--dtaa", "x"], "did you mean '--data'?"),
        (["translate", "x", "y", "--out", "z", "--num", "0"], "must be a whole number above 0, not '0'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_missing_argument_is_one_sentence(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_the_method_may_follow_the_changes(tmp_path, capsys):
    words = ["train", "--out", str(tmp_path / "run"), "--change", "optim.lr=1e-3"]
    assert main([*words, "fastcut"]) == 2
    assert "leave out --change, and write optim.lr=1e-3 instead" in capsys.readouterr().err
    assert main([*words, "fastcot"]) == 2
    assert "name METHOD and --data DIR" in capsys.readouterr().err  # no method was found among the changes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "train.py --CUT_mode CUT --pool_size 50",
            "same, loss.pool_size = 50 (the published code never reads it; here",
        ),
        ("train.py --model cycle_gan --norm instance --pool_size 20", "same, loss.pool_size = 20"),
        ("train.py --model dcl --flip_equivariance", "(the published code never reads it; here it has its effect)"),
        ("train.py --CUT_mode CUT --batch_size 2 --gpu_ids 0,1", "renamed, --nproc 2"),
        ("test.py --CUT_mode CUT --eval", "same, eval mode is the default here"),
    ],
)
def test_a_line_does_not_mislead(words, said, capsys):
    assert main(["import-options", f"{words} --dataroot d --name n"]) == 0
    name = [word for word in words.split() if word.startswith("--")][-1]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"# {name}"))
    assert said in line
    assert ("never reads" in line) == ("never reads" in said)
