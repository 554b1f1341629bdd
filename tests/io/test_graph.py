"""Graph files: save then load is the identity for every op and for whole graphs, and every damaged or foreign file is refused by name."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from quantlib.io.graph import FORMAT, GraphFileError, _digest, load, save
from quantlib.ir import Decode, Front, Graph, GraphError, IntType, Node
from quantlib.ops import Add, Conv2d, FixedMerge, FractionalConv2d, Input, Op, Requant, Threshold

EXAMPLES = [(name, i) for name, op in sorted(Op.registry.items()) for i in range(len(op.examples()))]


def assert_same(a: Any, b: Any, where: str = "graph") -> None:
    """Equal type, value, dtype, shape, all the way down."""
    if isinstance(a, (np.ndarray, np.floating)):
        assert isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape, where
        assert np.array_equal(a, b), where
    elif is_dataclass(a) and not isinstance(a, type):
        assert type(a) is type(b), where
        for f in fields(a):
            assert_same(getattr(a, f.name), getattr(b, f.name), f"{where}.{f.name}")
    elif isinstance(a, tuple):
        assert isinstance(b, tuple) and len(a) == len(b), where
        for i, (u, v) in enumerate(zip(a, b, strict=True)):
            assert_same(u, v, f"{where}[{i}]")
    else:
        assert type(a) is type(b) and a == b, where


def around(op: Op, types: tuple[IntType, ...]) -> Graph:
    """A graph that holds `op` on edges like `types`: one input, and a node that stands in for a branch for every further one."""
    nodes: list[Node] = []
    if type(op) is Input:
        return Graph((Node("x", op, (), op.infer()),), (Decode(("x",), (np.ones(()),), np.zeros(()), op.infer().shape),))
    nodes.append(Node("x", Input(types[0].shape, types[0].lo, types[0].hi, types[0].step), (), types[0]))
    for i, t in enumerate(types[1:], 1):
        nodes.append(Node(f"x{i}", Stand(t.shape, t.lo, t.hi, t.step), ("x",), t))
    y = op.infer(*types)
    nodes.append(Node("y", op, tuple(n.name for n in nodes), y, "model.layer"))
    return Graph(tuple(nodes), (Decode(("y",), (np.full((), 0.5),), np.zeros((1,)), y.shape),), name="around")


class Stand:
    """Replaced below: an op of the test that makes any edge out of any other, so that graphs with several inputs can be built."""


@pytest.fixture(scope="module", autouse=True)
def stand(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = tmp_path_factory.mktemp("op") / "stand.py"
    source.with_suffix(".hpp").write_text("#pragma once\n")
    source.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from quantlib.ir import IntType\n"
        "from quantlib.ops._base import Op\n"
        "@dataclass(frozen=True, eq=False)\n"
        "class Stand(Op):\n"
        "    '''any edge -> an edge of the stated type'''\n"
        "    shape: tuple[int, ...]\n"
        "    lo: int\n"
        "    hi: int\n"
        "    step: int = 1\n"
        "    def infer(self, *x): return IntType(self.shape, self.lo, self.hi, 1.0, self.step)\n"
        "    def evaluate(self, *x): raise NotImplementedError\n"
        "    def magnitude(self, *x): return 1\n"
        "    def hls(self, x, y, folding): raise NotImplementedError\n"
        "    def cost(self, x, y, folding): raise NotImplementedError\n"
        "    @classmethod\n"
        "    def examples(cls): return []\n"
    )
    spec = importlib.util.spec_from_file_location("stand", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stand"] = module
    spec.loader.exec_module(module)
    globals()["Stand"] = module.Stand
    yield module.Stand
    del Op.registry["Stand"], sys.modules["stand"]


def network() -> Graph:
    """Padding, groups, a negative sign, a per-channel scale, a merge, a two-branch requant, a join by addition, two decodes and a front."""
    rng = np.random.default_rng(7)
    x = IntType((3, 6, 6), 0, 255, 1 / 255)
    conv = Conv2d(rng.integers(-3, 4, (4, 3, 3, 3)), padding=(1, 1, 1, 1))
    c = conv.infer(x).with_scale(rng.random((4, 1, 1)) + 0.1)
    act = Threshold(np.sort(rng.integers(-500, 500, (4, 3)), 1), np.array([1, -1, 1, 1]), lo=-3, step=2)
    a = act.infer(c)
    fraction = FractionalConv2d(rng.choice([-1, 1], (4, 4, 3, 3)), rng.integers(-5, 5, 4), padding=(1, 1, 1, 1), merge=FixedMerge())
    f = fraction.infer(a)
    requant = Requant(np.array([3]), np.array([-(2**33)]), 4, -128, 127, kink=np.array([5]), mul2=np.array([7]), add2=np.array([2**40]))
    r = requant.infer(f)
    nodes = (
        Node("x", Input((3, 6, 6), 0, 255), (), x),
        Node("conv", conv, ("x",), c, "features.0"),
        Node("act", act, ("conv",), a, "features.1"),
        Node("fraction", fraction, ("act",), f, "features.2"),
        Node("requant", requant, ("fraction",), r),
        Node("sum", Add(), ("requant", "requant"), Add().infer(r, r)),
    )
    decodes = (
        Decode(("sum",), (rng.random((4, 1, 1)),), rng.random((4, 1, 1)), (4, 6, 6)),
        Decode(("act", "requant"), (np.float64(0.25) * np.ones(()), rng.random(())), np.zeros(()), (144,)),
    )
    front = Front(np.sort(rng.random((3, 255)), 1).astype(np.float32), np.ones(3))
    return Graph(nodes, decodes, front, name="netz_ü", single_output=False)


@pytest.mark.parametrize(("name", "i"), EXAMPLES)
def test_every_op_comes_back(name: str, i: int, tmp_path: Path) -> None:
    graph = around(*Op.registry[name].examples()[i])
    save(graph, tmp_path / "g")
    assert_same(graph, load(tmp_path / "g"))


def test_a_network_comes_back_with_decodes_front_and_names(tmp_path: Path) -> None:
    graph = network()
    save(graph, tmp_path / "g.ql")
    again = load(tmp_path / "g.ql")
    assert_same(graph, again)
    assert str(graph) == str(again)
    save(again, tmp_path / "h.ql")
    assert (tmp_path / "g.ql").read_bytes() == (tmp_path / "h.ql").read_bytes()


def test_integers_beyond_float64_survive(tmp_path: Path) -> None:
    big = 2**61 + 1
    op = Threshold(np.array([[big]]), np.array([1]), lo=0)
    x = IntType((1, 1, 1), -big, big)
    nodes = (Node("x", Input((1, 1, 1), -big, big), (), x), Node("t", op, ("x",), op.infer(x)))
    graph = Graph(nodes, (Decode(("t",), (np.ones(()),), np.zeros(()), (1,)),))
    save(graph, tmp_path / "g")
    again = load(tmp_path / "g")
    assert int(again.by_name["t"].op.thresholds[0, 0]) == big and again.input.type.hi == big  # type: ignore[attr-defined]


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(network(), tmp_path / "g")
    before = (tmp_path / "g").read_bytes()

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("quantlib.io.graph.os.replace", broken)
    with pytest.raises(OSError, match="no space"):
        save(replace(network(), name="other"), tmp_path / "g")
    assert [p.name for p in tmp_path.iterdir()] == ["g"] and (tmp_path / "g").read_bytes() == before


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no graph file"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("part", [0, 4, 100, -1])
def test_truncated(part: int, tmp_path: Path) -> None:
    save(network(), tmp_path / "g")
    data = (tmp_path / "g").read_bytes()
    (tmp_path / "g").write_bytes(data[:part])
    with pytest.raises(GraphFileError, match="no graph file, or is truncated"):
        load(tmp_path / "g")


def test_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("just a text, longer than eight bytes\n" * 10)
    with pytest.raises(GraphFileError, match="no graph file"):
        load(tmp_path / "text")
    save_file({"w": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(GraphFileError, match="holds no graph"):
        load(tmp_path / "weights")
    save_file({"w": np.zeros(3)}, tmp_path / "other", {"quantlib": '{"format": "other", "version": 1}'})
    with pytest.raises(GraphFileError, match="not that of a graph file"):
        load(tmp_path / "other")
    save_file({"w": np.zeros(3)}, tmp_path / "broken", {"quantlib": "{"})
    with pytest.raises(GraphFileError, match="no JSON"):
        load(tmp_path / "broken")


def edited(folder: Path, edit: Any, seal: bool = True) -> Path:
    """A graph file whose description went through `edit(document, arrays)`, with a checksum that fits unless `seal` is off."""
    save(network(), folder / "g")
    with safe_open(str(folder / "g"), framework="np") as f:
        document = json.loads(f.metadata()["quantlib"])
    arrays = load_file(folder / "g")
    edit(document, arrays)
    if "graph" in document and seal:
        document["sha256"] = _digest(document["graph"], arrays)
    save_file(arrays, folder / "edited", {"quantlib": json.dumps(document)})
    return folder / "edited"


def node(document: Any, name: str) -> Any:
    return next(n for n in document["graph"]["nodes"] if n["name"] == name)


def put(target: str, key: str, value: Any) -> Any:
    return lambda d, a: node(d, target)["op"].__setitem__(key, value)


BAD = {
    "newer version": (lambda d, a: d.update(version=99), "format 99.*newer quantlib"),
    "unknown op": (put("act", "op", "os.system"), r"graph.nodes.2.op: no op is registered as 'os.system'"),
    "op that is a class of Python": (put("act", "op", "Node"), "no op is registered as 'Node'"),
    "unknown field": (put("act", "colour", 1), r"graph.nodes.2.op \(Threshold\): unknown field colour"),
    "missing field": (lambda d, a: node(d, "act")["op"].pop("lo"), r"\(Threshold\): field lo is missing"),
    "string for int": (put("act", "lo", "3"), "graph.nodes.2.op.lo: expected int, found '3'"),
    "bool for int": (put("act", "lo", True), "expected int, found True"),
    "fraction for int": (put("act", "lo", 3.0), "expected int, found 3.0"),
    "list for array": (put("act", "thresholds", [[1]]), "expected an array"),
    "array that is not there": (put("act", "thresholds", {"array": "nowhere"}), "the file has no array 'nowhere'"),
    "short tuple": (put("conv", "stride", [1]), "graph.nodes.1.op.stride: expected 2 entries, found 1"),
    "array of another dtype": (lambda d, a: a.update({"graph.nodes.2.op.thresholds": np.zeros((4, 3), np.int8)}), "array of int8"),
    "array with fractions": (lambda d, a: a.update({"graph.nodes.1.op.weight": a["graph.nodes.1.op.weight"] + 0.5}), "no integers"),
    "other weights": (lambda d, a: a.update({"graph.nodes.1.op.weight": a["graph.nodes.1.op.weight"] * 9}), "conv: declared .* infers"),
    "rows that fall": (lambda d, a: a["graph.nodes.2.op.thresholds"].__imul__(-1), "non-decreasing"),
    "interval typed in": (lambda d, a: node(d, "act")["type"].update(hi=5), "act: declared"),
    "input from nowhere": (lambda d, a: node(d, "act").update(inputs=["void"]), "act reads void"),
    "no nodes": (lambda d, a: d["graph"].update(nodes=[]), "the output reads"),
    "graph of another kind": (lambda d, a: d.update(graph=[1]), "expected a Graph"),
    "no graph": (lambda d, a: d.pop("graph"), "has no graph"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_files_are_refused_and_the_place_is_named(case: str, tmp_path: Path) -> None:
    edit, message = BAD[case]
    with pytest.raises(GraphFileError, match=message) as error:
        load(edited(tmp_path, edit))
    assert str(tmp_path / "edited") in str(error.value)


def test_damage_that_every_type_allows_is_found_by_the_checksum(tmp_path: Path) -> None:
    def another_name(document: Any, arrays: Any) -> None:
        document["graph"]["name"] = "nets"

    def another_weight(document: Any, arrays: Any) -> None:
        arrays["graph.decodes.0.bias"][0] += 1

    for edit in (another_name, another_weight):
        with pytest.raises(GraphFileError, match="damaged or was edited"):
            load(edited(tmp_path, edit, seal=False))
    data = bytearray((tmp_path / "g").read_bytes())
    data[-3] ^= 1
    (tmp_path / "g").write_bytes(data)
    with pytest.raises(GraphFileError, match="damaged or was edited"):
        load(tmp_path / "g")


def test_what_cannot_be_held_is_refused_when_saving(tmp_path: Path) -> None:
    graph = network()
    bad = replace(graph, front=Front(np.zeros((1, 1), complex), np.ones(1)))
    with pytest.raises(TypeError, match="graph.front.thresholds is an array of complex128"):
        save(bad, tmp_path / "g")
    assert not list(tmp_path.iterdir())


def test_the_format_name_is_stated() -> None:
    assert FORMAT == "quantlib.graph"
    with pytest.raises(GraphError):
        Graph((), ())
