"""A mixed-precision supernet from any model with quantized layers, what it has found, and the fixed-bit model of that."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from brevitas.nn import QuantConv2d, QuantLinear, TruncAdaptiveAvgPool2d, TruncAvgPool2d
from brevitas.nn.quant_layer import QuantNonLinearActLayer, QuantWeightBiasInputOutputLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantlib._brevitas import value_of
from quantlib._modules import replace_module
from quantlib.layers import ImageFloor, TruncAvgPool
from quantlib.search.candidates import activation_at, at_bits, rebind
from quantlib.search.geometry import Geometry, SearchError, geometry, size_of
from quantlib.search.mixed import MixedActivation, MixedWeights

PUBLISHED_BITS = (2, 3, 4, 5, 6, 7, 8)
_READ_SCALES = (TruncAdaptiveAvgPool2d, TruncAvgPool2d, TruncAvgPool)  # they need the scale of their input, which a mixture has not
_IMAGE, _REAL = "the network's input", "a value that is not quantized"


@dataclass(frozen=True)
class Kept:
    """A quantized layer that is not searched, with its fixed widths: hardware costs count it too."""

    geometry: Geometry
    weight_bits: int
    act_bits: int


@dataclass(frozen=True)
class Bits:
    """Widths found for the searched layers, in the order in which they run.

    act_bits are those of each layer's input, the largest where several activations meet. activations: searched activation -> bits.
    """

    names: tuple[str, ...]
    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    activations: Mapping[str, int]

    @property
    def bitw(self) -> str:
        """Weight bits as a digit string, as networks take them; joined by commas where a width has two digits."""
        return _joined(self.weight_bits)

    @property
    def bita(self) -> str:
        """Activation bits likewise."""
        return _joined(self.act_bits)


def _joined(bits: Sequence[int]) -> str:
    return ("" if max(bits, default=0) < 10 else ",").join(map(str, bits))


def supernet(
    model: nn.Module,
    bits: Sequence[int] = PUBLISHED_BITS,
    *,
    input_shape: Sequence[int],
    weight_bits: Sequence[int] | None = None,
    act_bits: Sequence[int] | None = None,
    only: str | Sequence[str] = "*",
    fixed: str | Sequence[str] = (),
    share: bool = True,
    input_bits: int = 8,
) -> nn.Module:
    """A copy of `model` in which every quantized convolution and linear layer, and the activation quantizer in front of it, is a softmax
    over candidate widths; the forward pass is that of the model otherwise, with one multiplication per layer.

    bits: candidate widths of weights and of activations; weight_bits, act_bits: where they differ. only, fixed: shell patterns of layer
    names to search, and of those that keep their bits; an activation that also feeds such a layer, or a truncating pool, keeps its own.
    share=False: a weight tensor for each width. input_bits: what costs take as the width of an input that has no quantizer. input_shape
    has no batch axis; one run on zeros of it shows which activation feeds which layer, and their sizes.

    Searched are brevitas.nn's QuantConv2d and QuantLinear and what is built on them, with any injector that takes `bit_width`. Their state
    is carried over, and every alpha starts at 0.01. SearchError names a layer whose input is not quantized, whose quantizer has one width
    only, or whose bias follows the scales of its input; a pattern that matches nothing; candidates that are none.

    Source: DeepBurning-MixQ (Luo et al., ICCAD 2023, arXiv 2308.11334)
    """
    candidates = _candidates(bits if weight_bits is None else weight_bits), _candidates(bits if act_bits is None else act_bits)
    net = rebind(copy.deepcopy(model))
    searched = _matching(net, only, fixed)
    uses = _trace(net, tuple(input_shape))
    calls = [u.name for u in uses]
    for name in sorted(searched):
        if calls.count(name) != 1:
            times = f"runs {calls.count(name)} times" if name in calls else "does not run"
            raise SearchError(f"{name} {times} in one forward pass of the model; name it in fixed=")
    kept = {s for u in uses if u.name not in searched for s in u.sources}
    activations: dict[str, MixedActivation | int] = {}
    for use in uses:
        if use.name in searched:
            for source in sorted(use.sources - {_IMAGE, _REAL, use.name}):
                if source not in activations:
                    module = net.get_submodule(source)
                    many = source not in kept
                    activations[source] = _mixed(module, candidates[1], source) if many else _width(module, source)
    for order, use in enumerate(u for u in uses if u.name in searched):
        replace_module(net, use.name, _composite(net.get_submodule(use.name), use, order, candidates, activations, share, input_bits))
    for source, mixed in activations.items():
        if isinstance(mixed, MixedActivation):
            replace_module(net, source, mixed)
    net.kept_layers = tuple(_kept(net, u, activations, input_bits) for u in uses if u.name not in searched and u.quantized)  # type: ignore[assignment]
    for module in net.modules():
        if isinstance(module, MixedActivation | MixedWeights):
            module.train(model.training)
    return net


def _candidates(bits: Sequence[int]) -> tuple[int, ...]:
    found = tuple(int(b) for b in bits)
    if not found or min(found) < 1 or len(set(found)) < len(found):
        raise SearchError(f"candidate bits are one or more different positive integers, got {found}")
    return found


def _matching(net: nn.Module, only: str | Sequence[str], fixed: str | Sequence[str]) -> set[str]:
    names = [n for n, m in net.named_modules() if isinstance(m, QuantConv2d | QuantLinear) and m.weight_quant.is_quant_enabled]
    if not names:
        raise SearchError(f"{type(net).__name__} has no quantized QuantConv2d or QuantLinear to search")
    if "" in names:
        raise SearchError(f"the model itself is a {type(net).__name__}; put it into an nn.Sequential")

    def hits(patterns: str | Sequence[str], what: str) -> set[str]:
        found: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            mine = {n for n in names if fnmatchcase(n, pattern)}
            if not mine:
                near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:8]
                raise SearchError(f"{what}={pattern!r} matches no quantized layer; there are {', '.join(near)}")
            found |= mine
        return found

    searched = hits(only, "only") - hits(fixed, "fixed")
    if not searched:
        raise SearchError("only= and fixed= leave no layer to search")
    return searched


# Which activation feeds which layer: one run, in which every tensor carries the quantizers it came from.


@dataclass(frozen=True)
class _Use:
    """One call of a layer: where its input came from, and the sizes."""

    name: str
    sources: frozenset[str]
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    quantized: bool


class _Sources(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, frozenset[str]] = {}
        self.alive: list[Tensor] = []  # so that ids are not used twice

    def get(self, tree: Any) -> frozenset[str]:
        return frozenset().union(*(self.of.get(id(t), frozenset()) for t in _tensors(tree)))

    def put(self, tree: Any, sources: frozenset[str]) -> None:
        for t in _tensors(tree):
            self.alive.append(t)
            self.of[id(t)] = sources

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if sources := self.get((args, kwargs)):
            self.put(out, sources)
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for v in tree.values():
            yield from _tensors(v)
    elif isinstance(tree, tuple | list):
        for v in tree:
            yield from _tensors(v)


def _is_quantizer(module: nn.Module) -> bool:
    if isinstance(module, QuantNonLinearActLayer):
        return bool(module.act_quant.is_quant_enabled)
    return isinstance(module, ImageFloor) or (hasattr(module, "bits") and hasattr(module, "lower") and not any(module.parameters(False)))


def _trace(net: nn.Module, input_shape: tuple[int, ...]) -> list[_Use]:
    """Every call of a layer with weights, and of a pool that reads scales, in order."""
    mode, uses = _Sources(), list[_Use]()
    handles = []
    for name, module in net.named_modules():
        quantizer = _is_quantizer(module)
        reader = isinstance(module, _READ_SCALES)
        real = any(True for _ in module.parameters(False)) or isinstance(module, nn.modules.batchnorm._NormBase)
        if not (quantizer or reader or real):
            continue
        layer = isinstance(module, QuantWeightBiasInputOutputLayer | nn.modules.conv._ConvNd | nn.Linear)

        def reads(_: nn.Module, args: Any, name: str = name) -> None:
            uses.append(_Use(name, mode.get(args), (1, 1), (1, 1), False))

        def after(_: nn.Module, args: Any, out: Any, name: str = name, quantizer: bool = quantizer, layer: bool = layer) -> None:
            if layer:
                weighted: Any = net.get_submodule(name)
                own = isinstance(weighted, QuantWeightBiasInputOutputLayer) and weighted.input_quant.is_quant_enabled
                sources = frozenset({name}) if own else mode.get(args)
                quantized = isinstance(weighted, QuantConv2d | QuantLinear) and weighted.weight_quant.is_quant_enabled
                uses.append(_Use(name, sources, size_of(value_of(args[0])), size_of(value_of(out)), quantized))
            mode.put(out, frozenset({name if quantizer else _REAL}))

        handles.append(module.register_forward_pre_hook(reads) if reader else module.register_forward_hook(after))
    some = next(net.parameters())
    try:
        with torch.no_grad(), _evaluating(net), mode:
            x = torch.zeros(1, *input_shape, dtype=some.dtype, device=some.device)
            mode.put(x, frozenset({_IMAGE}))
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return uses


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _mixed(module: nn.Module, bits: tuple[int, ...], name: str) -> MixedActivation:
    return MixedActivation([activation_at(module, b, name) for b in bits], bits)


def _width(module: Any, name: str) -> int:
    width = module.act_quant.bit_width() if isinstance(module, QuantNonLinearActLayer) else getattr(module, "bits", None)
    if width is None:
        raise SearchError(f"{name} ({type(module).__name__}) does not say how many bits it has")
    return int(width)


def _composite(
    layer: Any,
    use: _Use,
    order: int,
    candidates: tuple[tuple[int, ...], tuple[int, ...]],
    activations: Mapping[str, MixedActivation | int],
    share: bool,
    input_bits: int,
) -> MixedWeights:
    if layer.bias is not None and layer.bias_quant.is_quant_enabled and layer.bias_quant.requires_input_scale:
        raise SearchError(f"{use.name}: its bias is quantized to the scales of input and weights, which are mixed here; name it in fixed=")
    mixed = MixedWeights(use.name, layer, candidates[0], share)
    mixed.order, mixed.in_size, mixed.out_size = order, use.in_size, use.out_size
    if layer.input_quant.is_quant_enabled:
        own = [at_bits(layer.input_quant, mixed.layer, b, use.name) for b in candidates[1]]
        mixed.activation = MixedActivation(own, candidates[1])
        mixed.inputs = (mixed.activation,)
        for branch in mixed.branches:
            branch.input_quant = None  # type: ignore[assignment]
    elif _REAL in use.sources or not use.sources:
        raise SearchError(f"{use.name}: its input is not quantized; put an activation quantizer in front of it, or name it in fixed=")
    else:
        mixed.inputs = tuple(input_bits if s == _IMAGE else activations[s] for s in sorted(use.sources))
    return mixed


def _kept(net: nn.Module, use: _Use, activations: Mapping[str, MixedActivation | int], input_bits: int) -> Kept:
    layer: Any = net.get_submodule(use.name)
    if use.sources == {use.name}:
        act = int(layer.input_quant.bit_width())
    else:
        widths = [activations.get(s) or _width(net.get_submodule(s), s) for s in use.sources - {_IMAGE, _REAL}]
        act = max([w for w in widths if isinstance(w, int)], default=input_bits)
    return Kept(geometry(use.name, layer, use.in_size, use.out_size), int(layer.weight_quant.bit_width()), act)


# Reading the result.


def layers(net: nn.Module) -> list[MixedWeights]:
    """The searched layers of a supernet in the order in which they run. SearchError where there are none."""
    found = sorted((m for m in net.modules() if isinstance(m, MixedWeights)), key=lambda m: m.order)
    if not found:
        raise SearchError(f"{type(net).__name__} is no supernet; make one with ql.search.supernet(model, input_shape=...)")
    return found


def split_parameters(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(all other parameters, the alphas): the two are trained with optimizers of their own. Alphas are called ...alpha_weight and
    ...alpha_activ."""
    layers(net)
    alphas = [p for n, p in net.named_parameters() if n.rpartition(".")[2] in ("alpha_weight", "alpha_activ")]
    chosen = set(map(id, alphas))
    return [p for p in net.parameters() if id(p) not in chosen], alphas


def _best(bits: Sequence[int], alpha: Tensor) -> int:
    """The width of the largest share, the first of equals."""
    return bits[int(alpha.detach().argmax())]


def read_bits(net: nn.Module) -> Bits:
    """The width with the largest share of every searched layer and activation, the first among equals."""
    found = layers(net)
    acts = {id(m): _best(m.bits, m.alpha_activ) for m in net.modules() if isinstance(m, MixedActivation)}
    inputs = [max(acts[id(s)] if isinstance(s, MixedActivation) else s for s in m.inputs) for m in found]
    named = {n: acts[id(m)] for n, m in net.named_modules() if isinstance(m, MixedActivation)}
    return Bits(tuple(m.name for m in found), tuple(_best(m.bits, m.alpha_weight) for m in found), tuple(inputs), named)


def make_bits(net: nn.Module, weight_bits: str | Sequence[int], act_bits: str | Sequence[int]) -> Bits:
    """Bits of your own for a supernet, as digit strings or lists in the order of its layers; act_bits are those of each layer's input.

    SearchError for a wrong number of them, and where layers that share an activation ask for different widths of it.
    """
    found = layers(net)
    lists = []
    for what, given in (("weight_bits", weight_bits), ("act_bits", act_bits)):
        numbers = tuple(int(b) for b in (given.split(",") if isinstance(given, str) and "," in given else given))
        if len(numbers) != len(found):
            raise SearchError(f"{what}={given!r} has {len(numbers)} entries for {len(found)} layers: {', '.join(m.name for m in found)}")
        lists.append(numbers)
    paths = {id(m): n for n, m in net.named_modules() if isinstance(m, MixedActivation)}
    activations: dict[str, int] = {}
    for mixed, width in zip(found, lists[1], strict=True):
        for source in mixed.inputs:
            path = paths.get(id(source), mixed.name)
            known = activations.setdefault(path, width) if isinstance(source, MixedActivation) else source
            if known != width:
                raise SearchError(f"act_bits: {path} has {known} bits already, {mixed.name} asks for {width}")
    return Bits(tuple(m.name for m in found), lists[0], lists[1], activations)


def fixed(net: nn.Module, bits: Bits | None = None) -> nn.Module:
    """The model without composites: a copy in which every searched layer and activation has the bits found (`read_bits`), or those of
    `bits` (`make_bits`), and the weights of the supernet. It has the state-dict keys of the model that the supernet was made from.

    SearchError where `bits` belong to another supernet or are no candidates.
    """
    chosen = bits or read_bits(net)
    own = read_bits(net)
    if chosen.names != own.names or set(chosen.activations) != set(own.activations):
        raise SearchError("these bits were read from another supernet: its layers have other names")
    plain = rebind(copy.deepcopy(net))
    for mixed, width in zip(layers(plain), chosen.weight_bits, strict=True):
        index = _index(mixed.bits, width, mixed.name)
        layer: Any = mixed.layer if mixed.share else mixed.branches[index]
        if not mixed.share:
            layer.bias = mixed.layer.bias
        layer.weight_quant = mixed.quantizers[index]
        if mixed.activation is not None:
            path = next(n for n, m in plain.named_modules() if m is mixed.activation)
            place = _index(mixed.activation.bits, chosen.activations[path], path)
            layer.input_quant = mixed.activation.candidates[place]
        if hasattr(layer, "bits"):
            layer.bits = width
        replace_module(plain, next(n for n, m in plain.named_modules() if m is mixed), layer)
    for path, module in [(n, m) for n, m in plain.named_modules() if isinstance(m, MixedActivation)]:
        width = chosen.activations[path]
        replace_module(plain, path, module.candidates[_index(module.bits, width, path)])
    del plain.kept_layers
    return plain


def _index(bits: Sequence[int], width: int, name: str) -> int:
    if width not in bits:
        raise SearchError(f"{name}: {width} bits are none of its candidates {tuple(bits)}")
    return bits.index(width)
