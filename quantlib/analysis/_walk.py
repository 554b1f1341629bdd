"""One run of a model as a list of steps with shapes and bit widths: what the three analyses share.

The run is a record of `quantlib.capture` on a copy of the model in eval mode: layers are leaves, a layer that runs twice is two steps,
functions are seen. Nothing of the user's model changes.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor, nn

from quantlib.analysis._bits import activation_bits, enabled, steps, weight_steps
from quantlib.analysis._geometry import (
    brevitas_name,
    constant_tensors,
    function_terms,
    is_convolution,
    mode_of,
    pool_terms,
    tracked,
    window_of,
)
from quantlib.analysis._steps import COMPUTE, IMAGE_BITS, AnalysisError, FanIn, Step, Value, Walk, Weight, Window


def walk(model: nn.Module, input_shape: tuple[int, ...], fan_in: FanIn = "true") -> Walk:
    """Run a copy of `model` in eval mode on one image of input_shape (no batch axis) and list its steps.

    fan_in: what accumulator widths count as inputs of an output, kh kw times "true": in_channels / groups, "published": out_channels //
    groups. AnalysisError when the model does not run on that shape, and for layers without a rule that hold weights.
    """
    from quantlib.capture import CaptureError, record_once

    try:
        record = record_once(model, input_shape)
    except CaptureError as error:
        raise AnalysisError(str(error)) from error
    except Exception as error:
        size = "x".join(map(str, (1, *input_shape)))
        raise AnalysisError(f"the model does not run on a batch of shape {size}: {type(error).__name__}: {error}") from error
    return _Walker(record, fan_in).run()


# functions that multiply and accumulate, and have no rule below
_REFUSED = set(
    """
addmm addmv addbmm baddbmm addr einsum tensordot bilinear scaled_dot_product_attention multi_head_attention_forward conv_tbc fft rfft
ifft irfft fft2 ifft2 rfft2 irfft2 stft istft lstm gru rnn_tanh rnn_relu embedding_bag cdist kron chain_matmul multi_dot vdot inner outer
""".split()
)
# elementwise functions that are straight lines with kinks; the other elementwise ones are curves
_LINES = set(
    """
add radd iadd sub rsub isub subtract mul rmul imul multiply neg negative div truediv itruediv divide true_divide batch_norm
relu relu6 hardtanh clamp clip clamp_min clamp_max hardsigmoid sign round floor ceil trunc maximum minimum fmax fmin max min
hardshrink softshrink threshold leaky_relu prelu abs absolute where gt ge lt le eq ne greater less
""".split()
)
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardtanh: "hardtanh", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.Hardsigmoid: "hardsigmoid",
    nn.Softplus: "softplus", nn.LogSigmoid: "logsigmoid", nn.Softsign: "softsign", nn.SELU: "selu", nn.Threshold: "threshold",
    nn.GELU: "gelu", nn.SiLU: "silu", nn.Mish: "mish", nn.Hardswish: "hardswish", nn.ELU: "elu", nn.CELU: "celu",
    nn.Hardshrink: "hardshrink", nn.Softshrink: "softshrink", nn.Tanhshrink: "tanhshrink", nn.LeakyReLU: "leaky_relu", nn.PReLU: "prelu",
}  # fmt: skip
_CLIPS = {"relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max"}
_MULTIPLY = {"mul", "rmul", "imul", "multiply"}
_ADD = {"add", "radd", "iadd", "sub", "rsub", "isub", "subtract"}
_AVERAGE = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum"}
_MAXIMUM = {"max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch", "adaptive_max_pool2d", "amax"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_PASS_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MOVE_MODULES = (
    nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.UpsamplingNearest2d,
)  # fmt: skip
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_PRELU = 2  # operations per element: compare, multiply


class _Walker:
    def __init__(self, record: Any, fan_in: FanIn) -> None:
        self.record, self.fan_in = record, fan_in
        self.walk = Walk(record.model)
        self.env: dict[int, Value] = {0: Value(tuple(record.shapes[0]), steps(IMAGE_BITS), image=True)}
        self.seen: dict[str, int] = {}
        self.call: Any = None

    def run(self) -> Walk:
        from quantlib.capture import refs

        for call in self.record.calls:
            self.call = call
            inputs = tuple(self.env[i] for i in dict.fromkeys(r.index for r in refs((self.call.args, self.call.kwargs))))
            out = refs(self.call.out)
            if not inputs or not out:
                continue
            value = self.visit(inputs, tuple(self.record.shapes[out[0].index]))
            for ref in out:
                self.env[ref.index] = replace(value, shape=tuple(self.record.shapes[ref.index]))
        self.walk.outputs = tuple(self.env[r.index] for r in refs(self.record.output))
        return self.walk

    # -------------------------------------------------------- making steps

    def step(self, kind: str, inputs: tuple[Value, ...], output: Value, suffix: str = "", **facts: Any) -> Value:
        module = self.call.target if isinstance(self.call.target, nn.Module) else None
        name = self.call.name + suffix
        self.seen[name] = self.seen.get(name, 0) + 1
        times = f"#{self.seen[name]}" if self.seen[name] > 1 else ""
        made = Step(len(self.walk.steps), name + times, kind, self.what(), inputs, output, module, **facts)
        self.walk.steps.append(made)
        return output

    @property
    def row(self) -> int:
        """The number of the next step."""
        return len(self.walk.steps)

    def what(self) -> str:
        from quantlib.capture import short_name

        return type(self.call.target).__name__ if isinstance(self.call.target, nn.Module) else short_name(self.call.target)

    def refuse(self, why: str) -> AnalysisError:
        where = f" at {self.call.line}" if self.call.line else ""
        return AnalysisError(f"{self.call.name} ({self.what()}){where}: {why}")

    def visit(self, inputs: tuple[Value, ...], shape: tuple[int, ...]) -> Value:
        if isinstance(self.call.target, nn.Module):
            return self.module(self.call.target, inputs, shape)
        return self.function(self.what(), inputs, shape)

    # -------------------------------------------------------- primitive kinds

    def quantizer(self, x: Value, bits: float, suffix: str = "") -> Value:
        return self.step("quantizer", (x,), Value(x.shape, steps(bits), row=self.row), suffix)

    def move(self, inputs: tuple[Value, ...], shape: tuple[int, ...]) -> Value:
        """One input keeps what is known; several (a concat) are as wide as the widest."""
        if len(inputs) == 1:
            return self.step("move", inputs, replace(inputs[0], shape=shape))
        tops = [v.top for v in inputs]
        pending = tuple(dict.fromkeys(p for v in inputs for p in v.pending))
        top = None if None in tops else max(t for t in tops if t is not None)
        image = all(v.image for v in inputs)
        clipped = all(v.clipped or not v.pending for v in inputs)
        merged = Value(shape, top, any(v.wide for v in inputs), pending, clipped, image, self.row)
        return self.step("move", inputs, merged)

    def elementwise(
        self, name: str, x: Value, shape: tuple[int, ...], constants: int = 0, operations: int = 1, monotone: bool | None = None
    ) -> Value:
        """A function of one tensor: it waits upon the value, for a quantizer absorbs it."""
        from quantlib._torch import ELEMENTWISE

        clipped = name in _CLIPS and x.bits is not None
        kept = replace(x, shape=shape) if x.image else replace(x, shape=shape, pending=(*x.pending, self.row), clipped=clipped)
        monotone = ELEMENTWISE.get(name, (name in _LINES, False))[0] or name in ("leaky_relu", "prelu") if monotone is None else monotone
        curve = name not in _LINES
        return self.step("elementwise", (x,), kept, constants=constants, operations=operations, curve=curve, monotone=monotone)

    def batch_norm(self, x: Value, shape: tuple[int, ...], channels: int) -> Value:
        """Two operations per element, one where real weights take the factor in; a convolution's own bias goes into the offset."""
        own = self.walk.steps[x.row] if x.row >= 0 else None
        direct = own is not None and own.kind in COMPUTE and x.pending in ((), (own.row,))
        folded = direct and own is not None and own.is_float
        y = self.elementwise("batch_norm", replace(x, pending=()) if direct else x, shape, channels * (2 - folded), 2 - folded)
        return y

    def add(self, inputs: tuple[Value, ...], shape: tuple[int, ...]) -> Value:
        if all(v.bits is not None for v in inputs):
            return self.step("add", inputs, Value(shape, sum(v.top or 0 for v in inputs), row=self.row))
        return self.step("add", inputs, Value(shape, row=self.row))

    def multiply(self, inputs: tuple[Value, ...], shape: tuple[int, ...]) -> Value:
        if all(v.bits is not None for v in inputs):
            return self.step("multiply", inputs, Value(shape, prod(v.top or 0 for v in inputs), wide=True, row=self.row))
        return self.step("multiply", inputs, Value(shape, row=self.row))

    def average(self, x: Value, shape: tuple[int, ...], terms: int) -> Value:
        """terms: window elements summed in all."""
        each = -(-terms // max(1, prod(shape)))
        top = None if x.bits is None else (x.top or 0) * each
        return self.step("average", (x,), Value(shape, top, row=self.row), terms=terms)

    def maximum(self, x: Value, shape: tuple[int, ...], terms: int) -> Value:
        return self.step("maximum", (x,), replace(x, shape=shape), terms=terms)

    def product(self, kind: str, x: Value, shape: tuple[int, ...], fan_in: int, counted: int, weight: Weight, **facts: Any) -> Value:
        """A convolution or matrix product: fan_in real inputs per output, `counted` for the accumulator's width."""
        macs = facts.pop("macs", prod(shape) * fan_in)
        readable = x.bits is not None and weight.top is not None
        top = (x.top or 0) * (weight.top or 0) * counted if readable else None
        y = Value(shape, top, True, (self.row,) if weight.bias else (), row=self.row)
        return self.step(kind, (x,), y, weight=weight, macs=macs, **facts)

    # -------------------------------------------------------- modules

    def module(self, m: Any, inputs: tuple[Value, ...], shape: tuple[int, ...]) -> Value:
        if len(inputs) == 1 and enabled(getattr(m, "input_quant", None)):
            inputs = (self.quantizer(inputs[0], self.given(m.input_quant, inputs[0]), ".input_quant"),)
        elif enabled(getattr(m, "input_quant", None)):
            inputs = tuple(self.quantizer(x, self.given(m.input_quant, x), ".input_quant") for x in inputs)
        y = self.layer(m, inputs, shape)
        if enabled(getattr(m, "output_quant", None)):
            y = self.quantizer(y, self.given(m.output_quant, y), ".output_quant")
        return y

    def given(self, proxy: Any, x: Value) -> float:
        bits = activation_bits(proxy, x.shape)
        if bits is None:
            raise self.refuse("its quantizer says no bit width; integer and minifloat quantizers of Brevitas do")
        return bits

    def layer(self, m: Any, inputs: tuple[Value, ...], shape: tuple[int, ...]) -> Value:
        x = inputs[0]
        out_bits = getattr(m, "out_bits", None)
        if hasattr(m, "act_quant"):
            return self.activation(m, x, shape)
        if is_convolution(m):
            y = self.convolution(m, x, shape)
        elif isinstance(getattr(m, "weight", None), Tensor) and hasattr(m, "in_features") and m.weight.dim() == 2:
            y = self.linear(m, x, shape)
        elif isinstance(m, _BATCH_NORMS):
            y = self.batch_norm(x, shape, m.num_features)
        elif enabled(getattr(m, "trunc_quant", None)) and self.call.args[0].quant is not None:
            y = self.truncated(m, x, shape)
        elif isinstance(m, _POOLS):
            y = self.average(x, shape, pool_terms(m, x.shape, shape))
        elif isinstance(m, _MAX_POOLS):
            y = self.maximum(x, shape, pool_terms(m, x.shape, shape))
        elif isinstance(m, _PASS_MODULES + _MOVE_MODULES) or (isinstance(m, nn.Upsample) and m.mode.startswith("nearest")):
            y = self.move(inputs, shape)
        elif type(m) in _MODULES:
            prelu = isinstance(m, nn.PReLU)
            y = self.elementwise(_MODULES[type(m)], x, shape, sum(p.numel() for p in m.parameters()), _PRELU if prelu else 1)
        else:
            return self.special(m, inputs, shape)
        return y if out_bits is None else self.quantizer(y, out_bits, "")

    def special(self, m: Any, inputs: tuple[Value, ...], shape: tuple[int, ...]) -> Value:
        """Our layers, Brevitas joins, and layers that only say their out_bits."""
        from brevitas import nn as qnn

        from quantlib.layers import RPReLU, TruncAvgPool

        out_bits = getattr(m, "out_bits", None)
        if isinstance(m, TruncAvgPool):
            return self.truncated(m, inputs[0], shape)
        if isinstance(m, RPReLU):
            return self.elementwise("prelu", inputs[0], shape, 3 * shape[1], 2 + _PRELU)
        if isinstance(m, qnn.QuantEltwiseAdd):
            return self.add(inputs * 2 if len(inputs) == 1 else inputs, shape)
        if isinstance(m, qnn.QuantCat):
            return self.move(inputs, shape)
        held = [n for n, p in m.named_parameters() if sum(size > 1 for size in p.shape) > 1]
        if held and not isinstance(m, _NORMS):
            raise self.refuse(
                f"no rule for this layer, which holds {', '.join(held)}. Convolutions and linear layers of torch.nn, brevitas.nn and "
                "quantlib.layers have one, and F.conv2d, F.linear and torch.matmul inside your own modules"
            )
        if out_bits is not None:
            summed = self.add(inputs, shape) if len(inputs) > 1 else replace(inputs[0], shape=shape)
            return self.quantizer(summed, out_bits)
        if getattr(m, "moves", False):
            return self.move(inputs, shape)
        if all(x.image for x in inputs) and shape == inputs[0].shape:  # a normalisation of the image is still the image
            return self.step("elementwise", inputs, inputs[0])
        return self.step("other", inputs, Value(shape, row=self.row))

    def activation(self, m: Any, x: Value, shape: tuple[int, ...]) -> Value:
        """QuantReLU and its like: the function, then the quantizer. Clips are part of the quantizer."""
        name = {"QuantSigmoid": "sigmoid", "QuantTanh": "tanh", "QuantHardSwish": "hardswish"}.get(brevitas_name(m), "")
        bits = activation_bits(m.act_quant, x.shape)
        if name:
            x = self.elementwise(name, x, shape)
        elif bits is None:
            plain = {"QuantReLU": "relu", "QuantHardTanh": "hardtanh"}.get(brevitas_name(m))
            return self.elementwise(plain, x, shape) if plain else self.move((x,), shape)
        return x if bits is None else self.quantizer(x, bits, ".act_quant" if name else "")

    def truncated(self, m: Any, x: Value, shape: tuple[int, ...]) -> Value:
        """Sum, then a shift that drops bits: codes of as many bits as the layer says, or as the input has."""
        proxy = getattr(m, "trunc_quant", None)
        kept = proxy.bit_width() if proxy is not None else None
        top = x.top if kept is None else steps(float(kept))
        terms = pool_terms(m, x.shape, shape)
        y = Value(shape, top if x.bits is not None else None, row=self.row)
        return self.step("average", (x,), y, terms=terms, truncated=True)

    def convolution(self, m: Any, x: Value, shape: tuple[int, ...]) -> Value:
        transposed = isinstance(m, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        bits, top = weight_steps(m)
        weight = Weight(id(m.weight), m.weight.numel(), bits, top, 0 if getattr(m, "bias", None) is None else m.bias.numel())
        window = window_of(m.weight.shape, m.stride, m.padding, m.dilation, m.groups, transposed)
        gate = isinstance(getattr(m, "threshold", None), nn.Parameter)
        return self.windowed(window, weight, x, shape, gate)

    def windowed(self, window: Window, weight: Weight, x: Value, shape: tuple[int, ...], gate: bool = False) -> Value:
        taps = prod(window.kernel)
        per_output = taps * (window.c_in // window.groups)
        if window.transposed:
            macs = prod(x.shape) * taps * (window.c_out // window.groups)
            return self.product("transposed", x, shape, per_output, per_output, weight, macs=macs, window=window)
        depthwise = window.groups > 1 and window.groups == window.c_in
        kind = "conv" if window.groups == 1 else "depthwise" if depthwise else "grouped"
        counted = per_output if self.fan_in == "true" else taps * (window.c_out // window.groups)
        return self.product(kind, x, shape, per_output, counted, weight, window=window, gate=gate)

    def linear(self, m: Any, x: Value, shape: tuple[int, ...]) -> Value:
        bits, top = weight_steps(m)
        weight = Weight(id(m.weight), m.weight.numel(), bits, top, 0 if getattr(m, "bias", None) is None else m.bias.numel())
        return self.product("linear", x, shape, m.weight.shape[1], m.weight.shape[1], weight)

    # -------------------------------------------------------- functions

    def function(self, name: str, inputs: tuple[Value, ...], shape: tuple[int, ...]) -> Value:
        from quantlib._torch import ELEMENTWISE, IDENTITY, REARRANGE

        x, args, kwargs = inputs[0], self.call.args, self.call.kwargs
        if name in _REFUSED or name.startswith("conv_transpose"):
            raise self.refuse("no rule for this function; F.conv2d, F.linear and torch.matmul have one, and the layers of torch.nn")
        if name in _CONVOLUTIONS or name == "linear":
            return self.functional_product(name, x, shape)
        if name in ("matmul", "rmatmul", "bmm", "mm", "mv", "dot"):
            return self.matmul(inputs, shape)
        if name in REARRANGE | IDENTITY or name == "pad" or (name in ("interpolate", "upsample") and "nearest" in mode_of(args, kwargs)):
            return self.move(inputs, shape)
        if name in ("max", "min") and len(tracked(args, kwargs)) == 1:
            return self.maximum(x, shape, prod(x.shape))
        if name in _AVERAGE or name in _MAXIMUM:
            pool = self.average if name in _AVERAGE else self.maximum
            return pool(x, shape, function_terms(name, args, kwargs, x.shape, shape))
        if name in _ADD and len(tracked(args, kwargs)) > 1:
            return self.add(inputs * 2 if len(inputs) == 1 else inputs, shape)
        if name in _MULTIPLY and len(tracked(args, kwargs)) > 1:
            return self.multiply(inputs * 2 if len(inputs) == 1 else inputs, shape)
        if name == "batch_norm":
            return self.batch_norm(x, shape, shape[1])
        if len(inputs) == 1 and name in ELEMENTWISE:
            constants = sum(t.numel() for t in constant_tensors(args, kwargs))
            return self.elementwise(name, x, shape, constants, _PRELU if name == "prelu" else 1)
        if len(inputs) > 1 and (name in ELEMENTWISE or name in ("max", "min")):
            return self.step("join", inputs, Value(shape, row=self.row))
        return self.step("other", inputs, Value(shape, row=self.row))

    def functional_product(self, name: str, x: Value, shape: tuple[int, ...]) -> Value:
        given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), self.call.args, strict=False))
        given |= self.call.kwargs
        w, bias = given["weight"], given.get("bias")
        if not isinstance(w, Tensor):
            raise self.refuse("its weights are computed from the image; use torch.matmul, or weights that are parameters")
        weight = Weight(id(w), w.numel(), None, None, bias.numel() if isinstance(bias, Tensor) else 0)
        if name == "linear":
            return self.product("linear", x, shape, w.shape[-1], w.shape[-1], weight)
        geometry = (given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1), given.get("groups", 1))
        return self.windowed(window_of(w.shape, *geometry), weight, x, shape)

    def matmul(self, inputs: tuple[Value, ...], shape: tuple[int, ...]) -> Value:
        left, right = self.call.args[:2] if self.what() != "rmatmul" else self.call.args[1::-1]
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            w = left if isinstance(left, Tensor) else right
            size = left.shape[-1] if isinstance(left, Tensor) else inputs[0].shape[-1]
            kind = "linear" if isinstance(right, Tensor) else "matmul"
            return self.product(kind, inputs[0], shape, size, size, Weight(id(w), w.numel(), None, None))
        a, b = inputs if len(inputs) > 1 else inputs * 2
        size = a.shape[-1]
        top = None if a.bits is None or b.bits is None else (a.top or 0) * (b.top or 0) * size
        y = Value(shape, top, True, row=self.row)
        return self.step("matmul", (a, b), y, macs=prod(shape) * size)
