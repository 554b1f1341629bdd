"""Reads the synthesised half of kernels and generated sources, and says what a vendor's tool would refuse or quietly make slow.

No C++ parser: it knows the manner in which kernels are written here (docs/hls.md, "Rules for a kernel"), and what it cannot follow is an
error too. Pragma names and options are those of UG1399, "HLS Pragmas".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

VALUES = {"complete", "block", "cyclic"}
STORAGE = {"fifo", "ram_1p", "ram_1wnr", "ram_2p", "ram_s2p", "ram_t2p", "rom_1p", "rom_2p", "rom_np"}
IMPLEMENTATIONS = {"bram", "bram_ecc", "lutram", "uram", "uram_ecc", "srl", "memory", "auto"}
NUMBER, NAME = re.compile(r"\d+"), re.compile(r"[A-Za-z_]\w*")
# pragma -> option -> what its value may be: a pattern, a set, or None for an option without value
PRAGMAS: dict[str, dict[str, object]] = {
    "PIPELINE": {"II": NUMBER, "rewind": None, "off": None, "style": {"stp", "frp", "flp"}},
    "UNROLL": {"factor": NUMBER, "skip_exit_check": None, "off": {"true"}},
    "INLINE": {"off": None, "recursive": None},
    "DATAFLOW": {"disable_start_propagation": None},
    "STREAM": {"variable": NAME, "depth": NUMBER, "type": {"fifo", "pipo", "shared", "unsync"}, "off": None},
    "BIND_STORAGE": {"variable": NAME, "type": STORAGE, "impl": IMPLEMENTATIONS, "latency": NUMBER},
    "BIND_OP": {"variable": NAME, "op": NAME, "impl": NAME, "latency": NUMBER},
    "AGGREGATE": {"variable": NAME, "compact": {"bit", "byte", "none", "auto"}},
    "ARRAY_PARTITION": {"variable": NAME, "type": VALUES, "factor": re.compile(r"\w+"), "dim": NUMBER, **dict.fromkeys(VALUES)},
    "ARRAY_RESHAPE": {"variable": NAME, "type": VALUES, "factor": re.compile(r"\w+"), "dim": NUMBER, **dict.fromkeys(VALUES)},
    "DEPENDENCE": {"variable": NAME, "class": {"array", "pointer"}, "inter": None, "intra": None, "true": None, "false": None,
                   "type": {"inter", "intra"}, "dependent": {"true", "false"}, "direction": {"RAW", "WAR", "WAW"}, "distance": NUMBER},
    "INTERFACE": {"axis": None, "m_axi": None, "s_axilite": None, "ap_ctrl_hs": None, "ap_ctrl_none": None, "ap_ctrl_chain": None,
                  "mode": NAME, "port": NAME, "bundle": NAME, "offset": {"slave", "direct", "off"}, "depth": NUMBER,
                  "latency": NUMBER, "num_read_outstanding": NUMBER, "num_write_outstanding": NUMBER, "max_read_burst_length": NUMBER,
                  "max_write_burst_length": NUMBER, "max_widen_bitwidth": NUMBER},
    "LOOP_TRIPCOUNT": {"min": NUMBER, "max": NUMBER, "avg": NUMBER},
}  # fmt: skip
NEEDED = {"STREAM": ["variable"], "BIND_STORAGE": ["variable", "type"], "AGGREGATE": ["variable"], "ARRAY_PARTITION": ["variable"],
          "ARRAY_RESHAPE": ["variable"], "DEPENDENCE": ["variable"], "INTERFACE": ["port"]}  # fmt: skip


@dataclass(frozen=True)
class Pragma:
    name: str
    options: Mapping[str, str]

    @property
    def variable(self) -> str:
        return self.options.get("variable", "")

    @property
    def dims(self) -> int:
        """The dimension a partition or reshape means, 0 for all of them."""
        dim = self.options.get("dim", "1")
        return int(dim) if dim.isdigit() else -1


@dataclass
class Loop:
    label: str
    variable: str
    head: str
    body: str
    pragmas: list[Pragma]
    first: str
    inner: list[Loop] = field(default_factory=list)

    @property
    def unrolled(self) -> bool:
        return any(p.name == "UNROLL" for p in self.pragmas)

    @property
    def pipelined(self) -> bool:
        return any(p.name == "PIPELINE" and p.options.get("II") == "1" for p in self.pragmas)

    def walk(self) -> Iterator[Loop]:
        yield self
        for loop in self.inner:
            yield from loop.walk()


@dataclass
class Function:
    name: str
    template: str
    parameters: str
    body: str
    loops: list[Loop]
    pragmas: list[Pragma]

    @property
    def streams(self) -> dict[str, bool]:
        """Parameter -> whether it is a pack of streams."""
        found = re.findall(r"hls::stream<(?:[^<>]|<(?:[^<>]|<[^<>]*>)*>)*>\s*&\s*(\.\.\.)?\s*(\w+)", self.parameters)
        return {name: bool(pack) for pack, name in found}

    @property
    def arrays(self) -> dict[str, int]:
        """Name -> number of dimensions of every array that is a parameter or declared in the body."""
        given = {m.group(1): m.group(2).count("[") for m in re.finditer(r"\(&(\w+)\)\s*((?:\[[^\]]*\])+)", self.parameters)}
        body = re.sub(r"#pragma[^\n]*", "", self.body)
        kind = r"(?:static |const )*[\w:]+(?:<[^;=()]*>)?"
        own = re.finditer(rf"(?:^|[;{{}}])\s*{kind}\s+((?:\w+(?:\[[^;=]*?\])*(?:\s*=\s*\{{\}})?,?\s*)+);", body)
        for declared in own:
            for name, dims in re.findall(r"(\w+)((?:\[[^\]]*\])+)", declared.group(1)):
                given[name] = dims.count("[")
        return given


def synthesised(text: str) -> str:
    """The text as the vendor's tool sees it: no comments, __SYNTHESIS__ and the bodies for synthesis chosen."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    kept: list[str] = []
    state: list[bool] = []
    for line in text.splitlines():
        words = line.split()
        if words[:1] in (["#ifdef"], ["#ifndef"]):
            state.append((words[1] in ("__SYNTHESIS__", "QL_SYNTHESIS_BODIES")) == (words[0] == "#ifdef"))
        elif words[:1] == ["#if"]:
            state.append("__SYNTHESIS__" in line and "!defined(__SYNTHESIS__)" not in line)
        elif words[:1] == ["#else"]:
            state[-1] = not state[-1]
        elif words[:1] == ["#endif"]:
            state.pop()
        elif all(state) and (not line.startswith("#") or line.startswith("#pragma HLS")):
            kept.append(line)
    return "\n".join(kept)


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    pairs, depth = {"(": ")", "{": "}", "[": "]"}, 0
    for i in range(start, len(text)):
        depth += (text[i] == text[start]) - (text[i] == pairs[text[start]])
        if not depth:
            return i
    raise ValueError(f"no end to {text[start : start + 60]!r}")


def pragma(line: str) -> Pragma:
    words = re.sub(r"\s*=\s*", "=", line).split()[2:]
    return Pragma(words[0].upper() if words else "", {k: v for k, _, v in (w.partition("=") for w in words[1:])})


def loops(body: str) -> list[Loop]:
    """The loops of a body, outermost first, each with what stands directly in it."""
    found, at = [], 0
    for m in re.finditer(r"(?:(\w+)\s*:\s*)?\b(for|while)\s*\(", body):
        if m.start() < at:
            continue
        end = closing(body, m.end() - 1)
        head, rest = body[m.end() : end], body[end + 1 :].lstrip()
        opened = body.index(rest, end + 1) if rest else end
        if rest.startswith("{"):
            at = closing(body, opened) + 1
            inside = body[opened + 1 : at - 1]
        else:
            at = body.index(";", opened) + 1
            inside = body[opened:at]
        lines = [line.strip() for line in inside.strip().splitlines() if line.strip()]
        leading = []
        for line in lines:
            if not line.startswith("#pragma HLS"):
                break
            leading.append(pragma(line))
        first = next((line for line in lines if not line.startswith("#pragma HLS")), "")
        variable = re.match(r"\s*(?:unsigned|int|uint64_t)\s+(\w+)", head)
        found.append(Loop(m.group(1) or "", variable.group(1) if variable else "", head, inside, leading, first, loops(inside)))
    return found


def functions(text: str) -> list[Function]:
    """Every function and function template of a synthesised text; constexpr ones are computed by the compiler and left out."""
    found, at = [], 0
    for m in re.finditer(r"(template\s*<[^;{}()]*>\s*)?((?:[\w:]+(?:<[^;{}()]*>)?[\s&*]+)+)(\w+)\s*\(", text):
        if m.start() < at or m.group(3) in ("for", "while", "if", "switch") or "return" in m.group(2).split() or "#" in m.group(2):
            continue
        end = closing(text, m.end() - 1)
        after = text[end + 1 :].lstrip()
        if after.startswith("const "):
            after = after[6:].lstrip()
        if not after.startswith("{"):
            continue
        opened = text.index("{", end)
        at = closing(text, opened) + 1
        body = text[opened + 1 : at - 1]
        if "constexpr" in m.group(2):
            continue
        own = [pragma(line.strip()) for line in body.splitlines() if line.strip().startswith("#pragma HLS")]
        found.append(Function(m.group(3), m.group(1) or "", text[m.end() : end], body, loops(body), own))
    return found


def words_of(p: Pragma) -> Iterator[str]:
    """What is wrong with the spelling of one pragma."""
    if p.name not in PRAGMAS:
        yield f"unknown pragma {p.name}"
        return
    for key, value in p.options.items():
        if key not in PRAGMAS[p.name]:
            yield f"{p.name} has no option {key}"
            continue
        allowed = PRAGMAS[p.name][key]
        good = not value if allowed is None else value in allowed if isinstance(allowed, set) else bool(allowed.fullmatch(value))  # type: ignore[attr-defined]
        if not good:
            yield f"{p.name} {key} cannot be {value or 'empty'}"
    for key in NEEDED.get(p.name, []):
        if key not in p.options:
            yield f"{p.name} needs {key}"
    kinds = [v for v in (*(k for k in p.options if k in VALUES), p.options.get("type", "")) if v in VALUES]
    if p.name.startswith("ARRAY") and (("factor" in p.options) != any(k in ("block", "cyclic") for k in kinds)):
        yield f"{p.name} of {p.variable}: a factor goes with block and cyclic, and only with them"


def check(text: str, elsewhere: Mapping[tuple[str, str], int] | None = None) -> list[str]:
    """Everything found in one source. elsewhere: (function, array) -> dimensions from which on the generated network partitions it."""
    problems = []
    text = synthesised(text)
    for line in text.splitlines():
        if line.strip().startswith("#pragma HLS"):
            problems += list(words_of(pragma(line.strip())))
    tables = set(re.findall(r"\b(\w+)\.h\"", text)) | set(re.findall(r"#include \"[\w./]*?(\w+)\.h\"", text))
    everything = functions(text)
    inlined = {f.name: f for f in everything if any(p.name == "INLINE" for p in f.pragmas)}
    for f in everything:
        problems += [f"{f.name}: {p}" for p in (*scope(f, tables), *pipelines(f), *parallel(f, dict(elsewhere or {}), inlined))]
    return problems


def scope(f: Function, tables: set[str]) -> Iterator[str]:
    """Names in pragmas are parameters, declared in the function, or tables of the project."""
    without = "\n".join(line for line in f.body.splitlines() if not line.strip().startswith("#pragma"))
    for p in f.pragmas:
        name = p.variable or p.options.get("port", "")
        if not name or name == "return":
            continue
        known = re.search(rf"\b{name}\b\)?(?:\[|,|$)", f.parameters) or re.search(rf"[\w>&*]\s+{name}\b\s*[\[;(=,]", without)
        if not known and not re.search(rf"[,\s(]{name}(?:[,)]|\[\w+\][;,])", without):
            yield f"{p.name} names {name}, which is not in scope"


def pipelines(f: Function) -> Iterator[str]:
    """Outer loops of a kernel are labelled, pipelined at II = 1 and begin with QL_CYCLE; every other loop is unrolled."""
    kernel = bool(f.streams) or "stream" in f.parameters
    for loop in f.loops:
        unrolled_only = loop.unrolled and not loop.pipelined
        if kernel and not unrolled_only:
            if not loop.label:
                yield f"the loop over {loop.head.split(';')[0].strip()} has no label"
            if not loop.pipelined or loop.pragmas[0].name != "PIPELINE":
                yield f"the loop {loop.label} does not begin with PIPELINE II = 1"
            if loop.first != "QL_CYCLE();":
                yield f"the loop {loop.label} does not begin with QL_CYCLE()"
        elif not unrolled_only:
            yield f"the loop {loop.label or loop.head.strip()} of a function that is called per cycle is not unrolled"
        for inner in loop.inner:
            for one in inner.walk():
                if not one.unrolled or one.pragmas[0].name != "UNROLL":
                    yield f"the loop over {one.head.split(';')[0].strip()} inside {loop.label or 'a loop'} does not begin with UNROLL"


def parallel(f: Function, elsewhere: dict[tuple[str, str], int], inlined: Mapping[str, Function]) -> Iterator[str]:
    """Dimensions that an unrolled loop indexes, or that are handed on whole, are partitioned or reshaped.

    Arrays given to an inlined function are its callers' business.
    """
    for name, dims in f.arrays.items():
        if f.name in inlined and re.search(rf"\(&{name}\)", f.parameters):
            continue
        done = {p.dims for p in f.pragmas if p.name in ("ARRAY_PARTITION", "ARRAY_RESHAPE") and p.variable == name}
        if (f.name, name) in elsewhere:
            done |= set(range(elsewhere[f.name, name], dims + 1))
        if 0 not in done:
            for dim in sorted(read_at_once(f, name, dims, inlined) - done):
                yield f"dimension {dim} of {name} is read in parallel and neither partitioned nor reshaped"


def read_at_once(f: Function, name: str, dims: int, inlined: Mapping[str, Function]) -> set[int]:
    """The dimensions of an array along which one iteration reads or writes several elements.

    An index that only looks up data of its lane (k[p]) is fine where another dimension keeps the lanes apart. What is handed to an inlined
    function of the same source is judged there, to another one as read whole.
    """
    lanes = {one.variable for loop in f.loops for one in loop.walk() if one.unrolled and one.variable}
    for m in re.finditer(r"[,;{]?\s*(\w+) = ([^;,]*[^;,=<>!])(?=[;,])", f.body):
        if words_in(strip_nested(m.group(2))) & lanes:
            lanes.add(m.group(1))
    wanted: set[int] = set()
    for given, before in uses(f.body, name):
        direct = {k + 1 for k, index in enumerate(given) if words_in(strip_nested(index)) & lanes}
        looked_up = {k + 1 for k, index in enumerate(given) if words_in(index) & lanes} - direct
        wanted |= direct or looked_up
        if len(given) < dims:
            callee, place = receiver(before)
            if callee in inlined and callee != f.name:
                parameter = list(inlined[callee].arrays.items())
                whole = split_arguments(inlined[callee].parameters)
                mine = next(((n, d) for n, d in parameter if place < len(whole) and re.search(rf"\(&{n}\)", whole[place])), None)
                if mine is not None:
                    wanted |= {len(given) + d for d in read_at_once(inlined[callee], *mine, inlined)}
                    continue
            wanted |= set(range(len(given) + 1, dims + 1))
    return wanted


def receiver(before: str) -> tuple[str, int]:
    """The function whose argument list is open at the end of `before`, and how many arguments came before."""
    depth, place = 0, 0
    for i in range(len(before) - 1, -1, -1):
        depth += (before[i] in ")]") - (before[i] in "([")
        if depth < 0:
            m = re.search(r"(\w+)(?:<[^();{}]*>)?$", before[:i])
            return (m.group(1) if m else "", place)
        place += before[i] == "," and not depth
        if before[i] in ";{}":
            break
    return "", 0


def split_arguments(text: str) -> list[str]:
    """Arguments or parameters, commas inside brackets left alone."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "(<[") - (c in ")>]")
        if c == "," and not depth:
            found.append(text[start:i])
            start = i + 1
    return [*found, text[start:]]


def uses(body: str, name: str) -> Iterator[tuple[list[str], str]]:
    """The indices of every place where an array is used, and the text before it; its declaration and pragmas left out."""
    body = re.sub(r"#pragma[^\n]*|\"[^\"\n]*\"", "", body)
    for m in re.finditer(rf"(?<![\w.]){name}\b", body):
        before = body[: m.start()].rsplit("\n", 1)[-1].strip()
        if re.fullmatch(r"(?:static |const )*\w[\w:]*(?:<[^=]*>)?(?: \w+\[[^;]*\],)*", before) and before not in ("return",):
            continue  # `TYPE name[...]`
        end = m.end()
        while body[end : end + 1] == "[":
            end = closing(body, end) + 1
        yield indices(body[m.end() : end]), body[: m.start()]


def strip_nested(text: str) -> str:
    """An expression without what stands in square brackets."""
    while re.search(r"\[[^\[\]]*\]", text):
        text = re.sub(r"\[[^\[\]]*\]", "", text)
    return text


def words_in(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


def indices(text: str) -> list[str]:
    """ "[a][b[c]]" -> ["a", "b[c]"]."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c == "[":
            depth += 1
            start = i + 1 if depth == 1 else start
        elif c == "]":
            depth -= 1
            if not depth:
                found.append(text[start:i])
    return found


# Dataflow regions: what reads and writes every stream.


def directions(sources: Mapping[str, str]) -> dict[str, tuple[list[str], bool]]:
    """Kernel -> ("r" or "w" for each stream parameter in order, whether the last is a pack)."""
    made: dict[str, tuple[list[str], bool]] = {}
    everything = [f for text in sources.values() for f in functions(synthesised(text))]
    for f in everything:
        ways = []
        for name, pack in f.streams.items():
            if pack or re.search(rf"\b{name}\.read\(", f.body):
                ways.append("r")
            elif re.search(rf"\b{name}\.write\(", f.body):
                ways.append("w")
            else:  # handed to another function, by the same names or as a word of the bus
                ways.append("r" if name in ("in", "source") else "w")
        if ways:
            made.setdefault(f.name, (ways, any(f.streams.values())))
    return made


def dataflow(text: str, kernels: Mapping[str, tuple[list[str], bool]]) -> list[str]:
    """In every DATAFLOW region: only streams and calls, each stream with one writer and one reader."""
    problems = []
    known = dict(kernels)
    for f in functions(synthesised(text)):
        if not any(p.name == "DATAFLOW" for p in f.pragmas):
            continue
        ends: dict[str, list[str]] = {}
        declared = re.findall(r"static hls::stream<.*?>+ (\w+)\(", f.body)
        statements = re.sub(r"#pragma[^\n]*", "", f.body)
        statements = re.sub(r"static hls::stream<[^;]*;|QL_DEPTH\([^;]*;|QL_RUN\(\);", "", statements)
        for call in re.findall(r"[^;]+;", statements):
            m = re.fullmatch(r"\s*(?:QL_STAGE\(\"\w+\",\s*)?(?:ql::)?(\w+)(?:<.*>)?\s*\(([^()]*)\)\)?;", call, re.S)
            if not m or m.group(1) not in known:
                problems.append(f"{f.name}: {call.strip()[:60]} is neither a stream nor a call of a kernel")
                continue
            ways, pack = known[m.group(1)]
            streams = [n for a in m.group(2).split(",") if (n := a.strip()) in declared or n in f.streams]
            if m.group(1) in ("enter", "leave"):  # the other end is the bus
                streams = [n for n in streams if n in declared]
            if len(streams) != len(ways) and not (pack and len(streams) >= len(ways) - 1):
                problems.append(f"{f.name}: {m.group(1)} has {len(ways)} streams and is called with {len(streams)}")
            for k, n in enumerate(streams):
                ends.setdefault(n, []).append(ways[k] if k < len(ways) else "r")
        for n in declared:
            if sorted(ends.get(n, [])) != ["r", "w"]:
                problems.append(f"{f.name}: stream {n} has {ends.get(n, []).count('w')} writers and {ends.get(n, []).count('r')} readers")
        for n in f.streams:
            if len(ends.get(n, [])) != 1 and n in ends:
                problems.append(f"{f.name}: stream {n} is used {len(ends[n])} times")
        known[f.name] = ([ends.get(n, ["?"])[0] for n in f.streams], False)
    return problems


def regions(sources: Mapping[str, str], network: str, top: str) -> list[str]:
    """The dataflow regions of a project: its kernels, src/network.hpp, src/top.cpp."""
    return dataflow(network + "\n" + top, directions(sources))
