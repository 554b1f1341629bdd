"""What lies in memory: places of maps, and the image of constants (program, weights, tables)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from quantlib.layerwise.engine import Counts, Engine, Shape, Tiling, counts, facts, in_ranges, is_masked, passes, powers, table_rows
from quantlib.layerwise.formats import LANES, WORD
from quantlib.layerwise.steps import CODES, KINDS, MODES, Micro, Place, Source, Step, Steps

JOINED = 1 << 8  # in the code of an operation
IN_SLOT = 1 << 31  # addresses relative to the image's slot
FIELDS = (  # in the order of Field in lw_step.hpp
    "KIND MODE GROUPS_IN HEIGHT WIDTH BITS SHIFT BIAS PITCH LAST_IN "
    "GROUPS_OUT OUT_HEIGHT OUT_WIDTH LAST_OUT KERNEL_H KERNEL_W STRIDE_H STRIDE_W TOP LEFT DILATION_H DILATION_W "
    "TILE_ROWS TOGETHER BLOCK_ROWS BLOCK_COLS WEIGHT_BASE HEAD_WORDS MASKED RANGES "
    "MERGE MSB LSB FRACTION_IN MERGE_SHIFT LOW HIGH HALF "
    "TABLE_BASE TABLE_ROWS MICROS ADDRESSES RECEIVES"
).split()


@dataclass(frozen=True)
class Memory:
    """Addresses in words of 512 bits. maps: edge -> first word, in the arena, or with IN_SLOT in the slot of an image (the input, then the
    outputs). alive: edge -> (first, last) step in which its place is taken."""

    maps: dict[str, int]
    alive: dict[str, tuple[int, int]]
    arena: int
    slot: int


def allocate(steps: Steps) -> Memory:
    """First fit over the steps: a map's place is taken from the step that writes it to the last that reads it."""
    graph = steps.graph
    fixed = [graph.input.name, *dict.fromkeys(steps.copies.values())]
    maps: dict[str, int] = {}
    slot = 0
    for edge in fixed:
        maps[edge] = IN_SLOT | slot
        slot += steps.maps[edge].words
    alive: dict[str, tuple[int, int]] = {}
    for k, step in enumerate(steps.steps):
        for edge in step.stores:
            alive[edge] = (k, k)
        read = [*(step.reads.sources if step.reads else ()), *(s for m in step.micros if m.code == "LOAD" for s in m.sources)]
        for edge in {s.edge for s in read} - set(fixed):
            alive[edge] = (alive[edge][0], k)
    taken: list[tuple[int, int, str]] = []
    top = 0
    for edge, (first, _) in sorted(alive.items(), key=lambda item: item[1]):
        if edge in fixed:
            continue
        taken = [t for t in taken if alive[t[2]][1] >= first]
        size, start = steps.maps[edge].words, 0
        for begin, end, _ in sorted(taken):
            if begin - start >= size:
                break
            start = max(start, end)
        taken.append((start, start + size, edge))
        maps[edge] = start
        top = max(top, start + size)
    return Memory(maps, alive, top, slot)


def dense_block(step: Step, group: int, source: int) -> np.ndarray:
    """The weights between one group of inputs and one of outputs, (32, 32, kh, kw) with zeros where there is no connection."""
    assert step.weight is not None and step.reads is not None
    o, each, kh, kw = step.weight.shape
    outs, ins = np.arange(group * LANES, min((group + 1) * LANES, o)), np.arange(source * LANES, (source + 1) * LANES)
    block = np.zeros((LANES, LANES, kh, kw), dtype=np.int64)
    local = ins[None, :] - outs[:, None] // (o // step.groups) * each
    rows, cols = np.nonzero((local >= 0) & (local < each) & (ins[None, :] < step.reads.layout.channels))
    block[rows, cols] = step.weight[outs[rows], local[rows, cols]]
    return block


def words32(values: np.ndarray) -> bytes:
    return values.astype(np.int64).astype("<u4").tobytes() if values.dtype != np.uint32 else values.astype("<u4").tobytes()


def narrow_fields(values: np.ndarray, bits: int) -> bytes:
    """Signed integers side by side in fields of `bits` bits, the first lowest."""
    flat = values.reshape(-1).astype(np.int64)
    if bits >= 8:
        return flat.astype(f"<i{bits // 8}").tobytes()
    per = 8 // bits
    parts = (flat & ((1 << bits) - 1)).astype(np.uint8).reshape(-1, per) << (bits * np.arange(per, dtype=np.uint8))
    return np.bitwise_or.reduce(parts, axis=1).tobytes()


def whole_words(data: bytes) -> bytes:
    return data + bytes(-len(data) % WORD)


def weights_of(step: Step, e: Engine) -> list[bytes]:
    """The weights of every group of outputs, in the order in which the unit uses them."""
    groups, made = step.out.groups, []
    for g in range(groups):
        if step.mode == "SATURATE":
            assert step.dense is not None
            rows = np.concatenate([step.dense.bias[:, None], step.dense.weight], 1).T[:, g * LANES : (g + 1) * LANES]
            made.append(narrow_fields(np.pad(rows, ((0, 0), (0, LANES - rows.shape[1]))), e.window_bits))
        elif step.kind == "WINDOW" and step.mode == "MAC":
            assert step.weight is not None
            part = step.weight[g * LANES : (g + 1) * LANES].reshape(-1, step.weight[0].size).T
            made.append(narrow_fields(np.pad(part, ((0, 0), (0, LANES - part.shape[1]))), e.window_bits))
        elif step.kind in ("XNOR", "MULTIPLY"):
            made.append(_products(step, e, g) if step.kind == "MULTIPLY" else _signs(step, g))
        else:
            made.append(b"")
    return made


def _products(step: Step, e: Engine, group: int) -> bytes:
    assert step.reads is not None
    layout, out = step.reads.layout, step.out
    first, last = in_ranges(step)[group]
    parts = -(-(out.last if group == out.groups - 1 else LANES) // e.outputs)
    data = []
    for source in range(first, last + 1):
        block = dense_block(step, group, source)
        chunks = -(-(layout.last if source == layout.groups - 1 else LANES) // e.inputs)
        block = block.reshape(LANES // e.outputs, e.outputs, LANES // e.inputs, e.inputs, -1)[:parts, :, :chunks]
        data.append(block.transpose(4, 2, 0, 1, 3).reshape(-1))  # tap, chunk of inputs, part of outputs, output, input
    flat = np.concatenate(data)
    return whole_words(narrow_fields(np.pad(flat, (0, -len(flat) % 8)), e.weight_bits))


def _signs(step: Step, group: int) -> bytes:
    assert step.weight is not None
    first, last = in_ranges(step)[group]
    masked, data = is_masked(step), []
    if step.gate is not None:
        gate = step.gate[group * LANES : (group + 1) * LANES]
        data.append(np.pad(gate, (0, LANES - len(gate))).astype("<i4").tobytes())
    for source in range(first, last + 1):
        block = dense_block(step, group, source).reshape(LANES, LANES, -1).transpose(2, 0, 1)  # tap, output, input
        signs = np.packbits(block > 0, axis=-1, bitorder="little").reshape(len(block), -1)
        masks = np.packbits(block != 0, axis=-1, bitorder="little").reshape(len(block), -1)
        data.append((np.concatenate([signs, masks], 1) if masked else signs).tobytes())
    return b"".join(data)


def tables_of(step: Step, e: Engine) -> bytes:
    """The constants of the finishing unit: for every group of outputs its rows of 32."""
    rows = table_rows(step)
    full = np.zeros((rows, step.out.groups * LANES), dtype=np.int64)
    at = 0
    for r in step.rows:
        full[at : at + len(r), : step.shape[0]] = r  # one column holds for all channels
        at += len(r)
    groups = np.ascontiguousarray(full.reshape(rows, step.out.groups, LANES).transpose(1, 0, 2))
    return groups.astype(f"<i{e.table_bits // 8}").tobytes()


def entries_of(step: Step, memory: Memory, steps: Steps) -> bytes:
    """A gather's list: for every field of the output where it lies, in the order of the vectors."""
    assert step.gather is not None and step.reads is not None
    place = step.reads
    f, layout, lanes = place.layout.format, place.layout, step.out
    full = np.full((lanes.groups * LANES, lanes.height, lanes.width), -1, dtype=np.int64)
    full[: lanes.channels] = step.gather
    index = full.reshape(lanes.groups, LANES, lanes.height, lanes.width).transpose(0, 2, 3, 1).reshape(-1)
    pixels = layout.height * layout.width
    c, rest = index.clip(0) // pixels, index.clip(0) % pixels
    y, x = rest // layout.width, rest % layout.width
    base = np.array([address(s, memory, steps) for s in place.sources], dtype=np.int64)[c // LANES]
    lane = c % LANES
    bit = x * LANES * f.bits + (lane if f.bits <= 2 else lane * f.bits)
    word = base + y * layout.pitch + bit // 512
    entry = (bit % 512).astype(np.uint64) | word.astype(np.uint64) << np.uint64(9)
    entry |= np.uint64(f.bits << 41) | np.uint64(f.shift << 48) | (index < 0).astype(np.uint64) << np.uint64(63)
    return entry.astype("<u8").tobytes()


def address(source: Source, memory: Memory, steps: Steps) -> int:
    return memory.maps[source.edge] + source.group * steps.maps[source.edge].group_words


@dataclass
class Image:
    """The constants of a network in one file: `data`; program at word 0. counts: what each step takes."""

    data: bytes
    program_words: int
    weight_words: int
    table_words: int
    counts: list[Counts] = field(default_factory=list)


def build(steps: Steps, e: Engine, tilings: list[Tiling], memory: Memory) -> Image:
    """The image for an engine; addresses of weights and tables count from its first word."""
    shapes = facts(steps).shapes
    weights, tables, program = bytearray(), bytearray(), bytearray()
    made: list[tuple[Step, Shape, Tiling, int, int, list[int]]] = []
    for step, shape, t in zip(steps.steps, shapes, tilings, strict=True):
        parts = [entries_of(step, memory, steps)] if step.kind == "GATHER" else weights_of(step, e)
        words = [len(p) // WORD for p in parts]
        made.append((step, shape, t, len(weights) // WORD, len(tables) // WORD, words))
        weights += b"".join(parts)
        tables += tables_of(step, e)
    size = 1 + sum(counts(shape, e, t)["program"] for _, shape, t, *_ in made)
    program += np.array([len(steps.steps), memory.arena, memory.slot, 0, 0, 0, 0, 0], dtype="<i8").tobytes()
    for step, shape, t, w, b, words in made:
        program += _encode(step, shape, t, e, memory, steps, size + w, size + len(weights) // WORD + b, words)
    assert len(program) == size * WORD
    data = bytes(program + weights + tables)
    return Image(data, size, len(weights) // WORD, len(tables) // WORD, [counts(s, e, t) for _, s, t, *_ in made])


def _encode(
    step: Step, shape: Shape, t: Tiling, e: Engine, memory: Memory, steps: Steps, weights: int, tables: int, words: list[int]
) -> bytes:
    place = step.reads or Place(step.out, ())
    layout, out, w = place.layout, step.out, step.window
    f = dict.fromkeys(FIELDS, 0)
    f |= {
        "KIND": KINDS.index(step.kind),
        "MODE": MODES.index(step.mode),
        "GROUPS_IN": layout.groups,
        "HEIGHT": layout.height,
        "WIDTH": layout.width,
    }
    f |= {
        "BITS": layout.format.bits,
        "SHIFT": layout.format.shift,
        "BIAS": layout.format.bias,
        "PITCH": layout.pitch,
        "LAST_IN": layout.last,
    }
    f |= {"GROUPS_OUT": out.groups, "OUT_HEIGHT": out.height, "OUT_WIDTH": out.width, "LAST_OUT": out.last}
    f |= {
        "KERNEL_H": w.kernel[0],
        "KERNEL_W": w.kernel[1],
        "STRIDE_H": w.stride[0],
        "STRIDE_W": w.stride[1],
        "TOP": w.before[0],
        "LEFT": w.before[1],
    }
    f |= {"DILATION_H": w.dilation[0], "DILATION_W": w.dilation[1], "TILE_ROWS": t.tile_rows, "TOGETHER": t.together}
    f |= {"BLOCK_ROWS": t.block_rows, "BLOCK_COLS": t.block_cols, "WEIGHT_BASE": weights, "HEAD_WORDS": 2 * (step.gate is not None)}
    f |= {"MASKED": int(shape.masked), "TABLE_BASE": tables, "TABLE_ROWS": table_rows(step), "RECEIVES": int(step.kind != "NONE")}
    if step.merge is not None:
        merge = step.merge
        f |= {
            "MERGE": 1,
            "MSB": merge.msb,
            "LSB": merge.lsb,
            "FRACTION_IN": merge.fraction_in,
            "MERGE_SHIFT": merge.shift,
            "LOW": merge.lo,
            "HIGH": merge.hi,
            "HALF": (1 << merge.shift) >> 1,
        }
    if step.dense is not None:
        d = step.dense
        f |= {"MERGE_SHIFT": d.shift, "LOW": d.lo, "HIGH": d.hi, "HALF": d.half}
    addresses = [address(s, memory, steps) for s in place.sources]
    f["RANGES"] = len(addresses)
    for g in range(out.groups):
        first, last = shape.ranges[g] if shape.ranges else (0, layout.groups - 1)
        addresses += [first, last, words[g] if g < len(words) and step.kind != "GATHER" else 0]
    micros: list[list[int]] = []
    for m in step.micros:
        micros += _micro(m, e, len(addresses))
        if m.code in ("LOAD", "STORE"):
            addresses += [address(s, memory, steps) for s in m.sources]
    f |= {"MICROS": len(micros), "ADDRESSES": len(addresses)}
    head = np.zeros(64, dtype=np.int64)
    head[: len(FIELDS)] = [f[k] for k in FIELDS]
    listed = np.array(addresses, dtype=np.int64).astype("<u4")
    return head.astype("<i8").tobytes() + np.array(micros, dtype="<i8").tobytes() + whole_words(listed.tobytes())


def _micro(m: Micro, e: Engine, at: int) -> list[list[int]]:
    code = CODES.index(m.code) | (JOINED if m.joined else 0)
    if m.code in ("LOAD", "STORE"):
        assert m.format is not None
        return [[code, m.to, m.a, m.b, at, m.format.bits, m.format.shift, m.format.bias]]
    if m.code != "SEARCH":
        return [[code, m.to, m.a, m.b, m.row, m.p, m.q, m.r]]
    bit, rows = powers(m.p)[-1], []
    for k in range(passes(m.p, e.search)):
        rows.append([code if k == 0 else code & ~JOINED, m.to, m.a, m.b, m.row, m.p, bit | (k == 0) << 30, m.r])
        bit >>= e.search
    return rows
