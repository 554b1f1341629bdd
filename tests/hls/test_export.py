"""The files of a project: what is there, what is refused, what the test bench says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import quantlib as ql
from quantlib.hls import ExportError, project, writer
from quantlib.ir import GraphError


@pytest.fixture(scope="module")
def made(nets: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> project.Project:
    graph, folding = nets.small()
    return project.write(graph, tmp_path_factory.mktemp("export") / "deep" / "small", folding)


def test_project_is_complete_and_names_no_place(made: project.Project) -> None:
    files = {str(p.relative_to(made.folder)) for p in made.folder.rglob("*") if p.is_file() and "build" not in p.parts}
    manifest = json.loads((made.folder / project.MANIFEST).read_text())
    assert set(manifest["files"]) | {project.MANIFEST} == files
    expected = "Makefile project.tcl driver.py driver.json params/conv_weight.h src/network.hpp src/top.cpp src/testbench.cpp"
    assert {*expected.split(), "golden/input.txt", "golden/output0.txt", "include/ql.hpp", "include/shim/ap_int.h"} <= files
    for name in files:
        assert str(made.folder.parent) not in (made.folder / name).read_text()
    assert "set PART   xczu3eg" in (made.folder / "project.tcl").read_text()


def test_a_layer_is_found_by_the_table_of_contents(nets: ModuleType, tmp_path: Path) -> None:
    """Every node has a row; its line holds the node's comment, and its calls follow up to the next comment."""
    for name in ("everything", "residual"):
        graph, folding = getattr(nets, name)()
        made = project.write(graph, tmp_path / name, folding)
        lines = (made.folder / "src" / "network.hpp").read_text().splitlines()
        rows = [
            m.groups()
            for line in lines
            if (m := re.match(r"//   (\d+)\s+(\w+)\s+(to the bus|\w+)\s\s+(\d[\d x]*\d|\d)\s\s+(.*?)\s\s+(.*)$", line))
        ]
        assert {row[1] for row in rows} >= {n.name for n in graph.nodes[1:]} and len({row[0] for row in rows}) == len(rows)
        for number, node, op, _, fold, stages in rows:
            line = lines[int(number) - 1]
            assert line.startswith(f"    // {node}: ")
            if op != "to the bus":
                assert f"{type(graph.by_name[node].op).__name__}," in line or not graph.by_name[node].inputs
                assert f"; {fold}; " in line or fold == "-"
            end = next(k for k in range(int(number), len(lines)) if not lines[k].strip() or lines[k] == "}")
            called = re.findall(r'QL_STAGE\("(\w+)"', "\n".join(lines[int(number) : end]))
            assert set(stages.split()) <= set(called)
            assert [s.name for s in made.net.stages if s.name in called] == called
        assert max(map(len, lines)) <= 230, "calls are broken into lines"
        assert (
            "// c1: Conv2d, 12 x 8 x 8 ap_int<2> -> 8 x 8 x 8 ap_int<9>; pe 4, simd 6; 2,304 cycles" in "\n".join(lines)
            or name != "everything"
        )


def test_sanitizers_find_nothing_and_warnings_are_errors(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.residual(1)
    made = project.write(graph, tmp_path / "p", folding)
    done = subprocess.run(["make", "sanitize"], cwd=made.folder, capture_output=True, text=True)
    assert done.returncode == 0 and "every integer equal" in done.stdout, done.stderr
    assert "-fsanitize=address,undefined" in done.stdout and "-Wall -Wextra -Werror" in done.stdout
    assert re.findall(r"-Wno-\S+", done.stdout) == ["-Wno-unknown-pragmas"]
    source = made.folder / "src" / "top.cpp"
    text = source.read_text()
    source.write_text(text + "void unused() { int nothing; }\n")
    spoiled = subprocess.run(["make", "sanitize"], cwd=made.folder, capture_output=True, text=True)
    assert spoiled.returncode != 0 and "unused variable" in spoiled.stderr
    names = subprocess.run(["make", "help"], cwd=made.folder, capture_output=True, text=True).stdout
    assert {line.split()[0] for line in names.splitlines()} == {
        "help", "csim", "optimized", "sanitize", "strict", "hls", "bitstream", "clean"}  # fmt: skip


def test_kernels_follow_the_rules() -> None:
    """One pipelined loop per kernel, beginning with QL_CYCLE, no non-blocking access, no static data."""
    root = Path(writer.__file__).parent
    kernels = [*root.joinpath("include").glob("*.hpp"), *root.parent.joinpath("ops").glob("*.hpp")]
    assert len(kernels) > 20
    for path in kernels:
        if path.name == "ql_csim.hpp":
            continue
        text = path.read_text()
        assert text.startswith("//") and "#pragma once" in text, path
        assert not re.search(r"\.(empty|full|size|read_nb|write_nb)\(", text), path
        for loop in re.findall(r"i < total; \+\+i\) \{\n(.*?);\n", text, re.S):
            lines = [line.strip() for line in loop.splitlines() if not line.strip().startswith("#pragma HLS DEPENDENCE")]
            assert lines == ["#pragma HLS PIPELINE II = 1", "QL_CYCLE()"], path


def test_make_csim_passes_and_a_corrupt_golden_file_is_found(made: project.Project) -> None:
    done = subprocess.run(["make", "csim", "CXXFLAGS=-O0"], cwd=made.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "passed: 2 images, every integer equal" in done.stdout
    path = made.folder / "golden" / "output0.txt"
    text = path.read_text()
    lines = text.splitlines()
    lines[13] = str(int(lines[13]) + 1)
    path.write_text("\n".join(lines))
    try:
        bench = subprocess.run(["./build/testbench"], cwd=made.folder, capture_output=True, text=True)
        assert bench.returncode == 1
        assert "output fc, image 1, pixel (0, 0), channel 3" in bench.stdout
        path.write_text("\n".join(lines[:5]))
        short = subprocess.run(["./build/testbench"], cwd=made.folder, capture_output=True, text=True)
        assert short.returncode == 1
        assert "20 integers expected, 5 found" in short.stdout
    finally:
        path.write_text(text)


@pytest.mark.parametrize("content", ["notes.txt", project.MANIFEST])
def test_foreign_folder_is_refused_and_untouched(nets: ModuleType, tmp_path: Path, content: str) -> None:
    graph, folding = nets.small()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / content).write_text("{}")
    before = (tmp_path / "mine" / content).stat().st_mtime_ns
    with pytest.raises(ExportError, match="was not written by export"):
        project.write(graph, tmp_path / "mine", folding)
    with pytest.raises(ExportError, match="was not written by export"):
        ql.export(graph, tmp_path / "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert [p.name for p in (tmp_path / "mine").iterdir()] == [content]
    assert (tmp_path / "mine" / content).stat().st_mtime_ns == before and (tmp_path / "mine" / content).read_text() == "{}"
    with pytest.raises(ExportError, match="is no folder"):
        project.write(graph, tmp_path / "mine" / content, folding)


def test_export_again_replaces_and_keeps_what_was_compiled(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.small()
    target = tmp_path / "p"
    first = project.write(graph, target, folding)
    x = nets.codes(graph, 1)
    first.csim(x)
    (target / "leftover").write_text("from before")
    built = {p.name: p.stat().st_mtime_ns for p in (target / "build").glob("*.so")}
    second = project.write(graph, target, folding)
    assert not (target / "leftover").exists()
    second.csim(x)
    assert {p.name: p.stat().st_mtime_ns for p in (target / "build").glob("*.so")} == built
    project.write(graph, target, {**folding, "fc": project.Folding(2, 4)}).csim(x)
    assert len(list((target / "build").glob("*.so"))) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("before", [False, True], ids=["new", "over a project"])
@pytest.mark.parametrize("where", ["write_bytes", "replace"])
def test_an_error_on_the_way_leaves_what_was_there(
    nets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, where: str
) -> None:
    graph, folding = nets.small()
    target = tmp_path / "p"
    if before:
        project.write(graph, target, folding)
    old, count = snapshot(tmp_path), 0
    real: Any = Path.write_bytes if where == "write_bytes" else os.replace

    def fails(source: Any, destination: Any) -> Any:
        """The disk is full at the ninth file, or the new folder cannot be put in its place."""
        nonlocal count
        count += 1
        if count == 9 or (where == "replace" and Path(source).name == "new"):
            raise OSError("no space left on device")
        return real(source, destination)

    monkeypatch.setattr(*((Path, "write_bytes") if where == "write_bytes" else (os, "replace")), fails)
    with pytest.raises(OSError, match="no space left"):
        project.write(graph, target, {**folding, "fc": project.Folding(2, 4)})
    monkeypatch.undo()
    assert snapshot(tmp_path) == old and [p.name for p in tmp_path.iterdir()] == (["p"] if before else [])
    assert project.write(graph, target, folding).folder == target


def test_a_killed_export_leaves_nothing_half_written(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.small()
    target = tmp_path / "p"
    project.write(graph, target, folding)
    old = snapshot(target)
    child = os.fork()
    if not child:  # dies at the ninth file, as by a power cut: nothing is tidied up
        count = iter(range(100))
        real = Path.write_bytes
        Path.write_bytes = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(count) == 9 else real(*a)  # type: ignore
        project.write(graph, target, {**folding, "fc": project.Folding(2, 4)})
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert snapshot(target) == old
    assert len(list(tmp_path.iterdir())) == 2  # what the dead process wrote lies beside it, hidden
    project.write(graph, target, folding)
    assert [p.name for p in tmp_path.iterdir()] == ["p"] and snapshot(target) == old


def test_files_in_the_way_and_foreign_plans(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.small()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="file exists and is no folder"):
        ql.export(graph, tmp_path / "file")
    with pytest.raises(ExportError, match="file is a file, not a folder"):
        project.write(graph, tmp_path / "file" / "deep" / "p", folding)
    with pytest.raises(ValueError, match="the schedule was made for another graph than hand_made"):
        ql.export(graph, tmp_path / "p", plan=ql.estimate(nets.residual()[0]))
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_missing_compiler_says_how_to_get_one(nets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, folding = nets.small()
    made = project.write(graph, tmp_path / "p", folding)  # export itself needs none
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match="apt install g.."):
        made.csim(nets.codes(graph, 1))
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(ExportError, match="failed on"):
        made.csim(nets.codes(graph, 1))


def test_dead_edges_and_illegal_foldings_are_errors(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.small()
    with pytest.raises(GraphError, match="pe = 3 must divide 8"):
        project.write(graph, tmp_path / "p", {**folding, "conv": project.Folding(3, 1)})
    net = nets.Net(nets.Input((2, 4, 4), 0, 3))
    net.conv("dead", "x", 2)
    net.conv("live", "x", 2)
    with pytest.raises(GraphError, match="dead is read by nobody"):
        project.write(net.graph("live"), tmp_path / "p", {})
    assert not any(tmp_path.iterdir())
