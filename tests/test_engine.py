"""The packed engine equals `evaluate` in every integer, with both bodies; its cache, its fallbacks, and what it says about itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import quantlib as ql
from quantlib import engine, ops
from quantlib.engine import build, lines
from quantlib.engine.program import KINDS, translate
from quantlib.evaluator import engine as which
from quantlib.evaluator import execute
from quantlib.ir import Decode, Graph, IntType, Node
from quantlib.ops import Op

BODIES = ("native", "portable")
CASES = [(name, i) for name in sorted(set(Op.registry) - {"Input"}) for i in range(len(Op.registry[name].examples()))]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    for body in BODIES:
        try:
            build.library(body)
        except build.Unavailable as reason:
            pytest.skip(f"the engine does not compile here: {reason}")


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("QUANTLIB_ENGINE", request.param)
    yield request.param


class Net:
    """A graph under construction; every edge is read at the end, so every edge is compared."""

    def __init__(self, shape: tuple[int, ...], lo: int, hi: int, step: int = 1) -> None:
        op = ops.Input(shape, lo, hi, step)
        self.nodes = [Node("input", op, (), op.infer())]

    def type(self, name: str) -> IntType:
        return next(n.type for n in self.nodes if n.name == name)

    def add(self, op: Op, *inputs: str) -> str:
        name = f"{type(op).__name__.lower()}{len(self.nodes)}"
        inputs = inputs or (self.nodes[-1].name,)
        self.nodes.append(Node(name, op, inputs, op.infer(*map(self.type, inputs))))
        return name

    def graph(self) -> Graph:
        last = self.nodes[-1]
        return Graph(tuple(self.nodes), (Decode((last.name,), (np.ones(1),), np.zeros(1), last.type.shape),))


def lattice(x: IntType, images: int, seed: int) -> np.ndarray:
    """All lo, all hi, a chessboard of both, then random codes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, x.levels, (images, *x.shape))
    codes[0], codes[1] = 0, x.levels - 1
    codes[2] = rng.integers(0, 2, x.shape) * (x.levels - 1)
    return codes * x.step + x.lo


def assert_equal(graph: Graph, x: np.ndarray) -> None:
    """Every edge, from a program that keeps them all and from one that keeps only the outputs."""
    codes = torch.from_numpy(x)
    want = {graph.input.name: codes}
    for node in graph.nodes[1:]:
        want[node.name] = node.op.evaluate(*(want[i] for i in node.inputs))
    got = engine.execute(graph, codes, want)
    assert got is not None, engine.describe(graph)
    for node in graph:
        assert got[node.name].dtype == torch.int64
        differ = int((got[node.name] != want[node.name]).sum())
        assert not differ, f"{node.name}: {differ} integers differ"
    short = engine.execute(graph, codes, graph.outputs)
    assert short is not None and list(short) == list(graph.outputs)
    assert all(torch.equal(v, want[k]) for k, v in short.items())


def example(name: str, i: int) -> tuple[Graph, np.ndarray]:
    """An op's example as a network; several inputs are cut out of one flat input and clamped into their intervals."""
    op, types = Op.registry[name].examples()[i]
    images = 7
    x = np.concatenate([lattice(t, images, 9 * k).reshape(images, -1) for k, t in enumerate(types)], 1)
    if len(types) == 1:
        net = Net(types[0].shape, types[0].lo, types[0].hi, types[0].step)
        net.add(op)
        return net.graph(), x.reshape(images, *types[0].shape)
    net = Net(x.shape[1:], min(t.lo for t in types), max(t.hi for t in types))
    start, inputs = 0, []
    for t in types:
        name = net.add(ops.Rearrange(np.arange(start, start + t.numel).reshape(t.shape)), "input")
        name = net.add(ops.Requant(np.ones(1), np.zeros(1), 0, t.lo, t.hi), name)
        if t.step > 1:
            name = net.add(ops.Lut(t.lo + np.arange(t.hi - t.lo + 1)[None] // t.step * t.step, t.lo, 1, t.step), name)
        inputs.append(name)
        start += t.numel
    net.add(op, *inputs)
    return net.graph(), x


@pytest.mark.parametrize(("name", "i"), CASES)
def test_examples_of_every_op(name: str, i: int, body: str) -> None:
    assert_equal(*example(name, i))


def signs(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return 2 * rng.integers(0, 2, shape) - 1


INTERVALS = {
    "sign": (-1, 1, 2), "two bits": (-3, 3, 2), "unsigned": (0, 3, 1), "byte": (0, 255, 1), "int8": (-128, 127, 1), "one": (1, 1, 1),
    "int10": (-400, 500, 1), "int16": (-32768, 32767, 1), "int24": (-(2**23), 2**23, 1), "int40": (-(2**39), 2**39, 1), "above": (5, 9, 1),
}  # fmt: skip


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("seed", range(4))
def test_convolutions_of_any_geometry(interval: str, seed: int, body: str) -> None:
    """Signs, bytes, 16 bits and beyond; strides, dilation, one-sided padding, groups, depthwise; channels that fill no byte or block."""
    rng = np.random.default_rng([seed, *map(ord, interval)])
    lo, hi, step = INTERVALS[interval]
    groups = int(rng.choice([1, 1, 2, 3]))
    per_group, outputs = int(rng.choice([1, 3, 8, 16, 20, 64])), int(rng.choice([1, 5, 16, 17, 40, 64]))
    kernel = rng.integers(1, 4, 2)
    stride, dilation, padding = tuple(rng.integers(1, 3, 2)), tuple(rng.integers(1, 3, 2)), tuple(rng.integers(0, 3, 4))
    most = {"byte": 128, "int8": 127, "int16": 40000}.get(interval, 3)
    shape = (outputs * groups, per_group, *kernel)
    weights = [signs(rng, *shape), rng.integers(-most, most + 1, shape)]
    for weight in weights[: 1 if interval == "int40" else 2]:
        net = Net((per_group * groups, 8, 7), lo, hi, step)
        net.add(ops.Conv2d(weight, stride, padding, dilation, groups))
        net.add(ops.Conv2d(rng.integers(-2, 3, (shape[0], 1, 2, 2)), groups=shape[0]))  # depthwise
        assert_equal(net.graph(), lattice(net.nodes[0].type, 3, seed))


@pytest.mark.parametrize(("most", "taps", "kind"), [(127, (64, 65), "DEPTH16"), (128, (64, 64), "DEPTH32")])
@pytest.mark.parametrize("sign", [1, -1])
def test_depthwise_sums_up_to_the_end_of_int16(most: int, taps: tuple[int, int], kind: str, sign: int, body: str) -> None:
    """Sums of 4 taps up to 127 * 258 or 128 * 256 in the first and the last channel: 70 channels are two whole blocks and a part."""
    weight = np.random.default_rng(most).integers(-60, 61, (70, 1, 2, 2))
    weight[[0, -1]] = sign * np.array(taps)
    net = Net((70, 9, 8), -most, most)
    net.add(ops.Conv2d(weight, padding=(1, 0, 1, 1), groups=70))
    graph = net.graph()
    records = translate(graph, graph.outputs, build.library(body)).words
    assert KINDS.index(kind) in kinds(records)
    assert_equal(graph, lattice(graph.input.type, 4, most))


def kinds(words: np.ndarray) -> list[int]:
    """The kind of every record of a program."""
    found, at = [], 0
    while at < len(words):
        found.append(int(words[at]))
        at += int(words[at + 1])
    return found


@pytest.mark.parametrize("seed", range(6))
def test_gated_convolutions_of_any_geometry(seed: int, body: str) -> None:
    rng = np.random.default_rng(seed)
    groups, per_group, outputs = int(rng.choice([1, 2])), int(rng.choice([3, 8, 16, 32, 72])), int(rng.choice([5, 16, 33]))
    shape = (outputs * groups, per_group, *rng.integers(1, 4, 2))
    merge = [None, ops.FixedMerge(), ops.FixedMerge(-3, 5, 16, 12, -(2**28), 2**27)][seed % 3]
    net = Net((per_group * groups, 9, 6), -3, 3, 2)
    gate = rng.integers(-9, 9, shape[0])
    gate[0], gate[-1] = -(2**40), 2**40
    stride, padding = tuple(rng.integers(1, 3, 2)), tuple(rng.integers(0, 3, 4))
    net.add(ops.FractionalConv2d(signs(rng, *shape), gate, stride, padding, groups, merge))
    assert_equal(net.graph(), lattice(net.nodes[0].type, 3, seed))


@pytest.mark.parametrize("bits", [12, 31, 33, 61])
def test_elementwise_chains_up_to_62_bits(bits: int, body: str) -> None:
    """Groups of int32 and of int64 slots, wide products of narrow codes, thresholds beyond the interval, many levels, unused edges."""
    rng = np.random.default_rng(bits)
    c, most = 5, 2**bits // 5
    net = Net((c, 3, 7), -(2 ** (bits // 2)), 2 ** (bits // 2))
    half = 2 ** (bits - bits // 2 - 3)

    def factor(n: int) -> np.ndarray:
        return rng.integers(-half, half + 1, n)

    def term(n: int) -> np.ndarray:
        return rng.integers(-most, most, n)

    a = net.add(ops.Requant(factor(c), term(c), bits // 3, -(2 ** (bits // 2)), 2 ** (bits // 2)))
    kinked = ops.Requant(factor(1), term(c), bits // 4, -(2**bits), 2**bits - 1, rng.integers(-99, 99, c), factor(c), term(1))
    b = net.add(kinked, "input")
    both = net.add(ops.Add(), a, b)
    net.add(ops.Requant(np.array([3]), np.array([-1]), 45, -2, 2), "input")
    levels = {1: both, 4: both, 15: b, 40: both}
    rows = {n: np.sort(rng.integers(-(2**bits), 2**bits, (c, n)), 1) for n in levels}
    ends = [net.add(ops.Threshold(rows[n], signs(rng, c), -7, 3), x) for n, x in levels.items()]
    net.add(ops.Threshold(np.sort(rng.integers(-(2**62), 2**62, (1, 2)), 1), signs(rng, c), 0), a)
    net.add(ops.Lut(rng.integers(-most, most, (c, 13)), -7), ends[1])
    net.add(ops.Concat(), both, ends[0], a)
    assert_equal(net.graph(), lattice(net.nodes[0].type, 4, bits))


def rounded(rng: np.random.Generator, channels: int, levels: int, reach: int) -> np.ndarray:
    """Thresholds of codes round(a*n + b), slopes of every size; a few rows lie far off, at one point, or on no line."""
    step, first = reach / 2 ** rng.uniform(0, 9, (channels, 1)), rng.uniform(-reach, reach, (channels, 1))
    t = np.ceil(first + step * np.arange(levels) / levels).astype(np.int64)
    t[0], t[1], t[2] = t[0, 0], reach + 5, -reach - 5
    return t


def counted(found: lines.Lines, n: np.ndarray, lo: int, levels: int) -> np.ndarray:
    """What the kernel computes at the points n (P, 1)."""
    wrapped = (np.clip(n, found.low, found.high) * found.mul + found.add).astype(np.int32)
    return np.clip(wrapped >> found.shift, lo, lo + levels)


@pytest.mark.parametrize("lo", [0, -8, -(2**20), 1000])
@pytest.mark.parametrize("levels", [4, 15, 31, 255])
def test_lines_through_thresholds_hold_at_every_point(lo: int, levels: int) -> None:
    rng = np.random.default_rng([levels, abs(lo)])
    span = (-700, 900)
    t, sign = rounded(rng, 40, levels, 900), signs(rng, 40)
    t[3:6] = np.sort(rng.integers(-800, 1000, (3, levels)), 1)  # no line, but for luck
    found = lines.through(t, sign, lo, span)
    assert found.proven[:3].all() and (abs(lo) > 1000 or found.proven[6:].all())  # a far code leaves few bits to the slope
    n = np.arange(span[0], span[1] + 1)[:, None]
    want = lo + (sign * n >= t.T[:, None]).sum(0)
    got = counted(found, n, lo, levels)
    assert np.array_equal(got[:, found.proven], want[:, found.proven])


def test_lines_of_the_widest_interval() -> None:
    span = (-(2**31), 2**31 - 2)
    t = np.array([[-(2**62), -(2**31), 0, 2**31 - 2, 2**62], [5, 5, 5, 5, 5], [-(2**31) + 1, -(2**30), 0, 2**30, 2**31 - 2]])
    for sign in (np.ones(3, dtype=np.int64), -np.ones(3, dtype=np.int64)):
        found = lines.through(t, sign, -2, span)
        n = np.unique(np.clip(np.concatenate([t.ravel() + d for d in (-1, 0, 1)] + [-t.ravel() + d for d in (-1, 0, 1)]), *span))[:, None]
        want = -2 + (sign * n >= t.T[:, None]).sum(0)
        got = counted(found, n, -2, 5)
        assert found.proven[1] and np.array_equal(got[:, found.proven], want[:, found.proven])


@pytest.mark.parametrize("levels", [4, 15, 31, 100])
@pytest.mark.parametrize("channels", [1, 30])
def test_thresholds_on_lines_and_beside_them(channels: int, levels: int, body: str) -> None:
    rng = np.random.default_rng([levels, channels])
    net = Net((30, 12, 5), -1500, 2000)
    t = rounded(rng, max(channels, 3), levels, 1800)[-channels:]
    if channels > 1:
        t[7] = np.sort(rng.integers(-1500, 2000, levels))  # no line: mended
    net.add(ops.Threshold(t, signs(rng, 30), -9), "input")
    net.add(ops.Threshold(t, signs(rng, 1), 7, 2), "input")
    net.add(ops.Threshold(np.sort(rng.integers(-1500, 2000, (30, levels)), 1), signs(rng, 30), 0), "input")
    assert_equal(net.graph(), lattice(net.nodes[0].type, 4, levels))


def cnv(seed: int = 0, channels: tuple[int, ...] = (16, 16, 32, 32)) -> Graph:
    """A small network of 2-bit weights and activations: convolutions, thresholds, pools and dense layers."""
    rng = np.random.default_rng(seed)
    net, previous = Net((3, 20, 20), -128, 127), 3
    for k, n in enumerate(channels):
        net.add(ops.Conv2d(rng.integers(-1, 2, (n, previous, 3, 3))))
        net.add(ops.Threshold(np.sort(rng.integers(-60, 60, (n, 3)), 1), signs(rng, n), 0))
        if k == 1:
            net.add(ops.MaxPool((2, 2), (2, 2)))
        previous = n
    for n in (64, 10):
        net.add(ops.Dense(rng.integers(-1, 2, (n, net.nodes[-1].type.numel))))
        if n > 10:
            net.add(ops.Threshold(np.sort(rng.integers(-30, 30, (1, 3)), 1), np.array([1]), -3, 2))
    return net.graph()


def test_a_network_on_several_threads_and_callers(body: str) -> None:
    graph = cnv()
    x = lattice(graph.input.type, 9, 1)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert_equal(graph, x)
    finally:
        torch.set_num_threads(threads)
    codes, want, seen = torch.from_numpy(x), ql.run(graph, x), []
    callers = [threading.Thread(target=lambda: seen.append(torch.equal(ql.run(graph, codes), want))) for _ in range(4)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert seen == [True] * 4


def test_fracbnn_equals_the_torch_carriers(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = pytest.importorskip("zoo")
    graph = ql.convert(zoo.get("fracbnn_digits").eval(), zoo.card("fracbnn_digits").input_shape)
    x = torch.from_numpy(lattice(graph.input.type, 5, 0))
    edges = [n.name for n in graph]
    got = execute(graph, x, edges)
    assert which(graph).startswith("packed, C++")
    monkeypatch.setenv("QUANTLIB_ENGINE", "torch")
    want = execute(graph, x, edges)
    assert which(graph).startswith("torch") and "QUANTLIB_ENGINE" in which(graph)
    assert all(torch.equal(got[k], want[k]) for k in edges)


# ---------------------------------------------------------------- where it cannot run


def test_an_op_without_a_kernel_leaves_the_graph_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = cnv(3)
    monkeypatch.setattr("quantlib.engine.convolution.emit", lambda b, node: False)
    assert engine.execute(graph, torch.from_numpy(lattice(graph.input.type, 3, 0)), graph.outputs) is None
    assert "no kernel for Conv2d" in which(graph)


def test_run_uses_the_engine_for_codes_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = cnv()
    codes = torch.from_numpy(lattice(graph.input.type, 3, 0))
    names = [graph.outputs[0], graph.input.name]
    got = engine.execute(graph, codes, names)
    assert got is not None and list(got) == names
    assert engine.execute(graph, codes * 2, names) is None
    assert engine.execute(graph, codes.int(), names) is None
    monkeypatch.setattr(ops.Dense, "evaluate", lambda op, x: 1 / 0)
    assert torch.equal(ql.run(graph, codes, integers=True)[names[0]], got[names[0]])


def test_unknown_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLIB_ENGINE", "fast")
    with pytest.raises(ValueError, match="native, portable, torch"):
        ql.run(cnv(), lattice(cnv().input.type, 3, 0))


@pytest.mark.parametrize(
    ("compiler", "reason"), [(None, "no g"), ("exit 3", "fails"), ('[ "$1" = --version ] || { echo broken >&2; exit 1; }', "broken")]
)
def test_without_a_working_compiler_torch_runs(compiler: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = cnv()
    x = lattice(graph.input.type, 3, 0)
    want = ql.run(graph, x)
    if compiler is not None:
        (tmp_path / "g++").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "g++").chmod(0o755)
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("QUANTLIB_CACHE", str(tmp_path / "cache"))
    assert torch.equal(ql.run(graph, x), want)
    assert which(graph).startswith("torch") and reason in which(graph)
    assert not list(tmp_path.glob("cache/*.so")) and not list(tmp_path.glob("cache/*.tmp"))


def test_an_unusable_cache_leaves_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv("QUANTLIB_CACHE", str(tmp_path / "cache"))
    assert "cache" in which(cnv())
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_compiled", lambda body: tmp_path / "cache")
    assert which(cnv()).startswith("torch")


def test_two_processes_compile_once(tmp_path: Path, root: Path) -> None:
    code = "from quantlib.engine import build; print(build.library('portable').path.name)"
    env = {**os.environ, "QUANTLIB_CACHE": str(tmp_path), "PYTHONPATH": str(root)}
    jobs = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = {job.communicate()[0].strip() for job in jobs}
    assert [job.returncode for job in jobs] == [0, 0]
    assert names == {p.name for p in tmp_path.glob("*.so")} and len(names) == 1
    assert not list(tmp_path.glob("*.tmp"))
