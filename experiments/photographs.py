"""Make a training folder of freely licensed photographs from Debian packages.

python -m experiments.photographs --out PHOTOS                      # fetches the packages with apt-get
python -m experiments.photographs --packages DEBS --out PHOTOS      # takes NAME_VERSION_all.deb files from a folder

PHOTOS/trainB gets each photograph in several sizes, PHOTOS/test/norain and PHOTOS/test/rain held-out ones, clean and
with rendered rain, and PHOTOS/SOURCES.csv names file, package, version, author and licence of each.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when started as a script

from fastnce.data.encoding import save_image
from fastnce.data.folder import load_image
from fastnce.data.rain import parse_kinds, render_rain

SIDES = (320, 480, 720)
"""Shorter sides in pixels of the training pictures: textures of several finenesses."""
HELD_OUT_SIDE = 360

RAIN = (
    "density=0.03:0.2,length=0.04:0.2,width=0.002:0.008,angle=-45:45,opacity=0.2:0.8,haze=0:0.1,additive=0:1",
    "density=0.2:0.7,length=0.05:0.3,width=0.002:0.012,angle=-45:45,opacity=0.3:0.9,haze=0:0.2,additive=0:1",
    "density=0:0.1,length=0.04:0.3,width=0.002:0.006,angle=-60:60,opacity=0.2:0.8,haze=0:0.3,additive=0:1,"
    "drizzle=0.3:1",
)
"""Kinds of rain: light, heavy, and fine over the whole picture. Each image draws one of them."""


class Photograph(NamedTuple):
    package: str
    file: str
    """Its path below usr/share in the package."""
    author: str
    licence: str
    held_out: bool = False


_GPL, _BY, _BY_SA = "GPL-2.0-or-later", "CC-BY-4.0", "CC-BY-SA-4.0"
_FOLDERS = {
    "mate-backgrounds": "backgrounds/mate/nature/{}.jpg",
    "plasma-workspace-wallpapers": "wallpapers/{}/contents/images/2560x1600.jpg",
    "lomiri-wallpapers-16.04": "backgrounds/{}.jpg",
    "lomiri-wallpapers-20.04": "backgrounds/{}.jpg",
}
_HELD_OUT = ("Dune", "LadyBird", "EveningGlow", "Path", "picosdeeuropa_by_Aitzol_Berasategi", "Wine_by_Jakkub_Mede")


def _of(package: str, licence: str, **authors: str) -> list[Photograph]:
    folder = _FOLDERS[package]
    return [Photograph(package, folder.format(n), who, licence, n in _HELD_OUT) for n, who in authors.items()]


_KDE = "KDE Visual Design Group"
PHOTOGRAPHS = [
    *_of(
        "mate-backgrounds",
        _GPL,
        Aqua="Charles Barbin",
        Blinds="Lennart Poettering, Andrea Cimitan",
        Dune="Marco Cogoni, Hylke Bons",
        FreshFlower="Jens Ansorg",
        Garden="Charles Barbin",
        GreenMeadow="Timothy Schellhase, Lapo Calamandrei",
        LadyBird="Charles Barbin",
        RainDrops="blackcombwhistler07",
        Storm="Sergey Nazarov",
        TwoWings="Charles Barbin, Hylke Bons",
        Wood="Jean-François Fortin Tam",
        YellowFlower="Charles Barbin",
    ),
    *_of(
        "plasma-workspace-wallpapers",
        _GPL,
        BytheWater=_KDE,
        ColdRipple=_KDE,
        ColorfulCups=_KDE,
        DarkestHour=_KDE,
        EveningGlow=_KDE,
        FallenLeaf=_KDE,
        Grey=_KDE,
        Kite=_KDE,
        OneStandsOut=_KDE,
        Path=_KDE,
        summer_1am=_KDE,
    ),
    *_of(
        "lomiri-wallpapers-16.04",
        _BY_SA,
        Bridge_by_Sander_Klootwijk="Sander Klootwijk",
        Dragonfly_by_Bolly="Bolly",
        free_by_Peter_Nerlich="Peter Nerlich",
        greentock_by_Peter_Nerlich="Peter Nerlich",
    ),
    *_of(
        "lomiri-wallpapers-16.04",
        _BY,
        aitzgorri_by_Aitzol_Berasategi="Aitzol Berasategi",
        friends_by_Aitzol_Berasategi="Aitzol Berasategi",
        life_by_Aitzol_Berasategi="Aitzol Berasategi",
        picosdeeuropa_by_Aitzol_Berasategi="Aitzol Berasategi",
        sunset_by_Aitzol_Berasategi="Aitzol Berasategi",
        Picture_0B_by_freespace="Trevor Freespace",
        Picture_1A_by_freespace="Trevor Freespace",
        Wine_by_Jakkub_Mede="Jakub Mede",
    ),
    *_of("lomiri-wallpapers-20.04", "CC-BY-SA-3.0", Kleiber_by_Lukas_Baubkus="Lukas Baubkus"),
    *_of("lomiri-wallpapers-16.04", "CC0-1.0", seeding_by_Clements_Engelhardt="Clemens Engelhardt"),
]
"""Photographs in the packages of Debian 12; drawings and computer graphics in them are left out.

`gnome-backgrounds` and `ukui-wallpapers` hold no photograph in this release. Authors and licences are those of each
package's copyright file.
"""


def fetch(folder: Path) -> None:
    """Fetch the packages into a folder with apt-get, which checks their signatures."""
    for package in _FOLDERS:
        subprocess.run(["apt-get", "download", "--quiet", package], cwd=folder, check=True)


def make(packages: Path, out: Path) -> int:
    """Unpack the packages, and write the folders; return the number of photographs."""
    rows = []
    with tempfile.TemporaryDirectory() as unpacked:
        versions = {}
        for package in dict.fromkeys(p.package for p in PHOTOGRAPHS):
            found = sorted(packages.glob(f"{package}_*.deb"))
            if not found:
                raise ValueError(f"{packages} holds no {package}_VERSION_all.deb: fetch it with apt-get download")
            versions[package] = found[-1].name.split("_")[1].replace("%3a", ":")
            subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(Path(unpacked) / package)], check=True)
        paths = [Path(unpacked) / photograph.package / "usr/share" / photograph.file for photograph in PHOTOGRAPHS]
        for path, photograph in zip(paths, PHOTOGRAPHS, strict=True):
            if not path.is_file():
                raise ValueError(
                    f"{photograph.package} {versions[photograph.package]} holds no usr/share/{photograph.file}: take "
                    f"the packages of Debian 12"
                )
        (out / "trainB").mkdir(parents=True)
        for place, (path, photograph) in enumerate(zip(paths, PHOTOGRAPHS, strict=True)):
            name = path.stem if path.stem != "2560x1600" else path.parts[-4]
            rows.append([name, *photograph, versions[photograph.package]])
            whole = load_image(path, 3)
            if photograph.held_out:
                clean = resized(whole, HELD_OUT_SIDE)
                for kind, text in enumerate(RAIN):
                    generator = torch.Generator().manual_seed(len(RAIN) * place + kind)
                    rain = parse_kinds("RAIN", text)
                    save_image(render_rain(clean[None], rain, generator)[0], out / "test/rain" / f"{name}-{kind}.png")
                    save_image(clean, out / "test/norain" / f"{name}-{kind}.png")
            else:
                for side in SIDES:
                    save_image(resized(whole, side), out / "trainB" / f"{name}-{side}.png")
            print(f"{place + 1}/{len(PHOTOGRAPHS)} {name}", flush=True)
    with (out / "SOURCES.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["name", *Photograph._fields, "version"])
        table.writerows(rows)
    return len(rows)


def resized(image: Tensor, side: int) -> Tensor:
    """Shrink a (3, height, width) image so that its shorter side is `side`."""
    height, width = image.shape[1:]
    scale = side / min(height, width)
    size = (round(height * scale), round(width * scale))
    return F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)


def main(arguments: list[str] | None = None) -> int:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.photographs", description=description)
    parser.add_argument("--packages", type=Path, metavar="DEBS", help="folder with the packages; default: fetch them")
    parser.add_argument("--out", type=Path, required=True, metavar="PHOTOS", help="a new folder")
    args = parser.parse_args(arguments)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out} is not an empty folder: take a new one")
    needed = ["dpkg-deb"] if args.packages else ["dpkg-deb", "apt-get"]
    for program in needed:
        if shutil.which(program) is None:
            parser.error(f"{program} is not installed: run this on Debian or Ubuntu")
    try:
        with tempfile.TemporaryDirectory() as folder:
            if args.packages is None:
                fetch(Path(folder))
            count = make(args.packages or Path(folder), args.out)
    except (ValueError, subprocess.CalledProcessError) as error:
        parser.error(str(error))
    print(f"written to {args.out}: {count} photographs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
