"""docs/analysis.md: its code runs, and its tables are what the library computes."""

from __future__ import annotations

import doctest
import re
import runpy
from pathlib import Path

import pytest

import zoo
from quantlib.analysis import counting, micronet, systolic, systolic_latency
from quantlib.analysis.systolic import speedups


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "analysis.md").read_text(encoding="utf-8")


def table(page: str, head: str) -> list[list[str]]:
    """Cells of the rows below a header line that begins with `head`."""
    lines = page[page.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_its_code_runs(page, capsys, tmp_path):
    (tmp_path / "page.py").write_text("".join(re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)), encoding="utf-8")
    runpy.run_path(str(tmp_path / "page.py"))
    assert "total" in capsys.readouterr().out


@pytest.mark.parametrize("module", [counting, micronet, systolic])
def test_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_links_and_files_exist(page, root):
    assert all((root / "docs" / link).exists() for link in re.findall(r"\]\(([^)#]+)\)", page))
    assert all((root / name).exists() for name in re.findall(r"recipes/\w+\.py", page))


def test_its_cycles(page):
    rows = table(page, "| network | pointwise")
    base = systolic_latency(zoo.get(rows[0][0]), (3, 224, 224))
    for name, *cells in rows:
        found = systolic_latency(zoo.get(name), (3, 224, 224), array="fuse")
        cycles = [f"{n:,}" for n in (found.pointwise, found.depthwise, found.other, found.cycles)]
        assert cells == [*cycles, f"{speedups({name: found}, base)[name]:.3f}"]
