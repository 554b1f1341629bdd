"""After training: integers, verification, estimate, HLS project, compiled C++, and the sections of a report about them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantlib as ql
from quantlib.training.data import Images
from quantlib.training.logs import Epoch
from quantlib.training.metrics import accuracy
from quantlib.training.report import figure, page, table, text, write, write_json


@dataclass
class Seconds:
    """Wall-clock seconds of named stages: `with seconds("convert"): ...`."""

    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Deployed:
    """graph, plan and check as `ql.convert`, `ql.estimate` and `ql.verify` gave them; facts: what goes into report.json."""

    graph: Any
    plan: Any
    check: Any
    facts: dict[str, Any]

    @property
    def ok(self) -> bool:
        return bool(self.check.ok) and not any(self.facts["cpp_mismatches"].values())


def deploy(
    model: nn.Module,
    codes: Tensor,
    part: str,
    out: Path,
    verify_images: int,
    cpp_images: int,
    seconds: Seconds,
    input: ql.Grid | None = None,
) -> Deployed:
    """Converts the model (eval mode), verifies every code on the first images, exports, and compares C++ and integers on some of them.

    codes: uint8 (N, C, H, W), evenly mixed as they come; input: what integers an image has, where the model does not say it itself.
    """
    with seconds("convert"):
        graph = ql.convert(model.eval(), tuple(codes.shape[1:]), input)
    with seconds("verify"):
        check = ql.verify(model, graph, codes[:verify_images])
    with seconds("estimate"):
        plan = ql.estimate(graph, part=part)
    with seconds("export"):
        hls = ql.export(graph, out / "hls", part=part, plan=plan)
    differing: dict[str, int] = {}
    if cpp_images:
        x = codes[:cpp_images]
        with seconds("compile C++"):
            hls.csim(x[:1])
        with seconds("run C++"):
            theirs = hls.csim(x, integers=True)
        ours = ql.run(graph, x, integers=True)
        differing = {edge: int((theirs[edge] != ours[edge]).sum()) for edge in ours}
    facts = {"verify": check.to_dict(), "plan": plan.to_dict(), "cpp_images": min(cpp_images, len(codes)), "cpp_mismatches": differing}
    return Deployed(graph, plan, check, facts)


def integer_predictions(graph: Any, data: Images, batch: int = 64) -> Tensor:
    """Outputs (N, classes) of `ql.run` on all images."""
    return torch.cat([ql.run(graph, codes) for codes in data.codes.split(batch)])


def integer_accuracy(graph: Any, data: Images, batch: int = 64) -> float:
    """Accuracy of `ql.run` on all images."""
    return accuracy(integer_predictions(graph, data, batch), data.labels)


def hardware_section(deployed: Deployed, published: Mapping[str, float] | None = None) -> str:
    """The estimate per layer and in total, beside published totals where there are some."""
    plan = deployed.plan
    nodes = {row.name: row for row in plan.rows}
    layers = [
        (n.name, type(n.op).__name__, str(n.type), nodes[n.name].folding.pe, nodes[n.name].folding.simd, nodes[n.name].cost.cycles,
         nodes[n.name].cost.lut, nodes[n.name].cost.bram18, nodes[n.name].cost.dsp)
        for n in deployed.graph
    ]  # fmt: skip
    ours = {"LUT": plan.total.lut, "DSP": plan.total.dsp, "BRAM18": plan.total.bram18, "frames/s": plan.fps, "MHz": plan.clock_mhz}
    head = ("", "estimate", "published") if published else ("", "estimate")
    totals = [(k, f"{v:,.0f}", *([f"{published[k]:,.0f}" if k in published else ""] if published else [])) for k, v in ours.items()]
    speed = f"{plan.cycles:,} cycles per image, slowest {plan.bottleneck}, latency {plan.latency:,} cycles"
    return table(head, totals) + text(speed) + table(("node", "op", "integers", "pe", "simd", "cycles", "LUT", "BRAM18", "DSP"), layers)


def training_section(curves: Mapping[str, Sequence[Epoch]], measure: str = "accuracy") -> str:
    """Loss and score of steps that follow each other, on one axis of epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plot, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    done = 0
    for name, rows in curves.items():
        epochs = [done + row.number for row in rows]
        left.plot(epochs, [row.loss for row in rows], label=name)
        (line,) = right.plot(epochs, [100 * row.test_accuracy for row in rows], label=f"{name}, test")
        right.plot(epochs, [100 * row.train_accuracy for row in rows], ":", color=line.get_color(), label=f"{name}, train")
        done += len(rows)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel=f"{measure}, %")
    left.legend()
    right.legend(fontsize="small")
    plot.tight_layout()
    plt.close(plot)
    sums = [(name, len(r), sum(e.images for e in r), sum(e.seconds for e in r), speed(r)) for name, r in curves.items()]
    cells = [(name, epochs, f"{images:,}", f"{seconds:,.0f}", f"{rate:,.0f}") for name, epochs, images, seconds, rate in sums]
    return figure(plot, f"Loss and {measure} per epoch.") + table(("step", "epochs", "images", "seconds", "images/s"), cells)


def finish(
    title: str,
    out: Path,
    config: Any,
    scores: Mapping[str, float],
    curves: Mapping[str, Sequence[Epoch]],
    seconds: Seconds,
    done: Deployed | None = None,
    published: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
    shown: Mapping[str, str] | None = None,
    measure: str = "accuracy",
    sections: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Ends a recipe: report.json, report.html and a table on the terminal; the content of report.json is returned.

    config: the run's frozen dataclass; scores: name -> share of images; done: what `deploy` gave, None for a network that stays
    real-valued; published: totals of a published accelerator; facts: further entries of report.json; shown: further rows of the table
    and the page; measure: what the scores are; sections: further (heading, HTML body) of the page.
    SystemExit where integers differ, after the report is written.
    """
    from rich.console import Console
    from rich.table import Table

    console, shown = Console(), dict(shown or {})
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
    result: dict[str, Any] = {"config": asdict(config), measure: dict(scores), "training": curve_facts(curves)}
    result |= {"seconds": seconds.spent, "machine": machine} | dict(facts or {}) | (done.facts if done else {})
    write_json(out / "report.json", result)
    parts = [(measure[:1].upper() + measure[1:], accuracy_section(scores) + (table(("", ""), shown.items()) if shown else ""))]
    parts += [("Training", training_section(curves, measure))] if curves else []
    parts += sections
    if done:
        parts += [("Hardware", hardware_section(done, published)), ("Integers against the model", text(str(done.check)))]
    parts += [
        ("Time", table(("stage", "seconds"), [(k, f"{v:.1f}") for k, v in seconds.spent.items()])),
        ("Configuration", table(("option", "value"), result["config"].items())),
    ]
    write(out / "report.html", page(f"{title}: from training to C++", parts))

    rows = Table(title=f"{title} on {done.plan.part}" if done else title, show_header=False, min_width=72)
    for name, score in scores.items():
        rows.add_row(name, f"{100 * score:.2f} %")
    for name, value in shown.items():
        rows.add_row(name, value)
    if done:
        rows.add_row("codes that differ, integers against model", f"{done.check.mismatches:,} of {done.check.codes:,}")
        rows.add_row("integers that differ, C++ against integers", f"{sum(done.facts['cpp_mismatches'].values()):,}")
        rows.add_row("cycles per image, frames per second", f"{done.plan.cycles:,}, {done.plan.fps:,.0f} at {done.plan.clock_mhz:g} MHz")
    rows.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in seconds.spent.items()))
    console.print(rows)
    console.print(f"report: {out / 'report.html'}" + (f"   HLS project: {out / 'hls'}" if done else ""), highlight=False, soft_wrap=True)
    if done and not done.ok:
        raise SystemExit("integers differ: see the report")
    return result


def speed(rows: Sequence[Epoch]) -> float:
    """Images per second of training, evaluation left out."""
    return sum(r.images for r in rows) / max(sum(r.seconds for r in rows), 1e-9)


def curve_facts(curves: Mapping[str, Sequence[Epoch]]) -> dict[str, Any]:
    """For report.json: every row of every step, and its throughput."""
    return {name: {"images_per_second": speed(rows), "epochs": [asdict(row) for row in rows]} for name, rows in curves.items()}


def accuracy_section(scores: Mapping[str, float]) -> str:
    return table(("", "%"), [(name, f"{100 * value:.2f}") for name, value in scores.items()])
