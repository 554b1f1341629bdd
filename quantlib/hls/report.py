"""What an exported project says of itself: README.md with the steps, report.html with the plan's figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantlib import pages
from quantlib.hls import boards
from quantlib.hls.netlist import Netlist, Pin, Wire
from quantlib.hls.network import GLUE, cycles, folding_text, layers, plain, shape_text, template
from quantlib.ir import Graph
from quantlib.parts import RESOURCES
from quantlib.schedule import BASE_DEPTH

if TYPE_CHECKING:
    from quantlib.schedule import Plan

FED = ("node", "file", "64-bit words", "read per image")
NAMES = {"lut": "LUT", "ff": "FF", "dsp": "DSP", "bram18": "BRAM18", "uram": "URAM"}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def layer_rows(graph: Graph, net: Netlist) -> list[tuple[str, str, str, str, str]]:
    """(node, op, output, folding, cycles of its slowest stage) of every node with kernels."""
    rows = []
    for node, stages, _ in layers(net):
        kernels = [s for s in stages if s.header != GLUE]
        if kernels:
            n, fold = graph.by_name[node], folding_text(kernels[-1].folding)
            rows.append((plain(node), type(n.op).__name__, f"{shape_text(n.type)}, {n.type.lo}..{n.type.hi}", fold,
                         f"{cycles(net, node, kernels):,}"))  # fmt: skip
    return rows


def layout_rows(net: Netlist) -> list[tuple[str, str, str, str, str]]:
    """(port, edge, integers, container, 64-bit words per image)."""
    pins: list[tuple[str, Pin]] = [("in", net.input), *((f"out{k}", p) for k, p in enumerate(net.outputs))]
    return [
        (name, plain(p.edge), f"{shape_text(p.type)}, {p.type.lo}..{p.type.hi}", f"{'int' if p.type.signed else 'uint'}{p.bits}",
         f"{p.bus_words:,}")
        for name, p in pins
    ]  # fmt: skip


def figures(plan: Plan) -> list[tuple[str, str]]:
    verdict = "fits" if plan.fits else "does not fit: lacks " + ", ".join(f"{v:,.0f} {NAMES.get(k, k)}" for k, v in plan.missing.items())
    return [
        ("part", f"{plan.part.full_name}, {verdict}"),
        ("clock", f"{plan.clock_mhz:g} MHz"),
        ("cycles per image", f"{plan.cycles:,} (slowest: {plain(plan.bottleneck)})"),
        ("frames per second", f"{plan.fps:,.1f}"),
        ("latency of one image", f"{plan.latency:,} cycles, {plan.latency_us:,.1f} us"),
    ]


def shares(plan: Plan) -> list[tuple[str, int, int, float]]:
    """(resource, used, may be used, percent of that)."""
    budget = plan.part.budget()
    return [
        (NAMES[r], getattr(plan.total, r), budget[r], 100 * getattr(plan.total, r) / budget[r] if budget[r] else 0.0)
        for r in RESOURCES
        if budget[r] or getattr(plan.total, r)
    ]


def bottleneck(plan: Plan) -> str:
    """Why the network is not faster, in sentences."""
    order = sorted(plan.rows, key=lambda r: -r.cost.cycles)
    row, rest = order[0], [r for r in order if r.cost.cycles < order[0].cost.cycles]
    alike = [plain(r.name) for r in order[1:] if r.cost.cycles == row.cost.cycles]
    said = f"{plain(row.name)} ({row.op}, {folding_text(row.folding)}) needs {row.cost.cycles:,} cycles per image and sets the pace of all."
    if alike:
        names = ", ".join(alike[:6]) + (", ..." if len(alike) > 6 else "")
        said += f" As slow {'is' if len(alike) == 1 else 'are'} {len(alike)} more: {names}."
    if rest:
        gain = f"{row.cost.cycles / rest[0].cost.cycles:.2f}"
        said += f" The next one is {plain(rest[0].name)} with {rest[0].cost.cycles:,}: a faster bottleneck alone gains at most {gain}-fold."
    if plan.explanation:
        why = re.sub(r"[^\w .,:;()/-]", "_", plan.explanation)  # it holds names from the graph
        said += f" Why it is not faster: {why}."
    short = max(shares(plan), key=lambda s: s[3], default=None)
    if short:
        said += f" The scarcest resource is {short[0]}: {short[3]:.0f} % of what may be used."
    if not plan.fits:
        lacking = ", ".join(f"{v:,.0f} {NAMES.get(k, k)}" for k, v in plan.missing.items())
        said += f" This plan does not fit: it lacks {lacking}; the smallest listed part that would do is {plan.smallest or 'none'}."
    return said


def word_bits(w: Wire) -> int:
    return w.port.lanes * int((re.findall(r"\d+", w.port.ctype) or ["64"])[0])


def fifo_rows(net: Netlist) -> list[tuple[str, str, str, str]]:
    """(FIFO, depth in words, bits per word, kbit) of those deeper than usual, the largest first."""
    ends = {p.wire.name for p in (net.input, *net.outputs)}
    deep = sorted((w for w in net.wires if w.name not in ends and w.depth > BASE_DEPTH), key=lambda w: -w.depth * word_bits(w))
    return [(w.name, f"{w.depth:,}", str(word_bits(w)), f"{w.depth * word_bits(w) / 1024:,.1f}") for w in deep]


def feed_rows(net: Netlist) -> list[tuple[str, str, str, str]]:
    """(node, file, words of 64 bits, words read per image) of weights that come from memory."""
    return [(plain(f.node), f"params/{f.name}.bin", f"{f.bus_words:,}", f"{f.bus_words * f.replay:,}") for f in net.feeds]


def traffic(net: Netlist, plan: Plan) -> str:
    """What all weights from memory ask of it together: the plan looks at each port by itself."""
    share = sum(f.bus_words * f.replay for f in net.feeds) / plan.cycles
    return f"Together {share:.2f} words of 64 bits per cycle; ports that share a memory share what it brings."


def html(graph: Graph, net: Netlist, plan: Plan) -> str:
    """report.html: the plan as figures, bars and tables."""
    rows = [
        (plain(r.name), r.op, folding_text(r.folding), "+".join(map(str, r.depths)), f"{r.cost.cycles:,}",
         *(f"{getattr(r.cost, k):,}" for k in RESOURCES))
        for r in plan.rows
    ]  # fmt: skip
    used = shares(plan)
    deep, all_wires = fifo_rows(net), len(net.wires) - 1 - len(net.outputs)
    why = "The deeper ones hold what arrives while their reader pauses, or what the shorter of two branches must store:"
    fifos = f"<p>{all_wires} FIFOs, {all_wires - len(deep)} of them {BASE_DEPTH} words deep. {why}</p>"
    fed = [("Weights from memory", pages.table(FED, feed_rows(net)) + f"<p>{traffic(net, plan)}</p>")] if net.feeds else []
    sections = [
        ("Figures", pages.table(("", ""), figures(plan)) + f"<p>{bottleneck(plan)}</p>"),
        ("Resources, percent of what may be used",
         pages.bars([(name, share, f"{share:.0f} % ({n:,} of {limit:,})") for name, n, limit, share in used], limit=100.0)),
        ("Cycles per image", pages.bars([(plain(r.name), r.cost.cycles, f"{r.cost.cycles:,}") for r in plan.rows], plain(plan.bottleneck))),
        ("Nodes", pages.table(("node", "op", "folding", "FIFO", "cycles", *NAMES.values()), rows)),
        ("FIFOs", fifos + (pages.table(("FIFO", "words", "bits", "kbit"), deep) if deep else "")),
        *fed,
        ("Input and output", pages.table(("port", "edge", "integers", "container", "64-bit words per image"), layout_rows(net))),
    ]  # fmt: skip
    return pages.page(f"{plain(graph.name)} on {plan.part}", sections)


def readme(graph: Graph, net: Netlist, part: str, clock_ns: float, plan: Plan | None) -> str:
    """README.md: exact steps, layers, layout, figures."""
    found = boards.board_of(part)
    if isinstance(found, boards.Card):
        board = f"The {found.name} takes the kernel flow: `kernel.tcl` packs `top_memory`, `v++` links it by `kernel.cfg`."
        program, image = "build/network.xclbin", "build/network.xclbin"
    else:
        name = found.name if found else "no board of the table in it has this part: add a row"
        board = f"`bitstream.tcl` knows {', '.join(b.name for b in boards.BOARDS)} (BOARD=..., here {name})."
        program, image = "network.bit", "build/network.bit and build/network.hwh (equal stems)"
    costs = ""
    if plan is not None:
        used = markdown(
            ("resource", "used", "may be used", "share"), [(n, f"{u:,}", f"{b:,}", f"{s:.0f} %") for n, u, b, s in shares(plan)]
        )
        note = "Resources are first-order counts, no synthesis report; `report.html` has them per layer, with FIFO depths."
        costs = f"## Figures of the plan\n\n{markdown(('', ''), figures(plan))}\n\n{used}\n\n{bottleneck(plan)}\n\n{note}\n\n"
    return template(
        "readme.md", graph=plain(graph.name), part=part, clock=f"{clock_ns:g}", board=board, bitstream=program, image=image, costs=costs,
        layers=markdown(("node", "op", "output", "folding", "cycles"), layer_rows(graph, net)),
        layout=markdown(("port", "edge", "integers", "container", "64-bit words per image"), layout_rows(net)),
        fed=f"Weights from memory, a port each:\n\n{markdown(FED, feed_rows(net))}\n\n" if net.feeds else "",
    )  # fmt: skip
