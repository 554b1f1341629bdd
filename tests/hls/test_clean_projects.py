"""Exported projects have no warning and no finding of the sanitizers: every quantized network of the zoo, foldings of all kinds."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

import quantlib as ql
import zoo
from quantlib.hls import project
from quantlib.ir import Graph
from quantlib.schedule import Folding, Schedule

CASES = [(name, index) for name in zoo.names() for index in range(len(zoo.card(name).converts))]


@pytest.fixture(scope="module")
def every_network() -> ModuleType:
    """tests/test_every_network.py: which networks, options and shapes, and weights off their initial values."""
    spec = importlib.util.spec_from_file_location("tests_every_network", Path(__file__).parents[1] / "test_every_network.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(target: str, folder: Path) -> str:
    done = subprocess.run(["make", target], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert not done.stderr, done.stderr[-4000:]
    return done.stdout


def clean(made: project.Project, x: torch.Tensor) -> None:
    """No warning at -O2 in any source and mode; the test bench passes under both sanitizers; csim gives the integers of run."""
    make("strict", made.folder)
    assert "every integer equal" in make("sanitize", made.folder)
    ours, theirs = ql.run(made.graph, x, integers=True), made.csim(x, integers=True)
    assert all(torch.equal(ours[edge], theirs[edge]) for edge in ours)


def widest(graph: Graph, packing: str) -> dict[str, Folding]:
    """For every node a folding with as many taps as it allows, or the packing of a slice where it has one."""
    chosen = {}
    for node in graph:
        folds = node.op.folds(graph.types(node), node.type)
        if packing:
            limits = folds.packed.get(packing)
            chosen[node.name] = Folding(limits.pe, limits.simd, taps=limits.taps[-1], packing=packing) if limits else Folding()
        else:
            chosen[node.name] = Folding(2 if folds.pe % 2 == 0 else 1, 1, taps=folds.taps[-1])
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize(("name", "index"), CASES)
def test_every_quantized_network(name: str, index: int, every_network: ModuleType, tmp_path: Path) -> None:
    model = every_network.randomised(name, dict(zoo.card(name).converts[index]))
    graph = ql.convert(model, every_network.shape_of(name))
    clean(ql.export(graph, tmp_path / "p", part="xczu7ev"), every_network.images(name, 2))


@pytest.mark.parametrize("packing", ["", "dsp48e2"], ids=["taps", "packing"])
def test_taps_and_packing(nets: ModuleType, tmp_path: Path, packing: str) -> None:
    graph, _ = nets.small()
    chosen = widest(graph, packing)
    assert any(f.packing for f in chosen.values()) if packing else any(f.taps > 1 for f in chosen.values())
    made = project.write(graph, tmp_path / "p", chosen)
    assert "every integer equal" in make("sanitize", made.folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["taps", "dsp48e1", "dsp48e2", "dsp58", "stream"])
@pytest.mark.parametrize("name", ["everything", "residual", "small"])
def test_every_kind_of_folding(nets: ModuleType, tmp_path: Path, name: str, kind: str) -> None:
    graph, _ = getattr(nets, name)()
    if kind == "stream":
        streams = {n.name for n in graph if n.op.folds(graph.types(n), n.type).streams}
        chosen = {n.name: Folding(memory="stream" if n.name in streams else "auto") for n in graph}
    else:
        chosen = widest(graph, "" if kind == "taps" else kind)
    plan = ql.estimate(graph, "xczu7ev", schedule=Schedule.of(graph, chosen))
    clean(ql.export(graph, tmp_path / "p", plan=plan), nets.codes(graph, 2))
