"""Exported networks against the evaluator, in every mode of the simulation, with every set of headers at hand."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

import quantlib as ql
from quantlib.hls import Deadlock, netlist, project, writer


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def everything(nets: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> project.Project:
    graph, folding = nets.everything()
    return project.write(graph, tmp_path_factory.mktemp("export") / "everything", folding)


@pytest.mark.parametrize("mode", project.MODES)
def test_every_op_in_one_network(nets: ModuleType, everything: project.Project, mode: str) -> None:
    x = nets.codes(everything.graph, 4)
    want = nets.definition(everything.graph, x)
    assert equal(everything.csim(x, mode=mode, integers=True), want)
    assert equal(everything.csim(x[:1], mode=mode, integers=True), {k: v[:1] for k, v in want.items()})


def test_csim_means_what_run_means(nets: ModuleType, everything: project.Project) -> None:
    x = nets.codes(everything.graph, 2)
    for a, b in zip(everything.csim(x), ql.run(everything.graph, x), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="fast, fifo, timed"):
        everything.csim(x, mode="quick")


@pytest.mark.parametrize("flags", [("-DQL_UCONTEXT",), ("-DQL_SYNTHESIS_BODIES",)])
def test_other_bodies_and_other_fibers_give_the_same(nets: ModuleType, tmp_path: Path, flags: tuple[str, ...]) -> None:
    graph, folding = nets.residual(1)
    made = project.write(graph, tmp_path / "p", folding)
    made._library(project.MODES["timed"], flags)
    x = nets.codes(graph, 3)
    assert equal(made.csim(x, mode="timed", integers=True), nets.definition(graph, x))


def test_timed_cycles_are_those_of_the_slowest_stage(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.residual()
    made = project.write(graph, tmp_path / "p", folding, {n.name: (32,) * len(n.inputs) for n in graph})
    made.csim(nets.codes(graph, 5), mode="timed", integers=True)
    assert made.last is not None
    slowest = max(s.iterations for s in made.net.stages)
    assert {s.name: s.iterations for s in made.net.stages}.items() <= made.last.iterations.items()
    # one pixel of slack: a stage that is as slow as its neighbours sees the pipeline's rhythm at the borders of an image
    assert slowest <= made.last.cycles <= slowest + slowest // 144
    assert all(mark <= depth for mark, depth in made.last.marks.values())


def test_planned_network_runs_at_the_estimated_speed(nets: ModuleType, tmp_path: Path) -> None:
    graph, _ = nets.small()
    plan = ql.estimate(graph, "xczu3eg")
    made = ql.export(graph, tmp_path / "p", plan=plan)
    made.csim(nets.codes(graph, 4), mode="timed")
    assert made.last is not None
    # allowance: a windowed stage does not begin the next image before it has written the last row of this one (docs: 2 rows of 10)
    # the bus pads an image of 135 integers to whole words, the simulation feeds them one by one
    assert plan.cycles - 1 <= made.last.cycles <= 1.25 * plan.cycles


def test_too_small_fifo_deadlocks_and_says_where(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.residual()
    made = project.write(graph, tmp_path / "p", folding)
    x = nets.codes(graph, 2)
    want = nets.definition(graph, x)
    assert equal(made.csim(x, mode="fifo", integers=True), want)
    needed = netlist.required(made.net)
    skip = max(needed.items(), key=lambda item: item[1])
    tight = {w.name: needed.get(w.name, netlist.SHALLOW) for w in made.net.wires}
    assert equal(made.csim(x, mode="fifo", integers=True, depths=tight), want)
    with pytest.raises(Deadlock) as caught:
        made.csim(x, mode="fifo", integers=True, depths={**tight, skip[0]: skip[1] // 2})
    assert f"waits to write {skip[0]}, which holds {skip[1] // 2} of {skip[1] // 2}" in str(caught.value)
    assert "waits to read" in str(caught.value)
    assert equal(made.csim(x, mode="fifo", integers=True), want)  # the experiment leaves nothing behind
    with pytest.raises(KeyError, match="there is no FIFO nowhere"):
        made.csim(x, mode="fifo", depths={"nowhere": 3})


@pytest.mark.parametrize("seed", (3, 14))
def test_generated_depths_never_deadlock(nets: ModuleType, tmp_path: Path, seed: int) -> None:
    """Every wire as shallow as the analysis allows, on random networks with skips inside skips."""
    graph, folding = nets.tangle(seed)
    made = project.write(graph, tmp_path / "p", folding)
    needed = netlist.required(made.net)
    assert needed
    tight = {w.name: needed.get(w.name, netlist.SHALLOW) for w in made.net.wires}
    x = nets.codes(graph, 3)
    assert equal(made.csim(x, mode="fifo", integers=True, depths=tight), nets.definition(graph, x))


def test_big_tables_come_from_binary_files(nets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, folding = nets.small()
    monkeypatch.setattr(writer, "BIG", 100)
    made = project.write(graph, tmp_path / "p", folding)
    params = made.folder / "params"
    data = (params / "fc_weight.bin").read_bytes()
    assert [int(v) for v in (params / "fc_weight.inc").read_text().split(",")] == [v - 256 * (v > 127) for v in data]
    x = nets.codes(graph, 2)
    assert equal(made.csim(x, integers=True), nets.definition(graph, x))
    assert subprocess.run(["make", "csim", "CXXFLAGS=-O0"], cwd=made.folder, capture_output=True).returncode == 0


def test_networks_compile_against_the_open_ap_types(nets: ModuleType, tmp_path: Path) -> None:
    """The headers in the hls4ml wheel stand in for the vendor's: the same source gives the same integers."""
    found = importlib.util.find_spec("hls4ml")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the open ap_types headers come with the package hls4ml, which is not installed")
    headers = next(Path(found.submodule_search_locations[0]).rglob("ap_types"), None)
    if headers is None or not (headers / "hls_stream.h").exists():
        pytest.skip("this hls4ml carries no ap_types headers")
    for name in ("everything", "residual"):
        graph, folding = getattr(nets, name)()
        made = project.write(graph, tmp_path / name, folding)
        shim = made.folder / "include" / "vendor"  # the open set has no ap_axi_sdata.h that works without a tool
        shim.mkdir()
        (shim / "ap_axi_sdata.h").write_text((made.folder / "include" / "shim" / "ap_axi_sdata.h").read_text())
        command = ["make", "csim", f"VENDOR={headers}", f"CXXFLAGS=-O0 -Wno-attributes -I{shim}"]
        done = subprocess.run(command, cwd=made.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert "every integer equal" in done.stdout
