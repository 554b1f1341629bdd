"""Settings of every test: one torch thread per worker, reproducible hypothesis, and where the shared reference data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
settings.register_profile("default", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


def shared_folder() -> Path | None:
    """Golden vectors and data sets: the folder QUANTLIB_SHARED names, else `shared` beside the project."""
    folder = Path(os.environ.get("QUANTLIB_SHARED", ROOT.parent / "shared"))
    return folder if (folder / "golden").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip("no reference data: set QUANTLIB_SHARED to a folder that holds golden/ and data/")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
