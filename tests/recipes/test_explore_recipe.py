"""recipes/explore.py: its designs are the library's, none of those it keeps is beaten, and a second run computes nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import quantlib as ql
import zoo
from quantlib.parts import RESOURCES, part


@pytest.fixture(scope="module")
def explore(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("explore")


ARGUMENTS = ["fracbnn_digits", "--option", "num_classes=10,20", "--parts=xc7z010,Ultra96-V2", "--points=3", "--clock=100"]


@pytest.fixture(scope="module")
def result(explore: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("explore")
    return folder, explore.main([*ARGUMENTS, f"--out={folder}"])


def test_every_kept_design_is_a_plan(result: tuple[Path, dict[str, Any]]) -> None:
    torch.manual_seed(0)
    graph = ql.convert(zoo.get("fracbnn_digits", num_classes=20).eval(), (1, 8, 8))
    points = [p for p in result[1]["pareto"] if (p["part"], p["options"]) == ("xc7z010", "num_classes=20")]
    plans = [ql.estimate(graph, "xc7z010", clock_mhz=100)]
    plans += [ql.estimate(graph, "xc7z010", plans[0].fps / 1.6**k, clock_mhz=100) for k in (1, 2)]
    figures = [(p.cycles, *(getattr(p.total, r) for r in RESOURCES)) for p in plans]
    assert points and {(p["cycles"], *(p[r] for r in RESOURCES)) for p in points} <= set(figures)
    for p in points:
        assert p["frames_per_second"] == 100e6 / p["cycles"]
        assert p["share"] == max(p[r] / b for r, b in part("xc7z010").budget().items() if b) <= 1


def test_its_files_say_the_same(result: tuple[Path, dict[str, Any]]) -> None:
    folder, found = result
    assert {(p["part"], p["options"]) for p in found["pareto"]} == {
        (name, f"num_classes={n}") for name in ("xc7z010", "xczu3eg") for n in (10, 20)
    }
    with (folder / "pareto.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["cycles"]) for row in rows] == [p["cycles"] for p in found["pareto"]]
    assert json.loads((folder / "report.json").read_text())["pareto"] == found["pareto"]
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and page.count("<tr>") > len(rows)
    assert not list(folder.glob(".*")) and len(list((folder / "points").iterdir())) == 4


def test_a_second_run_computes_nothing(explore: ModuleType, result: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, first = result
    next((folder / "points").glob("xc7z010_num_classes-10_*")).unlink()
    asked = []
    computed = explore.explored
    monkeypatch.setattr(explore, "explored", lambda config, chosen, todo: asked.append((chosen, todo)) or computed(config, chosen, todo))
    assert explore.main([*ARGUMENTS, f"--out={folder}"])["pareto"] == first["pareto"]
    assert asked == [(("num_classes=10",), ("xc7z010",))]


def test_undominated_by_brute_force(explore: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = rng.integers(0, 4, (12, 1 + len(RESOURCES)))
        points = [{"frames_per_second": int(row[0]), **dict(zip(RESOURCES, row[1:].tolist()))} for row in table]
        signed = table * np.array([-1, *[1] * len(RESOURCES)])  # less is better everywhere
        keep = [
            i
            for i, row in enumerate(signed)
            if not any((other <= row).all() and ((other < row).any() or j < i) for j, other in enumerate(signed) if j != i)
        ]
        assert explore.undominated(points) == [points[i] for i in keep]


def test_combinations_of_values(explore: ModuleType) -> None:
    assert explore.combinations(("a=1,2", "fixed_point=12,6")) == [("a=1", "fixed_point=12,6"), ("a=2", "fixed_point=12,6")]
    assert explore.combinations(("fixed_point=authors;12,6",)) == [("fixed_point=authors",), ("fixed_point=12,6",)]
    assert explore.combinations(()) == [()]
    with pytest.raises(SystemExit, match="write NAME=VALUE"):
        explore.combinations(("weight_bits",))


def test_accuracy_comes_from_the_card_of_the_same_bits(explore: ModuleType) -> None:
    assert explore.measured("diracdeltanet_cifar10", ("weight_bits=4", "act_bits=4")).startswith("51.21 % (top-1")
    assert explore.measured("fracbnn_cifar10", ("fixed_point=authors",)).startswith("88.06 %")
    assert explore.measured("vggtiny_cifar10", ("weight_bits=444444", "act_bits=844444", "width=0.5")).startswith("40.94 %")
    assert explore.measured("vggtiny_cifar10", ("weight_bits=444444", "act_bits=844444")) == ""
    assert explore.measured("fracbnn_digits", ()) == ""


def test_what_does_not_fit_says_where_it_would(explore: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = explore.main(
        ["vggtiny_cifar10", "--option", "weight_bits=8", "act_bits=8", "--parts=xc7z010", "--points=2", f"--out={tmp_path}"]
    )
    assert not found["pareto"] and len(found["does_not_fit"]) == 1
    assert found["does_not_fit"][0]["missing"]["bram18"] > 0
    assert "smallest listed part that would do: xc" in capsys.readouterr().out
    assert "What does not fit" in (tmp_path / "report.html").read_text() and not (tmp_path / "pareto.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fracbnn"], "no network is called 'fracbnn'; near it"),
        (["fracbnn_digits", "--parts=Ultra69"], "nearest: xczu3eg"),
        (["fracbnn_digits", "--step=1"], "--step is above 1"),
        (["fracbnn_digits", "--option", "bits=2"], "has no option 'bits'"),
        (["fracbnn_digits", "--option", "fixed_point=None"], "fracbnn_digits: "),
        (["proxylessnas_float_imagenet", "--input-shape=3,32,32"], "proxylessnas_float_imagenet: "),
    ],
)
def test_bad_input(explore: ModuleType, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        explore.main([*arguments, f"--out={tmp_path}"])
    assert says in str(stopped.value) + capsys.readouterr().err
