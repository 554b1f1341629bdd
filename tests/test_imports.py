"""What an import costs: nothing loads a module that it has no use for. Each line runs in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import quantlib as ql
from quantlib import ops
from quantlib.ir import Decode, Graph, Node

HEAVY = ("brevitas", "torchvision", "scipy", "matplotlib", "rich", "onnx", "qonnx", "PIL", "torch._dynamo", "torch._inductor", "sympy")


def heavy_after(code: str, root: Path, *forbidden: str) -> list[str]:
    """Which of the forbidden modules a fresh process holds after `code`."""
    line = f"{code}\nimport sys\nprint('loaded', *[m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, check=True
    )
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of one convolution and one threshold."""
    image = ops.Input((1, 4, 4), 0, 15, 1)
    conv, quantizer = ops.Conv2d(np.array([[[[1, -1], [2, 1]]]])), ops.Threshold(np.array([[-3, 4, 9]]), np.ones(1), 0)
    nodes = [Node("input", image, (), image.infer())]
    for name, op in (("conv", conv), ("quantizer", quantizer)):
        nodes.append(Node(name, op, (nodes[-1].name,), op.infer(nodes[-1].type)))
    graph = Graph(tuple(nodes), (Decode(("quantizer",), (np.ones(1),), np.zeros(1), (1, 3, 3)),))
    path = tmp_path_factory.mktemp("graph") / "net.safetensors"
    ql.save(graph, path)
    return path


def test_the_package_alone(root: Path) -> None:
    assert heavy_after("import quantlib", root, "torch", "numpy", *HEAVY) == []


def test_running_a_saved_graph(saved: Path, root: Path) -> None:
    code = f"import quantlib as ql, numpy as np\nql.run(ql.load({str(saved)!r}), np.zeros((2, 1, 4, 4), dtype=np.uint8))"
    assert heavy_after(code, root, *HEAVY) == []


def test_estimating_and_exporting_a_saved_graph(saved: Path, root: Path, tmp_path: Path) -> None:
    code = f"import quantlib as ql\ngraph = ql.load({str(saved)!r})\nql.export(graph, {str(tmp_path / 'cpp')!r}, plan=ql.estimate(graph))"
    assert heavy_after(code, root, *HEAVY) == []


def test_the_command_line(root: Path) -> None:
    code = "import quantlib.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass"
    assert heavy_after(code, root, "torch", "numpy", *HEAVY) == []
