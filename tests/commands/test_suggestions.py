"""A wrong name is refused with the name that is most like it."""

from __future__ import annotations

import pytest

from fastnce.commands.main import main
from fastnce.common.messages import nearest
from fastnce.config import resolve
from fastnce.networks import build_discriminator, build_generator


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian"], "train"),
        (["Evaluate"], "evaluate"),
        (["train", "FastCUT"], "fastcut"),
        (["train", "DCL-GAN"], "dclgan"),
        (["train", "cut", "network.generator=unet256"], "unet_256"),
        (["train", "cut", "network.generator=resnet9"], "resnet_9blocks"),
        (["train", "cut", "network.generator=ResNet_6blocks"], "resnet_6blocks"),
        (["train", "cut", "network.discriminator=nlayers"], "n_layers"),
        (["train", "cut", "network.norm=instanse"], "instance"),
        (["train", "cut", "network.init_type=Xavier"], "xavier"),
        (["train", "cut", "loss.gan_mode=LSGAN"], "lsgan"),
        (["train", "cut", "loss.weighting=MoNCE"], "monce"),
        (["train", "cut", "data.preprocess=resize-and-crop"], "resize_and_crop"),
        (["train", "cut", "run.precision=bfloat16"], "bf16"),
        (["train", "cut", "run.best=PSNR", "--dry-run"], "psnr_y"),
        (["train", "cut", "Optim.lr=1"], "optim.lr"),
        (["train", "cut", "--dry-runs"], "--dry-run"),
        (["translate", "x", "y", "--out", "z", "--tiles", "exat"], "exact"),
        (["evaluate", "x", "--data", "y", "--rain-side", "Right"], "right"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_nearest_name_is_suggested(words, meant, capsys):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert f"; did you mean '{meant}'?" in capsys.readouterr().err


def test_a_format_is_suggested(model, photos, tmp_path, capsys):
    assert main(["translate", str(model), str(photos), "--out", str(tmp_path / "out"), "--format", "Jpgg"]) == 2
    assert "did you mean 'jpg'?" in capsys.readouterr().err


def test_networks_by_name_in_python():
    with pytest.raises(ValueError, match=r"not 'resnet_9block'; did you mean 'resnet_9blocks'\?"):
        build_generator("resnet_9block")
    with pytest.raises(ValueError, match=r"not 'Basic'; did you mean 'basic'\?"):
        build_discriminator("Basic")


def test_nothing_is_suggested_for_a_name_that_is_like_none():
    assert nearest("xyz", ["cut", "fastcut"]) == ""
    assert nearest(3, ["cut"]) == ""
    with pytest.raises(ValueError, match=r"not 'zzzz'$"):
        resolve("cut", overrides=["network.generator=zzzz"])


def test_layers_that_a_network_lacks_get_an_example_that_works(capsys):
    assert main(["train", "cut", "network.generator=unet_256", "--dry-run"]) == 2
    message = capsys.readouterr().err
    example = message.strip().rpartition(" ")[2]
    assert example == "loss.nce_layers=0,1,2,3,4"
    assert main(["train", "cut", "network.generator=unet_256", example, "--dry-run"]) == 0
