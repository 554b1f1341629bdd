from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from quantlib.hls import project as hls


def _beside(path: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def nets() -> ModuleType:
    """Integer networks built by hand, those of the streaming design's tests."""
    return _beside("../hls/nets.py", "tests_layerwise_nets")


@pytest.fixture(scope="session")
def board() -> ModuleType:
    """Stand-ins for a PYNQ board, those of the streaming design's tests."""
    return _beside("../hls/test_driver.py", "tests_layerwise_board")


@pytest.fixture(scope="session")
def examples() -> ModuleType:
    return _beside("examples.py", "tests_layerwise_examples")


@pytest.fixture(autouse=True, scope="package")
def quick_compilation() -> Iterator[None]:
    """What is tested here are values and counts, not speed."""
    flags = hls.FLAGS
    hls.FLAGS = tuple("-O0" if flag == "-O2" else flag for flag in flags)
    yield
    hls.FLAGS = flags
