"""Kernels of many single ops compiled in one go: streams fed from arrays, without a graph around them."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlib.hls import netlist, writer
from quantlib.hls.call import Kernel, Port
from quantlib.hls.netlist import Stage, Wire
from quantlib.hls.project import FLAGS, compiler
from quantlib.ir import IntType
from quantlib.ops import Op
from quantlib.schedule import Folding


@dataclass(frozen=True)
class Case:
    """One op on edges of these types with one folding."""

    name: str
    op: Op
    types: tuple[IntType, ...]
    folding: Folding

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return self.op.hls(self.types, self.op.infer(*self.types), self.folding).kernels


def foldings(op: Op, types: tuple[IntType, ...]) -> list[Folding]:
    """A few legal foldings: one lane, all lanes, and one in between where there is one, with every number of taps and packing."""
    limits = op.folds(types, op.infer(*types))
    p, s = limits.pe, limits.simd

    def middle(n: int) -> int:
        inner = [d for d in range(2, n) if n % d == 0]
        return inner[len(inner) // 2] if inner else n

    some = [Folding(1, middle(s)), Folding(p, s), Folding(middle(p), 1)]
    more = [Folding(*lanes, taps=t) for t, lanes in zip(limits.taps[1:], ((middle(p), s), (1, middle(s))))]
    packed = [Folding(middle(f.pe), middle(f.simd), taps=f.taps[-1], packing=slice) for slice, f in limits.packed.items()]
    return list(dict.fromkeys([*some, *more, *packed]))


def source(case: Case, number: int, folder: Path) -> str:
    """C++ for one case: `void case_N(const int64_t* const* in, int64_t* out, unsigned images)`; tables go into folder/params."""
    wires: list[Wire] = []

    def wire(port: Port) -> Wire:
        wires.append(Wire(f"w{len(wires)}", "", port, 3))
        return wires[-1]

    inputs = [wire(p) for p in case.kernels[0].inputs]
    lines, ends = [], inputs
    for k, kernel in enumerate(case.kernels):
        tables = tuple((f"t{number}_{k}_{t.name}", t) for t in kernel.tables)
        for name, table in tables:
            for path, content in writer.table_files(name, table)[0].items():
                assert isinstance(content, str)
                (folder / path).write_text(content)
        out = wire(kernel.output)
        lines.append(
            writer.stage_line(
                Stage(f"k{k}", "", kernel.header, kernel.function, kernel.args, tuple(ends), (out,), 0, kernel.demand, tables)
            )
        )
        ends = [out]
    streams = [
        f'    hls::stream<{writer.word(w.port.ctype, w.port.lanes)}> {w.name}("{w.name}");\n    QL_DEPTH({w.name}, {w.depth});'
        for w in wires
    ]
    feeds = [f'    QL_STAGE("source{i}", ql::source(in[{i}], {w.name}, uint64_t({w.port.words}), images));' for i, w in enumerate(inputs)]
    sink = f'    QL_STAGE("sink", ql::sink({ends[0].name}, out, uint64_t({ends[0].port.words}), &times[0], images));'
    return "\n".join([f"static void case_{number}(const int64_t* const* in, int64_t* out, unsigned images) {{",
                      "    std::vector<std::vector<uint64_t>> times(1);", *streams, *feeds, *lines, sink, "    QL_RUN();",
                      "    last_report = ql::report(times, std::string());", "}"])  # fmt: skip


def compile_cases(cases: Sequence[Case], folder: Path, flags: Sequence[str]) -> subprocess.Popen[str]:
    """Starts the compiler on all cases; wait for it, then `load`."""
    (folder / "params").mkdir(parents=True)
    (folder / "include").mkdir()
    bodies = [source(c, i, folder) for i, c in enumerate(cases)]
    wanted = sorted({k.header for c in cases for k in c.kernels} | {"ql_csim.hpp"})
    for name, content in writer.headers(wanted).items():
        (folder / "include" / name).write_text(content)
    tables = sorted(p.name for p in (folder / "params").glob("*.h"))
    table = ", ".join(f"case_{i}" for i in range(len(cases)))
    text = [
        *(f'#include "{h}"' for h in wanted),
        *(f'#include "{t}"' for t in tables),
        "#include <cstring>",
        "static std::string last_report;",
        *bodies,
    ]
    text += [
        f"static void (*const cases[])(const int64_t* const*, int64_t*, unsigned) = {{{table}}};",
        '#define EXPORT extern "C" __attribute__((visibility("default")))',
        "EXPORT uint64_t run_case(unsigned i, const int64_t* const* in, int64_t* out, unsigned images) {",
        "    try {\n        cases[i](in, out, images);\n    } catch (const std::exception& e) {",
        '        last_report = std::string("error ") + e.what() + "\\n";\n    }',
        "    return last_report.size();\n}",
        "EXPORT void get_report(char* to) { std::memcpy(to, last_report.data(), last_report.size()); }",
    ]
    (folder / "cases.cpp").write_text("\n".join(text) + "\n")
    shim = Path(netlist.__file__).parent / "include" / "shim"
    optimise = [f for f in FLAGS if not re.match(r"-O|-march", f)]
    command = [
        compiler(),
        *optimise,
        "-O0",
        *flags,
        f"-I{folder / 'include'}",
        f"-I{folder / 'params'}",
        f"-I{shim}",
        "cases.cpp",
        "-o",
        "cases.so",
    ]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def load(folder: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(folder / "cases.so"))
    library.run_case.restype = ctypes.c_uint64
    return library


def run(library: ctypes.CDLL, number: int, case: Case, x: Sequence[np.ndarray]) -> tuple[np.ndarray, dict[str, int], str]:
    """Integers of the case's output for (N, *shape) inputs, loop iterations by stage, and what else the simulator reported."""
    y, images = case.op.infer(*case.types), len(x[0])
    streams = [writer.to_stream(v, t) for v, t in zip(x, case.types, strict=True)]
    pointers = (ctypes.c_void_p * len(streams))(*(s.ctypes.data for s in streams))
    out = np.full((images, y.numel), -(2**63), dtype=np.int64)
    size = library.run_case(number, pointers, ctypes.c_void_p(out.ctypes.data), images)
    text = ctypes.create_string_buffer(size + 1)
    library.get_report(text)
    lines = text.value.decode().splitlines()
    ticks = {line.split(" ", 2)[2]: int(line.split(" ", 2)[1]) for line in lines if line.startswith("stage ")}
    return writer.from_stream(out, y), ticks, "\n".join(line for line in lines if line.split(" ")[0] in ("blocked", "error"))
