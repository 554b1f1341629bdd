"""The wheel holds both packages whole: every kernel, header and template, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest


def test_wheel(root, tmp_path):
    if tuple(map(int, version("setuptools").split(".")[:2])) < (77, 0):
        pytest.skip("building a wheel needs setuptools 77; pip fetches it, this environment has an older one")
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for package in ("quantlib", "zoo"):
        shutil.copytree(root / package, source / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(source / "dist" / done.stdout.splitlines()[-1]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(root).as_posix()
        for package in ("quantlib", "zoo")
        for path in Path(root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == expected
