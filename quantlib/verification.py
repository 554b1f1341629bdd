"""Compare an integer network with its model, code by code.

The reference shares no table with the graph: the recorded model runs in float64 with every integer edge snapped to its grid, v = scale
* round((v - b) / scale) + b, and each snap must move the value by less than 1e-6 of a step, which proves the edge's scale on the way.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantlib import evaluator, ops, tails
from quantlib.capture import CaptureError, unwrapped, values_of
from quantlib.ir import Graph, Grid
from quantlib.lowering import Conversion, lower
from quantlib.snapping import VerifyError, codes_and_noise, replay_snapped


@dataclass(frozen=True)
class Row:
    """One integer edge: how many codes were compared and how many differ, against the snapped float64 model, plain float64 and plain
    float32.

    ties: decision points that an integer of the interval hits exactly. sensitive: thresholds so close to an integer that float32 may
    decide otherwise.
    """

    name: str
    source: str
    op: str
    codes: int
    mismatches: int
    float64: int
    float32: int
    ties: int
    sensitive: int


@dataclass(frozen=True)
class Mismatch:
    """The first differing code, and what led to it."""

    name: str
    source: str
    image: int
    channel: int
    pixel: tuple[int, ...]
    code: int
    expected: int
    value: float
    accumulator: int | None
    threshold: int | None

    def __str__(self) -> str:
        place = f"{self.name} ({self.source}): image {self.image}, channel {self.channel}, pixel {self.pixel}"
        text = f"{place}: code {self.code}, the model has {self.expected} ({self.value:.9g})"
        if self.accumulator is not None:
            text += f"; accumulator {self.accumulator}"
        if self.threshold is not None:
            text += f", nearest threshold {self.threshold}"
        return text


@dataclass(frozen=True)
class Check:
    """What `verify` found. ok: no code differs and every snap held; output_error: largest |ql.run - model| of the snapped model's real
    outputs.
    """

    rows: tuple[Row, ...]
    first: Mismatch | None
    images: int
    output_error: float
    engine: str = field(default="")

    @property
    def ok(self) -> bool:
        return all(r.mismatches == 0 for r in self.rows)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def mismatches(self) -> int:
        return sum(r.mismatches for r in self.rows)

    @property
    def codes(self) -> int:
        return sum(r.codes for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "images": self.images,
            "codes": self.codes,
            "mismatches": self.mismatches,
            "output_error": self.output_error,
            "engine": self.engine,
            "first": None if self.first is None else asdict(self.first),
            "rows": [asdict(r) for r in self.rows],
        }

    def __str__(self) -> str:
        head = (
            f"{'exact' if self.ok else 'NOT exact'}: {self.mismatches} of {self.codes} codes differ on {self.images} images ({self.engine})"
        )
        widths = [max([len(str(getattr(r, k))) for r in self.rows] + [len(k)]) for k in ("name", "op", "codes")]
        lines = [f"{'name':{widths[0]}}  {'op':{widths[1]}}  {'codes':>{widths[2]}}  differ  float64  float32  ties  sensitive"]
        for r in self.rows:
            counts = f"{r.mismatches:6}  {r.float64:7}  {r.float32:7}  {r.ties:4}  {r.sensitive:9}"
            lines.append(f"{r.name:{widths[0]}}  {r.op:{widths[1]}}  {r.codes:>{widths[2]}}  {counts}")
        return "\n".join([head, *([f"first: {self.first}"] if self.first else []), *lines])


def _margins(conversion: Conversion, name: str) -> tuple[int, int]:
    """Ties and float32-sensitive thresholds of a Threshold node, measured with the trained modules around each threshold."""
    node, known = conversion.graph.by_name[name], conversion.tails.get(name)
    if known is None or not isinstance(node.op, ops.Threshold) or known[0].pre is None:
        return 0, 0
    value, edge, grid = known
    sign, thresholds = node.op.sign[:, None], node.op.thresholds
    t = edge.type
    low, high = np.where(sign > 0, t.lo, -t.hi), np.where(sign > 0, t.hi, -t.lo)
    inside = (thresholds > low) & (thresholds <= high)
    full = np.broadcast_to(np.where(inside, thresholds, low), (value.shape[0], thresholds.shape[1]))
    inside = np.broadcast_to(inside, full.shape)
    signs = np.broadcast_to(sign, (value.shape[0], 1))
    ties = sensitive = np.zeros(full.shape, dtype=bool)
    for n in (full, full - t.step):
        units = tails.codes_of(value, {edge.name: tails.real_of(edge, np.clip(signs * n, t.lo, t.hi).T)}, grid, before=True).T / grid.step
        decision = 0.5 if grid.step == 1 else 0.0  # a two-level sign decides at 0; finer grids between two codes
        distance = np.abs(units - decision - np.rint(units - decision))
        ties = ties | (distance == 0)
        sensitive = sensitive | (distance < 2.0**-20 * np.maximum(1, np.abs(units)))
    return int((ties & inside).sum()), int((sensitive & inside).sum())


def _images_of(graph: Graph, codes: Tensor) -> Tensor:
    """Real images that the model's own input quantizer turns into these codes: for each code the first float32 that reaches it."""
    t, front = graph.input.type, graph.front
    assert front is not None
    first = np.nextafter(front.thresholds[:, :1], np.float32(-np.inf))
    table = np.clip(np.concatenate([first, front.thresholds], axis=1), -3e38, 3e38) * front.sign[:, None].astype(np.float32)
    rows = np.broadcast_to(table, (t.shape[0], table.shape[1]))
    index = ((codes - t.lo) // t.step).numpy()
    channels = np.arange(t.shape[0]).reshape(1, -1, *[1] * (codes.dim() - 2))
    return torch.from_numpy(rows[channels, index].astype(np.float64))


def _same_meaning(graph: Graph, fresh: Graph) -> None:
    """Codes can only be compared where both graphs give them the same real meaning: nodes, scales and decodes."""
    again = "the graph was made from another state of this model, or was changed; convert again"
    for node in fresh:
        if node.name not in graph.by_name:
            raise VerifyError(f"the graph was not made from this model: it has no node {node.name}")
        t = graph.by_name[node.name].type
        if t.shape != node.type.shape:
            raise VerifyError(f"{node.name}: its shape is {t.shape}, the model's is {node.type.shape}: {again}")
        if not t.same_scale(node.type):
            ours, theirs = (float(np.asarray(s.scale).reshape(-1)[0]) for s in (t, node.type))
            raise VerifyError(f"{node.name}: its scale is {ours:.9g}, the model's is {theirs:.9g}: {again}")
    if len(graph.decodes) != len(fresh.decodes):
        raise VerifyError(f"the graph has {len(graph.decodes)} outputs, the model {len(fresh.decodes)}: {again}")
    for k, (a, b) in enumerate(zip(graph.decodes, fresh.decodes, strict=True)):
        arrays = zip((*a.gains, a.bias), (*b.gains, b.bias), strict=False)
        if (a.inputs, a.shape) != (b.inputs, b.shape) or not all(np.array_equal(i, j) for i, j in arrays):
            raise VerifyError(f"output {k}: its gain, bias or shape is not that of the model: {again}")


def verify(model: nn.Module, graph: Graph, x: Any) -> Check:
    """Run model and graph on images x (as `ql.run` takes them) and compare the integer code of every quantizer and accumulator.

    Returns a Check: counts per edge, the first mismatch by layer, channel, pixel, accumulator and threshold, exact ties,
    float32-sensitive thresholds, and, for information, how many codes plain float64 and float32 evaluation of the model would have
    decided differently (they have no snapping, so noise at exact ties shows there). Raises VerifyError when the graph was not made
    from this model, or when a value is off its edge's grid.
    """
    t = graph.input.type
    stated = graph.front is not None
    model = unwrapped(model)
    conversion = lower(model, t.shape, None if stated else Grid(t.lo, t.hi, t.scale, t.step))
    _same_meaning(graph, conversion.graph)
    codes = evaluator.encode(graph, x).cpu()
    if graph.front is None:
        real = codes.double() * torch.tensor(np.asarray(t.scale), dtype=torch.float64)
    elif torch.as_tensor(x).is_floating_point():
        real = torch.as_tensor(x).cpu().float().double()
    else:
        real = _images_of(graph, codes)
    snaps = {k: s for k, s in conversion.snaps.items() if s.edge in graph.by_name}
    names = list(dict.fromkeys([graph.input.name, *(s.edge for s in snaps.values()), *graph.outputs]))

    single = copy.deepcopy(model).cpu().float().eval()
    counts: dict[int, list[int]] = {k: [0, 0, 0, 0] for k in snaps}
    first: Mismatch | None = None
    output_error, start = 0.0, 0
    for part, part_codes in zip(real.split(evaluator.CHUNK), codes.split(evaluator.CHUNK), strict=True):
        values = evaluator.execute(graph, part_codes, names)
        expected: dict[int, tuple[Tensor, Tensor]] = {}
        output = replay_snapped(conversion, part, lambda index, n, v, seen=expected: seen.__setitem__(index, (n, v)))  # type: ignore[misc]
        plain64, plain32 = values_of(conversion.record.model, part), values_of(single, part.float())
        for index, known in snaps.items():
            n, v = expected[index]
            got = values[known.edge].reshape(n.shape)
            differ = got != n.long()
            rates = [int((codes_and_noise(p[index], known)[0] != n).sum()) for p in (plain64, plain32)]
            for k, c in enumerate((n.numel(), int(differ.sum()), *rates)):
                counts[index][k] += c
            if first is None and bool(differ.any()):
                first = _first(graph, known, values, got, n.long(), v, differ, start, part_codes)
        decoded = evaluator.decode(graph, {k: values[k] for k in graph.outputs})
        for y, reference in zip(_flat(decoded), _flat(output), strict=True):
            output_error = max(output_error, float((y.double() - reference.reshape(y.shape)).abs().max()))
        start += len(part)
    rows = []
    for index, known in snaps.items():
        node = graph.by_name[known.edge]
        ties, sensitive = _margins(conversion, known.edge)
        codes_, differ_, in64, in32 = counts[index]
        rows.append(Row(known.edge, known.source, type(node.op).__name__, codes_, differ_, in64, in32, ties, sensitive))
    return Check(tuple(rows), first, len(codes), output_error, evaluator.engine(graph))


def _flat(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return (
        [t for item in (tree.values() if isinstance(tree, dict) else tree) for t in _flat(item)]
        if isinstance(tree, dict | list | tuple)
        else []
    )


def _first(
    graph: Graph, known: Any, values: dict[str, Tensor], got: Tensor, n: Tensor, v: Tensor, differ: Tensor, start: int, codes: Tensor
) -> Mismatch:
    where = tuple(int(i) for i in differ.nonzero()[0])
    node = graph.by_name[known.edge]
    accumulator = threshold = None
    if node.inputs:
        source = node.inputs[0]
        before = values[source] if source in values else evaluator.execute(graph, codes, [source])[source]
        if before.shape == got.shape:
            accumulator = int(before[where])
            if isinstance(node.op, ops.Threshold):
                c = where[1] if len(node.op.thresholds) > 1 else 0
                sign = int(node.op.sign[where[1] if len(node.op.sign) > 1 else 0])
                row = node.op.thresholds[c] * sign
                threshold = int(row[np.abs(row - accumulator).argmin()])
    return Mismatch(
        known.edge,
        known.source,
        start + where[0],
        where[1],
        where[2:],
        int(got[where]),
        int(n[where]),
        float(v[where]),
        accumulator,
        threshold,
    )


__all__ = ["CaptureError", "Check", "Mismatch", "Row", "VerifyError", "verify"]
