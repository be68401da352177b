"""What is shipped: the wheel made from the source distribution, and the links of a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fxmpq

ROOT = Path(__file__).resolve().parent.parent
# Where the files of an installed folder lie in the repository.
FOLDERS = {"fxmpq": "fxmpq", "fxmpq/callbacks": "callbacks", "fxmpq/recipes": "recipes"}
BUILT = ("pyproject.toml", "README.md", "LICENSE", *FOLDERS.values())
LEFTOVERS = shutil.ignore_patterns("__pycache__", "*.progress", "*.part")


def build(kind: str, source: Path, output: Path) -> Path:
    """Build `kind`, "sdist" or "wheel", through setuptools' build backend, without a network."""
    output.mkdir()
    command = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", command, str(output)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that is built from the source distribution of a copy of this checkout."""
    folder = tmp_path_factory.mktemp("build")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in BUILT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=LEFTOVERS)
        else:
            shutil.copy(ROOT / name, checkout / name)
    sdist = build("sdist", checkout, folder / "sdist")
    # Python's own command line, as `extractall` wants a filter on some versions and knows none on
    # others.
    unpack = [sys.executable, "-m", "tarfile", "-e", str(sdist), str(folder / "unpacked")]
    subprocess.run(unpack, check=True, capture_output=True)
    (unpacked,) = (folder / "unpacked").iterdir()
    return zipfile.ZipFile(build("wheel", unpacked, folder / "wheel"))


def shipped(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def in_folders() -> set[str]:
    found = set()
    for installed, folder in FOLDERS.items():
        for directory, names, files in os.walk(ROOT / folder):
            for name in LEFTOVERS(directory, names + files):
                (names if name in names else files).remove(name)
            inside = Path(directory).relative_to(ROOT / folder)
            found |= {(installed / inside / name).as_posix() for name in files}
    return found


def test_the_wheel_holds_the_files_of_the_three_folders_and_no_other(
    wheel: zipfile.ZipFile,
) -> None:
    assert shipped(wheel) == in_folders()


def test_fxmpq_is_the_only_name_that_is_installed(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in shipped(wheel)} == {"fxmpq"}
    (top_level,) = [name for name in wheel.namelist() if name.endswith("top_level.txt")]
    assert wheel.read(top_level).decode().split() == ["fxmpq"]


@pytest.mark.parametrize(
    "name",
    [
        "fxmpq/py.typed",
        "fxmpq/callbacks/__init__.py",
        "fxmpq/recipes/models/resnet20.py",
        "fxmpq/recipes/resnet.yaml",
        "fxmpq/recipes/assets/resnet20_fashion_mnist.safetensors",
        "fxmpq/recipes/assets/MODEL_CARD.md",
        "fxmpq/recipes/assets/fashion_mnist_subset.npz",
        "fxmpq/recipes/assets/DATA_CARD.md",
    ],
)
def test_what_users_and_recipes_rely_on_is_in_the_wheel(wheel: zipfile.ZipFile, name: str) -> None:
    assert wheel.getinfo(name).file_size == (ROOT / name).stat().st_size


def test_metadata_names_the_version_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert info == f"fxmpq-{fxmpq.__version__}.dist-info"
    assert "fxmpq = fxmpq.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_the_checkout_reaches_the_top_folders_through_relative_links(name: str) -> None:
    link = ROOT / "fxmpq" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_no_bare_name_can_be_imported(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"from importlib.util import *; print(find_spec({name!r}))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "None"
