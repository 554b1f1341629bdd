"""Projects of the layer-by-layer engine on disk, and their simulation."""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from quantlib.hls import boards, netlist, writer
from quantlib.hls import project as hls
from quantlib.ir import Graph
from quantlib.layerwise import image
from quantlib.layerwise.engine import SHALLOW, UNITS, Counts, Engine
from quantlib.layerwise.formats import WORD, Layout, pack, unpack
from quantlib.layerwise.planning import LayerwiseError, Plan, estimate
from quantlib.layerwise.steps import Steps, build
from quantlib.parts import Part

HEADERS = ("lw_engine.hpp", "lw_finish.hpp", "lw_memory.hpp", "lw_step.hpp", "lw_sweep.hpp", "lw_units.hpp")
MASTERS = 6  # AXI ports of the top, gmem0 to gmem5
SHIM = ("ap_int.h", "hls_stream.h", "ql_fiber.h")


@dataclass(eq=False)
class Project:
    """An exported project. `csim` compiles and runs it; `counts` then holds what every step took in the simulation, for one image."""

    plan: Plan
    folder: Path
    steps: Steps
    memory: image.Memory
    constants: bytes
    counts: list[Counts] = field(default_factory=list)
    _library: ctypes.CDLL | None = field(default=None, repr=False)

    @property
    def graph(self) -> Graph:
        return self.plan.graph

    def csim(self, x: Any, integers: bool = False) -> Any:
        """Outputs for the images x, as `ql.run(graph, x)` gives them; with integers=True a dict edge -> int64 tensor (N, *shape).

        ExportError when there is no compiler.
        """
        from quantlib.evaluator import decode, encode

        edges = {k: torch.from_numpy(v) for k, v in self.simulate(encode(self.graph, x).cpu().numpy()).items()}
        return edges if integers else decode(self.graph, edges)

    def simulate(self, codes: np.ndarray) -> dict[str, np.ndarray]:
        """Integers in, integers out: codes (N, *shape) -> edge -> (N, *shape)."""
        library, graph = self.library(), self.graph
        memory, count = self.memory, len(codes)
        maps = np.zeros((memory.arena + count * memory.slot) * WORD, np.uint8)
        slots = maps[memory.arena * WORD :].reshape(count, -1)
        layout, base = self.place(graph.input.name)
        slots[:, base * WORD : (base + layout.words) * WORD] = pack(
            codes.reshape(count, layout.channels, layout.height, layout.width), layout
        )
        constants = np.frombuffer(self.constants, np.uint8)
        took = np.zeros((len(self.steps.steps), len(UNITS)), np.uint64)
        addresses = (ctypes.c_void_p(constants.ctypes.data), ctypes.c_void_p(maps.ctypes.data))
        if library.lw_run(*addresses, count, ctypes.c_void_p(took.ctypes.data)):
            raise RuntimeError(f"csim of {self.folder}: a stream ran empty")
        self.counts = [Counts(tuple(int(v) for v in row)) for row in took]
        found = {}
        for edge in graph.outputs:
            layout, base = self.place(self.steps.copies[edge])
            values = unpack(slots[:, base * WORD : (base + layout.words) * WORD], layout)
            found[edge] = values.reshape(count, *graph.by_name[edge].type.shape)
        return found

    def place(self, edge: str) -> tuple[Layout, int]:
        """Layout of an input or output, and its first word in the slot of an image."""
        return self.steps.maps[edge], self.memory.maps[edge] & ~image.IN_SLOT

    def library(self) -> ctypes.CDLL:
        if self._library is None:
            self._library = ctypes.CDLL(str(hls.compile_library(self.folder, hls.FLAGS)))
            self._library.lw_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p]
        return self._library


def export(graph: Graph, folder: str | os.PathLike[str], part: str | Part = "xczu3eg", plan: Plan | None = None) -> Project:
    """Writes a complete HLS project of the layer-by-layer engine for the graph and returns it.

    plan: what `quantlib.layerwise.estimate` returned for this graph; None makes one for `part`. The folder holds include/ and src/ (the
    engine,
    its top, test bench and simulation), memory.bin (program, weights, tables), golden/, Makefile, project.tcl, driver.py with host.py and
    driver.json, plan.txt and README.md. Folders are replaced and refused as by `ql.export` (ExportError). LayerwiseError when the plan is
    for
    another graph; GraphError, naming the node, for what the engine cannot run.
    """
    target = Path(folder)
    hls.check_folder(target)
    plan = plan or estimate(graph, part)
    steps = build(graph)
    if [s.name for s in steps.steps] != [r.name for r in plan.rows] or [n.name for n in plan.graph] != [n.name for n in graph]:
        raise LayerwiseError(f"the plan was made for another graph ({plan.network}) than {graph.name}: estimate it again")
    memory = image.allocate(steps)
    made = image.build(steps, plan.engine, [r.tiling for r in plan.rows], memory)
    project = Project(plan, target, steps, memory, made.data)
    hls.install(_files(project), target, graph.name)
    return project


# ---------------------------------------------------------------- files


def _text(folder: str, name: str) -> str:
    return (resources.files("quantlib.layerwise") / folder / name).read_text()


def _template(name: str, **values: object) -> str:
    return Template(_text("templates", name)).substitute(values)


def numbers(e: Engine) -> str:
    """The engine's numbers as members of a C++ struct."""
    values = {f.name: getattr(e, f.name) for f in fields(e)} | {"xnor_banks": e.xnor_banks, "table_words": e.table_words}
    kinds = {name: ("bool", str(v).lower()) if isinstance(v, bool) else ("unsigned", str(v)) for name, v in values.items()}
    return "\n".join(f"    static const {kind} {name.upper()} = {text};" for name, (kind, text) in kinds.items())


def storage(e: Engine) -> str:
    """Macros that the pragmas of the units name."""
    places = {"REGISTERS": e.block, "LANE_TILE": e.lane_tile, "WINDOW_TILE": e.window_tile, "TABLE": e.table}
    words = max(1, e.inputs * e.outputs * e.weight_bits // 512)
    return "\n".join(
        [*(f"#define LW_{k} {'lutram' if n <= SHALLOW else 'bram'}" for k, n in places.items()), f"#define LW_ROW_WORDS {words}"]
    )


def _files(p: Project) -> dict[str, str | bytes]:
    plan, graph, memory = p.plan, p.graph, p.memory
    name, words = writer.plain(graph.name), len(p.constants) // WORD
    codes, expected = hls.golden(graph)
    outputs = [p.steps.copies[o] for o in graph.outputs]
    layout = f"constants {words} words, maps {memory.arena} words and {memory.slot} for every image behind them; words have 64 bytes"
    depths = {"constants": words, "maps": memory.arena + len(codes) * memory.slot}
    files: dict[str, str | bytes] = {
        "src/engine.hpp": _template("engine.hpp", network=name, numbers=numbers(plan.engine), storage=storage(plan.engine)),
        "src/engine.cpp": _template("engine.cpp", **depths),
        "src/top.hpp": _template("top.hpp", layout=layout),
        "src/csim.cpp": _text("templates", "csim.cpp"),
        "src/testbench.cpp": _template(
            "testbench.cpp", images=len(codes), arena=memory.arena, slot=memory.slot, constants=words, input=_edge(p, graph.input.name),
            outputs=", ".join(_edge(p, o) for o in outputs),
        ),
        "memory.bin": p.constants,
        "golden/input.txt": _lines(writer.to_stream(codes, graph.input.type)),
        "Makefile": _text("templates", "project.mk"),
        "project.tcl": _template("project.tcl", part=plan.part.full_name, clock=f"{1000 / plan.clock_mhz:g}"),
        **boards.block_design(plan.part.full_name, plan.clock_mhz, ("layerwise_top",), MASTERS),
        "plan.txt": f"{plan}\n",
        "plan.json": json.dumps(plan.to_dict(), indent=1) + "\n",
        "README.md": _template("readme.md", network=name, part=plan.part, clock=f"{plan.clock_mhz:g}", constants=words, plan=plan),
    }  # fmt: skip
    for k, edge in enumerate(graph.outputs):
        files[f"golden/output{k}.txt"] = _lines(writer.to_stream(expected[edge], graph.by_name[edge].type))
    files |= {f"include/{h}": _text("include", h) for h in HEADERS} | {f"include/{h}": t for h, t in writer.headers(["ql.hpp"]).items()}
    files |= {f"include/shim/{h}": (resources.files("quantlib.hls") / "include" / "shim" / h).read_text() for h in SHIM}
    return files | _driver(p, outputs)


def _edge(p: Project, edge: str) -> str:
    t, base = p.place(edge)
    f = t.format
    return "{" + ", ".join([f'"{writer.plain(edge)}"', *map(str, (base, t.channels, t.height, t.width, f.bits, f.shift, f.bias))]) + "}"


def _driver(p: Project, outputs: list[str]) -> dict[str, str | bytes]:
    """The streaming design's host program reads images and decodes; ours knows the engine."""
    graph = p.graph

    def pin(edge: str) -> Any:
        t = graph.by_name[edge].type
        return netlist.Pin(edge, t, netlist.container(t), None)  # type: ignore[arg-type]  # there is no stream

    def about(edge: str, name: str) -> dict[str, object]:
        t, base = p.place(edge)
        shape = graph.by_name[name].type.shape
        where = {"base": base, "words": t.words, "pitch": t.pitch, "channels": t.channels, "height": t.height, "width": t.width}
        return {"name": name, "shape": shape, **where, "bits": t.format.bits, "shift": t.format.shift, "bias": t.format.bias}

    pins: Any = SimpleNamespace(input=pin(graph.input.name), outputs=[pin(o) for o in graph.outputs], feeds=[])
    made = writer.driver(graph, pins)
    engine = {
        "constants": len(p.constants) // WORD, "arena": p.memory.arena, "slot": p.memory.slot,
        "input": about(graph.input.name, graph.input.name), "outputs": [about(e, o) for e, o in zip(outputs, graph.outputs, strict=True)],
    }  # fmt: skip
    text = json.dumps(json.loads(made["driver.json"]) | {"engine": engine}, indent=1) + "\n"
    return {"host.py": made["driver.py"], "driver.py": _text("templates", "driver.py"), "driver.json": text}


def _lines(values: np.ndarray) -> str:
    return "\n".join(map(str, values.reshape(-1).tolist())) + "\n"
