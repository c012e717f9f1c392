"""Whether sdist and wheel hold what they should, run in the repository: `contents.py FOLDER`.

The sdist has every file that git has. The wheel, which is built of the sdist, has every file of both
packages, their types, the shipped models with their cards, the pictures of the web page and the list of emoji
among them; and the licences.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGES = {"deqlib/": "deqlib/", "models/viar/": "viar/"}  # folder in the repository, and in the wheel
INFORMATION = {
    "METADATA",
    "RECORD",
    "WHEEL",
    "entry_points.txt",
    "licenses/LICENSE",
    "licenses/models/viar/data/emoji.LICENSE",
}
# Each is among the files that git has; were one to go from there, this would tell of it.
NOTABLE = {
    "deqlib/py.typed",
    "viar/py.typed",
    "viar/app/figures/frontier.png",
    "viar/data/emoji.LICENSE",
    "viar/weights/mnist/tokenizer/model.safetensors",
    "viar/weights/mnist/transformer/model.safetensors",
    "viar/weights/mnist/transformer/README.md",
}
LICENCES_OF_OTHERS = {"docs/vendor/katex/LICENSE", "docs/vendor/iframe-worker/LICENSE"}


def differences(what: str, found: set[str], expected: set[str]) -> list[str]:
    """A line for each file that is missing or too much."""
    missing = [f"{what}: {name} is missing" for name in sorted(expected - found)]
    return missing + [f"{what}: {name} is not to be there" for name in sorted(found - expected)]


def check(folder: Path) -> list[str]:
    """What is wrong with the one sdist and the one wheel in a folder."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True)
    tracked = set(listed.stdout.split("\0")) - {""}
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    information = "-".join(wheel.name.split("-")[:2]) + ".dist-info/"
    expected = {information + name for name in INFORMATION} | NOTABLE
    for source, installed in PACKAGES.items():
        expected |= {installed + name.removeprefix(source) for name in tracked if name.startswith(source)}
    return [
        *differences("sdist", in_sdist, tracked | LICENCES_OF_OTHERS | {"PKG-INFO"}),
        *differences("wheel", in_wheel, expected),
    ]


if __name__ == "__main__":
    wrong = check(Path(sys.argv[1]))
    print("\n".join(wrong) or "sdist and wheel hold what git does, and the licences")
    sys.exit(bool(wrong))
