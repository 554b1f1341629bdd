"""Weights from memory: what lies there, equal results in every mode and through both tops, cycles as the bus allows, refusals."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantlib as ql
from quantlib.hls import project
from quantlib.hls.call import Port
from quantlib.hls.netlist import Feed, Wire
from quantlib.ir import GraphError
from quantlib.schedule import Folding, Schedule


def fields(words: np.ndarray, bits: int, lanes: int, rows: int) -> list[list[int]]:
    """The rows read back as the kernel does: whole weights in a word, lowest first; several rows in one, or a row over several."""
    per, found = 64 // bits, []
    for r in range(rows):
        row = []
        for p in range(lanes):
            if lanes <= per:
                word, place = r // (per // lanes), r % (per // lanes) * lanes + p
            else:
                word, place = r * -(-lanes // per) + p // per, p % per
            row.append(int(words[word]) >> place * bits & 2**bits - 1)
        found.append(row)
    return found


@given(st.integers(1, 64), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32))
@settings(max_examples=150)
def test_region_holds_the_rows(bits: int, lanes: int, rows: int, seed: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = np.random.default_rng(seed).integers(low, high, (rows, lanes), endpoint=True)
    feed = Feed("w", "n", rows, 3, bits, Wire("s", "s", Port(f"ap_int<{bits}>", lanes, rows * 3)), lambda: values)
    words = feed.packed()
    assert words.shape == (feed.bus_words,) and words.dtype == np.uint64
    assert fields(words, bits, lanes, rows) == (values & (2**bits - 1)).tolist() if bits < 64 else fields(words, bits, lanes, rows)
    # a whole number of words per row, or of rows per word: never more than a word per weight, nor fewer bits than there are
    assert rows * lanes * bits <= 64 * feed.bus_words <= 64 * rows * lanes
    assert feed.iterations == 3 * rows * max(1, -(-lanes // (64 // bits)))


def layouts() -> list[dict[str, Folding]]:
    """Several rows per word, a row per word, several words per row; one layer or both."""
    return [
        {"conv": Folding(4, 3, "stream"), "fc": Folding(5, 16, "stream")},
        {"conv": Folding(1, 1, "stream"), "fc": Folding(1, 1, "stream")},
        {"conv": Folding(8, 3, "bram"), "fc": Folding(2, 10, "stream")},
        {"conv": Folding(8, 3, "stream", 9), "fc": Folding(5, 8, "lut")},
    ]


@pytest.mark.parametrize("number", range(4))
def test_results_are_equal_in_every_mode(nets: ModuleType, tmp_path: Path, number: int) -> None:
    graph, folding = nets.small()
    folding |= layouts()[number]
    made = project.write(graph, tmp_path / "p", folding)
    assert {f.node for f in made.net.feeds} == {n for n, f in layouts()[number].items() if f.memory == "stream"}
    x = nets.codes(graph, 3)
    want = nets.definition(graph, x)
    for mode in project.MODES if number == 0 else ("timed",):
        got = made.csim(x, mode=mode, integers=True)
        assert all(torch.equal(got[k], want[k]) for k in want), mode
    assert made.last is not None
    for f in made.net.feeds:
        assert made.last.iterations[f"fetch_{f.name}"] == f.iterations
        assert not (made.folder / "params" / f"{f.node}_weight.h").exists()
    if number == 0:
        (made.folder / "params" / "conv_weights.bin").write_bytes(b"short")
        with pytest.raises(project.ExportError, match="a parameter file is missing"):
            project.Project(graph, made.folder, made.net).csim(x)


def test_test_bench_feeds_both_tops(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.small()
    made = project.write(graph, tmp_path / "p", folding | layouts()[0])
    done = subprocess.run(["make", "csim", "CXXFLAGS=-O0 -Wall -Wextra -Werror"], cwd=made.folder, capture_output=True, text=True)
    assert done.returncode == 0 and "every integer equal" in done.stdout, done.stderr
    path = made.folder / "params" / "fc_weights.bin"
    path.write_bytes(path.read_bytes()[:-1])
    short = subprocess.run(["make", "csim", "CXXFLAGS=-O0"], cwd=made.folder, capture_output=True, text=True)
    assert short.returncode != 0 and "fc_weights.bin is missing or too short in params" in short.stdout


def test_cost_counts_bus_words_and_no_memory(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.small()
    plans = {}
    for style in ("bram", "stream"):
        foldings = {**folding, "conv": Folding(8, 3, style, 3), "fc": Folding(5, 16, style)}
        plans[style] = ql.estimate(graph, "xczu3eg", schedule=Schedule.of(graph, foldings))
    rows = {style: {r.name: r.cost for r in plan.rows} for style, plan in plans.items()}
    assert rows["stream"]["fc"].bram18 == 0 < rows["bram"]["fc"].bram18
    made = ql.export(graph, tmp_path / "p", plan=plans["stream"])
    for f in made.net.feeds:
        own = max(s.iterations for s in made.net.stages if s.node == f.node)
        assert rows["stream"][f.node].cycles == max(own, f.iterations) and rows["bram"][f.node].cycles == own
        assert f.iterations > own  # 3-bit weights, 72 and 80 lanes: 4 words per row
    made.csim(nets.codes(graph, 5), mode="timed")
    assert made.last is not None and made.last.cycles == plans["stream"].cycles == rows["stream"]["conv"].cycles
    words = sum(f.bus_words * f.replay for f in made.net.feeds)
    assert f"Together {words / plans['stream'].cycles:.2f} words of 64 bits per cycle" in (made.folder / "report.html").read_text()
    assert "| fc | params/fc_weights.bin | 80 | 80 |" in (made.folder / "README.md").read_text()
    text = (made.folder / "src" / "network.hpp").read_text()
    assert f"pe 8, simd 3, taps 3, weights from memory; {plans['stream'].cycles:,} cycles" in text


def test_weights_of_plus_and_minus_one(nets: ModuleType, tmp_path: Path) -> None:
    net = nets.Net(nets.Input((40, 3, 3), -1, 1))
    net.add("conv", nets.Conv2d(2 * net.rng.integers(0, 2, (6, 40, 3, 3)) - 1, padding=(1, 1, 1, 1)), "x")
    graph = net.graph("conv")
    plan = ql.estimate(graph, schedule=Schedule.of(graph, {"conv": Folding(3, 40, "stream")}))
    made = ql.export(graph, tmp_path / "p", plan=plan)
    (feed,) = made.net.feeds
    assert feed.bits == 2 and feed.words == 4 and plan.cycles == feed.iterations == 9 * 2 * 9 * 4
    x = nets.codes(graph, 2)
    assert torch.equal(made.csim(x, integers=True)["conv"], nets.definition(graph, x)["conv"])


def test_what_cannot_be_streamed_is_refused(nets: ModuleType, tmp_path: Path) -> None:
    graph, folding = nets.everything()
    for node in ("dw", "frac", "a"):
        with pytest.raises(
            ValueError, match=f"{node} .*memory style stream is for the weights of a Dense or a Conv2d that is not depthwise"
        ):
            Schedule.of(graph, {node: Folding(memory="stream")})
        with pytest.raises(GraphError, match="memory style stream is "):
            project.write(graph, tmp_path / "p", {**folding, node: Folding(memory="stream")})
    with pytest.raises(ValueError, match="memory style stream goes with no packing, dsp48e2 was asked for"):
        Schedule.of(graph, {"c1": Folding(memory="stream", packing="dsp48e2")})
    assert not any(tmp_path.iterdir())
