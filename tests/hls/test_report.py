"""What an exported project says of itself: README.md and report.html against plan, netlist and Makefile."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

import quantlib as ql
from quantlib import pages
from quantlib.hls import project
from quantlib.parts import RESOURCES


class Reader(HTMLParser):
    """Text of every element by tag, and whether the tags close; svg's own are closed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: dict[str, list[str]] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(v) for k, v in attrs if k in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append(str(dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.found.setdefault(self.open[-1] if self.open else "", []).append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open and not reader.links
    return reader


@pytest.fixture(scope="module")
def planned(nets: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[project.Project, ql.Plan]:
    graph, _ = nets.residual()
    plan = ql.estimate(graph, "ZCU104")
    return ql.export(graph, tmp_path_factory.mktemp("report") / "p", plan=plan), plan


def test_report_shows_the_plan_and_needs_nothing_else(planned: tuple[project.Project, ql.Plan]) -> None:
    made, plan = planned
    text = (made.folder / "report.html").read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    page = read(text)
    cells = page.found["td"]
    at = cells.index(plan.rows[0].name)
    width = 5 + len(RESOURCES)
    for k, row in enumerate(plan.rows):
        mine = cells[at + k * width : at + (k + 1) * width] if row.depths else None
        if mine is None:  # the input has no FIFO in front of it: an empty cell
            at -= 1
            continue
        assert mine[:2] == [row.name, row.op] and mine[3] == "+".join(map(str, row.depths)) and mine[4] == f"{row.cost.cycles:,}"
        assert mine[5:] == [f"{getattr(row.cost, r):,}" for r in RESOURCES]
    bars = page.found["text"]
    assert all(bars[bars.index(row.name) + 1] == f"{row.cost.cycles:,}" for row in plan.rows)
    used = plan.total.lut
    assert f"{100 * used / plan.part.budget()['lut']:.0f} % ({used:,} of {plan.part.budget()['lut']:,})" in bars
    deep = {w.name: w for w in made.net.wires if w.depth > 32}
    assert deep and all(name in cells and f"{w.depth:,}" == cells[cells.index(name) + 1] for name, w in deep.items())
    assert f"{plan.bottleneck} (" in text and "sets the pace of all" in text


def test_readme_names_what_is_there(planned: tuple[project.Project, ql.Plan], nets: ModuleType, tmp_path: Path) -> None:
    made, plan = planned
    text, makefile = (made.folder / "README.md").read_text(), (made.folder / "Makefile").read_text()
    targets = set(re.findall(r"`make (\w+)", text))
    assert targets == {"csim", "sanitize", "optimized", "strict", "hls", "bitstream"}
    assert all(re.search(rf"^{t}:", makefile, re.M) for t in targets)
    for name in re.findall(r"`((?:src|include|params|golden)/[\w.]*|\w+\.(?:tcl|py|json|html))`", text):
        assert (made.folder / name).exists(), name
    for row in plan.rows[1:]:
        assert re.search(rf"^\| {row.name} \| {row.op} \|.*\| [\d,]+ \|$", text, re.M)
    assert f"| frames per second | {plan.fps:,.1f} |" in text and "BOARD=..., here ZCU104" in text
    assert "| in | x | 4 x 12 x 12, 0..3 | uint8 | 72 |" in text
    graph, folding = nets.small()
    bare = project.write(graph, tmp_path / "bare", folding)  # without a plan there are no figures
    assert not (bare.folder / "report.html").exists() and "Figures of the plan" not in (bare.folder / "README.md").read_text()
    card = project.write(graph, tmp_path / "card", folding, part="xcu50-fsvh2104-2-e")
    said = (card.folder / "README.md").read_text()
    assert "kernel.tcl" in said and "--bitstream build/network.xclbin" in said and "bitstream.tcl" not in said


def test_a_plan_that_does_not_fit_says_what_is_missing(nets: ModuleType, tmp_path: Path) -> None:
    graph, _ = nets.residual()
    plan = ql.estimate(graph, "xc7z010", fps=1e9)
    assert not plan.fits
    made = ql.export(graph, tmp_path / "p", plan=plan)
    for name in ("README.md", "report.html"):
        assert "This plan does not fit: it lacks " in (made.folder / name).read_text()


def test_bars() -> None:
    page = read(pages.bars([("a<b", 50.0, "50 %"), ("over", 200.0, "200 %")], "a<b", 100.0))
    assert page.found["text"] == ["a<b", "50 %", "over", "200 %"]
    widths = [re.search(r"'width': '([\d.]+)'", r) for r in page.found["rect"]]
    assert [float(m.group(1)) for m in widths if m] == [105.0, 420.0] and "line" in page.found
    assert read(pages.bars([])).open == []
