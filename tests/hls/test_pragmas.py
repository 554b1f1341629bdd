"""Pragmas of every kernel, generated network and top: known, in scope, and strong enough for one iteration per cycle."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quantlib.hls import project, writer
from quantlib.schedule import Folding

# Tables that src/network.hpp lays out: `memory_pragmas` in quantlib/hls/network.py, from the second dimension on.
KERNELS = ("matvec", "matvec_of", "gated_matvec", "depthwise", "depthwise_of", "saturating_dense")
LAID_OUT = {(kernel, "weight"): 2 for kernel in KERNELS}

KERNEL = """
template <unsigned N, typename T>
void k(hls::stream<Word<T, N>>& in, hls::stream<Word<T, N>>& out, const T (&table)[4][N], unsigned images) {
#pragma HLS ARRAY_PARTITION variable = table dim = 2 complete
    T acc[N];
#pragma HLS ARRAY_PARTITION variable = acc complete
    unsigned row = 0;
    const unsigned total = images * 4;
rows:
    for (unsigned i = 0; i < total; ++i) {
#pragma HLS PIPELINE II = 1
        QL_CYCLE();
        const Word<T, N> x = in.read();
        Word<T, N> y;
        for (unsigned p = 0; p < N; ++p) {
#pragma HLS UNROLL
            acc[p] = T(acc[p] + x.v[p] * table[row][p]);
            y.v[p] = acc[p];
        }
        out.write(y);
        if (++row == 4) row = 0;
    }
}
"""

REGION = """
inline void network(hls::stream<int>& a, hls::stream<int>& z, unsigned images) {
#pragma HLS DATAFLOW
    static hls::stream<int> s("s");
#pragma HLS STREAM variable=s depth=4
    QL_STAGE("one", ql::k<4>(a, s, t, images));
    QL_STAGE("two", ql::k<4>(s, z, t, images));
}
"""


@pytest.fixture(scope="module")
def pragmas() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tests_hls_pragmas", Path(__file__).with_name("pragmas.py"))
    assert spec and spec.loader
    module = sys.modules["tests_hls_pragmas"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    root = Path(writer.__file__).parent
    paths = [*root.joinpath("include").glob("*.hpp"), *root.parent.joinpath("ops").glob("*.hpp")]
    return {p.name: p.read_text() for p in paths if p.name != "ql_csim.hpp"}


def test_every_kernel(pragmas: ModuleType, sources: dict[str, str]) -> None:
    assert len(sources) > 20
    found = {name: pragmas.check(text, LAID_OUT) for name, text in sources.items()}
    assert {name: problems for name, problems in found.items() if problems} == {}
    # what is read is really read: kernels, their loops and their pragmas
    known = pragmas.directions(sources)
    assert {"matvec", "window_loop", "enter", "fork", "threshold", "rearrange"} <= set(known)
    assert sum(text.count("#pragma HLS") for text in sources.values()) > 120


def test_pragmas_of_the_layer_by_layer_engine_are_spelled_right(pragmas: ModuleType) -> None:
    """Its kernels are loop nests, to which the rules of the streaming kernels do not apply; names and options do."""
    root = Path(writer.__file__).parents[1] / "layerwise"
    lines = [line.strip() for p in (*root.glob("include/*.hpp"), *root.glob("templates/*.cpp")) for line in p.read_text().splitlines()]
    found = [re.sub(r"\$\w+", "1", line) for line in lines if line.startswith("#pragma HLS")]  # a template's number
    assert len(found) > 40
    assert {line: wrong for line in found if (wrong := list(pragmas.words_of(pragmas.pragma(line))))} == {}


@pytest.mark.parametrize("kind", ["", "taps", "packing", "stream"])
@pytest.mark.parametrize("name", ["small", "residual", "everything"])
def test_generated_network_and_tops(
    pragmas: ModuleType, sources: dict[str, str], nets: ModuleType, tmp_path: Path, name: str, kind: str
) -> None:
    graph, folding = getattr(nets, name)()
    for node in graph:
        folds = node.op.folds(graph.types(node), node.type)
        if kind == "taps":
            folding[node.name] = Folding(taps=folds.taps[-1])
        elif kind == "packing" and "dsp48e2" in folds.packed:
            limits = folds.packed["dsp48e2"]
            folding[node.name] = Folding(limits.pe, limits.simd, taps=limits.taps[-1], packing="dsp48e2")
        elif kind == "stream" and folds.streams:
            folding[node.name] = Folding(memory="stream")
    made = project.write(graph, tmp_path / "p", folding)
    network, top = ((made.folder / "src" / f).read_text() for f in ("network.hpp", "top.cpp"))
    assert pragmas.check(network) == [] and pragmas.check(top) == []
    assert pragmas.regions(sources, network, top) == []
    for s in made.net.stages:
        for table, t in s.tables:
            if (s.function.removeprefix("ql::"), t.name) in LAID_OUT:
                mine = [pragmas.pragma(line) for line in network.splitlines() if line.startswith("#pragma")]
                dims = [p.dims for p in mine if p.variable == table and p.name.startswith("ARRAY")]
                assert dims == list(range(2, t.build().ndim + 1)), table
    spoiled = network.replace("#pragma HLS STREAM variable=s_", "#pragma HLS STREAM variable=t_", 1)
    assert any("not in scope" in p for p in pragmas.check(spoiled))
    first = made.net.stages[0]
    crossed = network.replace(f"({first.inputs[0].name}, {first.outputs[0].name}", f"({first.outputs[0].name}, {first.outputs[0].name}")
    assert any("readers" in p for p in pragmas.regions(sources, crossed, top))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("PIPELINE II = 1", "PIPELINE II = 2"), "rows does not begin with PIPELINE II = 1"),
        (("#pragma HLS PIPELINE II = 1\n        QL_CYCLE();", "QL_CYCLE();\n#pragma HLS PIPELINE II = 1"), "does not begin with PIPELINE"),
        (("        QL_CYCLE();\n", ""), "rows does not begin with QL_CYCLE"),
        (("rows:\n", ""), "has no label"),
        (("#pragma HLS UNROLL\n", ""), "inside rows does not begin with UNROLL"),
        (("HLS UNROLL", "HLS UNROL"), "unknown pragma UNROL"),
        (("PIPELINE II = 1", "PIPELINE interval = 1"), "PIPELINE has no option interval"),
        (("dim = 2 complete", "dim = two complete"), "ARRAY_PARTITION dim cannot be two"),
        (("acc complete", "acc cyclic"), "a factor goes with block and cyclic"),
        (("variable = acc complete", "complete"), "ARRAY_PARTITION needs variable"),
        (("variable = acc complete", "variable = sum complete"), "ARRAY_PARTITION names sum, which is not in scope"),
        (("#pragma HLS ARRAY_PARTITION variable = acc complete\n", ""), "dimension 1 of acc is read in parallel"),
        (("#pragma HLS ARRAY_PARTITION variable = table dim = 2 complete\n", ""), "dimension 2 of table is read in parallel"),
        (("table dim = 2", "table dim = 1"), "dimension 2 of table is read in parallel"),
        (("table[row][p]", "dot(table[row])"), ""),
        (("table[row][p]", "table[p][row]"), "dimension 1 of table is read in parallel"),
        (("acc[p] = T(", "const unsigned lane = 3 - p;\n            acc[p] = T(table[lane][0] + "), "dimension 1 of table is read"),
        (("table[row][p]", "table[x.v[p]][p]"), ""),  # data of the lane, in a memory of its own
        (("    T acc[N];\n", "    T acc[N], other[N];\n"), ""),
        (("y.v[p] = acc[p];", "for (unsigned q = 0; q < 2; ++q) y.v[p] = acc[p];"), "inside rows does not begin with UNROLL"),
        (("", ""), ""),
    ],
)  # fmt: skip
def test_bad_kernels_are_found(pragmas: ModuleType, change: tuple[str, str], message: str) -> None:
    """Each line spoils one thing; an empty message: the change does no harm."""
    assert change[0] in KERNEL
    problems = pragmas.check(KERNEL.replace(*change, 1))
    assert (not problems and not message) or any(message in p for p in problems if message), problems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("k<4>(s, z", "k<4>(a, z"), "stream s has 1 writers and 0 readers"),
        (("k<4>(s, z", "k<4>(s, s"), "stream s has 2 writers and 1 readers"),
        (("    QL_STAGE(\"two\"", "    if (images) QL_STAGE(\"two\""), "neither a stream nor a call of a kernel"),
        (("    QL_STAGE(\"two\"", "    unsigned more = images + 1;\n    QL_STAGE(\"two\""), "neither a stream nor a call"),
        (("ql::k<4>(s", "ql::unknown<4>(s"), "neither a stream nor a call of a kernel"),
        (("k<4>(s, z, t", "k<4>(s, t"), "k has 2 streams and is called with 1"),
        (("depth=4", "depth=deep"), "STREAM depth cannot be deep"),
        (("", ""), ""),
    ],
)  # fmt: skip
def test_bad_regions_are_found(pragmas: ModuleType, change: tuple[str, str], message: str) -> None:
    assert change[0] in REGION
    text = REGION.replace(*change, 1)
    problems = [*pragmas.check(text), *pragmas.dataflow(text, pragmas.directions({"k": KERNEL}))]
    assert (not problems and not message) or any(message in p for p in problems if message), problems


def test_arrays_handed_to_inlined_functions_are_judged_there(pragmas: ModuleType) -> None:
    helper = """
template <unsigned N, typename T> inline T get(unsigned at, const T (&map)[4][N]) {
#pragma HLS INLINE
    T sum = 0;
    for (unsigned q = 0; q < N; ++q) {
#pragma HLS UNROLL
        sum += map[at][q];
    }
    return sum;
}
"""
    text = helper + KERNEL.replace("table[row][p]", "get(row, table)")
    assert pragmas.check(text) == []
    assert pragmas.check(text.replace("map[at][q]", "map[q][at]")) == [
        "k: dimension 1 of table is read in parallel and neither partitioned nor reshaped"
    ]
    assert len(pragmas.check(text.replace("get(row, table)", "unknown(row, table)"))) == 1


def test_what_is_simulated_only_is_not_read(pragmas: ModuleType) -> None:
    simulated, made = "inline int f(int n) {\n    for (;;) n++;\n}\n", "inline int g(int n) {\n    while (n) n--;\n    return n;\n}\n"
    text = f"#ifndef __SYNTHESIS__\n{simulated}#else\n{made}#endif\n"
    assert pragmas.check(text) == ["g: the loop n of a function that is called per cycle is not unrolled"]
