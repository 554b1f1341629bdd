"""Record one run of a model as a flat list of calls, and replay that record on other inputs.

The model runs once, in float64 and eval mode, on a concrete batch, with layers as leaves; torch functions between them are recorded
too, what touches only parameters folds to constants. A second run with another batch size shows which literals are the batch axis. The
record is replayed on fresh inputs and must equal the model bit for bit, so whatever recording cannot see is an error here and not a
wrong integer later.
"""

from __future__ import annotations

import copy
import ctypes
import linecache
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from quantlib import _brevitas

SMALL_IMAGE = 3 * 64 * 64  # numbers of an image up to which a record is checked on five of them


class CaptureError(ValueError):
    """The model does something that a record of one run cannot hold; the message shows the line and what would work."""


@dataclass(frozen=True)
class Ref:
    """A tensor of the record, by number. `quant` keeps the metadata of a Brevitas quant tensor (all fields but the value)."""

    index: int
    quant: Any = None


@dataclass(frozen=True)
class Batch:
    """A literal that was `factor` times the batch size."""

    factor: int


@dataclass(frozen=True)
class Call:
    """One recorded call: a leaf module or a torch function, in the forward of module `scope`.

    path: the module's dotted name, where it has several the one in `scope`; first: the first of its names.
    """

    target: nn.Module | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    path: str
    line: str
    scope: str = ""
    first: str = ""

    @property
    def name(self) -> str:
        """The module's dotted path (its class name where the model itself is the layer), or scope and bare name of the function."""
        if isinstance(self.target, nn.Module):
            return self.path or type(self.target).__name__
        return f"{self.scope}.{short_name(self.target)}".lstrip(".")

    def __str__(self) -> str:
        where = f" at {self.line}" if self.line else ""
        if isinstance(self.target, nn.Module):
            return f"{self.path or 'the model'} ({type(self.target).__name__}){where}"
        return f"{function_name(self.target)}(){where}"


@dataclass
class Record:
    """A run of the model: Ref(0) is the input, `calls` in order, `output` the structure the model returned."""

    model: nn.Module
    input_shape: tuple[int, ...]
    calls: list[Call] = field(default_factory=list)
    output: Any = None
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def replay(self, x: Tensor, edit: Callable[[int, Tensor], Tensor] | None = None) -> Any:
        """The output for x (N, *input_shape), float64; `edit(index, value)` may replace each value as it appears. A value is let go as
        soon as no later call reads it.
        """
        values: dict[int, Tensor] = {}
        last = {r.index: k for k, call in enumerate(self.calls) for r in refs((call.args, call.kwargs))}
        last |= {r.index: len(self.calls) for r in refs(self.output)}

        def put(index: int, value: Tensor) -> None:
            value = edit(index, value) if edit else value
            if index in last:
                values[index] = value

        put(0, x)
        batch = x.shape[0]
        del x
        for k, call in enumerate(self.calls):
            args, kwargs = fill((call.args, call.kwargs), values, batch)
            for r in refs((call.args, call.kwargs)):
                if last[r.index] == k:
                    values.pop(r.index, None)
            result = call.target(*args, **kwargs)
            del args, kwargs
            scatter(call.out, result, put)
            del result
        return plain(fill(self.output, values, batch))


def function_name(target: Any) -> str:
    name = resolve_name(target) if callable(target) and not isinstance(target, nn.Module) else None
    return name or getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)


def short_name(target: Any) -> str:
    """The bare name of a torch function: Tensor.__iadd__ -> iadd, relu_ -> relu, Tensor.T.__get__ -> T."""
    bits = function_name(target).split(".")
    return (bits[-2] if bits[-1] == "__get__" else bits[-1]).strip("_")


# ---------------------------------------------------------------- nested structures


def walk(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """Map over lists, tuples, dicts, slices and quant tensors; `leaf` sees everything else (and whole quant tensors and Refs)."""
    if isinstance(tree, Ref | Batch) or _brevitas.is_quant_tensor(tree):
        return leaf(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(walk(t, leaf) for t in tree))
    if isinstance(tree, torch.Size):
        return tuple(walk(t, leaf) for t in tree)
    if isinstance(tree, tuple | list):
        return type(tree)(walk(t, leaf) for t in tree)
    if isinstance(tree, dict):
        return {k: walk(v, leaf) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(walk(tree.start, leaf), walk(tree.stop, leaf), walk(tree.step, leaf))
    return leaf(tree)


def refs(tree: Any) -> list[Ref]:
    found: list[Ref] = []
    walk(tree, lambda t: found.append(t) if isinstance(t, Ref) else None)
    return found


def fill(tree: Any, values: dict[int, Any], batch: int) -> Any:
    """Put values in the place of Refs and the batch size in the place of Batch literals."""

    def leaf(t: Any) -> Any:
        if isinstance(t, Batch):
            return t.factor * batch
        if isinstance(t, Ref):
            value = values[t.index]
            return t.quant._replace(value=value) if t.quant is not None else value
        return t

    return walk(tree, leaf)


def scatter(out: Any, result: Any, put: Callable[[int, Tensor], None]) -> None:
    """Hand each tensor of a call's result to `put` under the number that the record gave it."""
    if isinstance(out, Ref):
        put(out.index, _brevitas.value_of(result))
    elif isinstance(out, list | tuple):
        for o, r in zip(out, result, strict=True):
            scatter(o, r, put)
    elif isinstance(out, dict):
        for k in out:
            scatter(out[k], result[k], put)


def plain(tree: Any) -> Any:
    return walk(tree, lambda t: _brevitas.value_of(t))


# ---------------------------------------------------------------- recording

# Torch functions with a tracked argument whose result is not a tensor, and may differ only in the batch size.
_HARMLESS = set(
    """
size dim ndimension numel nelement is_floating_point is_complex is_contiguous stride element_size get_device is_signed shape ndim
dtype device requires_grad is_cuda is_leaf layout is_sparse is_quantized is_meta is_mkldnn is_nested len type names itemsize
grad_fn grad is_cpu is_mps is_tensor is_storage is_same_size data_ptr storage_offset requires_grad_ version output_nr hash repr
format is_inference backward_hooks retains_grad
""".split()
)
_DATA = set("bool item tolist int float index numpy equal allclose contains nonzero array is_nonzero".split())
_LIBRARIES = ("torch", "brevitas", "quantlib", "unfoldnd")


def is_leaf(module: nn.Module) -> bool:
    """Layers are leaves: ours (anything with `lower`), torch.nn except containers, brevitas.nn, and subclasses that keep such a forward."""
    if hasattr(module, "lower"):
        return True
    root = type(module).forward.__module__ or ""
    if root.startswith("torch.nn"):
        return not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return root.startswith("brevitas.nn")


def _user_line() -> str:
    """file:line and text of the innermost frame that belongs to the user."""
    frame = sys._getframe(2)
    while frame is not None:
        root = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if root not in _LIBRARIES and not frame.f_code.co_filename.startswith("<"):
            path = frame.f_code.co_filename
            text = linecache.getline(path, frame.f_lineno).strip()
            return f"{Path(path).name}:{frame.f_lineno}: {text}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, x: Tensor, values: list[Tensor] | None = None):
        super().__init__()
        self.values = values
        self.record = Record(model, tuple(x.shape[1:]))
        self.names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(name)
        # id(tensor) -> number, version at the time, and a reference that takes the entry out when the tensor is gone and its id free
        self.live: dict[int, tuple[int, int, weakref.ref[Tensor]]] = {}
        self.inside = 0
        self.scopes: list[str] = []
        self.count = 0
        self.bind(x)

    @property
    def scope(self) -> str:
        return self.scopes[-1] if self.scopes else ""

    def path(self, module: nn.Module) -> str:
        """The dotted name under which the module that is running knows this one; else the first of its names."""
        names = self.names.get(id(module), [""])
        return next((name for name in names if name.rpartition(".")[0] == self.scope), names[0])

    def bind(self, value: Tensor) -> Ref:
        index, self.count = self.count, self.count + 1
        key, live = id(value), self.live

        def gone(dead: weakref.ref[Tensor]) -> None:
            if live[key][2] is dead:
                del live[key]

        live[key] = (index, self.version(value), weakref.ref(value, gone))
        self.record.shapes[index] = tuple(value.shape)
        if self.values is not None:
            self.inside += 1  # this copy is ours, not the model's
            self.values.append(value.clone())
            self.inside -= 1
        return Ref(index)

    def version(self, t: Tensor) -> int:
        """How often t was written to; read past the recording, for it is no step of the model."""
        with torch._C.DisableTorchFunction():
            return t._version

    def tracked(self, t: Any) -> bool:
        return isinstance(t, Tensor) and id(t) in self.live

    def refer(self, t: Any, what: str) -> Any:
        """A Ref for a tracked tensor or quant tensor; anything else as it is."""
        value = _brevitas.value_of(t)
        if not self.tracked(value):
            return t
        index, version, _ = self.live[id(value)]
        if self.version(value) != version:
            raise CaptureError(
                f"{what} reads a tensor that was written in place after it was made ({_user_line()}). A record cannot see such writes: "
                "use an expression that makes a new tensor (torch.where, torch.cat, multiplication by a mask)."
            )
        quant = t._replace(value=None) if _brevitas.is_quant_tensor(t) else None
        return Ref(index, quant)

    def capture(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any], path: str) -> Any:
        label = path or function_name(target)
        spec = walk((args, kwargs), lambda t: self.refer(t, label))
        if not refs(spec):
            return run()
        tracked = [_brevitas.value_of(t) for t in _flatten((args, kwargs)) if self.tracked(_brevitas.value_of(t))]
        versions = [self.version(t) for t in tracked]
        self.inside += 1
        try:
            result = run()
        finally:
            self.inside -= 1
        short = path or short_name(target)
        tensors = [t for t in _flatten(result) if isinstance(_brevitas.value_of(t), Tensor)]
        made = {id(_brevitas.value_of(t)) for t in tensors}
        written = any(self.version(t) != v and id(t) not in made for t, v in zip(tracked, versions, strict=True))
        if written or short == "setitem":
            raise CaptureError(
                f"{label} writes into a tensor in place, which a record cannot hold ({_user_line()}); build a new tensor instead."
            )
        if not tensors:
            if short in _HARMLESS:
                return result
            if short in _DATA or result is not None:
                raise CaptureError(
                    f"{label} turns tensor data into a Python value ({_user_line()}): what the model does then depends on the data, and "
                    "hardware has no such branch. Remove it, or put the decision into a layer with its own `lower`."
                )
            return result
        line = _user_line()
        out = walk(result, lambda t: self.bind(_brevitas.value_of(t)) if isinstance(_brevitas.value_of(t), Tensor) else None)
        first = self.names.get(id(target), [""])[0]
        self.record.calls.append(Call(target, spec[0], spec[1], out, path, line, self.scope, first))
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        return self.capture(func, args, kwargs, lambda: func(*args, **kwargs), "")


def _flatten(tree: Any) -> Iterator[Any]:
    found: list[Any] = []
    walk(tree, found.append)
    return iter(found)


def _same(a: Any, b: Any) -> bool:
    x, y = ([_brevitas.value_of(t) for t in _flatten(v)] for v in (a, b))
    return len(x) == len(y) and all(torch.equal(i, j) for i, j in zip(x, y, strict=True) if isinstance(i, Tensor))


@contextmanager
def _leaf_calls(recorder: _Recorder) -> Iterator[None]:
    """While recording, calls of leaf modules go through the recorder as one call each."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if recorder.inside:
            return original(module, *args, **kwargs)
        path = recorder.path(module)
        if not is_leaf(module):
            recorder.scopes.append(path)
            try:
                return original(module, *args, **kwargs)
            finally:
                recorder.scopes.pop()

        def run() -> Any:
            result = original(module, *args, **kwargs)
            if (module._forward_hooks or module._forward_pre_hooks) and not _same(result, module.forward(*args, **kwargs)):
                raise CaptureError(
                    f"{path or 'the model'} ({type(module).__name__}): a forward hook changes what the layer computes, and a hook "
                    f"cannot be lowered; write it as a step of the model, or remove it before converting"
                )
            return result

        return recorder.capture(module, args, kwargs, run, path)

    nn.Module.__call__ = call  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def _record(model: nn.Module, x: Tensor, values: list[Tensor] | None = None) -> tuple[Record, Any]:
    """A run of the model on x as a record, and what the run returned."""
    recorder = _Recorder(model, x, values)
    with torch.no_grad(), _leaf_calls(recorder), recorder:
        output = model(x)
    recorder.record.output = walk(output, lambda t: recorder.refer(t, "the output"))
    if not refs(recorder.record.output):
        raise CaptureError("the model's output does not depend on its input through recorded torch functions (numpy in between?)")
    return recorder.record, plain(output)


def record_once(model: nn.Module, input_shape: tuple[int, ...]) -> Record:
    """One run of a float32 copy of `model` in eval mode on one image of input_shape (no batch axis), without `capture`'s proof: for
    questions about shapes and order alone."""
    copied = copy.deepcopy(unwrapped(model)).cpu().float().eval()
    with torch.random.fork_rng(devices=[]):
        return _record(copied, torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0)))[0]


def values_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Every value that a run of the model on x makes, numbered as in its Record; in the model's own precision, nothing snapped."""
    values: list[Tensor] = []
    _record(model, x, values)
    return values


def _merge(a: Any, b: Any, sizes: tuple[int, int], where: str) -> Any:
    """The one structure behind two recordings at two batch sizes; literals that are multiples of the batch size become Batch."""
    if isinstance(a, Ref) and isinstance(b, Ref):
        if a.index != b.index:
            raise CaptureError(f"{where}: the two recordings differ; the model's control flow depends on the batch size or on data")
        return a
    if type(a) is type(b):
        if isinstance(a, tuple | list) and len(a) == len(b) and not _brevitas.is_quant_tensor(a):
            merged = [_merge(i, j, sizes, where) for i, j in zip(a, b, strict=True)]
            return type(a)(*merged) if hasattr(a, "_fields") else type(a)(merged)
        if isinstance(a, dict) and a.keys() == b.keys():
            return {k: _merge(a[k], b[k], sizes, where) for k in a}
        if isinstance(a, slice):
            return slice(*(_merge(getattr(a, k), getattr(b, k), sizes, where) for k in ("start", "stop", "step")))
        if isinstance(a, int) and not isinstance(a, bool) and a != b:
            if a % sizes[0] == 0 and b % sizes[1] == 0 and a // sizes[0] == b // sizes[1]:
                return Batch(a // sizes[0])
            raise CaptureError(f"{where}: a size of {a} at batch {sizes[0]} and {b} at batch {sizes[1]} is no multiple of the batch size")
        if isinstance(a, Tensor):
            if a.shape != b.shape:
                raise CaptureError(
                    f"{where}: a constant tensor has as many rows as the batch; write F.pad or torch.zeros_like(x), or a constant "
                    f"that broadcasts"
                )
            if not torch.equal(a, b):
                raise CaptureError(
                    f"{where}: a constant tensor differs between two runs of the model (random numbers, or data used through numpy)"
                )
            return a
        if _brevitas.is_quant_tensor(a) or a == b:
            return a
    raise CaptureError(
        f"{where}: the two recordings differ ({a!r} and {b!r}); the model's control flow depends on the batch size or on data"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile and DataParallel."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module) or isinstance(model, nn.DataParallel):
        model = model.module if isinstance(model, nn.DataParallel) else model._orig_mod  # type: ignore[assignment, union-attr]
    return model


def float64_copy(model: nn.Module) -> nn.Module:
    """A deep copy in float64 and eval mode; NaN or infinite parameters are an error that names them."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not torch.isfinite(value).all():
            kind = "NaN" if torch.isnan(value).any() else "infinite"
            raise CaptureError(f"{name} holds {kind} values; load a sound checkpoint (zoo.load) or repair the training before converting")
    done = {id(p): nn.Parameter(p.detach().cpu().double(), p.requires_grad) for p in model.parameters() if _widens(p)}
    return copy.deepcopy(model, done).cpu().double().eval()


def _widens(parameter: nn.Parameter) -> bool:
    """A plain parameter that float64 needs a new one of; copied as it is first, it would be there three times."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.dtype is not torch.float64


def give_back() -> None:
    """Hand freed memory to the system where the C library can (glibc): large maps come and go in a run, and what they leave is in pieces
    among the weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def capture(model: nn.Module, input_shape: tuple[int, ...], sample: Callable[[int, int], Tensor]) -> Record:
    """Record `model` (any nn.Module) on inputs `sample(batch, seed) -> (N, *input_shape) float64` of two batch sizes, and check the replay
    on other inputs.

    The sizes are 2 and 3, and the replay is checked at 5. A large image is recorded at 2 and 1, and the replay at 1 is compared with that
    second run; where a model treats a single image differently (squeeze), 3 takes the place of 1.

    The record's `model` is the float64 copy. Raises CaptureError for data-dependent Python, unseen in-place writes, structures that
    depend on the batch size, and a replay that is not bit-equal to the model.
    """
    model = float64_copy(model)
    small = prod(input_shape) <= SMALL_IMAGE
    try:
        two = _record(model, sample(2, 2))[0]
        give_back()
        if small:
            record, _ = _both(two, model, sample, 3)
            x = sample(5, 7)
            with torch.no_grad():
                expected = plain(model(x.clone()))
        else:
            try:
                batch = 1
                record, expected = _both(two, model, sample, batch)
            except Exception:
                batch = 3
                record, expected = _both(two, model, sample, batch)
            x = sample(batch, batch)
    except CaptureError:
        raise
    except Exception as error:
        shape = "x".join(map(str, input_shape))
        raise CaptureError(f"the model does not run on a float64 batch of shape (2, {shape}): {type(error).__name__}: {error}") from error
    with torch.no_grad():
        got = list(_flatten(record.replay(x)))
    want = list(_flatten(expected))
    if len(want) != len(got) or any(isinstance(e, Tensor) and not torch.equal(e, g) for e, g in zip(want, got, strict=True)):
        raise CaptureError(
            "replaying the recorded run on new data does not give the model's output: it depends on data in a way a record cannot hold"
        )
    give_back()
    return record


def _both(two: Record, model: nn.Module, sample: Callable[[int, int], Tensor], batch: int) -> tuple[Record, Any]:
    """The one record behind `two`, a run at batch 2, and another run at `batch`; and what that run returned."""
    other, output = _record(model, sample(batch, batch))
    if len(two.calls) != len(other.calls):
        raise CaptureError(
            f"the model makes a different number of calls at batch 2 and at batch {batch}; its control flow depends on the batch size or "
            f"on data"
        )
    calls = []
    for a, b in zip(two.calls, other.calls, strict=True):
        same = a.target is b.target if isinstance(a.target, nn.Module) else function_name(a.target) == function_name(b.target)
        if not same:
            raise CaptureError(f"{a} at batch 2 became {b} at batch {batch}; the model's control flow depends on the batch size or on data")
        args, kwargs, out = _merge((a.args, a.kwargs, a.out), (b.args, b.kwargs, b.out), (2, batch), str(a))
        calls.append(Call(a.target, args, kwargs, out, a.path, a.line, a.scope, a.first))
    shapes = {k: s[1:] for k, s in two.shapes.items()}
    return Record(model, two.input_shape, calls, two.output, shapes), output
