"""The packed engine: runs an integer network on the CPU through C++ that is compiled once per machine.

The graph becomes a flat program (program.py) over generic kernels (*.hpp): bit planes with popcount where weights are signs, products of
bytes or of 16-bit pairs elsewhere, 64-bit sums where intervals need them. QUANTLIB_ENGINE chooses: native (the default), portable (no
vector extensions beyond x86-64-v2) or torch (never use it). Where it cannot run, `execute` returns None and the torch carriers do the work.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from quantlib.engine.build import Library, Unavailable, library
from quantlib.engine.program import Program, Refused, translate
from quantlib.ir import Graph

KEPT = 4  # programs per graph: one per set of edges asked for
CHOICES = ("native", "portable", "torch")


class _Ready:
    """A program with its idle arenas; several callers may run it at once."""

    def __init__(self, program: Program, engine: Library) -> None:
        self.program, self.engine = program, engine
        self._idle: list[np.ndarray] = []

    def _arena(self) -> np.ndarray:
        try:
            return self._idle.pop()
        except IndexError:
            return np.empty(self.program.arena + 64, dtype=np.uint8)

    def run(self, codes: Tensor) -> dict[str, Tensor]:
        images = codes.shape[0]
        threads = max(1, min(torch.get_num_threads(), images))
        arenas = [self._arena() for _ in range(threads)]
        outputs = {name: torch.empty((images, *shape), dtype=torch.int64) for name, shape in self.program.outputs}
        to = np.array([t.data_ptr() for t in outputs.values()], dtype=np.int64)
        rooms = np.array([-(-a.ctypes.data // 64) * 64 for a in arenas], dtype=np.int64)
        words, codes = self.program.words, codes.contiguous()
        self.engine.handle.ql_run(
            words.ctypes.data, words.size, codes.data_ptr(), codes[0].numel(), images, to.ctypes.data, rooms.ctypes.data, threads
        )
        self._idle += arenas
        return outputs


_programs: weakref.WeakKeyDictionary[Graph, dict[object, _Ready | Refused]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _choice() -> str:
    choice = os.environ.get("QUANTLIB_ENGINE") or "native"
    if choice not in CHOICES:
        raise ValueError(f"QUANTLIB_ENGINE is {choice!r}; it may be {', '.join(CHOICES)}")
    return choice


def _ready(graph: Graph, keep: frozenset[str]) -> _Ready:
    """Raises Unavailable or Refused."""
    choice = _choice()
    if choice == "torch":
        raise Unavailable("QUANTLIB_ENGINE is torch")
    engine = library(choice)
    with _lock:
        known = _programs.setdefault(graph, {})
        found = known.get((engine.path, keep))
        if found is None:
            try:
                found = _Ready(translate(graph, keep, engine), engine)
            except Refused as error:
                found = error
            known[engine.path, keep] = found
            while len(known) > KEPT:
                del known[next(iter(known))]
    if isinstance(found, Refused):
        raise found
    return found


def execute(graph: Graph, codes: Tensor, keep: Iterable[str]) -> dict[str, Tensor] | None:
    """The edges in `keep`, in that order, as int64 (N, *shape) for input codes int64 (N, *shape); None where the engine does not run here.

    That is: not on the CPU, no compiler, an op without a kernel, codes outside the input's interval. Uses torch.get_num_threads() threads,
    each on images of its own.
    """
    t, wanted = graph.input.type, list(keep)
    if codes.device.type != "cpu" or codes.dtype is not torch.int64 or not wanted or tuple(codes.shape[1:]) != t.shape:
        return None
    try:
        ready = _ready(graph, frozenset(wanted))
    except (Unavailable, Refused):
        return None
    low, high = torch.aminmax(codes)
    if low < t.lo or high > t.hi:
        return None
    edges = ready.run(codes)
    return {name: edges[name] for name in wanted}


def describe(graph: Graph) -> tuple[bool, str]:
    """(does the engine run this graph, which body it uses or why it does not)."""
    try:
        return True, str(_ready(graph, frozenset(graph.outputs)).engine)
    except (Unavailable, Refused) as reason:
        return False, str(reason)
