"""recipes/export.py on a tiny network: it runs, its files agree with the library, and bad input is refused usefully."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import quantlib as ql
import zoo
from quantlib.hls import project
from quantlib.io import foldings
from quantlib.parts import PARTS
from quantlib.schedule import Folding, Schedule

NETWORK = "fracbnn_digits"


@pytest.fixture(scope="module")
def export(recipe: Callable[[str], ModuleType]) -> Iterator[ModuleType]:
    """The recipe, compiling without optimisation: values are tested, not speed."""
    flags = project.FLAGS
    project.FLAGS = tuple("-O0" if flag == "-O2" else flag for flag in flags)
    yield recipe("export")
    project.FLAGS = flags


@pytest.fixture(scope="module")
def exported(export: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with a checkpoint, labelled images and a clock."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(3)
    save_file({k: v.clone() for k, v in zoo.get(NETWORK).state_dict().items()}, folder / "w.safetensors")
    arguments = [
        NETWORK,
        f"--checkpoint={folder / 'w.safetensors'}",
        "--images=digits",
        "--count=4",
        "--check=timed",
        f"--out={folder / 'out'}",
    ]
    return folder, export.main(arguments)


def test_a_network_is_exported_verified_and_reported(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, result = exported
    assert result["verify"]["mismatches"] == 0 and result["plan"]["fits"]
    simulated = result["csim"]
    assert simulated["mode"] == "timed" and set(simulated["mismatches"].values()) == {0}
    assert simulated["cycles"] == simulated["planned_cycles"] == result["plan"]["cycles_per_image"]
    assert 0 <= simulated["accuracy"] <= 1 and simulated["fifos"]
    assert json.loads((folder / "out/report.json").read_text())["csim"] == json.loads(json.dumps(simulated))
    page = (folder / "out/report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not {"http:", "https:"} & set(page.split('"'))
    assert (folder / "out/hls/Makefile").is_file() and not list((folder / "out").glob(".*"))


def test_its_graph_and_folding_give_the_same_plan_again(export: ModuleType, exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, first = exported
    files = [f"--graph={folder / 'out/graph.safetensors'}", f"--fixed={folder / 'out/folding.json'}"]
    again = export.main([*files, "--no-export", f"--out={tmp_path}"])
    assert again["plan"]["rows"] == first["plan"]["rows"]
    assert "csim" not in again and "verify" not in again and not (tmp_path / "hls").exists()
    assert (tmp_path / "folding.json").read_text() == (folder / "out/folding.json").read_text()


def test_part_of_a_folding_a_memory_style_and_a_target(export: ModuleType, exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    graph = f"--graph={exported[0] / 'out/graph.safetensors'}"
    (tmp_path / "few.json").write_text(json.dumps({"layers": {"conv1": {"pe": 2}}}))
    few = export.main([graph, f"--fixed={tmp_path / 'few.json'}", "--no-export", f"--out={tmp_path / 'a'}"])
    folding = {row["name"]: row["folding"] for row in few["plan"]["rows"]}
    assert (folding["conv1"]["pe"], folding["conv1"]["simd"]) == (2, 1) and few["plan"]["bottleneck"] == "conv1"
    bram = export.main([graph, "--memory=bram", "--part=zcu104", "--clock=100", "--fps=1000", "--no-export", f"--out={tmp_path / 'b'}"])
    weighted = [row["folding"]["memory"] for row in bram["plan"]["rows"] if row["op"] in ("Conv2d", "FractionalConv2d", "Dense")]
    assert weighted and set(weighted) == {"bram"}
    assert bram["plan"]["clock_mhz"] == 100 and bram["plan"]["frames_per_second"] >= 1000


def test_the_second_architecture(export: ModuleType, exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    graph = f"--graph={exported[0] / 'out/graph.safetensors'}"
    result = export.main([graph, "--architecture=layers", "--count=2", f"--out={tmp_path}"])
    assert result["plan"]["architecture"] == "layerwise" and set(result["csim"]["mismatches"].values()) == {0}
    assert (tmp_path / "hls/memory.bin").is_file() and "layer by layer" in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit):
        export.main([graph, "--architecture=layers", "--check=timed", f"--out={tmp_path}"])


def test_images_from_an_array(export: ModuleType, exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 1, 8, 8), np.uint8))
    graph = f"--graph={exported[0] / 'out/graph.safetensors'}"
    result = export.main([graph, f"--images={tmp_path / 'x.npy'}", "--check=none", f"--out={tmp_path / 'out'}"])
    assert result["images"] == 3 and "csim" not in result


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fracbnn_digit"], "no network is called 'fracbnn_digit'; near it: fracbnn_digits"),
        ([NETWORK, "--option=bits=3"], "has no option 'bits'"),
        (["fracbnn_cifar10"], "does not convert: (?s:.*)This converts: --option fixed_point=authors"),
        ([NETWORK, "--graph=g"], "give a network of the zoo, or --graph FILE"),
        (["--graph=g", "--option=a=1"], "takes no --option"),
        (["--graph=nowhere.safetensors"], "no graph file at nowhere.safetensors"),
        ([NETWORK, "--part=PYNQ-Z9"], "no part or board is called 'PYNQ-Z9'; nearest: xc7z020"),
        ([NETWORK, "--fixed=nowhere.json"], "no folding file at nowhere.json"),
        ([NETWORK, "--fps=-1"], "must be positive"),
        ([NETWORK, "--fps=1e9"], "nothing was exported; --anyway exports the nearest folding"),
    ],
)
def test_bad_input(export: ModuleType, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export.main([*arguments, f"--out={tmp_path / 'out'}"])
    said = str(stopped.value) + capsys.readouterr().err
    assert re.search(says, said), said


def test_an_impossible_target_says_what_is_missing(export: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = export.main([NETWORK, "--fps=1e9", "--no-export", f"--out={tmp_path}"])
    assert not result["plan"]["fits"] and result["plan"]["missing"]["fps"] > 0 and result["plan"]["smallest_part"] is None
    assert "This plan does not fit: it lacks" in capsys.readouterr().out
    assert "the smallest listed part that would do is none" in (tmp_path / "report.html").read_text()


def test_a_foreign_folder_and_a_foreign_checkpoint(export: ModuleType, exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "hls").mkdir()
    (tmp_path / "hls/thesis.tex").write_text("years of work")
    graph = f"--graph={exported[0] / 'out/graph.safetensors'}"
    with pytest.raises(SystemExit, match="was not written by export"):
        export.main([graph, f"--out={tmp_path}"])
    assert (tmp_path / "hls/thesis.tex").read_text() == "years of work"
    with pytest.raises(SystemExit, match="does not fit(?s:.*)conv1"):
        export.main(["vggtiny_cifar10", f"--checkpoint={exported[0] / 'w.safetensors'}", f"--out={tmp_path / 'other'}"])


# ---------------------------------------------------------------- folding files


@pytest.fixture(scope="module")
def graph() -> ql.Graph:
    torch.manual_seed(0)
    return ql.convert(zoo.get(NETWORK).eval(), (1, 8, 8))


def test_a_folding_survives_its_file(graph: ql.Graph, tmp_path: Path) -> None:
    plan = ql.estimate(graph, PARTS[0].name)
    foldings.save(plan.schedule, tmp_path / "f.json", graph.name)
    read = foldings.load(tmp_path / "f.json", graph)
    assert read == {name: stage.folding for name, stage in plan.schedule.items()}
    assert Schedule.of(graph, read) == plan.schedule
    assert len((tmp_path / "f.json").read_text().splitlines()) == len(graph) + 2  # a line for each layer


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no JSON"),
        ("[]", "expected"),
        ('{"layers": {"conv": {"pe": 2}}}', "has no layer 'conv'; near it: conv1"),
        ('{"layers": {"conv1": 4}}', "conv1: 4 is no folding"),
        ('{"layers": {"conv1": {"pes": 2}}}', "no key 'pes'; there are pe, simd, memory"),
        ('{"layers": {"conv1": {"pe": "2"}}}', "pe = '2' is no int"),
        ('{"layers": {"conv1": {"pe": 0}}}', "must be at least 1"),
        ('{"layers": {"conv1": {"pe": 5}}}', "conv1 .Conv2d.: pe = 5 must divide 16: choose 1, 2, 4, 8 or 16"),
        ('{"layers": {"conv1": {"memory": "disk"}}}', "choose one of auto, lut, bram"),
    ],
)
def test_a_folding_file_that_cannot_be(graph: ql.Graph, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(foldings.FoldingFileError, match=says):
        foldings.load(tmp_path / "f.json", graph)


def test_defaults_may_be_left_out(graph: ql.Graph, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('{"layers": {"conv1": {"simd": 2, "memory": "lut"}}}')
    assert foldings.load(tmp_path / "f.json", graph) == {"conv1": Folding(1, 2, "lut")}
