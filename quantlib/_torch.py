"""Lowering rules for torch.nn modules and torch functions: three tables (elementwise, rearranging, everything else) and the rules
behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quantlib.capture import Batch, Call, Ref, fill, refs, short_name, walk
from quantlib.tails import ConversionError, Edge, Map, Move, RealInput, Value

if TYPE_CHECKING:
    from quantlib.lowering import Lowering

# ---------------------------------------------------------------- elementwise steps

# a*x + b per channel in each argument, for fixed other arguments
_AFFINE = """
add radd iadd sub rsub isub subtract mul rmul imul multiply neg negative div truediv itruediv divide true_divide batch_norm
""".split()
_PRODUCT = ("mul", "rmul", "imul", "multiply")
# monotone in each argument, for fixed other arguments
_MONOTONE_FUNCTIONS = """
relu relu6 hardtanh clamp clip clamp_min clamp_max sigmoid tanh hardsigmoid softplus logsigmoid softsign sign round floor ceil
trunc maximum minimum fmax fmin exp atan erf selu hardshrink softshrink tanhshrink sqrt log
""".split()
# elementwise, but every integer has to be run
_OTHER_FUNCTIONS = """
threshold leaky_relu prelu elu celu gelu silu mish hardswish abs absolute square pow rsqrt sin cos where lerp addcmul
gt ge lt le eq ne greater less
""".split()
# name -> (monotone, affine)
ELEMENTWISE = (
    dict.fromkeys(_AFFINE, (True, True))
    | dict.fromkeys(_MONOTONE_FUNCTIONS, (True, False))
    | dict.fromkeys(_OTHER_FUNCTIONS, (False, False))
)
IDENTITY = set(
    """
contiguous clone detach to double float type_as type dropout dropout1d dropout2d alpha_dropout feature_dropout requires_grad_ cpu
cuda identity alias positive pos
""".split()
)
REARRANGE = set(
    """
reshape view flatten ravel permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze getitem chunk split
split_with_sizes tensor_split hsplit vsplit dsplit narrow select unbind index_select expand repeat tile roll flip fliplr flipud
rot90 cat concat concatenate stack hstack vstack dstack pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
unflatten T mT t repeat_interleave broadcast_to expand_as view_as reshape_as iter
""".split()
)


def lower_function(g: Lowering, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lower a recorded torch function; args and kwargs hold Values in the place of tensors."""
    name = short_name(call.target)
    if name in IDENTITY:
        return args[0]
    if name not in REARRANGE and _mentions_batch((call.args, call.kwargs)):
        raise ConversionError(
            f"{g.path}: {call} computes with the batch size; what happens to an image must not depend on the images beside it"
        )
    if name in ("max", "min") and len(_values((args, kwargs))) == 2:
        name += "imum"
    if name in ELEMENTWISE:
        return _elementwise_function(g, call, name, args, kwargs)
    if name in REARRANGE:
        return _rearranging_function(g, call)
    if name in FUNCTIONS:
        return FUNCTIONS[name](g, *args, **kwargs)
    raise ConversionError(
        f"{g.path}: {call} has no integer meaning here. Supported functions: elementwise "
        f"({', '.join(sorted(ELEMENTWISE)[:12])}, ...), rearranging "
        f"(reshape, flatten, cat, chunk, ...), {', '.join(sorted(FUNCTIONS))}. Put anything else into a module with its own "
        f"`lower` (docs/add_an_op.md)."
    )


def _mentions_batch(tree: Any) -> bool:
    found: list[Batch] = []
    walk(tree, lambda t: found.append(t) if isinstance(t, Batch) else None)
    return bool(found)


def _values(tree: Any) -> list[Value]:
    found: list[Value] = []
    walk(tree, lambda t: found.append(t) if isinstance(t, Edge | RealInput | Map | Move) else None)
    return found


_TRACK = "train with track_running_stats=True and convert the model in eval mode"


def _elementwise_function(g: Lowering, call: Call, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    values = _values((args, kwargs))
    sources = refs((call.args, call.kwargs))
    if name in ("add", "radd", "iadd") and len(values) == 2 and not kwargs:
        return g.sum(*values)
    if name in _PRODUCT and len(values) == 2 and not kwargs and isinstance(values[0], Edge) and isinstance(values[1], Edge):
        return g.product(values[0], values[1])
    mono, affine = ELEMENTWISE[name]
    if name == "batch_norm" and (kwargs.get("training", args[5] if len(args) > 5 else False) or (*args, *[None] * 3)[1] is None):
        raise ConversionError(f"{g.path}: batch norm on the statistics of the batch depends on the other images; {_TRACK}")
    flag: bool | np.ndarray = mono
    if name in ("div", "truediv", "itruediv", "divide", "true_divide") and (len(values) > 1 or not isinstance(call.args[0], Ref)):
        flag, affine = False, False
    if name in _PRODUCT and len(values) > 1:
        affine = False
    if name == "leaky_relu":
        slope = call.kwargs.get("negative_slope", call.args[1] if len(call.args) > 1 else 0.01)
        flag = slope >= 0
    if name == "prelu":
        weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
        flag = per_channel_flag(weight.detach() >= 0)
    order: dict[int, int] = {}
    for r in sources:
        order.setdefault(r.index, len(order))
    distinct = {r.index: v for r, v in zip(sources, values, strict=True)}

    def run(*tensors: Tensor) -> Tensor:
        full_args, full_kwargs = fill(
            (_drop_quant(call.args), _drop_quant(call.kwargs)), {i: _fresh(tensors[k]) for i, k in order.items()}, len(tensors[0])
        )
        return call.target(*full_args, **full_kwargs)  # type: ignore[no-any-return]

    constants: list[Tensor] = []
    walk((call.args, call.kwargs), lambda t: constants.append(t) if isinstance(t, Tensor) else None)
    uniform = all(c.numel() == 1 for c in constants)
    ordered = [distinct[i] for i in order]
    return g.map(run, *ordered, monotone=flag, affine=affine, uniform=uniform)


def _drop_quant(tree: Any) -> Any:
    return walk(tree, lambda t: Ref(t.index) if isinstance(t, Ref) else t)


def _fresh(t: Tensor) -> Tensor:
    """In-place functions (relu_, iadd) get a copy of their own."""
    return t.clone()


def per_channel_flag(flag: Tensor) -> bool | np.ndarray:
    array = flag.detach().cpu().numpy().reshape(-1)
    return bool(array[0]) if array.size == 1 else array


# ---------------------------------------------------------------- rearranging


def _rearranging_function(g: Lowering, call: Call) -> Any:
    sources = refs((call.args, call.kwargs))
    order: dict[int, int] = {}
    for r in sources:
        order.setdefault(r.index, len(order))

    def run(*tensors: Tensor) -> Any:
        args, kwargs = fill((_drop_quant(call.args), _drop_quant(call.kwargs)), {i: tensors[k] for i, k in order.items()}, len(tensors[0]))
        return call.target(*args, **kwargs)

    out = g.rearrange(lambda *t: list(_tensors(run(*t))), *(g.value(i) for i in order))
    iterator = iter(out)
    return walk(call.out, lambda t: next(iterator))


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


# ---------------------------------------------------------------- pools, padding, plain convolutions


def pair(value: Any) -> tuple[int, int]:
    if isinstance(value, Batch):
        raise ConversionError("a kernel size, stride or padding that depends on the batch size")
    if isinstance(value, int):
        return value, value
    value = tuple(value)
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _sides(padding: Any) -> tuple[int, int, int, int]:
    h, w = pair(padding)
    return h, h, w, w


def max_pool2d(
    g: Lowering,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    if return_indices:
        raise ConversionError(f"{g.path}: max pooling with return_indices has no integer meaning here")
    return g.max_pool(
        x, pair(kernel_size), pair(stride if stride not in (None, ()) else kernel_size), _sides(padding), pair(dilation), bool(ceil_mode)
    )


def avg_pool2d(
    g: Lowering,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    scale: float | None = None,
) -> Value:
    kernel, sides = pair(kernel_size), _sides(padding)
    stride = pair(stride if stride not in (None, ()) else kernel_size)
    c, h, w = g.map_shape(x)
    if ceil_mode and any((n + 2 * p - k) % s for n, p, k, s in zip((h, w), pair(padding), kernel, stride, strict=True)):
        raise ConversionError(
            f"{g.path}: average pooling with ceil_mode divides its last windows by another number; use a size that divides evenly"
        )
    if not count_include_pad and any(sides):
        raise ConversionError(
            f"{g.path}: average pooling with count_include_pad=False and padding divides border windows by another number; pad with True"
        )
    return g.mean_pool(x, kernel, stride, sides, divisor_override or kernel[0] * kernel[1], scale)


def _adaptive(g: Lowering, x: Value, output_size: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    c, h, w = g.map_shape(x)
    out_h, out_w = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
    out_h, out_w = h if out_h is None else out_h, w if out_w is None else out_w
    if h % out_h or w % out_w:
        raise ConversionError(
            f"{g.path}: adaptive pooling from {h}x{w} to {out_h}x{out_w} has windows of different sizes; use sizes that divide"
        )
    return (h // out_h, w // out_w), (h // out_h, w // out_w)


def adaptive_avg_pool2d(g: Lowering, x: Value, output_size: Any, *, scale: float | None = None) -> Value:
    kernel, stride = _adaptive(g, x, output_size)
    return g.mean_pool(x, kernel, stride, (0, 0, 0, 0), kernel[0] * kernel[1], scale)


def adaptive_max_pool2d(g: Lowering, x: Value, output_size: Any, return_indices: bool = False) -> Value:
    kernel, stride = _adaptive(g, x, output_size)
    return g.max_pool(x, kernel, stride, (0, 0, 0, 0), (1, 1), False)


def _over_map(g: Lowering, x: Value, dim: Any, keepdim: bool, pool: Callable[..., Value], what: str) -> Value:
    """A reduction over both spatial axes (mean, sum, amax): one pool of the whole map, then a flatten unless keepdim."""
    shape = g.shape(x)
    dims = (
        tuple(range(1, len(shape) + 1))
        if dim is None
        else tuple(sorted(d % (len(shape) + 1) for d in (dim if isinstance(dim, tuple | list) else (dim,))))
    )
    flat_map = len(shape) == 2 and dims == (2,)  # (N, C, H*W)
    if not flat_map and (len(shape) != 3 or dims != (2, 3)):
        raise ConversionError(
            f"{g.path}: {what} over axes {dims} of a batch of shape (N, {', '.join(map(str, shape))}); only both spatial axes are supported"
        )
    if flat_map:
        (x,) = g.rearrange(lambda t: [t.unsqueeze(-1)], x)
    y = pool(g, x)
    return y if keepdim and not flat_map else g.rearrange(lambda t: [t.flatten(1) if not (keepdim and flat_map) else t.flatten(2)], y)[0]


def _whole(g: Lowering, x: Value) -> tuple[int, int]:
    return g.map_shape(x)[1:]


def mean(g: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return _over_map(g, x, dim, keepdim, lambda g, v: avg_pool2d(g, v, _whole(g, v)), "mean")


def total(g: Lowering, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return _over_map(g, x, dim, keepdim, lambda g, v: avg_pool2d(g, v, _whole(g, v), divisor_override=1), "sum")


def amax(g: Lowering, x: Value, dim: Any = (), keepdim: bool = False) -> Value:
    return _over_map(g, x, dim or None, keepdim, lambda g, v: max_pool2d(g, v, _whole(g, v)), "amax")


def pad(g: Lowering, x: Value, pad: Any, mode: str = "constant", value: float | None = None) -> Value:
    """F.pad with zeros; widths run from the last axis backwards."""
    shape = g.shape(x)
    if mode != "constant" or value not in (None, 0, 0.0):
        raise ConversionError(f"{g.path}: padding with mode {mode!r} and value {value}; only zeros (n = 0) are on every grid")
    widths = [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)][::-1]
    if len(shape) != 3 or len(widths) > 3:
        raise ConversionError(f"{g.path}: padding a batch of shape (N, {', '.join(map(str, shape))}); only (N, C, H, W) is supported")
    widths = [(0, 0)] * (3 - len(widths)) + widths
    if any(w < 0 for pair_ in widths for w in pair_):
        raise ConversionError(f"{g.path}: negative padding; crop with a slice")
    before, after = (tuple(w[i] for w in widths) for i in (0, 1))
    return g.pad(x, before, after)


def interpolate(
    g: Lowering,
    x: Value,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: bool = False,
) -> Value:
    if mode not in ("nearest", "nearest-exact"):
        raise ConversionError(
            f"{g.path}: interpolation mode {mode!r} makes values between the codes; use 'nearest', or a transposed convolution"
        )
    run = partial(torch.nn.functional.interpolate, size=size, scale_factor=scale_factor, mode=mode)
    return g.rearrange(lambda t: [run(t)], x)[0]


def conv2d(
    g: Lowering,
    x: Value,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Value:
    """A plain convolution whose constant weights are small multiples of one number (a shift, a fixed filter)."""
    codes, scale = _constant_weights(g, weight)
    y = g.conv2d(g.integer(x), codes, scale, stride, padding, dilation, groups, padding_mode)
    return y if bias is None else g.bias(y, bias.detach().double().numpy())


def linear(g: Lowering, x: Value, weight: Any, bias: Any = None) -> Value:
    codes, scale = _constant_weights(g, weight)
    y = g.dense(g.integer(x), codes, scale)
    return y if bias is None else g.bias(y, bias.detach().double().numpy())


def _constant_weights(g: Lowering, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(weight, Tensor):
        raise ConversionError(f"{g.path}: the weights of a convolution are computed from data; only constant weights can be lowered")
    w = weight.detach().double().numpy()
    nonzero = np.abs(w[w != 0])
    unit = float(nonzero.min()) if nonzero.size else 1.0
    codes = w / unit
    if not np.array_equal(np.rint(codes), codes) or np.abs(codes).max(initial=0) > 127:
        raise ConversionError(
            f"{g.path}: real-valued weights (not multiples of one number up to 127). Use a quantized layer: "
            f"quantlib.layers.ScaledIntConv2d, BinaryConv2d, "
            "brevitas.nn.QuantConv2d or QuantLinear, and train or calibrate it"
        )
    return codes.astype(np.int64), np.full(w.shape[0], unit)


def zeros_like(g: Lowering, x: Value, dtype: Any = None, device: Any = None) -> Value:
    """Real zeros in the place of x, on x's own grid."""
    return g.map(torch.zeros_like, x, affine=True, uniform=True)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max_pool2d": max_pool2d,
    "boolean_dispatch": max_pool2d,  # how F.max_pool2d calls itself
    "avg_pool2d": avg_pool2d,
    "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "adaptive_max_pool2d": adaptive_max_pool2d,
    "mean": mean,
    "sum": total,
    "amax": amax,
    "pad": pad,
    "zeros_like": zeros_like,
    "interpolate": interpolate,
    "upsample": interpolate,
    "conv2d": conv2d,
    "linear": linear,
}

# ---------------------------------------------------------------- torch.nn modules

_MONOTONE = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.LogSigmoid,
    nn.Softsign,
    nn.SELU,
)
_OTHER = (nn.Threshold, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.CELU, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink)
_PASS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MOVES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)


def lower_module(g: Lowering, m: Any, x: Value) -> Value:
    """Lower a torch.nn layer; ConversionError with the dotted path and what is supported when there is no rule."""
    if isinstance(m, _PASS):
        return x
    if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
        if m.running_mean is None or m.running_var is None:
            raise ConversionError(f"{g.path}: batch norm without running statistics depends on the other images of the batch; {_TRACK}")
        return g.map(m, x, affine=True)
    if isinstance(m, nn.PReLU):
        return g.map(m, x, monotone=per_channel_flag(m.weight >= 0), uniform=m.weight.numel() == 1)
    if isinstance(m, nn.LeakyReLU):
        return g.map(_copying(m), x, monotone=m.negative_slope >= 0, uniform=True)
    if isinstance(m, _MONOTONE):
        return g.map(_copying(m), x, uniform=True)
    if isinstance(m, _OTHER):
        return g.map(_copying(m), x, monotone=False, uniform=True)
    if isinstance(m, nn.MaxPool2d):
        return max_pool2d(g, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)
    if isinstance(m, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        return g.mean_pool_module(m, x)
    if isinstance(m, nn.AdaptiveMaxPool2d):
        return adaptive_max_pool2d(g, x, m.output_size, m.return_indices)
    if isinstance(m, _MOVES):
        return g.rearrange(lambda t: [m(t)], x)[0]
    if isinstance(m, nn.Upsample):
        return interpolate(g, x, m.size, m.scale_factor, m.mode)
    if isinstance(m, nn.ZeroPad2d | nn.ConstantPad2d):
        return pad(g, x, m.padding, "constant", getattr(m, "value", 0))
    if type(m).forward is nn.Conv2d.forward:
        return conv2d(g, x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)
    if type(m).forward is nn.Linear.forward:
        return linear(g, x, m.weight, m.bias)
    raise ConversionError(
        f"{g.path}: no integer rule for {type(m).__module__}.{type(m).__qualname__}. Supported: the layers of quantlib.layers, "
        f"brevitas.nn QuantConv2d, "
        "QuantLinear, QuantReLU, QuantHardTanh, QuantIdentity, QuantSigmoid, QuantTanh, QuantEltwiseAdd, TruncAvgPool2d, "
        "TruncAdaptiveAvgPool2d, and "
        "from torch.nn batch norm, activations, pooling, flatten, shuffles, padding, nearest upsampling. Give your own layer "
        "a `lower` (docs/add_an_op.md)."
    )


def _copying(m: nn.Module) -> Callable[[Tensor], Tensor]:
    """Activations with inplace=True must not write into the probes."""
    return lambda t: m(t.clone())


def mean_pool_module(g: Lowering, m: Any, x: Value, scale: float | None = None) -> Value:
    if isinstance(m, nn.AdaptiveAvgPool2d):
        return adaptive_avg_pool2d(g, x, m.output_size, scale=scale)
    return avg_pool2d(g, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override, scale=scale)
