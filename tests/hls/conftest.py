from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def nets() -> ModuleType:
    """The networks of nets.py beside this file."""
    spec = importlib.util.spec_from_file_location("tests_hls_nets", Path(__file__).with_name("nets.py"))
    assert spec and spec.loader
    module = sys.modules["tests_hls_nets"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="package")
def quick_compilation() -> Iterator[None]:
    """What is tested here are values, not speed: without optimisation the compiler takes a third of the time."""
    from quantlib.hls import project

    flags = project.FLAGS
    project.FLAGS = tuple("-O0" if flag == "-O2" else flag for flag in flags)
    yield
    project.FLAGS = flags
