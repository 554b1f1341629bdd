"""Several low-bit products in one DSP slice: which packings there are, how many products they make, and the arithmetic that proves them.

A slice multiplies a signed word of `wide` bits by one of `narrow` bits. Activations (unsigned) lie side by side in one word and weights
(signed) in the other,

    A = sum_i a_i 2^(i s_a),   W = sum_j w_j 2^(j s_w),   A W = sum_m y_m 2^(m S),   y_m = sum of a_i w_j with i s_a + j s_w = m S,

so one multiplication gives every product of an activation with a weight, already summed where they share a field:
- "conv": s_a = s_w = S, the fields are the N + K' - 1 sums of a 1-D convolution of N activations with K' weights;
- "mult": s = S on the 18-bit port and S times its number of values on the wide one, every field is one product.

A field of S = weight bits + activation bits + guard bits holds up to 2^guard signed products. With the overlap trick its top bit lies in
the next field and is told apart by the parity of that field's operands: twice as many products, or one guard bit less, even below zero.

Source: DeepBurning-MixQ (Luo et al., ICCAD 2023, arXiv 2308.11334) and the packing tables of its published code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

Scheme = Literal["conv", "mult"]
Integers = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Dsp:
    """Signed ports of a DSP slice and its accumulator, in bits. Source: UG479 (DSP48E1), UG579 (DSP48E2), AM004 (DSP58)."""

    name: str
    wide: int
    narrow: int
    accumulator: int


DSPS = {d.name: d for d in (Dsp("dsp48e1", 25, 18, 48), Dsp("dsp48e2", 27, 18, 48), Dsp("dsp58", 27, 24, 58))}


@dataclass(frozen=True)
class Rule:
    """What a packing must leave free, and which schemes are tried.

    sign_bit: the unsigned operand leaves the sign bit of its port free. spare_up_to: weights (or halves of them) of at most so many bits
    leave one bit of their port free in a "conv"; wider ones then must not take their lowest code. any_scheme: both schemes for every
    kernel, and the spare bit in both; otherwise "mult" for kernel 1 and "conv" for all others.
    """

    sign_bit: bool
    spare_up_to: int
    any_scheme: bool

    def schemes(self, kernel: int) -> tuple[Scheme, ...]:
        return ("mult", "conv") if self.any_scheme else ("mult",) if kernel == 1 else ("conv",)

    def spare(self, scheme: Scheme, weight_bits: int) -> int:
        return int((scheme == "conv" or self.any_scheme) and weight_bits <= self.spare_up_to)


PUBLISHED = Rule(sign_bit=False, spare_up_to=3, any_scheme=False)  # gives the published table, some of whose words leave their port
SAFE = Rule(sign_bit=True, spare_up_to=99, any_scheme=True)  # every word fits its signed port for every code
RULES = {"published": PUBLISHED, "safe": SAFE}

# The only cell of the published tables that the rule does not give: kernel 1, 2-bit weights, 3-bit activations; the rule gives 10.
PUBLISHED_ODD_CELL = {(1, 2, 3): 8.0}


@dataclass(frozen=True)
class Packing:
    """One way to use a slice for a kernel row of `kernel` taps.

    weight_bits, act_bits: of the operands; weight_parts, act_parts: 2 where an operand is cut into two halves of ceil(bits / 2) bits that
    take the slice one after the other. act_port: bits of the port that holds the activations. acts, weights: values per word (N and K').
    stride: S, between neighbouring fields; stride_min..stride_max are those that fit.
    """

    dsp: Dsp
    scheme: Scheme
    kernel: int
    weight_bits: int
    act_bits: int
    weight_parts: int
    act_parts: int
    act_port: int
    acts: int
    weights: int
    stride: int
    stride_min: int
    stride_max: int

    @property
    def weight_port(self) -> int:
        return self.dsp.wide + self.dsp.narrow - self.act_port

    @property
    def part_bits(self) -> tuple[int, int]:
        """Bits of a weight and of an activation as they lie in the words."""
        return -(-self.weight_bits // self.weight_parts), -(-self.act_bits // self.act_parts)

    @property
    def strides(self) -> tuple[int, int]:
        """Distance of neighbouring activations, and of neighbouring weights, in their words."""
        return _strides(self.scheme, self.dsp, self.act_port, self.acts, self.weights, self.stride)

    @property
    def fields(self) -> int:
        """Sums per multiplication."""
        return self.acts + self.weights - 1 if self.scheme == "conv" else self.acts * self.weights

    @property
    def terms(self) -> int:
        """Products in the fullest field of one multiplication."""
        return _terms(self.scheme, self.acts, self.weights)

    @property
    def guard(self) -> int:
        return self.stride - sum(self.part_bits)

    @property
    def overlap(self) -> bool:
        """Whether a field's top bit lies in the next field even for a single multiplication."""
        return self.guard < _bits_for(self.terms)

    def depth(self, overlap: bool | None = None) -> int:
        """How many packed products may be summed before unpacking: n terms <= 2^guard, or 2^(guard + 1) with the overlap trick, and the
        sum fits the accumulator.

        overlap=None: as `self.overlap` says. 0 where a single product is too much.
        """
        room = self.guard + int(self.overlap if overlap is None else overlap)
        act, (low, high) = self.act_word(), self.weight_word()
        largest = act * max(-low, high)
        return min(2**room // self.terms if room >= 0 else 0, (2 ** (self.dsp.accumulator - 1) - 1) // largest)

    @property
    def macs(self) -> Fraction:
        """Multiplications per slice and cycle: of a kernel row, ceil(kernel / K') words of weights are needed."""
        return _macs(self.scheme, self.kernel, self.acts, self.weights) / (self.weight_parts * self.act_parts)

    def act_word(self) -> int:
        """The largest word of activations."""
        step, bits = self.strides[0], self.part_bits[1]
        return (2**bits - 1) * sum(1 << (i * step) for i in range(self.acts))

    def weight_word(self, lowest: bool = True) -> tuple[int, int]:
        """The smallest and the largest word of weights; lowest=False: without the code -2^(bits-1), which then must not occur.

        Of split weights the low halves are unsigned.
        """
        step, bits = self.strides[1], self.part_bits[0]
        ones = sum(1 << (j * step) for j in range(self.weights))
        high = 2**bits - 1 if self.weight_parts == 2 else 2 ** (bits - 1) - 1
        return -(2 ** (bits - 1) - int(not lowest)) * ones, high * ones

    def fits(self, lowest: bool = True) -> bool:
        """Whether every word fits its signed port, whatever the codes (lowest=False: weights without their lowest code)."""
        low, high = self.weight_word(lowest)
        return self.act_word() < 2 ** (self.act_port - 1) and -(2 ** (self.weight_port - 1)) <= low and high < 2 ** (self.weight_port - 1)

    def at(self, stride: int) -> Packing:
        """The same packing with another distance of fields. ValueError where that does not fit the ports."""
        if not self.stride_min <= stride <= self.stride_max:
            raise ValueError(f"a stride of {stride} bits: {self.stride_min}..{self.stride_max} fit the ports of {self.dsp.name}")
        return replace(self, stride=stride)


def _bits_for(n: int) -> int:
    """ceil(log2(n))."""
    return (n - 1).bit_length()


def _terms(scheme: Scheme, acts: int, weights: int) -> int:
    return min(acts, weights) if scheme == "conv" else 1


def _macs(scheme: Scheme, kernel: int, acts: int, weights: int) -> Fraction:
    return Fraction(kernel * acts, -(-kernel // weights)) if scheme == "conv" else Fraction(acts * weights)


def _strides(scheme: Scheme, dsp: Dsp, act_port: int, acts: int, weights: int, stride: int) -> tuple[int, int]:
    if scheme == "conv":
        return stride, stride
    return (stride, acts * stride) if act_port == dsp.narrow else (weights * stride, stride)


def candidates(
    kernel: int,
    weight_bits: int,
    act_bits: int,
    dsp: str | Dsp = "dsp48e2",
    rule: str | Rule = "safe",
    *,
    depth: int = 1,
    split: bool = True,
) -> Iterator[Packing]:
    """Every packing that the rule allows, each with its largest stride.

    depth: so many packed products are summed before unpacking, with the overlap trick if need be. split=False: whole operands only.
    ValueError for a kernel, bits or depth below 1, LookupError for an unknown slice or rule.
    """
    if min(kernel, weight_bits, act_bits, depth) < 1:
        raise ValueError(f"kernel = {kernel}, weight_bits = {weight_bits}, act_bits = {act_bits} and depth = {depth} must be at least 1")
    port, allowed = _named(DSPS, dsp, "DSP slice"), _named(RULES, rule, "packing rule")
    parts = ((1, 1), (1, 2), (2, 1)) if split else ((1, 1),)
    for weight_parts, act_parts in parts:
        if (weight_parts == 2 and weight_bits < 2) or (act_parts == 2 and act_bits < 2):
            continue
        w, a = -(-weight_bits // weight_parts), -(-act_bits // act_parts)
        for scheme in allowed.schemes(kernel):
            for act_port in (port.narrow, port.wide):
                room = act_port - int(allowed.sign_bit), port.wide + port.narrow - act_port - allowed.spare(scheme, w)
                for acts, weights in _counts(scheme, kernel, room, w, a):
                    least = w + a + _bits_for(depth * _terms(scheme, acts, weights)) - 1
                    most = least - 1
                    while most < sum(room):  # one value per word fits at every stride; a word of the ports is the end of it
                        steps = _strides(scheme, port, act_port, acts, weights, most + 1)
                        if (acts - 1) * steps[0] + a > room[0] or (weights - 1) * steps[1] + w > room[1]:
                            break
                        most += 1
                    if most >= least:
                        yield Packing(port, scheme, kernel, weight_bits, act_bits, weight_parts, act_parts, act_port, acts, weights,
                                      most, least, most)  # fmt: skip


def _counts(scheme: Scheme, kernel: int, room: tuple[int, int], weight_bits: int, act_bits: int) -> Iterator[tuple[int, int]]:
    """Numbers of values that could fit: neighbours are at least weight bits + activation bits - 1 apart."""
    apart = max(weight_bits + act_bits - 1, 1)
    for acts in range(1, max(room[0] - act_bits, -1) // apart + 2):
        for weights in range(1, max(room[1] - weight_bits, -1) // apart + 2):
            if scheme == "mult" or weights <= kernel:
                yield acts, weights


@cache
def search(
    kernel: int, weight_bits: int, act_bits: int, dsp: str = "dsp48e2", rule: str | Rule = "safe", *, depth: int = 1, split: bool = True
) -> Packing:
    """The packing with the most multiplications per slice and cycle; arguments and errors as `candidates`.

    Among equals: "conv" before "mult", whole operands before split ones, split activations before split weights, activations on the wide
    port of a "conv" and on the narrow one of a "mult", more activations per word. ValueError where not even one product fits the slice.

    >>> p = search(3, 4, 4)
    >>> p.scheme, p.acts, p.weights, p.stride, p.macs
    ('conv', 2, 3, 11, Fraction(6, 1))
    """
    found = list(candidates(kernel, weight_bits, act_bits, dsp, rule, depth=depth, split=split))
    if not found:
        raise ValueError(
            f"{weight_bits}-bit weights times {act_bits}-bit activations, {depth} of them summed, do not fit a {dsp}; "
            "fewer bits or a smaller depth do"
        )

    def order(p: Packing) -> tuple[Any, ...]:
        wide = p.act_port == p.dsp.wide
        return -p.macs, p.scheme == "mult", p.weight_parts * p.act_parts, p.weight_parts, wide != (p.scheme == "conv"), -p.acts, p.weights

    return min(found, key=order)


def factor_safe(kernel: int, weight_bits: int, act_bits: int, dsp: str = "dsp48e2") -> Fraction:
    """Multiplications per slice and cycle of the best packing whose words fit their signed ports for every code.

    >>> factor_safe(3, 4, 4), factor_safe(1, 8, 8), factor_safe(5, 2, 2, "dsp58")
    (Fraction(6, 1), Fraction(2, 1), Fraction(20, 1))
    """
    return search(kernel, weight_bits, act_bits, dsp).macs


@cache
def factor_published(kernel: int, weight_bits: int, act_bits: int) -> float:
    """The published table: multiplications per DSP48E2 and cycle, rounded to two decimals, for the published search's cost and figures.

    Kernels 1, 3 and 5, 2 to 8 bits each; ValueError elsewhere, where `factor_safe` has an answer.
    """
    if kernel not in (1, 3, 5) or not (2 <= weight_bits <= 8 and 2 <= act_bits <= 8):
        raise ValueError(
            f"the published packing tables have kernels 1, 3, 5 and 2 to 8 bits, not kernel {kernel}, w{weight_bits} a{act_bits}; "
            "use factor_safe"
        )
    cell = (kernel, weight_bits, act_bits)
    return PUBLISHED_ODD_CELL.get(cell) or round(float(search(*cell, rule="published").macs), 2)


def factor_signed(kernel: int, weight_bits: int, act_bits: int, lowest: bool = True, dsp: str = "dsp48e2") -> Fraction:
    """As published, but for the real ranges of whole operands on signed ports; lowest=False: weights without their lowest code."""
    port = _named(DSPS, dsp, "DSP slice")
    best = Fraction(0)
    for act_port in (port.narrow, port.wide):
        for scheme in PUBLISHED.schemes(kernel):
            for acts, weights in _counts(scheme, kernel, (port.wide, port.wide), weight_bits, act_bits):
                stride = weight_bits + act_bits + _bits_for(_terms(scheme, acts, weights)) - 1
                p = Packing(port, scheme, kernel, weight_bits, act_bits, 1, 1, act_port, acts, weights, stride, stride, stride)
                if p.fits(lowest):
                    best = max(best, p.macs)
    return best


def _named(table: dict[str, Any], name: Any, what: str) -> Any:
    if not isinstance(name, str):
        return name
    if name not in table:
        raise LookupError(f"no {what} is called {name!r}; there are {', '.join(table)}")
    return table[name]


# The arithmetic itself. Integers are int64 arrays; words and sums of every packing above fit them.


def pack(values: Integers, stride: int) -> np.ndarray:
    """(..., n) integers -> (...) words: sum_i v_i 2^(i stride)."""
    v = np.asarray(values, np.int64)
    return (v << (stride * np.arange(v.shape[-1]))).sum(-1)


def parities(packing: Packing, acts: Integers, weights: Integers) -> np.ndarray:
    """(..., fields) lowest bit of each field's sum, from the lowest bits of the operands alone: acts (..., n, N), weights (..., n, K')."""
    a, w = np.asarray(acts, np.int64) & 1, np.asarray(weights, np.int64) & 1
    out = np.zeros((*np.broadcast_shapes(a.shape[:-2], w.shape[:-2]), packing.fields), np.int64)
    for i, j, m in places(packing):
        out[..., m] ^= np.bitwise_xor.reduce(a[..., i] & w[..., j], axis=-1)
    return out


def places(packing: Packing) -> list[tuple[int, int, int]]:
    """(i, j, m): activation i times weight j is added to field m."""
    step_a, step_w = packing.strides
    return [(i, j, (i * step_a + j * step_w) // packing.stride) for i in range(packing.acts) for j in range(packing.weights)]


def unpack(packing: Packing, total: Integers, parity: Integers | None = None, signed: bool = True) -> np.ndarray:
    """(...) sums of packed products -> (..., fields) the sums y_m, upwards from the lowest field.

    Without parity: y_m is the low S bits of what is left, as a signed number (signed=False: as an unsigned one). With it y_m has S + 1
    bits, whose top bit is bit S of what is left XOR the parity of y_(m+1). Then what is left is (rest - y_m) / 2^S.
    Exact while n packed products with n terms <= 2^guard were summed, 2^(guard + 1) with parity (`Packing.depth`).
    """
    rest, s = np.asarray(total, np.int64), packing.stride
    odd = None if parity is None else np.asarray(parity, np.int64)
    out = []
    for m in range(packing.fields):
        low = rest & ((1 << s) - 1)
        if odd is None:
            top = (low >> (s - 1)) & 1 if signed else np.zeros_like(low)
        else:
            top = (rest >> s) & 1
            top = top ^ odd[..., m + 1] if m + 1 < packing.fields else top
        y = low - (top << s) if signed else low + (top << s)
        out.append(y)
        rest = (rest - y) >> s
    return np.stack(out, -1)


def multiply_accumulate(packing: Packing, acts: Integers, weights: Integers, overlap: bool | None = None, check: bool = True) -> np.ndarray:
    """What the slice does: pack, multiply, sum n products, unpack. acts (..., n, N), weights (..., n, K') -> (..., fields) sums.

    Split operands take two passes: the halves of an activation are unsigned, the upper half of a weight is signed and its lower half
    unsigned. overlap as in `Packing.depth`. OverflowError (unless check=False) where a word leaves its signed port, the sum leaves the
    accumulator, or n exceeds the depth; ValueError where a code is out of range.
    """
    a, w = np.asarray(acts, np.int64), np.asarray(weights, np.int64)
    half = 2 ** (packing.weight_bits - 1)
    if a.min() < 0 or a.max() >= 2**packing.act_bits or w.min() < -half or w.max() >= half:
        raise ValueError(f"a code is outside {packing.act_bits} unsigned bits (activations) or {packing.weight_bits} signed bits (weights)")
    trick = packing.overlap if overlap is None else overlap
    if check and a.shape[-2] > packing.depth(trick):
        raise OverflowError(f"{a.shape[-2]} packed products are summed, and {packing.depth(trick)} may be")
    w_bits, a_bits = packing.part_bits
    if packing.act_parts == 2:
        low, high = a & ((1 << a_bits) - 1), a >> a_bits
        return _pass(packing, low, w, trick, True, check) + (_pass(packing, high, w, trick, True, check) << a_bits)
    if packing.weight_parts == 2:
        low, high = w & ((1 << w_bits) - 1), w >> w_bits
        return _pass(packing, a, low, trick, False, check) + (_pass(packing, a, high, trick, True, check) << w_bits)
    return _pass(packing, a, w, trick, True, check)


def _pass(packing: Packing, a: np.ndarray, w: np.ndarray, trick: bool, signed: bool, check: bool) -> np.ndarray:
    words = pack(a, packing.strides[0]), pack(w, packing.strides[1])
    total = (words[0] * words[1]).sum(-1)
    if check:
        for word, bits, what in (
            (words[0], packing.act_port, "a word of activations"),
            (words[1], packing.weight_port, "a word of weights"),
            (total, packing.dsp.accumulator, "the sum"),
        ):
            if word.min() < -(2 ** (bits - 1)) or word.max() >= 2 ** (bits - 1):
                raise OverflowError(f"{what} leaves {bits} signed bits")
    return unpack(packing, total, parities(packing, a, w) if trick else None, signed)


# Pages and pictures.


def table(kernel: int, dsp: str = "dsp48e2", bits: Sequence[int] = range(2, 9)) -> str:
    """`factor_safe` as a table in Markdown: rows weight bits, columns activation bits."""
    rows = [f"| k={kernel} | " + " | ".join(f"a{a}" for a in bits) + " |", "|---" * (len(bits) + 1) + "|"]
    rows += [f"| w{w} | " + " | ".join(f"{float(factor_safe(kernel, w, a, dsp)):.3g}" for a in bits) + " |" for w in bits]
    return "\n".join(rows)


def plot(path: str | Path, kernels: Sequence[int] = (1, 3, 5), dsp: str = "dsp48e2", bits: Sequence[int] = range(1, 9)) -> Path:
    """Multiplications per slice and cycle (`factor_safe`) over weight and activation bits, one map per kernel, as a picture file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(kernels), 4), layout="constrained")
    for axes, kernel in zip(np.atleast_1d(figure.subplots(1, len(kernels))), kernels, strict=True):
        values = np.array([[float(factor_safe(kernel, w, a, dsp)) for a in bits] for w in bits])
        axes.imshow(values, origin="lower", cmap="viridis", norm="log")
        for (row, column), value in np.ndenumerate(values):
            axes.text(
                column, row, f"{value:.3g}", ha="center", va="center", color="white" if value < values.max() / 4 else "black", fontsize=8
            )
        axes.set(title=f"{kernel}x{kernel} kernel", xlabel="activation bits", xticks=range(len(bits)), xticklabels=bits)
        axes.set(ylabel="weight bits", yticks=range(len(bits)), yticklabels=bits)
    figure.suptitle(f"multiplications per {dsp.upper()} and cycle")
    target = Path(path)
    unfinished = target.with_name(f".{target.name}")
    figure.savefig(unfinished, format=target.suffix.lstrip(".") or "png")
    os.replace(unfinished, target)
    return target
