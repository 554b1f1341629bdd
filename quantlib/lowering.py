"""From a PyTorch model to an integer network: record a run, lower call by call, apply the tail rule, clean up.

`Lowering` is what layers and rules talk to. Values in flight are integer edges (Edge), the real network input (RealInput), or
expressions that are still real (Map, Move): a quantizer turns those into an edge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantlib import _brevitas, _torch, ops, passes, tails
from quantlib.capture import Call, CaptureError, Record, Ref, capture, give_back, unwrapped, walk
from quantlib.ir import Decode, Front, Graph, GraphError, Grid, IntType, Node
from quantlib.snapping import prove
from quantlib.tails import ConversionError, Edge, Map, Move, RealInput, Value

Sides = tuple[int, int, int, int]
GIVE_BACK = 8  # calls after which the memory of their tables goes back to the system
MANY_SCALES = 4  # scales among the inputs of a convolution up to which it gets one accumulator for each


@dataclass(frozen=True, eq=False)
class Snap:
    """A value of the record that is an integer edge: real = scale * n + bias, scale and bias broadcast to (C, H, W)."""

    edge: str
    scale: np.ndarray
    bias: np.ndarray
    source: str


@dataclass
class Lowering:
    """The graph under construction, and the verbs with which layers and rules build it."""

    record: Record
    nodes: dict[str, Node] = field(default_factory=dict)
    env: dict[int, Any] = field(default_factory=dict)
    call: Call | None = None
    front_: Front | None = None
    snaps: dict[int, Snap] = field(default_factory=dict)
    views: dict[str, tuple[Edge, np.ndarray]] = field(default_factory=dict)
    settled: dict[int, tuple[Value, Edge | None]] = field(default_factory=dict)
    tails: dict[str, tuple[Map, Edge, Grid]] = field(default_factory=dict)

    # -------------------------------------------------------- context

    @property
    def path(self) -> str:
        """Where we are in the user's model, for messages."""
        if self.call is None:
            return "the model"
        return self.call.name if isinstance(self.call.target, nn.Module) else f"{self.call.name} at {self.call.line}"

    def value(self, index: int) -> Value:
        return self.env[index]  # type: ignore[no-any-return]

    def shape(self, x: Value) -> tuple[int, ...]:
        return x.shape

    def map_shape(self, x: Value) -> tuple[int, int, int]:
        """(C, H, W) of a feature map; a clear error for anything else."""
        if len(x.shape) != 3:
            raise ConversionError(f"{self.path}: expects a feature map (N, C, H, W), got (N, {', '.join(map(str, x.shape))})")
        return x.shape  # type: ignore[return-value]

    def quant_argument(self) -> Any:
        """The Brevitas metadata of this call's input, or None when a plain tensor came in."""
        assert self.call is not None
        first = self.call.args[0] if self.call.args else None
        return first.quant if isinstance(first, Ref) else None

    # -------------------------------------------------------- nodes

    def _name(self, op: ops.Op) -> str:
        base = self.call.name if self.call is not None else "output"
        kind = type(op).__name__.lower()
        name, k = (base, 1) if base not in self.nodes and base != "input" else (f"{base}.{kind}", 1)
        while name in self.nodes:
            k += 1
            name = f"{base}.{kind}{k}"
        return name

    def add(self, op: ops.Op, *edges: Value, scale: Any = None) -> Edge:
        """Append an op; scale overrides the output scale that the op infers."""
        inputs = tuple(self.integer(e) for e in edges)
        try:
            out = op.infer(*(e.type for e in inputs))
        except GraphError as error:
            raise ConversionError(f"{self.path}: {error}") from error
        if scale is not None:
            out = out.with_scale(self._fit_scale(scale, out.shape))
        shared = f" is {self.call.first}" if self.call is not None and self.call.first != self.call.path else ""
        node = Node(self._name(op), op, tuple(e.name for e in inputs), out, self.path + shared)
        self.nodes[node.name] = node
        return Edge(node.name, out)

    def _fit_scale(self, scale: Any, shape: tuple[int, ...]) -> np.ndarray:
        """A per-tensor or per-channel scale in a form that broadcasts to `shape`; all-equal scales become one number."""
        array = np.asarray(scale, dtype=np.float64)
        if array.size == 1 or (array == array.reshape(-1)[0]).all():
            return array.reshape(-1)[0]
        if array.ndim == 1 and len(shape) > 1:
            array = array.reshape(-1, *[1] * (len(shape) - 1))
        while array.ndim > len(shape) and array.shape[0] == 1:
            array = array[0]
        return array

    def input(self, grid: Grid) -> Edge:
        if any(isinstance(n.op, ops.Input) for n in self.nodes.values()):
            raise ConversionError(
                f"{self.path}: the real input of the network is quantized in two places; quantize it once, or pass "
                f"input=ql.Grid(lo, hi, scale)"
            )
        shape = self.record.input_shape
        op = ops.Input(shape, grid.lo, grid.hi, grid.step)
        node = Node("input", op, (), op.infer().with_scale(self._fit_scale(grid.scale, shape)), "input")
        self.nodes = {"input": node, **self.nodes}
        return Edge("input", node.type)

    def front(self, value: Map, leaf: RealInput, grid: Grid) -> Edge:
        """The model's own input quantizer: the input node carries its codes, and a table says from which float32 on each code is
        reached.
        """
        if not np.all(tails.monotone(value)):
            raise ConversionError(f"{value.label}: a non-monotone step in front of the input quantizer; quantize the input first")
        if value.shape != self.record.input_shape:
            raise ConversionError(
                f"{value.label}: the input changes shape before it is quantized; quantize it first, or pass input=ql.Grid(lo, hi, scale)"
            )
        self.front_ = _measure_front(value, leaf, grid)
        return self.input(grid)

    # -------------------------------------------------------- the verbs of layers

    def integer(self, x: Value) -> Edge:
        """x as an integer edge. Elementwise steps that keep an edge on a grid (a positive multiplier, ReLU on codes) are absorbed; a
        real value is an error.
        """
        if isinstance(x, Edge):
            return x
        if isinstance(x, RealInput):
            raise ConversionError(
                f"{self.path}: it reads the real-valued input of the network. Say what integers the image has, convert(..., "
                f"input=ql.Grid(0, 255, 1 / 255)), "
                "or begin the model with an input quantizer (QuantIdentity, ThermometerEncoder)."
            )
        edge = self._settled(x)
        if edge is None:
            raise ConversionError(
                f"{self.path}: it needs integers, but its input is the real-valued result of {x.label}. Put a quantizer in "
                f"between (QuantIdentity, QuantReLU, "
                "SharedHardTanh after a residual add, or FixedPoint(bits, fraction) where a real-valued join is wanted)."
            )
        return edge

    def _settled(self, x: Map | Move) -> Edge | None:
        """`_still_integer`, made once however many layers read x."""
        if id(x) not in self.settled:
            self.settled[id(x)] = x, self._still_integer(x)
        return self.settled[id(x)][1]

    def _still_integer(self, x: Map | Move) -> Edge | None:
        """An expression over one edge whose every value is scale' * integer, with one scale' per channel."""
        if isinstance(x, Move):
            args = [self._still_integer(a) if isinstance(a, Map | Move) else a for a in x.args]
            return x.apply(self, *args) if all(isinstance(a, Edge) for a in args) else None
        leaves = tails.frontier(x)
        if len(leaves) != 1:
            return None
        (leaf,) = leaves
        if isinstance(leaf, Move):
            moved = self._still_integer(leaf)
            return None if moved is None else self._still_integer(tails.substitute(x, leaf, moved))
        if not isinstance(leaf, Edge) or leaf.type.levels > 1 << 16:
            return None
        n = tails.integers(leaf.type)
        real = tails.evaluate(x, {leaf.name: tails.real_of(leaf, n[:, None])}).reshape(len(n), -1).numpy()
        if real.shape[1] != x.shape[0]:
            return None
        base = tails.edge_scale(leaf)
        for scale in (base, np.abs(real[-1] / n[-1]) if n[-1] else base):
            if not (scale > 0).all():
                continue
            codes = real / scale
            if np.abs(codes - np.rint(codes)).max() > 1e-9 or np.abs(codes).max() > 1 << 24:
                continue
            if np.array_equal(np.rint(codes), np.broadcast_to(n[:, None], codes.shape)):
                return leaf if scale is base else self.add(ops.Reshape(leaf.shape), leaf, scale=scale)
            low, high = int(np.rint(codes.min())), int(np.rint(codes.max()))
            if low == high:  # a constant, such as the zeros of a padded shortcut
                constant = ops.Requant(mul=np.zeros(1, dtype=np.int64), add=np.array([low]), shift=0, lo=low, hi=low)
                return self.add(constant, leaf, scale=scale)
            return tails.settle(self, x, Grid(low, high, self._fit_scale(scale, x.shape)))
        return None

    def map(
        self, fn: Callable[..., Tensor], *args: Value, monotone: bool | np.ndarray = True, affine: bool = False, uniform: bool = False
    ) -> Value:
        return Map(fn, self._spread(args), self.path, monotone, affine, uniform)

    def _spread(self, args: tuple[Value, ...]) -> tuple[Value, ...]:
        """Arguments of one shape: axes of size 1 (a per-channel gate on a feature map) are repeated."""
        if len({len(a.shape) for a in args}) > 1:
            raise ConversionError(
                f"{self.path}: batches of shapes {' and '.join(f'(N, {str(a.shape)[1:]}' for a in args)} meet in an "
                f"elementwise step; give them the same axes"
            )
        shape = np.broadcast_shapes(*(a.shape for a in args))
        return tuple(a if a.shape == shape else self.rearrange(lambda t: [t.expand(len(t), *shape)], a)[0] for a in args)

    def elementwise(self, fn: Callable[[Tensor], Tensor], x: Value, increasing: bool | Tensor = True) -> Value:
        """An elementwise real step with per-channel constants; `increasing` declares where it is non-decreasing (bool or (C,))."""
        flag = _torch.per_channel_flag(increasing) if isinstance(increasing, Tensor) else bool(increasing)
        return Map(fn, (x,), self.path, flag)

    def shift(self, edge: Edge, bias: Any) -> Value:
        """The real value scale * n + bias[c]."""
        return self.bias(edge, np.asarray(bias.detach() if isinstance(bias, Tensor) else bias, dtype=np.float64))

    def bias(self, y: Value, bias: np.ndarray) -> Value:
        constant = torch.from_numpy(np.array(bias, dtype=np.float64).reshape(-1))
        add = lambda t: t + constant.reshape(1, -1, *[1] * (t.dim() - 2))  # noqa: E731
        known = (y, constant.numpy()) if isinstance(y, Edge) else None
        return Map(add, (y,), self.path, affine=True, shift=known)

    def quantize(self, fn: Callable[[Tensor], Tensor], x: Value, grid: Grid, monotone: bool = True, uniform: bool = False) -> Edge:
        """fn maps real values onto `grid`, non-decreasing: the tail rule turns everything between x's integer edges and here into one
        op.

        uniform declares that fn has no per-channel constants; pools and reshapes in front of it then move behind it whatever they do
        to channels.
        """
        return tails.settle(self, Map(fn, (x,), self.path, monotone, uniform=uniform, pre=lambda t: t), grid)

    def sum(self, x: Value, y: Value) -> Value:
        """x + y: an integer add where both are edges of exactly equal scale, else a join to be resolved at the next quantizer."""
        x, y = self._spread((x, y))
        if isinstance(x, Edge) != isinstance(y, Edge):  # ReLU of a residual stream is still on the stream's grid
            x, y = (v if isinstance(v, Edge) else self._same_grid(v) or v for v in (x, y))
        if isinstance(x, Edge) and isinstance(y, Edge) and x.type.same_scale(y.type):
            return self.add(ops.Add(), x, y)
        return Map(lambda a, b: a + b, (x, y), self.path, affine=True, uniform=True)

    def product(self, x: Edge, y: Edge) -> Edge:
        """x * y as integers; one of them may be one factor per channel."""
        for a, b in ((x, y), (y, x)):
            if b.shape in (a.shape, ops.Multiply.gate(a.type)):
                return self.add(ops.Multiply(), a, b)
        return self.add(ops.Multiply(), *self._spread((x, y)))

    def _same_grid(self, x: Value) -> Edge | None:
        """Elementwise steps without constants over one edge, as an edge if they leave its grid to it."""
        leaves = tails.frontier(x)
        if not isinstance(x, Map) or len(leaves) != 1 or not isinstance(leaves[0], Edge) or not tails.every(x, "uniform"):
            return None
        edge = self._settled(x)
        return edge if edge is not None and edge.type.same_scale(leaves[0].type) else None

    # -------------------------------------------------------- convolutions

    def conv2d(
        self,
        edge: Edge,
        codes: np.ndarray,
        scale: np.ndarray,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        padding_mode: str = "zeros",
    ) -> Value:
        """Exact integer convolution; scale (O,) of the weights times the input's scale, which must be one number per group of input
        channels.
        """
        channels, height, width = self.map_shape(edge)
        if padding_mode != "zeros":
            raise ConversionError(
                f"{self.path}: padding_mode={padding_mode!r}; only zero padding has an integer meaning here (F.pad in front of the layer)"
            )
        stride, dilation = _torch.pair(stride), _torch.pair(dilation)
        sides = _conv_sides(padding, codes.shape[2:], dilation)
        if groups == 1:
            return self._per_scale(
                edge, lambda e, read, s: self.add(ops.Conv2d(codes[:, read], stride, sides, dilation), e, scale=s * scale)
            )
        rows = self._input_scales(edge, channels // groups, groups)
        per_output = rows.repeat(codes.shape[0] // groups)
        return self.add(ops.Conv2d(codes, stride, sides, dilation, groups), edge, scale=np.asarray(per_output * scale))

    def dense(self, edge: Edge, codes: np.ndarray, scale: np.ndarray) -> Value:
        if len(edge.shape) != 1:
            raise ConversionError(
                f"{self.path}: a linear layer on a batch of shape (N, {', '.join(map(str, edge.shape))}); flatten to (N, features) first"
            )
        return self._per_scale(edge, lambda e, read, s: self.add(ops.Dense(codes[:, read]), e, scale=s * scale))

    def _per_scale(self, edge: Edge, multiply: Callable[[Edge, Any, float], Edge]) -> Value:
        """One accumulator where all channels have one scale. After a concat of a few quantizers one accumulator for each of their scales,
        summed as real numbers: exact at the network's output, elsewhere a join of wide operands.
        """
        scales = np.broadcast_to(tails.channel_scale(edge.type.scale, edge.shape, self.path), edge.shape[:1])
        different = np.unique(scales)
        if len(different) == 1:
            return multiply(edge, slice(None), float(different[0]))
        if len(different) > MANY_SCALES or len(different) == len(scales) > 2:  # a scale per channel, not a concat
            self._input_scales(edge, edge.shape[0], 1)  # raises
        sums = []
        for scale in different:
            read = np.flatnonzero(scales == scale)
            sums.append(multiply(self.add(ops.Select(read), edge, scale=scale), read, float(scale)))
        label = f"{self.path}, whose input {edge.name} holds different scales"
        return Map(lambda *t: sum(t[1:], t[0]), tuple(sums), label, affine=True, uniform=True)

    def _input_scales(self, edge: Edge, size: int, groups: int) -> np.ndarray:
        scales = tails.channel_scale(edge.type.scale, edge.shape, self.path)
        if scales.size == 1:
            return scales.repeat(groups)
        grouped = scales.reshape(groups, size)
        if not (grouped == grouped[:, :1]).all():
            raise ConversionError(
                f"{self.path}: its input channels have different scales ({edge.name}), so their products cannot be summed as "
                f"integers. After a concat, share one "
                "quantizer between the branches or quantize again behind it; per-channel activation scales may only feed a "
                "depthwise convolution."
            )
        return np.ascontiguousarray(grouped[:, 0])

    # -------------------------------------------------------- pools and rearrangements

    def _move(
        self, kind: str, apply: Callable[..., Edge], args: tuple[Value, ...], shape: tuple[int, ...], index: np.ndarray | None = None
    ) -> Value:
        if all(isinstance(a, Edge) for a in args):
            return apply(self, *args)
        return Move(kind, apply, args, shape, self.path, index)

    def _pooled(self, op: ops.Op, x: Value) -> tuple[int, ...]:
        return op.infer(IntType(x.shape, 0, 1)).shape

    def max_pool(
        self, x: Value, kernel: tuple[int, int], stride: tuple[int, int], sides: Sides, dilation: tuple[int, int], ceil: bool
    ) -> Value:
        self.map_shape(x)
        op = ops.MaxPool(kernel, stride, sides, dilation, ceil)
        return self._move("max", lambda g, e: g.add(op, e, scale=e.type.scale), (x,), self._pooled(op, x))

    def mean_pool(
        self, x: Value, kernel: tuple[int, int], stride: tuple[int, int], sides: Sides, divisor: int, scale: float | None = None
    ) -> Value:
        """Integer window sum; the divisor goes into the scale."""
        op = ops.SumPool(kernel, stride, sides)
        apply = lambda g, e: g.add(op, e, scale=e.type.scale / divisor if scale is None else scale)  # noqa: E731
        return self._move("padded mean" if any(sides) else "mean", apply, (x,), self._pooled(op, x))

    def mean_pool_module(self, module: nn.Module, x: Value) -> Value:
        return _torch.mean_pool_module(self, module, x)

    def sum_pool_module(self, module: nn.Module, edge: Edge, scale: float) -> Edge:
        return self.integer(_torch.mean_pool_module(self, module, edge, scale))

    def pad(self, x: Value, before: tuple[int, int, int], after: tuple[int, int, int]) -> Value:
        if not any((*before, *after)):
            return x
        shape = tuple(b + s + a for b, s, a in zip(before, x.shape, after, strict=True))
        if before[0] or after[0]:
            x = self.integer(x)
        return self._move("pad", lambda g, e: g._padded(e, before, after), (x,), shape)

    def _padded(self, edge: Edge, before: tuple[int, int, int], after: tuple[int, int, int]) -> Edge:
        scale = edge.type.scale
        if np.asarray(scale).size > 1 and (before[0] or after[0]):
            full = np.broadcast_to(scale, edge.shape)[:, :1, :1]
            scale = np.pad(full, ((before[0], after[0]), (0, 0), (0, 0)), mode="edge")
        return self.add(ops.Pad(before, after), edge, scale=scale)

    def rearrange(self, run: Callable[..., list[Tensor]], *values: Value) -> list[Value]:
        """Anything that only moves elements: `run` is carried out on the element numbers themselves, and what comes out is the index."""
        sources: dict[int, Value] = {}  # what is moved, each once; a move of a move is one move of what lies below
        for v in values:
            below = v.args if isinstance(v, Move) and v.kind == "move" else (v,)
            sources |= {id(b): b for b in below}
        bases = dict(zip(sources, np.cumsum([0, *(prod(v.shape) for v in sources.values())])[:-1].tolist(), strict=True))
        total = sum(prod(v.shape) for v in sources.values())
        numbers = []
        for v in values:
            if isinstance(v, Move) and v.index is not None and v.kind == "move":
                places = np.concatenate([np.arange(prod(b.shape)) + bases[id(b)] for b in v.args])[v.index]
            else:
                places = np.arange(prod(v.shape)).reshape(v.shape) + bases[id(v)]
            one = torch.from_numpy(places.astype(np.float64))[None]
            numbers.append(torch.cat([one, one + total]))
        values = tuple(sources.values())
        out: list[Value] = []
        for moved in run(*numbers):
            if moved.dim() < 2 or moved.shape[0] != 2 or not torch.equal(moved[1], moved[0] + total):
                raise ConversionError(f"{self.path}: it moves data across the batch axis; every image must stay on its own")
            index = moved[0].to(torch.int64).numpy()
            out.append(self._move("move", lambda g, *e, index=index: g._view(e, index), values, index.shape, index))
        return out

    def _view(self, edges: tuple[Edge, ...], index: np.ndarray) -> Edge:
        if len(edges) > 1:
            total = sum(e.type.numel for e in edges)
            used = np.unique(np.searchsorted(np.cumsum([e.type.numel for e in edges]), index.reshape(-1), side="right"))
            if len(used) == 1:  # reads only one of them
                base = sum(e.type.numel for e in edges[: used[0]])
                return self._view((edges[used[0]],), index - base)
            straight = (
                index.size == total
                and np.array_equal(index.reshape(-1), np.arange(total))
                and all(e.shape[1:] == index.shape[1:] for e in edges)
            )
            if straight:
                return self.add(ops.Concat(), *edges)
            runs = _runs(edges, index)
            if runs is not None:
                return self.add(ops.Concat(), *(self._view((edges[i],), part) for i, part in runs))
            flat = [self._view((e,), np.arange(e.type.numel)) for e in edges]
            return self._view((self.add(ops.Concat(), *flat),), index)
        (edge,) = edges
        if edge.name in self.views and edge.type.scale.size == 1:  # a view of a view is a view of the first
            first, inner = self.views[edge.name]
            if first.type.same_scale(first.type.with_scale(edge.type.scale)):
                edge, index = first, inner.reshape(-1)[index]
        op = _view_op(edge.shape, index)
        if op is None:
            return edge
        if isinstance(op, ops.Rearrange):
            slices = _slices(edge.shape, index)
            if slices is not None:
                return self.add(ops.Concat(), *(self.add(s, edge) for s in slices))
        result = self.add(op, edge)
        self.views[result.name] = (edge, index)
        return result

    def expand(self, edge: Edge, shape: tuple[int, ...]) -> Edge:
        """An edge with axes of size 1 spread to `shape` (a per-channel gate on a feature map)."""
        if edge.shape == shape:
            return edge
        if len(edge.shape) != len(shape):
            raise ConversionError(f"{self.path}: shapes {edge.shape} and {shape} meet in an elementwise step")
        return self._view((edge,), np.ascontiguousarray(np.broadcast_to(np.arange(edge.type.numel).reshape(edge.shape), shape)))


def _conv_sides(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, int]) -> Sides:
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    h, w = _torch.pair(padding)
    return h, h, w, w


def _runs(edges: tuple[Edge, ...], index: np.ndarray) -> list[tuple[int, np.ndarray]] | None:
    """The index of a map as one run of channels per edge, each with positions in its own edge; None where edges are interleaved."""
    if index.ndim != 3:
        return None
    bases = np.cumsum([0, *(e.type.numel for e in edges)])
    owner = np.searchsorted(bases[1:], index.reshape(len(index), -1), side="right")
    if not (owner == owner[:, :1]).all():
        return None
    starts = np.flatnonzero(np.diff(owner[:, 0], prepend=-1))
    if len(starts) > len(edges):
        return None
    return [(int(owner[a, 0]), part - bases[owner[a, 0]]) for a, part in zip(starts, np.split(index, starts[1:]), strict=True)]


def _slices(shape: tuple[int, ...], index: np.ndarray) -> list[ops.Slice2d] | None:
    """Space to depth: blocks of all channels, each a strided slice of the map. As slices they stream; a Rearrange holds the whole map."""
    if index.ndim != 3 or len(shape) != 3 or len(index) == shape[0] or len(index) % shape[0]:
        return None
    found = [_view_op(shape, block) for block in np.split(index, len(index) // shape[0])]
    return [op for op in found if isinstance(op, ops.Slice2d)] if all(isinstance(op, ops.Slice2d) for op in found) else None


def _view_op(shape: tuple[int, ...], index: np.ndarray) -> ops.Op | None:
    """The plainest op for an index: none, Reshape, Select, Slice2d, or Rearrange."""
    numel = prod(shape)
    if index.size == numel and np.array_equal(index.reshape(-1), np.arange(numel)):
        return None if index.shape == shape else ops.Reshape(index.shape)
    if index.ndim == len(shape) and index.shape[1:] == shape[1:]:
        area = prod(shape[1:])
        channels = index.reshape(len(index), -1)[:, 0] // area
        if np.array_equal(index.reshape(len(index), -1), channels[:, None] * area + np.arange(area)):
            return ops.Select(channels)
    if index.ndim == 3 and len(shape) == 3 and index.shape[0] == shape[0]:
        rows, cols = index[0, :, 0] // shape[2], index[0, 0, :] % shape[2]
        steps = [int(np.diff(v)[0]) if len(v) > 1 else 1 for v in (rows, cols)]
        if all(s > 0 for s in steps):
            slices = [(int(v[0]), int(v[-1]) + 1, s) for v, s in zip((rows, cols), steps, strict=True)]
            full = np.arange(numel).reshape(shape)[:, slice(*slices[0]), slice(*slices[1])]
            if np.array_equal(full, index):
                return ops.Slice2d(*slices)
    return ops.Rearrange(index)


# ---------------------------------------------------------------- the input's front end


def _measure_front(value: Map, leaf: RealInput, grid: Grid) -> Front:
    """For each level the smallest float32 that reaches it, by bisection over the ordered float32 numbers (32 steps)."""
    channels, count = value.shape[0], grid.levels - 1
    levels = grid.lo + grid.step * np.arange(1, grid.levels)

    def codes(x: np.ndarray) -> np.ndarray:
        """x (L, C) float32 -> codes (L, C); infinities stand for the ends."""
        clipped = np.clip(x.astype(np.float64), -3.4e38, 3.4e38)
        return tails.codes_of(value, {id(leaf): tails.layout(leaf.shape, clipped)}, grid)

    ends = codes(np.array([[-3e38], [3e38]], dtype=np.float32).repeat(channels, 1))
    sign = np.where(ends[1] < ends[0], -1, 1)
    top = int(np.float32(np.finfo(np.float32).max).view(np.int32))
    below = np.full((count, channels), -top - 1, dtype=np.int64)
    above = np.full((count, channels), top + 1, dtype=np.int64)
    while (above - below > 1).any():
        middle = (below + above) // 2
        clipped = np.clip(middle, -top, top)
        reached = codes(_ordered(clipped) * sign) >= levels[:, None]
        wide = above - below > 1
        above, below = np.where(wide & reached, middle, above), np.where(wide & ~reached, middle, below)
    thresholds = np.where(above > top, np.inf, np.where(above < -top, -np.inf, _ordered(np.clip(above, -top, top)))).astype(np.float32)
    rows = tails.compress(np.ascontiguousarray(thresholds.T), sign[:, None].astype(np.int64))
    return Front(rows[0], rows[1][:, 0])


def _ordered(key: np.ndarray) -> np.ndarray:
    """The float32 number at place `key` of the ordered float32 numbers; 0 is 0.0 and -key is the negative of key."""
    magnitude = np.abs(key).astype(np.int32).view(np.float32)
    return np.where(key < 0, -magnitude, magnitude).astype(np.float32)


# ---------------------------------------------------------------- outputs


def _decode(g: Lowering, value: Value) -> Decode:
    """The real tail after the last integers, measured as gain and bias per channel."""
    if isinstance(value, RealInput):
        raise ConversionError("the model's output is its real input; there is nothing to convert")
    if isinstance(value, Move):
        value = tails.pull(g, value)
    if isinstance(value, Edge):
        return Decode((value.name,), (np.asarray(value.type.scale),), np.zeros(()), value.shape)
    assert isinstance(value, Map)
    value = tails.pull_all(g, value)
    leaves = tails.frontier(value)
    if any(not isinstance(leaf, Edge) for leaf in leaves):
        raise ConversionError(f"{value.label}: the network's output depends on its real input; quantize the input first")
    if not tails.every(value, "affine"):
        kept = g._still_integer(value) if len(leaves) == 1 else None
        if kept is not None:
            return _decode(g, kept)
        raise ConversionError(
            f"{value.label}: the network's output goes through a step that is not affine and not quantized. End the model "
            f"before it (apply softmax or sigmoid to "
            "the result of ql.run), or put a quantizer behind it."
        )
    edges = [g.expand(leaf, value.shape) for leaf in leaves if isinstance(leaf, Edge)]
    unit = {e.name: tails.layout(e.shape, np.zeros((1, e.shape[0]))) for e in leaves}  # type: ignore[union-attr]
    broadcast = (-1, *[1] * (len(value.shape) - 1))

    def run(env: dict[Any, Tensor]) -> np.ndarray:
        real = tails.evaluate(value, env).reshape(1, -1)
        if real.shape[1] not in (1, value.shape[0]):
            raise ConversionError(f"{value.label}: constants that change inside a channel in the real tail of the network")
        return real.expand(1, value.shape[0]).numpy().reshape(broadcast)

    bias = run(unit)
    gains = []
    for e in edges:
        far = max(e.type.magnitude, 1)
        gains.append((run(unit | {e.name: tails.real_of(e, np.array([[far]]))}) - bias) / far)
    return Decode(tuple(e.name for e in edges), tuple(gains), bias, value.shape)


# ---------------------------------------------------------------- the walk


def _lower_call(g: Lowering, call: Call) -> None:
    g.call = call
    args, kwargs = walk((call.args, call.kwargs), lambda t: g.env[t.index] if isinstance(t, Ref) else t)
    if isinstance(call.target, nn.Module):
        result = _lower_module(g, call.target, args, kwargs)
    else:
        result = _torch.lower_function(g, call, args, kwargs)
    slots: list[tuple[int, Value]] = []
    _bind(call.out, result, slots)
    for index, value in slots:
        g.env[index] = value
        if value.shape != g.record.shapes[index]:
            raise ConversionError(f"{g.path}: the lowered value has shape {value.shape}, the model's {g.record.shapes[index]}")
        known = (value, np.zeros(1)) if isinstance(value, Edge) else value.shift if isinstance(value, Map) else None
        if known is not None:
            edge, bias = known
            g.snaps[index] = Snap(edge.name, edge.type.scale, bias.reshape(-1, *[1] * (len(edge.shape) - 1)), g.path)


def _bind(out: Any, result: Any, slots: list[tuple[int, Value]]) -> None:
    if isinstance(out, Ref):
        slots.append((out.index, result))
    elif isinstance(out, list | tuple):
        for o, r in zip(out, result, strict=True):
            _bind(o, r, slots)


def _lower_module(g: Lowering, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0] if args else None, RealInput) and hasattr(module, "input_grid"):
        edge = g.input(module.input_grid())
        g.env[0] = edge
        g.snaps[0] = Snap(edge.name, edge.type.scale, np.zeros(1), "input")
        args = (edge, *args[1:])
    lower = getattr(module, "lower", None)
    if lower is not None:
        return lower(g, *args, **kwargs)
    rule = _brevitas.rule_for(module)
    if rule is not None:
        return rule(g, module, *args, **kwargs)
    return _torch.lower_module(g, module, *args, **kwargs)


def own_grid(model: nn.Module) -> Grid | None:
    """The image grid that a layer of the model states for raw image codes (ThermometerEncoder), if any."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "input_grid")]
    return layers[0].input_grid() if layers else None


def _sampler(shape: tuple[int, ...], grid: Grid | None) -> Callable[[int, int], Tensor]:
    def sample(batch: int, seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        if grid is None:
            return torch.rand(batch, *shape, dtype=torch.float64, generator=random)
        n = torch.randint(0, grid.levels, (batch, *shape), generator=random) * grid.step + grid.lo
        return n.double() * torch.from_numpy(np.array(grid.scale))

    return sample


@dataclass(frozen=True, eq=False)
class Conversion:
    """A graph together with what `verify` needs to compare it with its model: the record and where its values are integers."""

    graph: Graph
    record: Record
    snaps: dict[int, Snap]
    tails: dict[str, tuple[Map, Edge, Grid]]


def lower(model: nn.Module, input_shape: tuple[int, ...], input: Grid | None = None) -> Conversion:
    """`convert`, with the record kept beside the graph."""
    shape = tuple(int(s) for s in input_shape)
    if not shape or any(s < 1 for s in shape):
        raise ConversionError(f"input_shape is (C, H, W) or (features,) without the batch axis, got {tuple(input_shape)}")
    if not isinstance(model, nn.Module):
        raise ConversionError(f"convert takes a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    if input is not None and not isinstance(input, Grid):
        raise ConversionError(f"input is a ql.Grid(lo, hi, scale), got {type(input).__name__}")
    grid = input if input is not None else own_grid(model)
    record = capture(model, shape, _sampler(shape, grid))
    g = Lowering(record)
    g.env[0] = RealInput(shape) if input is None else g.input(input)
    if input is not None:
        g.snaps[0] = Snap("input", g.env[0].type.scale, np.zeros(1), "input")
    for k, call in enumerate(record.calls):
        if k % GIVE_BACK == 0:
            give_back()
        try:
            _lower_call(g, call)
        except (ConversionError, CaptureError):
            raise
        except GraphError as error:
            raise ConversionError(f"{g.path}: {error}") from error
    g.call = None
    outputs: list[Value] = []
    walk(record.output, lambda t: outputs.append(g.env[t.index]) if isinstance(t, Ref) else None)
    decodes = tuple(_decode(g, v) for v in outputs)
    name = type(record.model).__name__
    nodes = tuple(replace(n) for n in g.nodes.values())
    graph = Graph(nodes, decodes, g.front_, name, single_output=isinstance(record.output, Ref))
    graph = passes.run(graph)
    return Conversion(graph, record, g.snaps, g.tails)


def convert(model: nn.Module, input_shape: tuple[int, ...], input: Grid | None = None) -> Graph:
    """The integer network of `model` (eval mode), exact for every input.

    input_shape: (C, H, W) without the batch axis. input: the integer grid of the image when the model has no input quantizer of its
    own, e.g. ql.Grid(0, 255, 1 / 255) for uint8 pixels that the model sees as v / 255. The model is not changed.

    Raises ConversionError (a ValueError) naming the dotted path in the model and what would work: unsupported modules, real-valued
    weights, joins without a grid, non-monotone tails on wide accumulators, NaN parameters; CaptureError for data-dependent control
    flow and writes in place.
    """
    conversion = lower(model, input_shape, input)
    graph = conversion.graph
    give_back()
    image = _sampler(graph.input.type.shape, None if graph.front else _grid(graph))(1, 11)
    prove(conversion, image.float().double() if graph.front else image)
    return graph


def _grid(graph: Graph) -> Grid:
    t = graph.input.type
    return Grid(t.lo, t.hi, t.scale, t.step)
