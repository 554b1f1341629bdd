"""What the networks of DeepBurning-MixQ share: bit strings and named settings, families of quantizers, the published state dicts."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from quantlib.io.checkpoints import CheckpointError
from quantlib.layers import ConstantStepConv2d, DorefaActivation, DorefaConv2d, HalfWave, ImageFloor

Bits = int | str | Sequence[int]
Quantizer = Literal["mixq", "dorefa", "float"]
REAL = 32  # in a list of bits: not quantized

# network -> name -> (weight bits, activation bits), the first one being the default. readme, bjtu, ismart: README of the published code;
# authors: found by their search, as in the accelerators they generated; w4a4, w5a8: uniform, as their exports have them
SETTINGS: dict[str, dict[str, tuple[str, str]]] = {
    "vggtiny_cifar10": {"readme": ("822222", "833363")},
    "ultranet_dacsdc": {
        "bjtu": ("444444444", "844444444"),
        "ismart": ("844444448", "844444444"),
        "authors": ("532555558", "733677665"),
    },
    "ultranet_bypass_dacsdc": {"w4a4": ("444444444", "844444444")},
    "skynet_dacsdc": {"w5a8": ("5" * 13, "8" * 13), "authors": ("8765658583688", "8883878575556")},
    "skynetk5_dacsdc": {"w5a8": ("5" * 13, "8" * 13)},
}


def parse_bits(bits: Bits, layers: int, option: str) -> tuple[int, ...]:
    """A digit string (or the number of those digits, as command lines give it) or a list, one entry for each layer, or one number for all
    of them, as integers.

    ValueError names the option and the position of what is wrong.

    >>> parse_bits("8444", 4, "weight_bits"), parse_bits([8, 4, 4, 32], 4, "weight_bits"), parse_bits(4, 3, "weight_bits")
    ((8, 4, 4, 4), (8, 4, 4, 32), (4, 4, 4))
    >>> parse_bits(8444, 4, "weight_bits")
    (8, 4, 4, 4)
    """
    if isinstance(bits, int):
        bits = str(bits) if bits > REAL else [bits] * layers
    if len(bits) != layers:
        raise ValueError(f"{option}={bits!r} has {len(bits)} entries; the network has {layers} such layers, conv0 to conv{layers - 1}")
    allowed = {*range(1, 9), *(() if isinstance(bits, str) else (REAL,))}
    numbers = [_number(entry) for entry in bits]
    for position, (entry, number) in enumerate(zip(bits, numbers, strict=True)):
        if number not in allowed:
            raise ValueError(
                f"{option}={bits!r}: entry {position} (of conv{position}) is {entry!r}; bits are 1 to 8, in a list also {REAL} for none"
            )
    return tuple(numbers)


def _number(entry: Any) -> int:
    """A digit or a whole number; 0, which is no width, for anything else."""
    if isinstance(entry, str):
        return int(entry) if entry.isdecimal() else 0
    return 0 if isinstance(entry, bool) or not hasattr(entry, "__index__") else operator.index(entry)


def chosen_bits(
    network: str, layers: int, weight_bits: Bits | None, act_bits: Bits | None, setting: str | None, quantizer: Quantizer
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bits of weights and of each layer's input; empty for the float form. Lists win over the default setting, never over a named one."""
    rows = SETTINGS[network]
    if quantizer not in FAMILIES:
        raise ValueError(f"quantizer={quantizer!r}: there are {', '.join(FAMILIES)}")
    if setting is not None and setting not in rows:
        raise ValueError(f"setting={setting!r}: {network} has {', '.join(rows)}")
    given = [name for name, value in (("weight_bits", weight_bits), ("act_bits", act_bits), ("setting", setting)) if value is not None]
    if quantizer == "float":
        if given:
            raise ValueError(f"quantizer='float' has no bits, but {' and '.join(given)} came with it")
        return (), ()
    if setting is not None and len(given) > 1:
        raise ValueError(f"give either setting or {' and '.join(given[:-1])}, not both")
    weights, acts = rows[setting or next(iter(rows))]
    w = parse_bits(weights if weight_bits is None else weight_bits, layers, "weight_bits")
    a = parse_bits(acts if act_bits is None else act_bits, layers, "act_bits")
    if quantizer == "dorefa":
        if a[0] != 8:
            raise ValueError(f"act_bits: the DoReFa form reads the image as it is, so entry 0 is 8, not {a[0]}")
        low = [i for i, b in enumerate(w) if not 2 <= b <= 8]
        if low:
            raise ValueError(f"weight_bits: DoReFa convolutions have 2 to 8 bits, entry {low[0]} (of conv{low[0]}) is {w[low[0]]}")
    return w, a


@dataclass(frozen=True)
class Family:
    """What a layer is made of: conv(bits, in, out, kernel, **options), activation(bits, six), image(bits); six: a float ReLU6, not ReLU."""

    conv: Callable[..., nn.Module]
    activation: Callable[[int, bool], nn.Module]
    image: Callable[[int], nn.Module]


def _mixq_conv(bits: int, *shape: Any, **options: Any) -> nn.Module:
    return nn.Conv2d(*shape, **options) if bits == REAL else ConstantStepConv2d(*shape, bits=bits, **options)


def _dorefa_conv(bits: int, *shape: Any, **options: Any) -> nn.Module:
    return DorefaConv2d(*shape, bits=bits, **options)


def _float_conv(bits: int, *shape: Any, **options: Any) -> nn.Module:
    return nn.Conv2d(*shape, **options)


FAMILIES: dict[str, Family] = {
    "mixq": Family(_mixq_conv, lambda bits, six: nn.ReLU() if bits == REAL else HalfWave(bits), ImageFloor),
    "dorefa": Family(_dorefa_conv, lambda bits, six: nn.ReLU6() if bits == REAL else DorefaActivation(bits), lambda bits: ImageFloor(REAL)),
    "float": Family(_float_conv, lambda bits, six: nn.ReLU6() if six else nn.ReLU(), lambda bits: nn.Identity()),
}


@dataclass(frozen=True)
class Row:
    """One convolution: output channels (0: depthwise, as many as come in), kernel, whether its output is halved, norm, bias."""

    out: int
    kernel: int = 3
    pool: bool = False
    norm: bool = True
    bias: bool = False


def widened(rows: Sequence[Row], width: float) -> tuple[Row, ...]:
    """The rows with their channels times `width`, at least 4; the head and depthwise rows stay."""
    if not 0 < width <= 8:
        raise ValueError(f"width multiplies the channels and lies in 0..8, got {width}")
    return tuple(replace(row, out=max(4, round(row.out * width))) if row.norm and row.out else row for row in rows)


def stack(
    rows: Sequence[Row],
    first: int,
    channels: int,
    family: Family,
    bits: tuple[Sequence[int], Sequence[int]],
    six: bool = False,
    pool_before_norm: bool = False,
    halved: bool = False,
) -> nn.Sequential:
    """act_i, conv_i, bn_i and pool_i of each row, numbered from `first`; `channels` come in; bits of weights and inputs of all layers.

    six: float activations are ReLU6. halved: the stack begins with the pool of the layer before it.

    Where published code pools behind the activation (float and DoReFa forms), pooling in front of it gives the same numbers, for
    activations are monotone. Among inputs that a DoReFa activation makes equal, the gradient goes to the largest instead of the first.
    """
    made = nn.Sequential()
    if halved:
        made.add_module(f"pool{first - 1}", nn.MaxPool2d(2))
    for i, row in enumerate(rows, first):
        w, a = (bits[0][i], bits[1][i]) if bits[0] else (REAL, REAL)
        groups, out = (1, row.out) if row.out else (channels, channels)
        conv = family.conv(w, channels, out, row.kernel, padding=row.kernel // 2, groups=groups, bias=row.bias)
        norm = [(f"bn{i}", nn.BatchNorm2d(out))] if row.norm else []
        pool = [(f"pool{i}", nn.MaxPool2d(2))] if row.pool else []
        act = family.image(a) if i == 0 else family.activation(a, six)
        for name, module in [(f"act{i}", act), (f"conv{i}", conv), *(pool + norm if pool_before_norm else norm + pool)]:
            made.add_module(name, module)
        channels = out
    return made


class Network(nn.Module):
    """A network of the paper, with its bits: weight_bits and act_bits, one of each layer (act_bits: of its input), () in the float form."""

    def __init__(self, weight_bits: tuple[int, ...], act_bits: tuple[int, ...]) -> None:
        super().__init__()
        self.weight_bits, self.act_bits = weight_bits, act_bits

    def translate_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dicts, fixed-bit, float and DoReFa: their positions in natural order are our layers in order.

        The buffers size_product, memory_size and in_width, which every forward run fills anew, are left out. Bits that the checkpoint
        states (`model_params`) must be the model's. A search's checkpoint fits the supernet made of this network, alphas included.
        CheckpointError for other bits, and for alphas where the model has none.
        """
        for option, key, own_bits in (("weight_bits", "bitw", self.weight_bits), ("act_bits", "bita", self.act_bits)):
            stated = tensors.pop(f"model_params.{key}", None)
            if stated is not None and tuple(stated.tolist()) != own_bits:
                found, ours = ("".join(map(str, bits)) for bits in (stated.tolist(), own_bits))
                raise CheckpointError(
                    f"the checkpoint was trained with {option} {found}, the model has {ours or 'none (it is the float form)'}"
                )
        tensors = {k: v for k, v in tensors.items() if k.rsplit(".", 1)[-1] not in ("size_product", "memory_size", "in_width")}
        if tensors.keys() == self.state_dict().keys():
            return tensors
        prefixes = sorted({key.rsplit(".", 1)[0] for key in tensors}, key=_natural)
        own = [[name for name, m in self.named_modules() if kind(m)] for kind in _KINDS]
        theirs = [
            [p for p in prefixes if f"{p}.weight" in tensors and tensors[f"{p}.weight"].dim() > 1],
            [p for p in prefixes if f"{p}.running_mean" in tensors],
            [p for p in prefixes if f"{p}.alpha_activ" in tensors],
            [p for p in prefixes if f"{p}.alpha_weight" in tensors],
        ]
        if theirs[2] and not own[2]:
            raise CheckpointError(
                "this is the checkpoint of a search (it has alphas): read its bits off and train a network of those bits, or load it into "
                "ql.search.supernet(model, input_shape=...)"
            )
        if [len(found) for found in own] != [len(found) for found in theirs]:
            return tensors
        names = {(p, group): n for group, pairs in enumerate(zip(theirs, own, strict=True)) for p, n in zip(*pairs, strict=True)}
        translated = {}
        for key, value in tensors.items():
            prefix, leaf = key.rsplit(".", 1)
            group = 2 if leaf == "alpha_activ" else 3 if leaf == "alpha_weight" else 1 if (prefix, 1) in names else 0
            translated[f"{names.get((prefix, group), prefix)}.{leaf}"] = value
        return translated


_KINDS: tuple[Callable[[nn.Module], bool], ...] = (  # of published keys: weights, norms, alphas of activations and of weights
    lambda m: isinstance(m, nn.Conv2d | nn.Linear),
    lambda m: isinstance(m, nn.BatchNorm2d),
    lambda m: isinstance(getattr(m, "alpha_activ", None), nn.Parameter),
    lambda m: isinstance(getattr(m, "alpha_weight", None), nn.Parameter),
)


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"[.]", key)]


def describe_bits(options: Iterable[str]) -> dict[str, str]:
    """The sentences of a card about the options that all these networks share."""
    return {
        "weight_bits": "bits of each layer's weights, a digit string, a list, or one number for all (32: real weights)",
        "act_bits": "bits of each layer's input, likewise; the first are those of the image",
        "setting": f"a named pair of both: {', '.join(options)}",
        "quantizer": "'mixq': constant steps; 'dorefa': tanh and powers of two, as in the older classes; 'float': no quantizers",
        "width": "factor on the channels of every layer but the head, for small trials",
    }
