"""Published accelerators rebuilt from our graphs, and estimates beside timed simulation: the tables of docs/validation.md.

    python recipes/validate.py                 # prints every table that takes seconds
    python recipes/validate.py --only ultranet
    python recipes/validate.py --timed         # full-size networks in timed simulation too; some minutes
    python recipes/validate.py --write docs/validation.md [--timed]

Weights are random: but for the width of a constant here and there, nothing in the tables depends on their values.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import quantlib as ql
import zoo
from quantlib.io.mixq_export import DEFAULT_PARALLELISM
from quantlib.ir import Node
from quantlib.ops import Conv2d, FractionalConv2d
from quantlib.parts import part as find_part
from quantlib.schedule import Folding, Plan
from quantlib.training.report import write
from zoo.diracdeltanet import INTEGERS

MHZ = 250.0
IMAGES = 6  # of a timed run: start-up is left out of the later three


@dataclass(frozen=True)
class Row:
    """One design; None where a figure is not known. bram18: block RAMs of 18 kbit. ours: computed here, not published."""

    design: str
    cycles: float | None = None
    fps: float | None = None
    dsp: int | None = None
    bram18: int | None = None
    lut: int | None = None
    ours: bool = False


FIGURES = ("cycles", "fps", "dsp", "bram18", "lut")
HEAD = ("design", "cycles per image", "frames/s", "DSP", "BRAM18", "LUT")


def graph_of(network: str, **options: Any) -> ql.Graph:
    torch.manual_seed(0)
    model = zoo.get(network, **options).eval()
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() == 4):
            weight.masked_fill_(weight == 0, 0.01)  # of so many random weights some are 0, which has no sign
    return ql.convert(model, zoo.card(network).input_shape)


def planned(design: str, plan: Plan | ql.layerwise.Plan) -> Row:
    t, verdict = plan.total, "" if plan.fits else "; does not fit, lacks " + " and ".join(f"{v:,.0f} {k}" for k, v in plan.missing.items())
    return Row(design + verdict, plan.cycles, plan.fps, t.dsp, t.bram18, t.lut, ours=True)


# ---------------------------------------------------------------- published designs, each first in its table


def fracbnn_cifar10() -> list[Row]:
    published = Row("published (Ultra96-V2)", MHZ * 1e6 / 2806.9, 2806.9, 126, 212, 51_444)
    graph, grid = graph_of("fracbnn_cifar10", fixed_point="authors"), graph_of("fracbnn_cifar10", fixed_point=ql.FixedPoint(12, 6))
    engine = published_engine(graph)
    return [
        published,
        Row("the published loops counted on our graph", engine, MHZ * 1e6 / engine, ours=True),
        planned("a stage per layer, authors' datapath, published frame rate", ql.estimate(graph, "xczu3eg", published.fps, clock_mhz=MHZ)),
        planned("the same, as fast as fits", ql.estimate(graph, "xczu3eg", clock_mhz=MHZ)),
        planned("a stage per layer, FixedPoint(12, 6), published frame rate", ql.estimate(grid, "xczu3eg", published.fps, clock_mhz=MHZ)),
        planned("the same, as fast as fits", ql.estimate(grid, "xczu3eg", clock_mhz=MHZ)),
        planned("one engine for all layers, FixedPoint(12, 6), as fast as fits", ql.layerwise.estimate(grid, "xczu3eg", clock_mhz=MHZ)),
    ]


def published_engine(graph: ql.Graph) -> int:
    """Cycles of one engine for 16 output channels, 9 taps and 64 input channels that runs the convolutions in turn, as the published HLS
    source loops: (H+1)^2 + 15 for a tile of output channels and bit plane (or colour), at the resolution of the input; 4 H^2 + 5 to
    quantize and pack an input; h^2 + 18 for norm, activation and shortcut of a tile at that of the output.
    """
    total = 0
    for node in graph:
        if isinstance(node.op, Conv2d | FractionalConv2d):
            (x,), tiles = graph.types(node), -(-node.type.shape[0] // 16)
            height, out, first = x.shape[1], node.type.shape[1], isinstance(node.op, Conv2d)
            total += tiles * ((3 if first else 2) * ((height + 1) ** 2 + 15) + out**2 + 18) + (0 if first else 4 * height**2 + 5)
    return total


def fracbnn_imagenet() -> list[Row]:
    graph = graph_of("fracbnn_imagenet", fixed_point=ql.FixedPoint(14, 6))
    fps = 48.1
    return [
        Row("published (Ultra96-V2; which block RAMs is not said)", MHZ * 1e6 / fps, fps, 224, 201, 50_656),
        planned("one engine for all layers, published frame rate", ql.layerwise.estimate(graph, "xczu3eg", clock_mhz=MHZ, fps=fps)),
        planned("one engine for all layers, as fast as fits", ql.layerwise.estimate(graph, "xczu3eg", clock_mhz=MHZ)),
    ]


def ultranet() -> list[Row]:
    """The generator's own cost model with its parallelism file; then SIMD and PE of that file in our stages, with products packed."""
    file = DEFAULT_PARALLELISM["ultranet"]
    limit = max(generator_cycles(file))
    rows = [Row("published generator (its model, 4-bit products)", limit, MHZ * 1e6 / limit, 248)]
    for setting, bits in (("bjtu", "444444444/844444444"), ("ismart", "844444448/844444444"), ("authors", "532555558/733677665")):
        graph = graph_of("ultranet_dacsdc", setting=setting)
        convolutions = [n for n in graph if isinstance(n.op, Conv2d)]
        fixed = {n.name: on_slices(graph, n, simd, pe, limit) for n, (simd, pe) in zip(convolutions, file, strict=True)}
        plan = ql.estimate(graph, replace(find_part("xczu3eg"), dsp=2_000), clock_mhz=MHZ, fixed=fixed)  # whether or not they fit
        rows.append(planned(f"{bits}: published SIMD and PE", plan))
        rows.append(planned(f"{bits}: as fast as fits", ql.estimate(graph, "xczu3eg", clock_mhz=MHZ)))
    return rows


def on_slices(graph: ql.Graph, node: Node, simd: int, pe: int, limit: int) -> Folding:
    """With these lanes, the fewest DSP slices within 1 % of the cycles: columns or taps at a time, and packing, are chosen."""
    x, folds = graph.types(node), node.op.folds(graph.types(node), node.type)
    choices = [Folding(pe, simd, taps=n, packing="dsp48e2") for n in folds.packed["dsp48e2"].taps]
    choices += [Folding(pe, simd, taps=n) for n in folds.taps]
    costs = [node.op.cost(x, node.type, f) for f in choices]
    return min((c.dsp, c.cycles, k, f) for k, (c, f) in enumerate(zip(costs, choices)) if c.dsp and c.cycles <= 1.01 * limit)[-1]


def generator_cycles(file: Sequence[Sequence[int]]) -> list[int]:
    """H (W / 2) (out / PE) (3 in / SIMD) of UltraNet's eight 3x3 layers: a row of the window and two columns at a time."""
    sizes = [(160, 320, 3, 16), (80, 160, 16, 32), (40, 80, 32, 64), (20, 40, 64, 64), *((10, 20, 64, 64),) * 4]
    return [h * w // 2 * (o // pe) * (3 * i // simd) for (h, w, i, o), (simd, pe) in zip(sizes, file)]


def contest() -> list[Row]:
    """Entries whose folding was not published: ours at their frame rate, and as fast as fits the same part."""
    bypass, skynet = graph_of("ultranet_bypass_dacsdc"), graph_of("skynet_dacsdc")
    return [
        Row("SJTU_microe, UltraNet with bypass (Ultra96-V2, 125 MHz)", 125e6 / 249.38, 249.38),
        planned("ours, 125 MHz, that frame rate", ql.estimate(bypass, "xczu3eg", 249.38, clock_mhz=125)),
        planned("ours, 125 MHz, as fast as fits", ql.estimate(bypass, "xczu3eg", clock_mhz=125)),
        Row("the same contest's UltraNet with HiKonv (recalled)", None, 401.0, 327),
        planned("ours, 250 MHz, that frame rate", ql.estimate(bypass, "xczu3eg", 401.0, clock_mhz=MHZ)),
        planned("ours, 250 MHz, as fast as fits", ql.estimate(bypass, "xczu3eg", clock_mhz=MHZ)),
        Row("SkyNet, DAC-SDC 2019 (Ultra96)", None, 25.05),
        planned("ours (w5 a8), 200 MHz, that frame rate", ql.estimate(skynet, "xczu3eg", 25.05, clock_mhz=200)),
        planned("ours (w5 a8), 200 MHz, as fast as fits", ql.estimate(skynet, "xczu3eg", clock_mhz=200)),
    ]


def synetgy() -> list[Row]:
    rows = []
    for bits, fps, published in ((4, 66.3, (360, 318, 51_776)), (1, 96.5, (None, None, None))):
        graph = graph_of("diracdeltanet_imagenet", weight_bits=bits, act_bits=4, **INTEGERS)
        rows.append(Row(f"Synetgy, {bits}/4 bits (Ultra96, ZU3EG)", MHZ * 1e6 / fps, fps, *published))
        rows.append(planned("one engine for all layers, ZU3EG, as fast as fits", ql.layerwise.estimate(graph, "xczu3eg", clock_mhz=MHZ)))
        rows.append(planned("a stage per layer, ZU9EG, that frame rate", ql.estimate(graph, "xczu9eg", fps, clock_mhz=MHZ)))
    return rows


TABLES: Mapping[str, Callable[[], list[Row]]] = {
    "fracbnn_cifar10": fracbnn_cifar10,
    "fracbnn_imagenet": fracbnn_imagenet,
    "ultranet": ultranet,
    "contest": contest,
    "synetgy": synetgy,
}


def markdown(rows: Sequence[Row]) -> str:
    """Ours with their difference from the published row above them, in percent of it."""
    lines = [HEAD, ("---", *("---:",) * len(FIGURES))]
    published = rows[0]
    for row in rows:
        published = published if row.ours else row
        cells = [shown(name, getattr(row, name), getattr(published, name) if row.ours else None) for name in FIGURES]
        lines.append((row.design if row.ours else f"**{row.design}**", *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(figure: str, value: float | None, published: float | None) -> str:
    if value is None:
        return ""
    text = f"{value:,.1f}" if figure == "fps" else f"{value:,.0f}"
    return text if published is None else f"{text} ({100 * value / published - 100:+.1f} %)"


# ---------------------------------------------------------------- the estimate against the clock

FULL_SIZE: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("fracbnn_cifar10", {"fixed_point": "authors"}, "xczu3eg"),
    ("vggtiny_cifar10", {}, "xczu3eg"),
    ("ultranet_dacsdc", {}, "xczu3eg"),
    ("ultranet_bypass_dacsdc", {}, "xczu3eg"),
    ("skynet_dacsdc", {}, "xczu3eg"),
    ("diracdeltanet_imagenet", {"weight_bits": 4, "act_bits": 4, **INTEGERS}, "xczu9eg"),
    ("proxylessnas_4b5b_imagenet", {}, "xcu250"),
    ("mobilenet_v2_imagenet", {"weight_bits": 4, "act_bits": 4}, "xcu250"),
)


def timed(network: str, options: Mapping[str, Any], part: str) -> tuple[str, ...]:
    """Plan and clock: cycles per image in steady state, latency of the first image. The C++ is compared with `ql.run` on the way."""
    graph = graph_of(network, **options)
    plan = ql.estimate(graph, part)
    t = graph.input.type
    x = torch.randint(t.levels, (IMAGES, *t.shape), generator=torch.Generator().manual_seed(0)) * t.step + t.lo
    with tempfile.TemporaryDirectory() as folder:
        project = ql.export(graph, Path(folder) / "hls", part=part, plan=plan)
        theirs, ours = project.csim(x, mode="timed", integers=True), ql.run(graph, x, integers=True)
    if not all(torch.equal(theirs[edge], ours[edge]) for edge in ours):
        raise SystemExit(f"{network}: the C++ differs from the integers")
    last = project.last
    assert last is not None
    pairs = ((plan.cycles, last.steady), (plan.latency, last.latency))
    cells = [cell for plan_, clock in pairs for cell in (f"{plan_:,}", f"{clock:,.0f}", f"{100 * plan_ / clock - 100:+.2f} %")]
    return (network, plan.part.name, str(len(project.net.stages)), *cells)


def timed_table() -> str:
    head = ("network", "part", "stages", "cycles, plan", "clock", "error", "latency, plan", "clock", "error")
    rows = []
    for case in FULL_SIZE:
        rows.append(timed(*case))
        print(rows[-1], flush=True)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---", "---", *("---:",) * 7), *rows))


# ---------------------------------------------------------------- the page


def placed(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its marks, `<!-- table NAME -->` and `<!-- end -->`."""
    for name, content in tables.items():
        content = content.replace("\\", "\\\\")
        page, found = re.subn(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", rf"\g<1>{content}\n\g<2>", page, flags=re.S)
        if found != 1:
            raise SystemExit(f"the page has {found} places for table {name}; it needs one line <!-- table {name} --> and one <!-- end -->")
    return page


def main(argv: list[str] | None = None) -> dict[str, str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=TABLES, default=list(TABLES), help="these tables, or none (default: all)")
    parser.add_argument("--timed", action="store_true", help="also the full-size networks in timed simulation: some minutes")
    parser.add_argument("--write", default="", metavar="PAGE", help="put the tables into this page, between their marks")
    flags = parser.parse_args(argv)
    tables = {name: markdown(TABLES[name]()) for name in flags.only}
    tables |= {"timed": timed_table()} if flags.timed else {}
    for name, table in tables.items():
        print(f"\n{name}\n\n{table}")
    if flags.write:
        path = Path(flags.write)
        write(path, placed(path.read_text(encoding="utf-8"), tables))
    return tables


if __name__ == "__main__":
    main()
