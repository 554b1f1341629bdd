"""The C headers of the published FracBNN accelerator for CIFAR-10.

A network retrained here drops into the authors' accelerator by replacing three headers of it, which `write` makes and `read` reads:

    weights_tb.h          float arrays of the test bench, named by the state-dict key with underscores for dots
    conv_weights.h        conv_weight_all[45][16][3][3]: the signs of all convolutions, 64 channels to a word
    weights_fracnet_64.h  every other parameter as <name>_fix[4][16], tiles of 16 channels padded with zeros; linear as it is

Batch normalisation is folded to y = w x + b in all of them. Source: xcel-cifar10 of cornell-zhang/FracBNN.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from quantlib.io.c_arrays import Arrays, parse
from quantlib.io.checkpoints import CheckpointError

FLOATS, WORDS, PARAMETERS = "weights_tb.h", "conv_weights.h", "weights_fracnet_64.h"
TILE, TILES, WORD_BITS, COLOURS = 16, 4, 64, 3
WORD_ARRAY = "conv_weight_all"


# ---------------------------------------------------------------- the network of the accelerator


def _shapes() -> dict[str, tuple[int, ...]]:
    """Every float array, by name, in network order."""
    shapes: dict[str, tuple[int, ...]] = {"conv1_weight": (16, 96, 3, 3), "bn1_weight": (16,), "bn1_bias": (16,)}
    channels = 16
    for layer, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            prefix = f"layer{layer}_{block}_"
            for k in (1, 2):
                shapes |= {f"{prefix}rprelu{k}_{v}": (width,) for v in ("shift_x_bias", "shift_y_bias", "prelu_weight")}
            for k in (1, 2):
                shapes[f"{prefix}conv{k}_weight"] = (width, channels, 3, 3)
                shapes[f"{prefix}conv{k}_threshold"] = (width,)
                channels = width
            for k in (1, 2, 3, 4):
                shapes |= {f"{prefix}bn{k}_{v}": (width,) for v in ("weight", "bias")}
    return shapes | {"linear_weight": (10, 64), "linear_bias": (10,)}


SHAPES = _shapes()
CONVOLUTIONS = tuple(name for name, shape in SHAPES.items() if len(shape) == 4)


def arrays_of(model: nn.Module) -> Arrays:
    """The float arrays of a FracBNN for CIFAR-10, by header name: batch normalisation folded in float64 and rounded once.

    Weights of gated convolutions become their signs; those of the first convolution stay real, the accelerator takes w > 0. ValueError when
    the model has another shape than the accelerator, and for a weight that is 0 or a value that is not finite.
    """
    arrays: Arrays = {}
    folded: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            w = module.weight.double() / torch.sqrt(module.running_var.double() + module.eps)
            folded |= {f"{path}.weight": w, f"{path}.bias": module.bias.double() - module.running_mean.double() * w}
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        array = folded.get(key, value).detach().float().cpu().numpy()
        name = key.replace(".", "_")
        arrays[name] = array if array.ndim != 4 or name in CONVOLUTIONS else array.reshape(-1)
    found = {name: array.shape for name, array in arrays.items()}
    if found != SHAPES:
        wrong = sorted(name for name in found.keys() | SHAPES.keys() if found.get(name) != SHAPES.get(name))
        raise ValueError(
            f"the published accelerator holds fracbnn_cifar10 with 10 classes and nothing else; this {type(model).__name__} differs in "
            f"{len(wrong)} arrays, first {wrong[0]}: {found.get(wrong[0])}, the accelerator has {SHAPES.get(wrong[0])}"
        )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are NaN or infinite")
        if name in CONVOLUTIONS and not array.all():
            raise ValueError(f"{name} has {int((array == 0).sum())} weights that are exactly 0 and have no sign; train on")
        if name in CONVOLUTIONS[1:]:
            arrays[name] = np.sign(array)
    return {name: arrays[name] for name in SHAPES}


def pack_words(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """conv_weight_all (45, 16, 3, 3) uint64: bit 63 - i is 1 where the weight of input channel i is > 0, unused bits are 0.

    The first convolution has one word per colour (32 thermometer bits each), every other one word per 16 output channels.
    """
    tiles = []
    for name in CONVOLUTIONS:
        w = arrays[name]
        if name == CONVOLUTIONS[0]:
            w = w.reshape(TILE, COLOURS, -1, 3, 3).swapaxes(0, 1)
        bits = (w.reshape(-1, TILE, *w.shape[-3:]) > 0).astype(np.uint64)
        places = np.arange(WORD_BITS - 1, WORD_BITS - 1 - bits.shape[2], -1, dtype=np.uint64).reshape(-1, 1, 1)
        tiles.append((bits << places).sum(2, dtype=np.uint64))
    return np.concatenate(tiles)


def unpack_words(words: np.ndarray) -> Arrays:
    """The convolutions' weights, +1 and -1, out of conv_weight_all; CheckpointError for another shape and for bits where no channel is."""
    expected = (sum(_tiles(name) for name in CONVOLUTIONS), TILE, 3, 3)
    if words.shape != expected:
        raise CheckpointError(f"{WORD_ARRAY} has the shape {words.shape}, the accelerator's is {expected}")
    arrays, start = {}, 0
    for name in CONVOLUTIONS:
        count, shape = _tiles(name), SHAPES[name]
        channels = shape[1] // COLOURS if name == CONVOLUTIONS[0] else shape[1]
        places = np.arange(WORD_BITS - 1, -1, -1, dtype=np.uint64).reshape(-1, 1, 1)
        bits = (words[start : start + count, :, None] >> places) & np.uint64(1)  # (tiles, 16, 64, 3, 3)
        if bits[:, :, channels:].any():
            raise CheckpointError(f"{WORD_ARRAY}: the words of {name} have bits set behind their {channels} channels")
        w = bits[:, :, :channels].astype(np.float32) * 2 - 1
        arrays[name] = (w.swapaxes(0, 1) if name == CONVOLUTIONS[0] else w).reshape(shape)
        start += count
    return arrays


def _tiles(name: str) -> int:
    return COLOURS if name == CONVOLUTIONS[0] else SHAPES[name][0] // TILE


def pad_tiles(name: str, values: np.ndarray) -> np.ndarray:
    """(C,) as (4, 16), zero padded; the classifier as it is."""
    if name.startswith("linear"):
        return values
    padded = np.zeros(TILES * TILE, np.float32)
    padded[: len(values)] = values
    return padded.reshape(TILES, TILE)


def unpad_tiles(name: str, values: np.ndarray) -> np.ndarray:
    shape = SHAPES[name]
    expected = pad_tiles(name, np.zeros(shape, np.float32)).shape
    if values.shape != expected:
        raise CheckpointError(f"{name}_fix has the shape {values.shape}, the accelerator's is {expected}")
    flat = values.reshape(-1)
    if flat[prod(shape) :].any():
        raise CheckpointError(f"{name}_fix has values behind its {shape[0]} channels, where the accelerator has padding")
    return flat[: prod(shape)].reshape(shape)


def image_words(pixels: np.ndarray) -> np.ndarray:
    """Images as the accelerator reads them, `uint64 image[3][32][32]`: uint8 (N, 32, 32, 3) -> uint64 (N, 3, 32, 32).

    One word per pixel and colour, thermometer bit b of 32 in bit 63 - b, 1 for +1. ValueError for anything but uint8 in that order.
    """
    from quantlib.layers import ThermometerEncoder

    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (32, 32, 3):
        raise ValueError(f"the accelerator takes uint8 images (N, 32, 32, 3), got {pixels.dtype} {pixels.shape}")
    bits = ThermometerEncoder(8)(torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))).numpy() > 0
    places = np.arange(WORD_BITS - 1, WORD_BITS - 33, -1, dtype=np.uint64).reshape(-1, 1, 1)
    return (bits.reshape(-1, COLOURS, 32, 32, 32).astype(np.uint64) << places).sum(2, dtype=np.uint64)


# ---------------------------------------------------------------- writing


def write(model: nn.Module, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes the three headers into `folder` (made if it is not there) and returns their paths; existing ones are replaced, each at once.

    model: fracbnn_cifar10 with any fixed_point option; fixed_point="authors" computes what the accelerator will, whose parameters have 12
    bits. Floats have 9 significant digits, which reading turns into the same float32. ValueError as `arrays_of`.
    """
    arrays = arrays_of(model)
    about = "// FracBNN for CIFAR-10, written by quantlib\n"
    texts = {
        FLOATS: about + "".join(_c_array("const float", name, array) for name, array in arrays.items()),
        WORDS: f'{about}#include "typedefs.h"\n' + _c_array("const uint64", WORD_ARRAY, pack_words(arrays)),
        PARAMETERS: f'{about}#include "typedefs.h"\n'
        + "".join(_c_array("const FIX_WT", f"{n}_fix", pad_tiles(n, a)) for n, a in arrays.items() if n not in CONVOLUTIONS),
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        handle, scratch = tempfile.mkstemp(dir=target, prefix=f".{name}.")
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target / name)
    return [target / name for name in texts]


def _c_array(kind: str, name: str, array: np.ndarray) -> str:
    number = (lambda v: f"0x{v:016x}") if array.dtype == np.uint64 else (lambda v: f"{v:.9g}")

    def initialiser(part: np.ndarray) -> str:
        if part.ndim == 1:
            rows = [", ".join(number(v) for v in part[i : i + 16].tolist()) for i in range(0, len(part), 16)]
            return "{" + ",\n ".join(rows) + "}"
        return "{" + ",\n ".join(initialiser(p) for p in part) + "}"

    return f"{kind} {name}{''.join(f'[{n}]' for n in array.shape)} = {initialiser(array)};\n"


# ---------------------------------------------------------------- reading


def read(*paths: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The arrays of C headers as tensors, by name. Packed words and `_fix` arrays of the accelerator come back under their float names.

    `zoo.load(model, "weights_tb.h")` reads one header; the accelerator's own two go in as `zoo.load(model, read("conv_weights.h",
    "weights_fracnet_64.h"))`, and then the first convolution's weights are signs. CheckpointError, with the line, for anything but
    declarations of arrays of numbers, comments and preprocessor lines.
    """
    arrays: Arrays = {}
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{path.name} is no text file") from None
        found = parse(text, path.name)
        if not found:
            raise CheckpointError(f"{path.name} holds no array of numbers")
        twice = arrays.keys() & found.keys()
        if twice:
            raise CheckpointError(f"{path.name} declares {sorted(twice)[0]} a second time")
        arrays |= found
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in _translated(arrays).items()}


def _translated(arrays: Arrays) -> Arrays:
    result: Arrays = {}
    for name, array in arrays.items():
        if name == WORD_ARRAY:
            result |= unpack_words(array)
        elif name.endswith("_fix") and name.removesuffix("_fix") in SHAPES:
            result[name.removesuffix("_fix")] = unpad_tiles(name.removesuffix("_fix"), array)
        elif "placeholder" not in name:
            result[name] = array
    return result
