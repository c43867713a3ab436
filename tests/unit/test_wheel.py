"""The wheel holds `dgd_lightning` and nothing else, with every tracked file of it; links are files there.

``DGD_WHEEL=FILE pytest -n0 tests/unit/test_wheel.py`` checks a wheel that is there (`make wheel` does).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def tracked(*folders: str) -> list[str]:
    """Files and links that git knows, relative to the clone."""
    command = ["git", "ls-files", "-z", *folders]
    return [name for name in subprocess.check_output(command, cwd=ROOT, text=True).split("\0") if name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("DGD_WHEEL"):
        return Path(given)
    copy, out = tmp_path_factory.mktemp("clean"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        if (ROOT / name).exists():  # else it is deleted, and git not told yet
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=copy, check=True, capture_output=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_alone_and_all_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if not name.endswith("/")}
        quickstart = file.read("dgd_lightning/configs/quickstart.yaml")
        (entry,) = (file.read(name).decode() for name in found if name.endswith("entry_points.txt"))
    assert {name.partition("/")[0].partition("-")[0] for name in found} == {"dgd_lightning"}
    assert quickstart == (ROOT / "configs/quickstart.yaml").read_bytes()
    assert "dgd = dgd_lightning.cli:main" in entry
    links = {"dgd_lightning/callbacks", "dgd_lightning/configs"}
    expected = {name for name in tracked("dgd_lightning") if (ROOT / name).exists()} - links
    expected |= {f"dgd_lightning/{name}" for name in tracked("callbacks", "configs") if (ROOT / name).exists()}
    assert {name for name in found if ".dist-info/" not in name} == expected
