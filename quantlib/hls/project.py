"""Exported projects on disk: written atomically, compiled once per mode, run through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantlib.hls import netlist, writer
from quantlib.ir import Graph, IntType
from quantlib.schedule import Folding

if TYPE_CHECKING:
    from quantlib.schedule import Plan

MANIFEST = "quantlib_project.json"
MODES = {"fast": 0, "fifo": 1, "timed": 2}
FLAGS = ("-std=c++14", "-O2", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-unknown-pragmas")
GOLDEN_IMAGES = 2


class ExportError(RuntimeError):
    """A folder that is not ours, or a compiler that is missing or fails."""


class Deadlock(RuntimeError):
    """No stage of a bounded simulation can run; the message names every blocked stage and the FIFO it waits for."""


@dataclass(frozen=True)
class Timing:
    """What a bounded or timed simulation saw.

    cycles: per image in steady state (mean distance between images at the outputs; of one image alone, its latency); latency: first
    image, from the first input word to the last output word. iterations: stage -> loop iterations per image. marks: FIFO -> (most words
    it ever held, its depth). ends: of each image, the cycle after its last output word.
    """

    cycles: float
    latency: int
    iterations: Mapping[str, float]
    marks: Mapping[str, tuple[int, int]]
    ends: tuple[int, ...] = ()

    @property
    def steady(self) -> float:
        """Cycles per image over the later half of the images, when the FIFOs have filled: start-up is left out. Needs two images."""
        half = len(self.ends) // 2
        return (self.ends[-1] - self.ends[half - 1]) / (len(self.ends) - half) if half else self.cycles


@dataclass(eq=False)
class Project:
    """An exported HLS project. `csim` compiles and runs it; `last` holds the Timing of the last fifo or timed run."""

    graph: Graph
    folder: Path
    net: netlist.Netlist
    last: Timing | None = None
    _libraries: dict[int, ctypes.CDLL] = field(default_factory=dict, repr=False)

    def csim(self, x: Any, mode: str = "fast", integers: bool = False, depths: Mapping[str, int] | None = None) -> Any:
        """Outputs for the images x, as `ql.run(graph, x)` gives them; with integers=True a dict edge -> int64 tensor (N, *shape).

        mode: "fast" runs the stages one after the other; "fifo" runs them side by side on FIFOs of the generated depths; "timed" also
        counts cycles (both fill `last`). depths: other depths for single FIFOs, by name, in these two modes. Raises Deadlock with every
        blocked stage; ExportError when there is no compiler.
        """
        from quantlib.evaluator import decode, encode

        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: choose one of {', '.join(MODES)}")
        codes = np.ascontiguousarray(encode(self.graph, x).cpu().numpy(), dtype=np.int64)
        edges = {k: torch.from_numpy(v) for k, v in self.simulate(codes, mode, depths).items()}
        return edges if integers else decode(self.graph, edges)

    def simulate(self, codes: np.ndarray, mode: str = "fast", depths: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
        """Integers in, integers out: codes (N, *shape) -> edge -> (N, *shape)."""
        library = self._library(MODES[mode])
        names = {w.name for w in self.net.wires}
        for name in depths or {}:
            if name not in names:
                raise KeyError(f"there is no FIFO {name}; there are {', '.join(sorted(names))}")
        for name in names:
            library.ql_depth(name.encode(), (depths or {}).get(name, 0))
        longest = max([s.iterations for s in self.net.stages] + [f.iterations for f in self.net.feeds])
        most = len(codes) if mode == "fast" else max(1, (2**31 - 1) // longest)  # loop counters are 32 bits wide
        pieces = [self._simulate(library, codes[i : i + most], mode) for i in range(0, len(codes), most)]
        return {edge: np.concatenate([p[edge] for p in pieces]) for edge in pieces[0]}

    def _simulate(self, library: ctypes.CDLL, codes: np.ndarray, mode: str) -> dict[str, np.ndarray]:
        inputs = writer.to_stream(codes, self.net.input.type)
        outputs = [np.empty((len(codes), p.type.numel), dtype=np.int64) for p in self.net.outputs]
        pointers = (ctypes.c_void_p * len(outputs))(*(o.ctypes.data for o in outputs))
        size = library.ql_csim(ctypes.c_void_p(inputs.ctypes.data), pointers, len(codes))
        text = ctypes.create_string_buffer(size + 1)
        library.ql_report(text)
        self._read_report(text.value.decode(), mode, len(codes))
        return {p.edge: writer.from_stream(o, p.type) for p, o in zip(self.net.outputs, outputs, strict=True)}

    def _read_report(self, text: str, mode: str, images: int) -> None:
        lines = [line.split(" ", 1) for line in text.splitlines()]
        blocked = [rest for kind, rest in lines if kind == "blocked"]
        errors = [rest for kind, rest in lines if kind == "error"]
        if errors:
            raise RuntimeError(f"csim of {self.folder}: {errors[0]}")
        if blocked:
            raise Deadlock("no stage can run:\n  " + "\n  ".join(blocked))
        if mode == "fast":
            return
        times = [int(rest) for kind, rest in lines if kind == "image"]
        iterations = {name: int(ticks) / images for kind, rest in lines if kind == "stage" for ticks, name in [rest.split(" ", 1)]}
        marks = {}
        for kind, rest in lines:
            if kind == "channel":
                mark, depth, name = rest.split(" ", 2)
                marks[name] = int(mark), int(depth)
        cycles = (times[-1] - times[0]) / (images - 1) if images > 1 else float(times[0])
        self.last = Timing(cycles, times[0], iterations, marks, tuple(times))

    def _library(self, mode: int, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
        if mode not in self._libraries:
            path = compile_library(self.folder, (*FLAGS, *flags, f"-DQL_MODE={mode}"))
            library = ctypes.CDLL(str(path))
            library.ql_csim.restype = ctypes.c_uint64
            library.ql_csim.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
            library.ql_report.argtypes = [ctypes.c_char_p]
            library.ql_depth.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
            if library.ql_load(str(self.folder / "params").encode()):
                raise ExportError(f"{self.folder / 'params'}: a parameter file is missing; export again")
            self._libraries[mode] = library
        return self._libraries[mode]


def compiler() -> str:
    """The C++ compiler: $CXX, else g++."""
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if not found:
        raise ExportError(
            f"csim needs a C++ compiler and {name} was not found. Debian/Ubuntu: sudo apt install g++; Fedora: sudo dnf install gcc-c++; "
            "macOS: xcode-select --install; or set CXX to one."
        )
    return found


def compile_library(folder: Path, flags: tuple[str, ...]) -> Path:
    """Compiles src/csim.cpp into build/, named by the content of all sources, the flags and the compiler; an existing one is used."""
    cxx = compiler()
    digest = hashlib.sha256(repr((flags, _version(cxx), _processor())).encode())
    for path in sorted(p for part in ("src", "include", "params") for p in (folder / part).rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    target = folder / "build" / f"csim_{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    command = [cxx, *flags, f"-I{folder / 'include'}", f"-I{folder / 'include' / 'shim'}", str(folder / "src" / "csim.cpp"), "-o", scratch]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        os.unlink(scratch)
        raise ExportError(f"{cxx} failed on {folder / 'src' / 'csim.cpp'}:\n" + "\n".join(done.stderr.splitlines()[:40]))
    os.replace(scratch, target)
    return target


def _version(cxx: str) -> str:
    return subprocess.run([cxx, "-dumpfullversion"], capture_output=True, text=True).stdout


def _processor() -> str:
    """What -march=native depends on, where the system tells."""
    info = Path("/proc/cpuinfo")
    return next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.exists() else ""


def export(graph: Graph, folder: str | os.PathLike[str], part: str = "xczu3eg", plan: Plan | None = None) -> Project:
    """Writes a complete HLS project for the graph and returns it.

    plan: what `ql.estimate` returned for this graph (folding, FIFO depths, clock); None makes one for `part`. The folder holds README.md,
    report.html, include/, params/ (one file per table), src/ (network, two tops, test bench, simulation), golden/, Makefile (`make csim`),
    scripts for the vendor's tools and driver.py. An existing folder is replaced when it was written by export and refused, untouched,
    when it was not (ExportError); the new one is complete before the old one goes. ValueError when the plan is for another graph.
    A plan of `quantlib.layerwise.estimate` gives a project of that architecture.
    """
    from quantlib.schedule import Plan, estimate

    if plan is not None and not isinstance(plan, Plan):  # of the other architecture
        from quantlib import layerwise

        return layerwise.export(graph, folder, plan=plan)
    target = Path(folder)
    check_folder(target)
    plan = plan or estimate(graph, part)
    plan.schedule.check(graph)
    foldings = {name: stage.folding for name, stage in plan.schedule.items()}
    depths = {name: stage.depths for name, stage in plan.schedule.items()}
    return write(graph, target, foldings, depths, plan.part.full_name, 1000.0 / plan.clock_mhz, plan)


def check_folder(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target} exists and is no folder")
    if target.exists() and any(target.iterdir()):
        manifest = target / MANIFEST
        try:
            ours = json.loads(manifest.read_text()).get("tool") == "quantlib"
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise ExportError(f"{target} exists and was not written by export (no {MANIFEST}): choose another folder or remove it yourself")


def write(graph: Graph, target: Path, foldings: Mapping[str, Folding], depths: Mapping[str, tuple[int, ...]] | None = None,
          part: str = "xczu3eg", clock_ns: float = 4.0, plan: Plan | None = None) -> Project:  # fmt: skip
    """`export` with explicit foldings and depths instead of a plan's; with `plan` the project reports its figures."""
    check_folder(target)
    net = netlist.build(graph, foldings, depths)
    files = writer.project(graph, net, part, clock_ns, golden(graph), plan)
    install(files, target, graph.name)
    return Project(graph, target, net)


def install(files: dict[str, str | bytes], target: Path, name: str) -> None:
    """Writes the files of a project for the network `name`, with their manifest, beside the target and puts them in its place at once.

    An interruption leaves the old project, or no folder where there was none. What a killed process left beside it is swept up here.
    """
    files[MANIFEST] = json.dumps({"tool": "quantlib", "graph": name, "files": sorted(files)}, indent=1) + "\n"
    if blocked := next((p for p in target.parents if p.exists() and not p.is_dir()), None):
        raise ExportError(f"{target}: {blocked} is a file, not a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    begins = f".{target.name}.export-"
    for left in [p for p in target.parent.iterdir() if p.name.startswith(begins)]:
        if not _alive(left.name.removeprefix(begins).partition("-")[0]):
            shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{begins}{os.getpid()}-"))
    new, old = scratch / "new", scratch / "old"
    try:
        for file, content in files.items():
            path = new / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(new, target)
        except BaseException:
            if old.exists():
                os.replace(old, target)
            raise
        if (old / "build").is_dir():  # compiled libraries are named by content, so they stay valid
            os.replace(old / "build", target / "build")
    finally:
        shutil.rmtree(scratch)


def _alive(pid: str) -> bool:
    """Whether a process of this number runs; a name without a number is not ours to judge."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        pass
    return True


def golden(graph: Graph) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Random codes on the input's lattice and the integers of every output edge, from the definitions of the ops."""
    from quantlib.evaluator import carrier

    t: IntType = graph.input.type
    levels = np.random.default_rng(0).integers(0, t.levels, (GOLDEN_IMAGES, *t.shape))
    codes = levels * t.step + t.lo
    edges = {graph.input.name: torch.from_numpy(codes)}
    for node in graph.nodes[1:]:
        dtype = torch.int64 if carrier(graph, node) == torch.int64 else torch.float64
        edges[node.name] = node.op.evaluate(*(edges[i].to(dtype) for i in node.inputs))
    return codes, {k: edges[k].numpy().astype(np.int64) for k in graph.outputs}
