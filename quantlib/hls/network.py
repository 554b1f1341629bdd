"""The text of src/network.hpp: streams, and the stages of every node under a line that says what it is, with a table of contents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from string import Template

from quantlib.hls.call import ctype
from quantlib.hls.netlist import Netlist, Stage, Wire
from quantlib.ir import Graph, IntType
from quantlib.schedule import Folding

SHALLOW_FIFO = 64  # up to here a FIFO is made of shift registers
LINE = 160  # longer calls go over three lines
GLUE = "ql_glue.hpp"
MEMORY = {"auto": "", "stream": "weights from memory"}


def template(name: str, **values: object) -> str:
    text = (resources.files("quantlib.hls") / "templates" / name).read_text()
    return Template(text).substitute(values) if values else text


def plain(name: str) -> str:
    """A name as it may stand in a comment or a string of C++, whatever a graph file says."""
    return re.sub(r"[^\w.:/-]", "_", name)


def word(ctype: str, lanes: int) -> str:
    return f"ql::Word<{ctype}, {lanes}>"


def stream_type(w: Wire) -> str:
    return f"hls::stream<{word(w.port.ctype, w.port.lanes)}>"


def ends(net: Netlist) -> list[Wire]:
    """The streams `network` is called with, in order: input, outputs, weights from memory."""
    return [net.input.wire, *(p.wire for p in net.outputs), *(f.wire for f in net.feeds)]


def literal(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def stage_line(s: Stage) -> str:
    args = f"<{', '.join(map(literal, s.args))}>" if s.args else ""
    more = [w.name for w in (s.weights, *s.inputs[1:], *s.outputs[1:]) if w]
    names = [s.inputs[0].name, s.outputs[0].name, *(n for n, _ in s.tables), "images", *more]
    call, given = f"{s.function}{args}", ", ".join(names)
    line = f'    QL_STAGE("{s.name}", {call}({given}));'
    return line if len(line) <= LINE else f'    QL_STAGE("{s.name}",\n        {call}(\n            {given}));'


def memory_pragmas(s: Stage) -> list[str]:
    """Weights lie in the memory the folding names, one memory per output lane, the words of all its inputs side by side."""
    lines = []
    for name, table in s.tables:
        if table.name == "weight":
            impl = {"lut": " impl=lutram", "bram": " impl=bram", "uram": " impl=uram"}.get(s.folding.memory, "")
            lines.append(f"#pragma HLS BIND_STORAGE variable={name} type=rom_1p{impl}")
            lines.append(f"#pragma HLS ARRAY_PARTITION variable={name} complete dim=2")
            if s.function in ("ql::matvec", "ql::matvec_of", "ql::gated_matvec"):
                lines.append(f"#pragma HLS ARRAY_RESHAPE variable={name} complete dim=3")
    return lines


def stream_lines(wires: Sequence[Wire]) -> list[str]:
    lines = []
    for w in wires:
        impl = "srl" if w.depth <= SHALLOW_FIFO else "bram"
        lines += [
            f'    static {stream_type(w)} {w.name}("{w.name}");',
            f"#pragma HLS STREAM variable={w.name} depth={w.depth}",
            f"#pragma HLS BIND_STORAGE variable={w.name} type=fifo impl={impl}",
            f"#pragma HLS AGGREGATE variable={w.name} compact=bit",
            f"    QL_DEPTH({w.name}, {w.depth});",
        ]
    return lines


def folding_text(f: Folding) -> str:
    """pe 4, simd 8, taps 3, packing dsp48e2, weights in bram: what differs from one lane."""
    parts = [f"pe {f.pe}", f"simd {f.simd}" if f.simd > 1 else "", f"taps {f.taps}" if f.taps > 1 else ""]
    parts += [f"packing {f.packing}" if f.packing else "", MEMORY.get(f.memory, f"weights in {f.memory}")]
    return ", ".join(p for p in parts if p)


def shape_text(t: IntType) -> str:
    return " x ".join(map(str, t.shape))


def cycles(net: Netlist, node: str, kernels: Sequence[Stage]) -> int:
    """Those of the slowest stage, or of the bus that brings the node's weights."""
    return max([*(s.iterations for s in kernels), *(f.iterations for f in net.feeds if f.node == node)])


def about(graph: Graph, net: Netlist, node: str, stages: Sequence[Stage], again: bool) -> str:
    """One line on a node: op, types, folding, cycles per image."""
    n = graph.by_name[node]
    if again:
        return f"{plain(node)}: words for the bus"
    if not n.inputs:
        return f"{plain(node)}: the network's input, {shape_text(n.type)} {ctype(n.type)}"
    x = " and ".join(f"{shape_text(t)} {ctype(t)}" for t in graph.types(n))
    kernels = [s for s in stages if s.header != GLUE]
    fold, pace = folding_text(kernels[-1].folding), cycles(net, node, kernels)
    return f"{plain(node)}: {type(n.op).__name__}, {x} -> {shape_text(n.type)} {ctype(n.type)}; {fold}; {pace:,} cycles"


def layers(net: Netlist) -> list[tuple[str, list[Stage], bool]]:
    """(node, its stages, whether it was there before): a node comes again where its output is made ready for the bus."""
    groups = [(node, list(stages)) for node, stages in groupby(net.stages, lambda s: s.node)]
    return [(node, stages, node in [g for g, _ in groups[:k]]) for k, (node, stages) in enumerate(groups)]


def contents(graph: Graph, net: Netlist, lines: Sequence[int]) -> list[str]:
    """The table of contents: a row per node with the line its calls begin at."""
    rows = [("line", "node", "op", "output", "folding", "stages")]
    for (node, stages, again), line in zip(layers(net), lines, strict=True):
        n, kernels = graph.by_name[node], [s for s in stages if s.header != GLUE]
        op = "to the bus" if again else type(n.op).__name__
        fold = folding_text(kernels[-1].folding) if kernels else "-"
        rows.append((str(line), plain(node), op, shape_text(n.type), fold, " ".join(s.name for s in kernels or stages)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["//   " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def network(graph: Graph, net: Netlist, loads: Sequence[str]) -> str:
    """src/network.hpp."""
    names = [n for s in net.stages for n, _ in s.tables]
    includes = [*(f'#include "{h}"' for h in dict.fromkeys([GLUE, *net.headers])), "", *(f'#include "../params/{n}.h"' for n in names)]
    parameters = [f"{stream_type(w)}& {w.name}" for w in ends(net)]
    outer = {w.name for w in ends(net)}
    streams: list[str] = []
    calls: list[str] = []
    starts: list[int] = []
    for node, stages, again in layers(net):
        wires = [w for s in stages for w in s.outputs if w.name not in outer]
        streams += [f"    // written by {plain(node)}", *stream_lines(wires)] if wires else []
        starts.append(len(calls))
        calls += ["", f"    // {about(graph, net, node, stages, again)}"]
        for s in stages:
            calls += [*memory_pragmas(s), *stage_line(s).splitlines()]

    def text(lines: Sequence[int]) -> str:
        return template(
            "network.hpp", graph=plain(graph.name), contents="\n".join(contents(graph, net, lines)), includes="\n".join(includes),
            parameters=",\n    ".join([*parameters, "unsigned images"]), streams="\n".join(streams), stages="\n".join(calls),
            loads="\n".join(loads) or "    (void)folder;",
        )  # fmt: skip

    first = text([0] * len(starts)).split("    // STAGES\n")[0].count("\n") + 3  # the comment of the first node, counted from 1
    return text([first + s for s in starts])
