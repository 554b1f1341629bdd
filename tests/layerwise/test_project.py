"""The files of a layer-by-layer project: complete, warning-free, clean under sanitizers, and refused where they would overwrite others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import quantlib as ql
from quantlib.hls import ExportError
from quantlib.hls import project as hls
from quantlib.layerwise import Project, project


@pytest.fixture(scope="module")
def made(nets: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Project:
    graph, _ = nets.small()
    return ql.layerwise.export(graph, tmp_path_factory.mktemp("layerwise") / "deep" / "small", "xczu3eg")


def test_project_is_complete_and_names_no_place(made: Project) -> None:
    files = {str(p.relative_to(made.folder)) for p in made.folder.rglob("*") if p.is_file() and "build" not in p.parts}
    assert set(json.loads((made.folder / hls.MANIFEST).read_text())["files"]) | {hls.MANIFEST} == files
    expected = "Makefile project.tcl bitstream.tcl driver.py host.py driver.json memory.bin plan.txt plan.json README.md src/engine.cpp"
    assert {
        *expected.split(),
        "src/engine.hpp",
        "src/testbench.cpp",
        "golden/input.txt",
        "golden/output0.txt",
        *(f"include/{h}" for h in project.HEADERS),
    } <= files
    for name in files - {"memory.bin"}:
        assert str(made.folder.parent) not in (made.folder / name).read_text()
    assert "set PART   xczu3eg" in (made.folder / "project.tcl").read_text()


def test_every_loop_that_counts_is_pipelined() -> None:
    """Iterations that the model counts take a cycle each: their loop says so in its first line."""
    for name in project.HEADERS:
        text = (Path(project.__file__).parent / "include" / name).read_text()
        assert text.startswith("//") and "#pragma once" in text, name
        assert not re.search(r"\.(empty|full|size|read_nb|write_nb)\(|\bstatic (?!const|bool|inline|uint64_t all|_assert)", text), name
        for where in re.finditer(r"LW_COUNT\((?!unit\) (?:\+\+|$))", text):
            before = text[: where.start()].rstrip().splitlines()
            if "#define" in before[-1] or name == "lw_engine.hpp":
                continue
            pragmas = [line.strip() for line in before[-3:]]
            assert "#pragma HLS PIPELINE II = 1" in pragmas, (name, before[-1])


def test_test_bench_passes_and_finds_a_corrupt_golden_file(made: Project) -> None:
    strict = "-O0 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all"
    done = subprocess.run(["make", "csim", f"CXXFLAGS={strict}"], cwd=made.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: 2 images, every integer equal" in done.stdout
    path = made.folder / "golden" / "output0.txt"
    text = path.read_text()
    lines = text.splitlines()
    lines[13] = str(int(lines[13]) + 1)
    path.write_text("\n".join(lines))
    bench = ["./build/testbench", "golden", "memory.bin"]
    try:
        found = subprocess.run(bench, cwd=made.folder, capture_output=True, text=True)
        assert found.returncode == 1
        assert f"output fc, image 1, pixel (0, 0), channel 3: got {int(lines[13]) - 1}, expected {lines[13]}" in found.stdout
        assert subprocess.run([*bench[:2], "Makefile"], cwd=made.folder, capture_output=True).returncode == 1
    finally:
        path.write_text(text)


def test_the_body_for_synthesis_is_the_same(nets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = nets.everything()
    made = ql.layerwise.export(graph, tmp_path / "p")
    monkeypatch.setattr(hls, "FLAGS", (*hls.FLAGS, "-DQL_SYNTHESIS_BODIES"))
    x = nets.codes(graph, 2)
    got, want = made.csim(x, integers=True), nets.definition(graph, x)
    assert all(bool((got[k] == want[k]).all()) for k in want)


def test_foreign_folders_and_foreign_plans_are_refused(nets: ModuleType, tmp_path: Path) -> None:
    graph, _ = nets.small()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="was not written by export"):
        ql.layerwise.export(graph, tmp_path / "mine")
    plan = ql.layerwise.estimate(nets.residual()[0])
    with pytest.raises(ql.layerwise.LayerwiseError, match="the plan was made for another graph"):
        ql.layerwise.export(graph, tmp_path / "new", plan=plan)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_export_again_replaces_the_other_architecture(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.small()
    hls.write(graph, tmp_path / "p", folding)
    made = ql.layerwise.export(graph, tmp_path / "p")
    assert not (tmp_path / "p" / "params").exists() and (tmp_path / "p" / "memory.bin").exists()
    assert made.graph is graph


def test_missing_compiler_says_how_to_get_one(nets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ql.layerwise.export(nets.small()[0], tmp_path / "p")  # export itself needs none
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match="apt install g.."):
        made.csim(nets.codes(made.graph, 1))
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(ExportError, match="failed on"):
        made.csim(nets.codes(made.graph, 1))
