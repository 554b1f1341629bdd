"""What the documents say is true: their code runs, the normative page names every op, the generated pages are current."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import zoo._registry
from quantlib.ops import Op
from quantlib.pages import PAGES, stale, write
from quantlib.schedule import Folding


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_the_normative_page_has_a_line_for_every_op_and_for_no_other(root: Path) -> None:
    rows = re.findall(r"^\| `(\w+)`(?: \(of it\))? \|", (root / "docs" / "integer_semantics.md").read_text(encoding="utf-8"), re.M)
    ours = {name for name, op in Op.registry.items() if op.__module__.startswith("quantlib.ops.")}
    assert len(rows) == len(set(rows))
    assert set(rows) == ours | {"FixedMerge"}


@pytest.mark.parametrize("page", ["integer_semantics.md", "architecture.md", "add_an_op.md", "add_a_network.md"])
def test_files_and_links_that_a_page_names_exist(page: str, root: Path) -> None:
    text = (root / "docs" / page).read_text(encoding="utf-8")
    named = {n for n in re.findall(r"`([\w/]+(?:\.(?:py|hpp|md)|/))`", text) if "NAME" not in n and "distance" not in n}
    missing = [n for n in named if not any((root / base / n).exists() for base in ("", "quantlib", "docs"))]
    assert not missing
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert all((root / "docs" / link).exists() for link in links)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_generated_pages_are_current(name: str, root: Path) -> None:
    assert name not in stale(root / "docs"), "run `python -m quantlib docs`"


def test_pages_are_written_and_then_current(tmp_path: Path) -> None:
    assert stale(tmp_path) == sorted(PAGES)
    assert [p.name for p in write(tmp_path / "docs")] == list(PAGES)
    assert stale(tmp_path / "docs") == []
    text = (tmp_path / "docs" / "ops.md").read_text(encoding="utf-8")
    assert all(f"## {name}(" in text for name, op in Op.registry.items() if op.__module__.startswith("quantlib.ops."))


def test_adding_a_network_as_documented(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo._registry, "_NETWORKS", dict(zoo._registry._NETWORKS))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    page = tmp_path / "documented_network.py"
    page.write_text("".join(blocks(root / "docs" / "add_a_network.md", "python")), encoding="utf-8")
    run_file(page)
    assert "tiny_digits" in zoo.names()
    card, model = zoo.card("tiny_digits"), zoo.get("tiny_digits")
    assert sum(p.numel() for p in model.parameters()) == card.parameters
    assert "frames/s" in capsys.readouterr().out


def test_adding_an_op_as_documented(root: Path, tmp_path: Path) -> None:
    (python,), (kernel,) = (blocks(root / "docs" / "add_an_op.md", language) for language in ("python", "cpp"))
    (tmp_path / "distance.py").write_text(python, encoding="utf-8")
    (tmp_path / "distance.hpp").write_text(kernel, encoding="utf-8")
    try:
        module = run_file(tmp_path / "distance.py")
        for op, types in module.Distance.examples():
            y = op.infer(*types)
            codes = torch.randint(types[0].levels, (50, *types[0].shape)) * types[0].step + types[0].lo
            centre = torch.tensor(op.centre).reshape(-1, *[1] * (len(y.shape) - 1))
            values = op.evaluate(codes)
            assert torch.equal(values, (codes - centre).abs())
            assert y.lo <= int(values.min()) and int(values.max()) <= y.hi
            assert op.cost(types, y, Folding()).cycles == op.hls(types, y, Folding()).iterations == y.numel
        (tmp_path / "distance.hpp").unlink()
        del Op.registry["Distance"]
        with pytest.raises(TypeError, match="op Distance lacks its kernel distance.hpp"):
            run_file(tmp_path / "distance.py")
    finally:
        Op.registry.pop("Distance", None)
        sys.modules.pop("distance", None)
