"""recipes/analyse.py prints what the library computes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import quantlib as ql
import zoo


@pytest.fixture(scope="module")
def analyse(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_analyse", root / "recipes" / "analyse.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_one_network_prints_its_tables(analyse, capsys):
    result = analyse.main(["fracbnn_digits", "--option", "fixed_point=12,6", "--show", "count,latency", "--array", "fuse", "--rows", "16"])
    out = capsys.readouterr().out
    model = zoo.get("fracbnn_digits", fixed_point=ql.FixedPoint(12, 6))
    assert str(ql.analysis.count(model, (1, 8, 8))) in out
    assert str(ql.analysis.systolic_latency(model, (1, 8, 8), 16, 64, "fuse")) in out and "score" not in out
    assert result["networks"]["fracbnn_digits"]["macs"] == zoo.card("fracbnn_digits").macs


def test_several_networks_and_a_baseline(analyse, capsys, tmp_path):
    result = analyse.main(["fracbnn_d*", "vggtiny*", "--baseline", "fracbnn_digits", "--out", str(tmp_path), "--reference", "cifar100"])
    out = capsys.readouterr().out
    assert set(result["networks"]) == {"fracbnn_digits", "vggtiny_cifar10"} and result["speedups"]["fracbnn_digits"] == 1
    cost = ql.analysis.micronet_cost(zoo.get("vggtiny_cifar10"), (3, 32, 32), reference=ql.analysis.CIFAR100)
    assert result["networks"]["vggtiny_cifar10"]["micronet"]["score"] == cost.printed and repr(cost.printed)[:6] in out
    assert json.loads((tmp_path / "analysis.json").read_text())["networks"] == result["networks"]
    assert (tmp_path / "latency.png").read_bytes()[:4] == b"\x89PNG"


def test_wrong_tables_and_networks(analyse):
    with pytest.raises(SystemExit, match="count, micronet, latency"):
        analyse.main(["fracbnn_digits", "--show", "energy"])
    with pytest.raises(zoo.ZooError, match="fracbnn_digits"):
        analyse.main(["fracbnn_digitz"])


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_every_network_has_all_figures(analyse, name):
    card = zoo.card(name)
    found = analyse.main([name])["networks"][name]
    assert (found["parameters"], found["macs"]) == (card.parameters, card.macs)
    assert found["cycles"]["total"] > 0 and found["micronet"]["score"] > 0
