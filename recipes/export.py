"""One network to a hardware project: converted, verified, folded onto a part, written as C++, simulated, reported.

The network is one of the zoo, with options and a checkpoint, or a graph that `ql.save` wrote. --out then holds hls/ (the project),
graph.safetensors, folding.json, report.json and report.html. A folding.json may be edited and given again (--fixed); layers left out of it
are chosen anew.

    python recipes/export.py fracbnn_cifar10 --option fixed_point=authors --checkpoint weights.npz --part Ultra96-V2 --clock 250
    python recipes/export.py ultranet_dacsdc --option weight_bits=4 --option act_bits=4 --fps 60 --check timed --count 4
    python recipes/export.py --graph build/export/graph.safetensors --fixed build/export/folding.json --part ZCU104
    python recipes/export.py mobilenet_v2_imagenet --option weight_bits=4 --option act_bits=4 --part ZCU104 --no-export
    python recipes/export.py fracbnn_imagenet --option fixed_point=14,6 --architecture layers --part Ultra96-V2
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib import layerwise, parts
from quantlib.capture import CaptureError
from quantlib.hls import Deadlock, ExportError, Project
from quantlib.hls.network import folding_text
from quantlib.hls.report import NAMES, bottleneck, figures, shares
from quantlib.io import foldings
from quantlib.io.foldings import FoldingFileError
from quantlib.io.graph import GraphFileError
from quantlib.ir import GraphError
from quantlib.pages import bars
from quantlib.schedule import BASE_DEPTH, MEMORY_STYLES, Plan, Schedule
from quantlib.training import DataError, Images, accuracy, read_images
from quantlib.training.deploy import Seconds
from quantlib.training.flags import network_options
from quantlib.training.report import page, table, text, write, write_json

CHECKS = ("fast", "fifo", "timed", "none")
REFUSED = (zoo.ZooError, zoo.CheckpointError, CaptureError, GraphFileError, GraphError, FoldingFileError, DataError, ExportError, Deadlock)


@dataclass(frozen=True)
class Config:
    """What is exported. architecture: "stream", a stage per layer, or "layers", one engine that runs them in turn with weights and maps in
    external memory (docs/layerwise.md). clock and fps 0: the part's own clock, as fast as fits; fixed "": no folding is given.
    """

    network: str
    option: tuple[str, ...]
    checkpoint: str
    graph: str
    input_shape: tuple[int, ...]
    architecture: str
    part: str
    clock: float
    fps: float
    fixed: str
    memory: str
    images: str
    split: str
    count: int
    check: str
    export: bool
    anyway: bool
    out: str


def options(argv: list[str] | None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("the network")
    source.add_argument("network", nargs="?", default="", help="name in the zoo (python -m quantlib docs lists them in docs/zoo.md)")
    source.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of the network; a FixedPoint is BITS,FRACTION"
    )
    source.add_argument("--checkpoint", default="", help="weights: .pt .pth .npz .safetensors .h .t7 (none: as built, untrained)")
    source.add_argument("--graph", default="", metavar="FILE", help="a graph written by ql.save, instead of a network")
    source.add_argument("--input-shape", default="", metavar="C,H,W", help="shape of one image (default: the card's)")
    target = parser.add_argument_group("the hardware")
    target.add_argument(
        "--architecture", default="stream", choices=("stream", "layers"), help="a stage per layer, or one engine with weights in memory"
    )
    target.add_argument("--part", default="xczu3eg", help="part or board: xczu3eg, Ultra96-V2, PYNQ-Z2, ZCU104, ... (default: %(default)s)")
    target.add_argument("--clock", type=float, default=0.0, metavar="MHZ", help="clock (default: the part's)")
    target.add_argument("--fps", type=float, default=0.0, help="frames per second to reach with least resources (default: as fast as fits)")
    target.add_argument("--fixed", default="", metavar="FILE", help="folding of some or all layers, as folding.json of an earlier run")
    target.add_argument(
        "--memory", default="", choices=("", *MEMORY_STYLES), help="where the weights of every layer live (default: chosen for each layer)"
    )
    proof = parser.add_argument_group("the proof")
    proof.add_argument("--images", default="", metavar="DATA", help="digits, .npy, .npz, .zip or folder of class folders (default: random)")
    proof.add_argument("--split", default="test", help="split of the digits, or folder of a .zip that has several")
    proof.add_argument("--count", type=int, default=8, help="images to verify and to simulate (default: %(default)s)")
    proof.add_argument(
        "--check", default="fast", choices=CHECKS, help="how the C++ is run: values; bounded FIFOs; with a clock; not at all"
    )
    parser.add_argument("--no-export", dest="export", action="store_false", help="estimate only")
    parser.add_argument("--anyway", action="store_true", help="export although the part is too small or the speed is not reached")
    parser.add_argument("--out", default="build/export", help="folder of the project and the report (default: %(default)s)")
    values = vars(parser.parse_args(argv))
    if bool(values["network"]) == bool(values["graph"]):
        parser.error("give a network of the zoo, or --graph FILE")
    if values["graph"] and (values["option"] or values["checkpoint"] or values["input_shape"]):
        parser.error("--graph is a finished integer network: it takes no --option, --checkpoint or --input-shape")
    if min(values["clock"], values["fps"]) < 0 or values["count"] < 1:
        parser.error("--clock and --fps must be positive, --count at least 1")
    if values["architecture"] == "layers" and (values["fixed"] or values["memory"] or values["check"] in ("fifo", "timed")):
        parser.error("--architecture layers has one engine: no --fixed, no --memory, and --check fast or none")
    try:
        parts.part(values["part"])
    except LookupError as error:
        parser.error(str(error))
    values["input_shape"] = tuple(int(n) for n in values["input_shape"].split(",") if n)
    return Config(**values | {"option": tuple(values["option"])})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    config = options(argv)
    Console().print(f"{config}\n", highlight=False)
    try:
        return export(config)
    except (*REFUSED, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None


def export(config: Config) -> dict[str, Any]:
    seconds, out = Seconds(), Path(config.out)
    model, graph = network(config, seconds)
    data = images(config, graph)
    result: dict[str, Any] = {"config": asdict(config), "network": graph.name, "images": len(data.codes)}
    sections: list[tuple[str, str]] = []
    if model is not None:
        with seconds("verify"):
            check = ql.verify(model, graph, data.codes)
        result["verify"] = check.to_dict()
        sections.append(("Integers against the model", text(str(check))))
    with seconds("estimate"):
        plan = laid_out(config, graph) if config.architecture == "stream" else engine(config, graph)
    result["plan"] = plan.to_dict()
    sections = [*plan_sections(plan), *sections]
    out.mkdir(parents=True, exist_ok=True)
    ql.save(graph, out / "graph.safetensors")
    if isinstance(plan, Plan):
        foldings.save(plan.schedule, out / "folding.json", graph.name)

    if config.export and (plan.fits or config.anyway):
        with seconds("export"):
            project = written(graph, out / "hls", plan)
        if config.check != "none":
            result["csim"] = simulated(project, data, plan, config.check, seconds)
            sections += simulation_sections(result["csim"])
    return finish(config, result, plan, sections, seconds)


def network(config: Config, seconds: Seconds) -> tuple[nn.Module | None, ql.Graph]:
    if config.graph:
        return None, ql.load(config.graph)
    model = zoo.get(config.network, **network_options(config.option)).eval()
    if config.checkpoint:
        zoo.load(model, config.checkpoint)
    card = zoo.card(config.network)
    with seconds("convert"):
        try:
            return model, ql.convert(model, config.input_shape or card.input_shape)
        except ql.ConversionError as error:
            known = " or ".join(" ".join(f"--option {k}={v}" for k, v in each.items()) or "the defaults" for each in card.converts)
            raise SystemExit(f"{config.network} does not convert: {error}" + (f"\nThis converts: {known}" if known else "")) from None


def images(config: Config, graph: ql.Graph) -> Images:
    """The first images of the data, or random codes; labels are -1 where there are none."""
    t = graph.input.type
    if config.images and not config.images.endswith(".npy"):
        return read_images(config.images, config.split)[: config.count]
    if config.images:
        codes = torch.from_numpy(np.load(config.images, allow_pickle=False)[: config.count])
    else:
        codes = torch.randint(t.levels, (config.count, *t.shape), generator=torch.Generator().manual_seed(0)) * t.step + t.lo
        codes = codes.to(torch.uint8) if 0 <= t.lo and t.hi <= 255 else codes
    unlabelled = torch.full((len(codes),), -1)
    return Codes(codes, unlabelled, config.images or "random codes")


class Codes(Images):
    """Images of any integer type: a network's input need not be pixels."""

    def __post_init__(self) -> None:
        pass


def laid_out(config: Config, graph: ql.Graph) -> Plan:
    """The solver's folding around the given one; then the weights of all other layers in one style of memory, where that is given."""
    fixed = foldings.load(config.fixed, graph) if config.fixed else {}
    clock, fps = config.clock or None, config.fps or None
    plan = ql.estimate(graph, config.part, fps, clock_mhz=clock, fixed=fixed)
    if not config.memory:
        return plan
    styled = {
        name: replace(stage.folding, memory=config.memory)
        if hasattr(graph.by_name[name].op, "weight") and name not in fixed
        else stage.folding
        for name, stage in plan.schedule.items()
    }
    return ql.estimate(graph, config.part, fps, clock_mhz=clock, schedule=Schedule.of(graph, styled))


def engine(config: Config, graph: ql.Graph) -> layerwise.Plan:
    return layerwise.estimate(graph, config.part, clock_mhz=config.clock or None, fps=config.fps or None)


def written(graph: ql.Graph, folder: Path, plan: Plan | layerwise.Plan) -> Project | layerwise.Project:
    if isinstance(plan, Plan):
        return ql.export(graph, folder, part=plan.part.name, plan=plan)
    return layerwise.export(graph, folder, plan.part, plan)


def simulated(
    project: Project | layerwise.Project, data: Images, plan: Plan | layerwise.Plan, mode: str, seconds: Seconds
) -> dict[str, Any]:
    """The project run on the images, counted against `ql.run`; with a clock also cycles, latency and what every FIFO held."""
    modes: dict[str, Any] = {"mode": mode} if isinstance(project, Project) else {}
    with seconds("compile C++"):
        project.csim(data.codes[:1], **modes)
    with seconds("run C++"):
        theirs = project.csim(data.codes, integers=True, **modes)
    ours = ql.run(project.graph, data.codes, integers=True)
    facts: dict[str, Any] = {"mode": mode, "mismatches": {edge: int((ours[edge] != theirs[edge]).sum()) for edge in ours}}
    facts["integers"] = sum(value.numel() for value in ours.values())
    facts["images_per_second"] = len(data.codes) / max(seconds.spent["run C++"], 1e-9)
    outputs = ql.run(project.graph, data.codes)
    if bool((data.labels >= 0).all()) and isinstance(outputs, Tensor) and outputs.dim() == 2:
        facts["accuracy"] = accuracy(outputs, data.labels)
    if mode == "timed" and isinstance(project, Project) and isinstance(plan, Plan) and project.last is not None:
        last = project.last
        facts |= {"cycles": last.steady if len(data.codes) > 1 else None, "latency": last.latency, "fifos": dict(last.marks)}
        facts |= {"planned_cycles": plan.cycles, "planned_latency": plan.latency}
    return facts


def simulation_sections(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, Any]] = [("mode", facts["mode"]), ("integers compared", f"{facts['integers']:,}")]
    rows += [(f"differing, {edge}", count) for edge, count in facts["mismatches"].items()]
    rows.append(("images per second", f"{facts['images_per_second']:,.1f}"))
    rows += [("accuracy", f"{100 * facts['accuracy']:.2f} %")] if "accuracy" in facts else []
    if "latency" not in facts:
        return [("C++ against the integers", table(("", ""), rows))]
    rows += [("cycles per image, clock and plan", f"{shown_cycles(facts)}, {facts['planned_cycles']:,}")]
    rows += [("latency, clock and plan", f"{facts['latency']:,}, {facts['planned_latency']:,}")]
    deep = sorted((item for item in facts["fifos"].items() if item[1][1] > BASE_DEPTH), key=lambda item: -item[1][0])
    fifos = f"<p>{len(facts['fifos']) - len(deep)} more are {BASE_DEPTH} words deep or less.</p>"
    fifos += table(("FIFO", "most words held", "depth"), [(name, *marks) for name, marks in deep])
    return [("C++ against the integers", table(("", ""), rows)), ("FIFOs with a clock", fifos)]


def shown_cycles(facts: Mapping[str, Any]) -> str:
    return "needs two images" if facts["cycles"] is None else f"{facts['cycles']:,.0f}"


def plan_sections(plan: Plan | layerwise.Plan) -> list[tuple[str, str]]:
    if not isinstance(plan, Plan):
        return [("Plan", text(str(plan)))]
    rows = [(r.name, r.op, folding_text(r.folding), f"{r.cost.cycles:,}", *(f"{getattr(r.cost, k):,}" for k in NAMES)) for r in plan.rows]
    used = [(name, share, f"{share:.0f} % ({n:,} of {limit:,})") for name, n, limit, share in shares(plan)]
    return [
        ("Plan", table(("", ""), figures(plan)) + f"<p>{bottleneck(plan)}</p>"),
        ("Resources, percent of what may be used", bars(used, limit=100.0)),
        ("Cycles per image", bars([(r.name, r.cost.cycles, f"{r.cost.cycles:,}") for r in plan.rows], plan.bottleneck)),
        ("Layers", table(("layer", "op", "folding", "cycles", *NAMES.values()), rows)),
    ]


def finish(
    config: Config, result: dict[str, Any], plan: Plan | layerwise.Plan, sections: list[tuple[str, str]], seconds: Seconds
) -> dict[str, Any]:
    """Report, page and table; ends with an error where integers differ or nothing was exported that should have been."""
    out, console, title = Path(config.out), Console(), f"{config.network or plan.network} on {plan.part}"
    result["seconds"] = seconds.spent
    sections += [
        ("Time", table(("stage", "seconds"), [(k, f"{v:.1f}") for k, v in seconds.spent.items()])),
        ("Configuration", table(("option", "value"), result["config"].items())),
    ]
    write_json(out / "report.json", result)
    write(out / "report.html", page(title, sections))

    rows = Table(title=title, show_header=False, min_width=72)
    if "verify" in result:
        rows.add_row("integers that differ from the model", f"{result['verify']['mismatches']:,} of {result['verify']['codes']:,}")
    rows.add_row("cycles per image, frames/s", f"{plan.cycles:,}, {plan.fps:,.1f} at {plan.clock_mhz:g} MHz")
    if isinstance(plan, Plan):
        rows.add_row("slowest layer, latency", f"{plan.bottleneck}, {plan.latency:,} cycles ({plan.latency_us / 1e3:,.3f} ms)")
    else:
        rows.add_row("cycles bound by", ", ".join(f"{kind} {cycles:,}" for kind, cycles in plan.bound().items()))
    budget = plan.part.budget()
    for resource in parts.RESOURCES:
        rows.add_row(f"{resource}, of what may be used", f"{getattr(plan.total, resource):,} of {budget[resource]:,}")
    if "csim" in result:
        facts = result["csim"]
        rows.add_row(
            "integers of the C++ that differ", f"{sum(facts['mismatches'].values()):,} of {facts['integers']:,}, mode {facts['mode']}"
        )
        if "latency" in facts:
            rows.add_row("with a clock: cycles per image, latency", f"{shown_cycles(facts)}, {facts['latency']:,}")
    rows.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in seconds.spent.items()))
    console.print(rows)
    made = f"   HLS project: {out / 'hls'}" if config.export and (plan.fits or config.anyway) else ""
    console.print(f"report: {out / 'report.html'}{made}", highlight=False, soft_wrap=True)
    if result.get("verify", {}).get("mismatches") or any(result.get("csim", {}).get("mismatches", {}).values()):
        raise SystemExit("integers differ: see the report")
    if not plan.fits:
        console.print(bottleneck(plan) if isinstance(plan, Plan) else str(plan).splitlines()[0], highlight=False, soft_wrap=True)
        if config.export and not config.anyway:
            raise SystemExit("nothing was exported; --anyway exports the nearest folding")
    return result


if __name__ == "__main__":
    main()
