"""The exact evaluator: a packed C++ engine on the CPU where g++ is found (quantlib.engine), else torch.

In torch each op runs in the narrowest carrier that is proven to hold every intermediate: float32 below 2^24, float64 below 2^53, int64
last; reduced precision (TF32, bfloat16) is switched off while it runs. Images go through in small chunks.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlib import engine as packed_engine
from quantlib.carriers import Step, fits_float32, step
from quantlib.ir import Graph, Node

CHUNK = 8  # images at a time: larger batches lose to fresh memory (measured, docs/architecture.md)
NUMBERS = 1 << 21  # of a map in a chunk: fewer images at a time where they are large
_LIMITS = ((torch.float32, 1 << 24), (torch.float64, 1 << 53), (torch.int64, 1 << 62))


class InputError(ValueError):
    """The images do not fit the network's input; the message says what would."""


def carrier(graph: Graph, node: Node) -> torch.dtype:
    """The narrowest dtype in which the node's evaluation is proven exact."""
    bound = max(node.op.magnitude(*graph.types(node)), node.type.magnitude, *(t.magnitude for t in graph.types(node)))
    for dtype, limit in _LIMITS:
        if bound < limit:
            return dtype
    raise ValueError(f"{node.name} needs integers up to {bound}, beyond 62 bits")


def engine(graph: Graph) -> str:
    """Which engine `run` uses for this graph on the CPU, in words; for carriers how many ops each of them runs, and why no other engine."""
    packed, words = packed_engine.describe(graph)
    if packed:
        return f"packed, {words} for {len(graph) - 1} ops"
    count = Counter(str(carrier(graph, n)).removeprefix("torch.") for n in graph.nodes[1:])
    return "torch, " + ", ".join(f"{k} for {v} ops" for k, v in count.most_common()) + f" ({words})"


# ---------------------------------------------------------------- images in, numbers out


def encode(graph: Graph, x: Any) -> Tensor:
    """Images as codes on the input grid, int64 (N, *input shape).

    Integer arrays (uint8 images) are codes already and must lie in the input's interval. Floats go through the model's own input
    quantizer (as float32), or must lie on the grid to within 1e-4 of a step. Raises InputError for a wrong shape, dtype, range, NaN,
    or a value off the grid.
    """
    t = graph.input.type
    try:
        x = x if isinstance(x, Tensor) else torch.from_numpy(np.require(x, requirements=["C", "W"]))
    except TypeError as error:
        raise InputError(f"images are a torch tensor or a numpy array of integers or floats: {error}") from None
    wanted = f"(N, {', '.join(map(str, t.shape))})"
    if tuple(x.shape[1:]) != t.shape or x.dim() != len(t.shape) + 1:
        hint = (
            "; add the batch axis"
            if tuple(x.shape) == t.shape
            else "; channels come first (N, C, H, W)"
            if x.dim() == 4 and x.shape[-1] == t.shape[0]
            else ""
        )
        raise InputError(f"the network reads images of shape {wanted}, got {tuple(x.shape)}{hint}")
    if x.shape[0] == 0:
        raise InputError("an empty batch: there is no image to run")
    if x.dtype is torch.bool or x.is_complex():
        raise InputError(f"images of dtype {x.dtype}; integers are codes {t.lo}..{t.hi}, floats are real values")
    if not x.is_floating_point():
        n = x.to(torch.int64)
    elif torch.isnan(x).any():
        raise InputError("the images hold NaN")
    elif graph.front is not None:
        return _through_front(graph, x)
    else:
        scale = torch.tensor(np.asarray(t.scale), dtype=torch.float64, device=x.device)
        units = x.double() / scale
        n = units.round()
        off = (units - n).abs()
        if bool((off > 1e-4).any()) or not torch.isfinite(units).all():
            worst = int(off.nan_to_num(posinf=1.0).argmax())
            raise InputError(
                f"the images are not on the input grid (scale {np.asarray(t.scale).reshape(-1)[0]:.6g}, codes {t.lo}..{t.hi}): for example "
                f"{float(x.reshape(-1)[worst]):.6g} is {float(off.reshape(-1)[worst]):.3g} steps away. Pass uint8 codes, or "
                f"values scale * n."
            )
        n = n.to(torch.int64)
    low, high = int(n.min()), int(n.max())
    if low < t.lo or high > t.hi or (t.step > 1 and bool(((n - t.lo) % t.step).any())):
        step = f" in steps of {t.step}" if t.step > 1 else ""
        raise InputError(f"input codes are {t.lo}..{t.hi}{step}, got {low}..{high}")
    return n


def _through_front(graph: Graph, x: Tensor) -> Tensor:
    t, front = graph.input.type, graph.front
    assert front is not None
    thresholds = torch.tensor(front.thresholds, device=x.device)
    sign = torch.tensor(front.sign, device=x.device, dtype=torch.float32).reshape(1, -1, *[1] * (x.dim() - 2))
    channels = (x.float() * sign).transpose(0, 1)
    rows = channels.reshape(channels.shape[0] if len(thresholds) > 1 else 1, -1).contiguous()
    count = torch.searchsorted(thresholds, rows, right=True)
    return t.lo + t.step * count.reshape(channels.shape).transpose(0, 1).contiguous()


def decode(graph: Graph, edges: Mapping[str, Tensor]) -> Any:
    """The model's output from the integers of `graph.outputs`: float64 arithmetic, rounded once to float32; a tuple where the model
    returns several.
    """
    results = []
    for d in graph.decodes:
        total: Tensor | float = torch.tensor(d.bias, dtype=torch.float64)
        for name, gain in zip(d.inputs, d.gains, strict=True):
            n = edges[name].double()
            total = total.to(n.device) + n * torch.tensor(gain, dtype=torch.float64, device=n.device)  # type: ignore[union-attr]
        assert isinstance(total, Tensor)
        results.append(total.reshape(total.shape[0], *d.shape).float())
    return results[0] if graph.single_output else tuple(results)


# ---------------------------------------------------------------- evaluation


@contextmanager
def exact() -> Iterator[None]:
    """Full float32 everywhere, whatever the user has switched on; restored afterwards."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        saved = []
        owners: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn, torch.backends.cuda)
        for owner in (owners[0].conv, owners[0].matmul, owners[1].conv, owners[2].matmul):
            saved.append((owner, owner.fp32_precision))
            owner.fp32_precision = "ieee"
        try:
            yield
        finally:
            for owner, value in saved:
                owner.fp32_precision = value


def execute(graph: Graph, codes: Tensor, keep: Iterable[str]) -> dict[str, Tensor]:
    """Evaluate on input codes (N, *shape) int64; returns the edges named in `keep` as int64 (N, *shape)."""
    wanted = dict.fromkeys(keep)
    edges = packed_engine.execute(graph, codes, wanted)
    return carriers(graph, codes, wanted) if edges is None else edges


def carriers(graph: Graph, codes: Tensor, keep: Iterable[str]) -> dict[str, Tensor]:
    """`execute` in torch, each op in its carrier."""
    wanted = dict.fromkeys(keep)
    pieces: dict[str, list[Tensor]] = {name: [] for name in wanted}
    largest = max(n.type.numel for n in graph)
    with exact():
        steps = _steps(graph, codes.device)
        for part in codes.split(max(1, min(CHUNK, NUMBERS // largest))):
            for name, value in edges_of(graph, part, wanted, steps):
                pieces[name].append(value.to(torch.int64))
    return {name: torch.cat(p) for name, p in pieces.items()}


Steps = list[tuple[Node, torch.dtype, Step]]


def definition(graph: Graph) -> Steps:
    """Every node with its carrier and the op's own `evaluate`."""
    return [(node, carrier(graph, node), node.op.evaluate) for node in graph.nodes[1:]]


def edges_of(graph: Graph, codes: Tensor, wanted: Container[str], steps: Steps) -> Iterator[tuple[str, Tensor]]:
    """The wanted edges of one batch as they come, each in its carrier; what nothing reads any more is let go. Run inside `exact`."""
    last = {i: k for k, node in enumerate(graph.nodes[1:]) for i in node.inputs}
    if codes.dim() == 4 and not codes.is_cuda:
        codes = codes.contiguous(memory_format=torch.channels_last)
    values: dict[str, Tensor] = {graph.input.name: codes}
    if graph.input.name in wanted:
        yield graph.input.name, codes
    for k, (node, dtype, compute) in enumerate(steps):
        inputs = [values[i].to(dtype) for i in node.inputs]
        values[node.name] = compute(*inputs)
        del inputs
        for i in set(node.inputs):
            if last[i] == k:
                del values[i]
        if node.name in wanted:
            yield node.name, values[node.name]
        if node.name not in last:
            del values[node.name]


_prepared: weakref.WeakKeyDictionary[Graph, dict[object, Steps]] = weakref.WeakKeyDictionary()


def _steps(graph: Graph, device: torch.device) -> Steps:
    """The faster steps of quantlib.carriers, made once per graph and device; float32 takes a float64 node where it is proven for it."""
    plain = definition(graph)
    known, key = _prepared.setdefault(graph, {}), (device, *(dtype for _, dtype, _ in plain))
    if key not in known:
        known[key] = []
        for node, dtype, evaluate in plain:
            types = graph.types(node)
            found = evaluate
            if dtype is torch.float64 and fits_float32(node.op, types):
                found = step(node.op, types, torch.float32, device)
            if found == evaluate:
                known[key].append((node, dtype, step(node.op, types, dtype, device)))
            else:
                known[key].append((node, torch.float32, found))
    return known[key]


def run(graph: Graph, x: Any, integers: bool = False) -> Any:
    """The network's output on images x (N, C, H, W): same meaning as model(x), computed in exact integers.

    x: uint8 or integer codes on the input grid, or floats (see `encode`), torch or numpy, on the CPU or a GPU. Returns float32 like
    the model, or with integers=True a dict edge name -> int64 (N, *shape) of the network's integer outputs. Raises InputError.
    """
    edges = execute(graph, encode(graph, x), graph.outputs)
    return edges if integers else decode(graph, edges)
