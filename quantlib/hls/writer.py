"""A netlist becomes the files of a project (path -> content); nothing is written here. `network.py` makes the text of src/network.hpp."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from quantlib.hls import boards, report
from quantlib.hls.call import Table, hw
from quantlib.hls.netlist import Netlist, Pin
from quantlib.hls.network import ends, network, plain, stream_type, template
from quantlib.hls.network import stage_line as stage_line
from quantlib.hls.network import word as word
from quantlib.ir import Graph, IntType
from quantlib.schedule import BASE_DEPTH

if TYPE_CHECKING:
    from quantlib.schedule import Plan

BIG = 1 << 18  # tables with more entries reach the simulation as a binary file; compilers are slow on long initialisers
Array = np.ndarray


def headers(wanted: Sequence[str]) -> dict[str, str]:
    """The named headers and all they include, from the ops and from the library's include folder."""
    found: dict[str, str] = {}
    todo = list(wanted)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        folder = resources.files("quantlib.hls") / "include" if name.startswith("ql") else resources.files("quantlib.ops")
        found[name] = (folder / name).read_text()
        todo += re.findall(r'#include "([\w.]+)"', found[name])
    return found


def native(lo: int, hi: int) -> np.dtype:
    """The smallest native type of C++ and numpy that holds lo..hi."""
    kinds = (np.uint8, np.uint16, np.uint32, np.int64) if lo >= 0 else (np.int8, np.int16, np.int32, np.int64)
    return next(np.dtype(k) for k in kinds if np.iinfo(k).min <= lo and hi <= np.iinfo(k).max)


def table_files(name: str, table: Table) -> tuple[dict[str, str | bytes], str]:
    """Files under params/ for one table, and the line that loads it in simulation (empty for the usual initialiser)."""
    array = np.ascontiguousarray(table.build())
    lo, hi = int(array.min()), int(array.max())
    kind, exact = native(lo, hi), IntType((1,), lo, hi)
    dims = "".join(f"[{n}]" for n in array.shape)
    types = f"{kind.name}_t", f"ap_{'int' if exact.signed else 'uint'}<{exact.bits}>"
    flat = array.reshape(-1).tolist()
    rows = ",\n".join(",".join(map(str, flat[i : i + 32])) for i in range(0, len(flat), 32))
    about = f"// {table.name}, {' x '.join(map(str, array.shape))}, {lo}..{hi}\n"
    if array.size <= BIG:
        return {f"params/{name}.h": f"{about}QL_TABLE({types[0]}, {types[1]}) {name}{dims} = {{\n{rows}\n}};\n"}, ""
    text = (
        f'{about}#ifdef __SYNTHESIS__\nstatic const {types[1]} {name}{dims} = {{\n#include "{name}.inc"\n}};\n'
        f"#else  // simulation reads {name}.bin\nstatic {types[0]} {name}{dims};\n#endif\n"
    )
    data = array.astype(kind.newbyteorder("<")).tobytes()
    return {f"params/{name}.h": text, f"params/{name}.inc": rows + "\n", f"params/{name}.bin": data}, (
        f'    missing += !ql::load_table(std::string(folder) + "/{name}.bin", {name}, sizeof({name}));'
    )


def port_lines(net: Netlist, depth: int = BASE_DEPTH) -> str:
    lines = []
    for w in ends(net):
        lines.append(f'    static {stream_type(w)} {w.name}("{w.name}");')
        lines.append(f"#pragma HLS STREAM variable={w.name} depth={depth}")
        lines.append(f"    QL_DEPTH({w.name}, {depth});")
    return "\n".join(lines)


def fetch_lines(net: Netlist, memory: str) -> list[str]:
    """The stages that fetch weights; `memory` is a pattern for the name of feed k's region."""
    lines = []
    for k, f in enumerate(net.feeds):
        region = memory.format(k=k, name=f.name)
        lines.append(f'    QL_STAGE("fetch_{f.name}", ql::fetch_rows<{f.rows}, {f.replay}, {f.bits}>({region}, {f.wire.name}, images));')
    return lines


def csim(net: Netlist) -> str:
    first, last = net.input.wire, net.outputs
    arguments = ", ".join([*(w.name for w in ends(net)), "images"])
    calls = [f'    QL_STAGE("source", ql::source(in, {first.name}, uint64_t({first.port.words}), images));']
    calls += [*fetch_lines(net, "{name}"), f"    network({arguments});"]
    calls += [
        f'    QL_STAGE("sink{k}", ql::sink({p.wire.name}, out[{k}], uint64_t({p.wire.port.words}), &times[{k}], images));'
        for k, p in enumerate(last)
    ]
    regions = [f"uint64_t {f.name}[{f.bus_words}];" for f in net.feeds]
    loads = [f'    missing += !ql::load_table(std::string(folder) + "/{f.name}.bin", {f.name}, sizeof({f.name}));' for f in net.feeds]
    advance = [f"            at[{k}] = out[{k}] + n * uint64_t({p.type.numel});" for k, p in enumerate(last)]
    return template(
        "csim.cpp",
        ports=port_lines(net),
        calls="\n".join(calls),
        outputs=len(last),
        advance="\n".join(advance),
        regions="\n".join(regions),
        loads="\n".join(loads),
        in_elements=net.input.type.numel,
    )


def tops(graph: Graph, net: Netlist) -> dict[str, str]:
    pins = (net.input, *net.outputs)
    ports = ["in", *(f"out{k}" for k in range(len(net.outputs)))]
    layout = "\n".join(
        f"// {name}: edge {plain(p.edge)}, {p.type}, {p.bits}-bit containers, {p.bus_words} words per image"
        for name, p in zip(ports, pins, strict=True)
    )
    layout += "".join(
        f"\n// weights{k}: those of {plain(f.node)}, params/{f.name}.bin, {f.bus_words} words" for k, f in enumerate(net.feeds)
    )
    fed = [f"const uint64_t* weights{k}" for k in range(len(net.feeds))]
    axis = ", ".join([*(f"hls::stream<bus_word>& {n}" for n in ports), *fed])
    memory = ", ".join([*(f"{'const ' if n == 'in' else ''}uint64_t* {n}" for n in ports), *fed])

    def calls(way: str) -> str:
        p = net.input
        kind = ("hls::stream<bus_word>&",) * 2 if way == "axis" else ("const uint64_t*", "uint64_t*")
        lines = [f'    QL_STAGE("enter", ql::enter<{p.type.numel}, {p.bits}, {kind[0]}>(in, {p.wire.name}, images));']
        lines += [*fetch_lines(net, "weights{k}"), f"    network({', '.join(w.name for w in ends(net))}, images);"]
        lines += [
            f'    QL_STAGE("leave{k}", ql::leave<{q.type.numel}, {q.bits}, {kind[1]}>({q.wire.name}, out{k}, images));'
            for k, q in enumerate(net.outputs)
        ]
        return "\n".join([*lines, "    QL_RUN();"])

    def masters(named: Sequence[tuple[str, int]]) -> list[str]:
        """Words come one by one, so many reads are kept under way."""
        way = "#pragma HLS INTERFACE m_axi port = {} offset = slave bundle = gmem{} depth = {} latency = 64 num_read_outstanding = 64"
        return [way.format(name, i, depth) for i, (name, depth) in enumerate(named)]

    data = [(n, p.bus_words * 4) for n, p in zip(ports, pins, strict=True)]
    weights = [(f"weights{k}", f.bus_words) for k, f in enumerate(net.feeds)]
    axis_pragmas = "\n".join([*(f"#pragma HLS INTERFACE axis port = {n}" for n in ports), *masters(weights)])
    memory_pragmas = "\n".join(masters([*data, *weights]))
    return {
        "src/top.hpp": template("top.hpp", layout=layout, axis_parameters=axis, memory_parameters=memory),
        "src/top.cpp": template(
            "top.cpp", axis_parameters=axis, memory_parameters=memory, axis_pragmas=axis_pragmas, memory_pragmas=memory_pragmas,
            ports=port_lines(net), axis_calls=calls("axis"), memory_calls=calls("memory"),
        ),
    }  # fmt: skip


def map_shape(t: IntType) -> tuple[int, int, int]:
    """Channels, height, width as the stream sees an edge; further axes count as width."""
    h, w = hw(t) if len(t.shape) <= 3 else (1, t.numel // t.shape[0])
    return t.shape[0], h, w


def to_stream(values: Array, t: IntType) -> Array:
    """(N, *shape) integers -> (N, numel) in the order of the stream: pixel by pixel, channels inside."""
    return np.ascontiguousarray(np.moveaxis(values.reshape(len(values), t.shape[0], -1), 1, 2)).reshape(len(values), t.numel)


def from_stream(values: Array, t: IntType) -> Array:
    return np.ascontiguousarray(np.moveaxis(values.reshape(len(values), -1, t.shape[0]), 2, 1)).reshape(len(values), *t.shape)


def testbench(net: Netlist, images: int) -> str:
    def edge(p: Pin) -> str:
        return "{" + ", ".join([f'"{plain(p.edge)}"', *map(str, map_shape(p.type)), str(p.bits), str(p.bus_words)]) + "}"

    count = range(len(net.outputs))
    fed = [f"weights[{k}].data()" for k in range(len(net.feeds))]
    memory = ", ".join(["in.data()", *(f"out[{k}].data()" for k in count), *fed, "IMAGES"])
    axis = ", ".join(["from", *(f"to{k}" for k in count), *fed, "IMAGES"])
    return template(
        "testbench.cpp", images=images, input=edge(net.input), outputs=", ".join(map(edge, net.outputs)),
        weights=", ".join(f'{{"{f.name}", {f.bus_words}}}' for f in net.feeds), memory_call=f"top_memory({memory});",
        axis_streams="\n".join(f'    hls::stream<bus_word> to{k}("bus_out{k}");' for k in count),
        axis_call=f"top_axis({axis});", axis_pointers=", ".join(f"&to{k}" for k in count),
    )  # fmt: skip


def driver(graph: Graph, net: Netlist) -> dict[str, str]:
    """The host program and what it must know of this network. JSON's decimals are the shortest that give every float back."""

    def edge(p: Pin) -> dict[str, object]:
        return {"name": p.edge, "shape": p.type.shape, "container": f"{'' if p.type.signed else 'u'}int{p.bits}"}

    t, front = net.input.type, graph.front
    grid = {"lo": t.lo, "hi": t.hi, "step": t.step, "scale": t.scale.tolist()}
    decodes = [
        {"inputs": d.inputs, "gains": [np.asarray(g).tolist() for g in d.gains], "bias": np.asarray(d.bias).tolist(), "shape": d.shape}
        for d in graph.decodes
    ]
    about = {
        "name": graph.name,
        "input": edge(net.input) | grid,
        "outputs": [edge(p) for p in net.outputs],
        "front": front and {"thresholds": front.thresholds.tolist(), "sign": front.sign.tolist()},
        "decodes": decodes,
        "weights": [{"port": f"weights{k}", "file": f"params/{f.name}.bin", "words": f.bus_words} for k, f in enumerate(net.feeds)],
    }
    return {"driver.py": template("driver.py"), "driver.json": json.dumps(about, indent=1) + "\n"}


def project(graph: Graph, net: Netlist, part: str, clock_ns: float, golden: tuple[Array, Mapping[str, Array]],
            plan: Plan | None = None) -> dict[str, str | bytes]:  # fmt: skip
    """All files of a project. golden: input codes (N, *shape) and the integers of every output edge for them; report.html needs a plan."""
    files: dict[str, str | bytes] = {}
    loads = []
    for s in net.stages:
        for name, table in s.tables:
            made, load = table_files(name, table)
            files.update(made)
            loads += [load] if load else []
    for f in net.feeds:
        files[f"params/{f.name}.bin"] = f.packed().astype("<u8").tobytes()
    files["src/network.hpp"] = network(graph, net, loads)
    files.update(tops(graph, net))
    files["src/csim.cpp"] = csim(net)
    files["src/testbench.cpp"] = testbench(net, len(golden[0]))
    for name, text in headers(["ql_csim.hpp", "ql_glue.hpp", *net.headers]).items():
        files[f"include/{name}"] = text
    for name in ("ap_int.h", "ap_axi_sdata.h", "hls_stream.h", "ql_fiber.h"):
        files[f"include/shim/{name}"] = (resources.files("quantlib.hls") / "include" / "shim" / name).read_text()
    files["golden/input.txt"] = _numbers(to_stream(golden[0], net.input.type))
    for k, p in enumerate(net.outputs):
        files[f"golden/output{k}.txt"] = _numbers(to_stream(golden[1][p.edge], p.type))
    files["Makefile"] = template("project.mk")
    files.update(boards.files(net, part, clock_ns))
    files["README.md"] = report.readme(graph, net, part, clock_ns, plan)
    if plan is not None:
        files["report.html"] = report.html(graph, net, plan)
    files.update(driver(graph, net))
    return files


def _numbers(values: Array) -> str:
    return "\n".join(map(str, values.reshape(-1).tolist())) + "\n"
