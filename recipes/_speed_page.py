"""The benchmark's report as tables and charts: on the terminal, as a page of its own, and inside docs/performance.md."""

from __future__ import annotations

import io
from math import floor, log10
from pathlib import Path
from typing import Any

from rich.table import Table

from quantlib.training import report as html
from quantlib.training.checkpoint import write_bytes

Rows = list[list[str]]
Titled = tuple[str, list[str], Rows]
BEGIN, END = "<!-- written by `recipes/benchmark.py --page` -->", "<!-- end -->"
IMAGE_MS = {"cnv_1bit": 0.15, "cnv_2bit": 0.35, "fracbnn_cifar10": 0.5}  # most ms per image and core of ql.run
OVER_FAKE = {"run, native": 3.0, "run, torch": 1.5}  # least speed over the fake-quantized model's, ImageNet networks


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(0, 2 - floor(log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


# --- tables --------------------------------------------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> list[Titled]:
    """(title, header, rows) of everything that was measured; what was not has no table."""
    rows = [r for r in report.get("networks", []) if "failed" not in r]
    failed = [[r["network"], r["failed"]] for r in report.get("networks", []) if "failed" in r]
    made: list[Titled] = []
    ways = list(dict.fromkeys(way for r in rows for way in r["images_per_second"]))
    if ways:
        header = ["ms per image", *ways]
        body = [[r["network"], *(_ms(r, way) for way in ways)] for r in rows]
        made.append(("One image, one core", header, body))
        made.append(("Images per second", ["", *ways], [[r["network"], *(_rate(r, way) for way in ways)] for r in rows]))
    over = [w for w in ways if w != "fake-quantized"]
    if any("fake-quantized" in r["images_per_second"] for r in rows):
        body = [[r["network"], *(_ratio(r, way) for way in over)] for r in rows if "fake-quantized" in r["images_per_second"]]
        made.append(("Speed over the fake-quantized model's", ["", *over], body))
    columns = {
        "convert s": "convert_seconds", "estimate s": "estimate_seconds", "export s": "export_seconds", "csim compile s": "compile_seconds",
        "weights MB": "weights_mb", "MB at start": "memory_start", "peak MB, convert": "memory_convert", "peak MB, export": "memory_export",
        "2 x weights + 1 GB": "limit",
    }  # fmt: skip
    if any("export_seconds" in r for r in rows):
        facts = [{**r, "limit": 2 * r["weights_mb"] + 1000} for r in rows]
        body = [[r["network"], *(number(r[k]) if k in r else "" for k in columns.values())] for r in facts]
        made.append(("Conversion, export and compilation", ["", *columns], body))
    notes = [[r["network"], peer, note] for r in rows for peer, note in r.get("notes", {}).items() if note]
    if notes:
        made.append(("Peers: what is absent, does not run, or is to be known", ["network", "peer", ""], notes))
    if isinstance(report.get("training"), list):
        header = [
            "",
            "device",
            "layout",
            "batch",
            "float or published ms",
            "Brevitas ms",
            "ours ms",
            "ours / first",
            "target",
            "ours / Brevitas",
        ]
        body = []
        for r in report["training"]:
            ms = [number(1000 * r["seconds"][k]) if k in r["seconds"] else "" for k in (r["over"], "brevitas", "ours")]
            ratios = [f"{r[k]:.2f}" if k in r else "" for k in ("ratio", "target", "of_brevitas")]
            body.append([r["network"], r["device"], r["layout"], str(r["batch"]), *ms, *ratios])
        made.append(("Training step: forward and backward, one thread", header, body))
    if isinstance(report.get("size"), list):
        body = [
            [r["axis"], r["way"], " ".join(map(str, r["sizes"])), " ".join(number(1000 * s) for s in r["seconds"]), f"{r['exponent']:.2f}",
             f"{r['error']:.2f}"]
            for r in report["size"]
        ]  # fmt: skip
        made.append(("Cost against size", ["varied", "what", "sizes", "ms", "exponent", "its standard error"], body))
    if "imports" in report:
        body = [
            [r["import"], number(r["seconds"]), str(r["modules"]), "yes" if r["brevitas"] == "True" else "no"] for r in report["imports"]
        ]
        made.append(("First import", ["", "seconds", "modules", "loads Brevitas"], body))
    failed += [[s, report[s]["failed"]] for s in ("training", "size") if isinstance(report.get(s), dict)]
    if failed:
        made.append(("Not measured", ["", "why"], failed))
    if report.get("targets"):
        body = [[t["what"], t["target"], t["measured"], "reached" if t["reached"] else "not reached"] for t in report["targets"]]
        made.append(("Targets", ["", "target", "measured", ""], body))
    return made


def _ms(row: dict[str, Any], way: str) -> str:
    rate = row["images_per_second"].get(way)
    return number(1000 / rate) if rate else ""


def _rate(row: dict[str, Any], way: str) -> str:
    rate = row["images_per_second"].get(way)
    return number(rate) if rate else ""


def _ratio(row: dict[str, Any], way: str) -> str:
    rates = row["images_per_second"]
    return number(rates[way] / rates["fake-quantized"]) if way in rates else ""


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets that what was measured can be held against."""
    found: list[dict[str, Any]] = []

    def most(what: str, limit: float, value: float, unit: str) -> None:
        found.append(
            {
                "what": what,
                "target": f"≤ {limit:g} {unit}".strip(),
                "measured": f"{number(value)} {unit}".strip(),
                "reached": value <= limit,
            }
        )

    def least(what: str, limit: float, value: float) -> None:
        found.append({"what": what, "target": f"≥ {limit:g}", "measured": number(value), "reached": value >= limit})

    rows = [r for r in report.get("networks", []) if "failed" not in r]
    for r in rows:
        rates, name = r["images_per_second"], r["network"]
        if name in IMAGE_MS and "run, native" in rates:
            most(f"{name}: ql.run, one image and core", IMAGE_MS[name], 1000 / rates["run, native"], "ms")
        for way, limit in OVER_FAKE.items():
            if way in rates and "fake-quantized" in rates and name.endswith("_imagenet"):
                least(f"{name}: {way} over fake-quantized", limit, rates[way] / rates["fake-quantized"])
        if name.startswith("cnv") and "compile_seconds" in r:
            most(f"{name}: compilation of csim", 5, r["compile_seconds"], "s")
            most(f"{name}: csim, one image", 5, 1000 / rates["csim, fast"], "ms")
        if name == "fracbnn_imagenet" and "csim, fast" in rates:
            most(f"{name}: csim, one image", 60, 1 / rates["csim, fast"], "s")
    for key, what, limit in (
        ("convert_seconds", "conversion", 5),
        ("export_seconds", "export", 10),
        ("compile_seconds", "compilation", 120),
    ):
        slowest = max((r for r in rows if key in r), key=lambda r: r[key], default=None)
        if slowest is not None:
            most(f"slowest {what} ({slowest['network']})", limit, slowest[key], "s")
    over = [(r["memory_export"] / (2 * r["weights_mb"] + 1000), r["network"]) for r in rows if "memory_export" in r]
    if over:
        share, name = max(over)
        most(f"peak memory over 2 x weights + 1 GB, the most ({name})", 1, share, "")
    for r in (r for r in report.get("training", []) if isinstance(report["training"], list) and r["device"] == "cpu"):
        most(f"training step of {r['network']}, {r['layout']}, over {r['over']}", r["target"], r["ratio"], "")
    return found


# --- charts --------------------------------------------------------------------------------------------------------------------------


def bars(report: dict[str, Any]) -> Any:
    """Images per second over the fake-quantized model's, one group of bars for each network; None without such rows."""
    from matplotlib.figure import Figure

    rows = [r for r in report.get("networks", []) if "fake-quantized" in r.get("images_per_second", {})]
    if not rows:
        return None
    ways = [w for w in dict.fromkeys(w for r in rows for w in r["images_per_second"]) if "threads" not in w]
    plot = Figure(figsize=(11, 1.2 + 0.16 * len(rows) * len(ways)))
    axes = plot.subplots()
    for k, way in enumerate(ways):
        at = [n + 0.8 * k / len(ways) for n, r in enumerate(rows) if way in r["images_per_second"]]
        axes.barh(
            at,
            [r["images_per_second"][way] / r["images_per_second"]["fake-quantized"] for r in rows if way in r["images_per_second"]],
            height=0.8 / len(ways),
            label=way,
        )
    axes.set_yticks([n + 0.4 for n in range(len(rows))], [r["network"] for r in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("images per second over those of the fake-quantized model, one thread")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=5, frameon=False)
    plot.tight_layout()
    return plot


def curves(report: dict[str, Any]) -> Any:
    """Seconds over size on logarithmic axes, with the fitted exponents; None without such rows."""
    from matplotlib.figure import Figure

    rows = report.get("size")
    if not isinstance(rows, list) or not rows:
        return None
    axes_of = list(dict.fromkeys(r["axis"] for r in rows))
    plot = Figure(figsize=(3.2 * len(axes_of), 3.8))
    for axes, axis in zip(plot.subplots(1, len(axes_of), squeeze=False)[0], axes_of):
        for r in (r for r in rows if r["axis"] == axis):
            axes.loglog(r["sizes"], r["seconds"], "o-", markersize=3, label=f"{r['way']}: {r['exponent']:.2f} ± {r['error']:.2f}")
        sizes = next(r["sizes"] for r in rows if r["axis"] == axis)
        axes.set_xticks(sizes, [f"{n:g}" for n in sizes])
        axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    plot.supylabel("seconds")
    plot.tight_layout()
    return plot


def _png(plot: Any) -> bytes:
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


# --- where it goes -------------------------------------------------------------------------------------------------------------------


def printed(title: str, header: list[str], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left")
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if not k else "right")
    for row in rows:
        table.add_row(*row)
    return table


def write(report: dict[str, Any], out: Path) -> None:
    """report.html and the charts as files."""
    sections = [("Machine", html.table(["", ""], [[k, v] for k, v in report["machine"].items()]))]
    for name, plot, caption in (
        ("chart", bars(report), "Speed over the fake-quantized model's"),
        ("size", curves(report), "Cost against size"),
    ):
        if plot is not None:
            write_bytes(out / f"{name}.png", _png(plot))
            sections.append((caption, html.figure_file(out / f"{name}.png", caption)))
    sections += [(title, html.table(header, rows)) for title, header, rows in tables(report)]
    html.write(out / "report.html", html.page("Benchmark", sections))


def markdown(report: dict[str, Any], pictures: list[str]) -> str:
    facts = report["machine"]
    lines = [f"Machine: {', '.join(f'{k} {v}' if k != 'processor' else str(v) for k, v in facts.items())}."]
    config = report["config"]
    lines.append(f"Run: sections {config['only']}; {config['rounds']} rounds; {report['seconds']:.0f} s in all.\n")
    lines += [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    for title, header, rows in sorted(tables(report), key=lambda t: t[0] != "Targets"):
        lines += [f"### {title}\n", "| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def into_docs(report: dict[str, Any], docs: Path) -> dict[str, Any]:
    """The report between the two marks of docs/performance.md, with its charts beside the page."""
    target = docs / "performance.md"
    text = target.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{target} has lost the marks {BEGIN} and {END}, between which the report belongs")
    pictures = []
    for name, plot in (("performance.png", bars(report)), ("performance_size.png", curves(report))):
        if plot is not None:
            write_bytes(docs / name, _png(plot))
            pictures.append(name)
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    html.write(target, f"{before}{BEGIN}\n\n{markdown(report, pictures)}\n{after}")
    return report
