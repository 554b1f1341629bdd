"""How a map lies in memory: the format of its fields, and vectors, rows and groups in words of 512 bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantlib.hls.writer import map_shape
from quantlib.ir import IntType

LANES = 32  # channels of a vector
WORD = 64  # bytes of a word of the bus
CONTAINERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Format:
    """n = (field << shift) + bias; a field has 1, 2, 4, 8, 16, 32 or 64 bits.

    A vector holds 32 neighbouring channels of a pixel: two planes of 32 bits for 2-bit fields (the low bits first), else the fields side by
    side, channel 0 in the lowest bits.
    """

    bits: int
    shift: int
    bias: int

    @property
    def beats(self) -> int:
        """Words of one vector, 1 where several share a word."""
        return max(1, self.bits // 16)

    def words(self, cols: int) -> int:
        """Words of `cols` vectors side by side."""
        return -(-cols * self.bits // 16)


def format_of(t: IntType) -> Format:
    """The narrowest format: fields count from lo in steps of the largest power of two that the lattice allows."""
    step = t.step if t.levels > 1 else 1
    shift = (step & -step).bit_length() - 1
    last = (t.hi - t.lo) >> shift
    return Format(next(b for b in CONTAINERS if last < 1 << b), shift, t.lo)


SIGNS = Format(1, 1, -1)  # -1, 1
FRACTIONS = Format(2, 1, -3)  # -3, -1, 1, 3: the high plane is the sign, the low one the sign of what is left


@dataclass(frozen=True)
class Layout:
    """A map (C, H, W) in memory: groups of 32 channels, each with H rows of `pitch` words."""

    channels: int
    height: int
    width: int
    format: Format

    @property
    def groups(self) -> int:
        return -(-self.channels // LANES)

    @property
    def last(self) -> int:
        """Channels of the last group."""
        return self.channels - LANES * (self.groups - 1)

    @property
    def pitch(self) -> int:
        return self.format.words(self.width)

    @property
    def group_words(self) -> int:
        return self.height * self.pitch

    @property
    def words(self) -> int:
        return self.groups * self.group_words


def layout_of(t: IntType) -> Layout:
    return Layout(*map_shape(t), format_of(t))


def pack_fields(fields: np.ndarray, bits: int) -> np.ndarray:
    """(..., 32) unsigned fields -> (..., 4 * bits) bytes, as a vector lies in memory."""
    if bits <= 2:
        planes = np.stack([fields >> k & 1 for k in range(bits)], -2).astype(np.uint8)
        return np.packbits(planes, axis=-1, bitorder="little").reshape(*fields.shape[:-1], 4 * bits)
    if bits == 4:
        f = fields.astype(np.uint8)
        return f[..., 0::2] | f[..., 1::2] << 4
    return np.ascontiguousarray(fields.astype(f"<u{bits // 8}")).view(np.uint8)


def unpack_fields(data: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of pack_fields: (..., 4 * bits) bytes -> (..., 32) uint64."""
    if bits <= 2:
        planes = np.unpackbits(data.reshape(*data.shape[:-1], bits, 4), axis=-1, bitorder="little").astype(np.uint64)
        return planes[..., 0, :] + (2 * planes[..., 1, :] if bits == 2 else 0)
    if bits == 4:
        return np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], LANES).astype(np.uint64)
    return np.ascontiguousarray(data).view(f"<u{bits // 8}").astype(np.uint64)


def pack(values: np.ndarray, layout: Layout) -> np.ndarray:
    """Integers (N, C, H, W) -> (N, words * 64) bytes; channels that fill up the last group hold the code 0."""
    f, n = layout.format, len(values)
    fields = ((values.astype(np.int64) - f.bias) >> f.shift).astype(np.uint64)
    full = np.zeros((n, layout.groups * LANES, layout.height, layout.width), np.uint64)
    full[:, : layout.channels] = fields
    vectors = full.reshape(n, layout.groups, LANES, layout.height, layout.width).transpose(0, 1, 3, 4, 2)
    data = pack_fields(vectors, f.bits)
    rows = data.reshape(n, layout.groups, layout.height, -1)
    out = np.zeros((n, layout.groups, layout.height, layout.pitch * WORD), np.uint8)
    out[..., : rows.shape[-1]] = rows
    return out.reshape(n, -1)


def unpack(data: np.ndarray, layout: Layout) -> np.ndarray:
    """(N, words * 64) bytes -> integers (N, C, H, W), int64."""
    f, n = layout.format, len(data)
    rows = data.reshape(n, layout.groups, layout.height, layout.pitch * WORD)[..., : layout.width * 4 * f.bits]
    fields = unpack_fields(rows.reshape(n, layout.groups, layout.height, layout.width, 4 * f.bits), f.bits)
    values = (fields << np.uint64(f.shift)).astype(np.int64) + f.bias
    return values.transpose(0, 1, 4, 2, 3).reshape(n, -1, layout.height, layout.width)[:, : layout.channels]
