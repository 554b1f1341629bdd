"""How fast everything is: training steps, every way of running a network, conversion, compiled simulation, imports, cost against size.

One command measures, prints and writes report.json, report.html and chart.png; --page puts the report into docs/performance.md. Every
network runs in a process of its own, in which the ways take turns, round after round, and medians are compared: their ratios hold although
a machine is shared. One thread, unless a row says otherwise. Weights are random: no way of running depends on their values. Peers (qonnx,
onnxruntime, hls4ml) run the same network on the same images in the same process where they are installed; absent ones are listed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import _speed_page as page  # type: ignore[import-not-found]
import torch
from rich.console import Console

from quantlib.training.report import write_json

SECTIONS = ("training", "inference", "conversion", "csim", "peers", "imports", "size")
OF_NETWORKS = ("inference", "conversion", "csim", "peers")
PACKAGES = ("torch", "brevitas", "numpy", "onnx", "qonnx", "onnxruntime", "hls4ml")
IMPORTS = ("torch", "brevitas.nn", "quantlib", "quantlib.evaluator", "quantlib.hls.project", "quantlib.lowering", "quantlib.layers", "zoo")


@dataclass(frozen=True)
class Config:
    only: str = ",".join(SECTIONS)
    networks: str = ""
    quick: bool = False
    rounds: int = 5
    out: str = "build/benchmark"
    page: bool = False
    one: str = ""


HELP = {
    "only": "sections to measure",
    "networks": "networks of inference, conversion, csim and peers; all unless given (--quick: the small ones)",
    "quick": "small networks and sizes, one round",
    "rounds": "turns of every way; the median counts",
    "out": "folder for report.json, report.html and chart.png, and for what is built",
    "page": "measure nothing: put the report in --out into docs/performance.md",
    "one": argparse.SUPPRESS,  # internal: what this process measures
}


# --- what one process measures -------------------------------------------------------------------------------------------------------


def one(config: Config) -> Any:
    """A network's name, or `training`, or `size`: each in a fresh process."""
    folder, rounds = Path(config.out) / config.one, config.rounds
    if config.one == "training":
        import _training_speed as training  # type: ignore[import-not-found]

        names = training.QUICK if config.quick else tuple(training.NETWORKS)
        rows = training.measure(names, rounds)
        for compiled in (False, True) if torch.cuda.is_available() else ():
            there = training.measure(names, rounds, "cuda", compiled)
            rows += [{**row, "device": "cuda, compiled" if compiled else "cuda"} for row in there]
        return rows
    if config.one == "size":
        from _size_speed import measure as size  # type: ignore[import-not-found]

        return size(folder, rounds, config.quick)
    from _network_speed import measure  # type: ignore[import-not-found]

    return measure(config.one, folder, rounds, config.only.split(","))


def child(config: Config, what: str) -> Any:
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in asdict(config).items() if k not in ("one", "quick", "page")]
    command = [sys.executable, __file__, *arguments, *(["--quick"] if config.quick else []), f"--one={what}"]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"network": what, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def imports(rounds: int) -> list[dict[str, Any]]:
    """Seconds and number of modules of a first import, in fresh processes that take turns; an empty interpreter is subtracted."""
    code = "import sys, time; t = time.perf_counter(); {}; print(time.perf_counter() - t, len(sys.modules), 'brevitas' in sys.modules)"
    taken: dict[str, list[list[str]]] = {}
    for _ in range(rounds + 1):
        for name in IMPORTS:
            done = subprocess.run([sys.executable, "-c", code.format(f"import {name}")], capture_output=True, text=True, check=True)
            taken.setdefault(name, []).append(done.stdout.split())
    rows = []
    for name, results in taken.items():
        seconds = sorted(float(r[0]) for r in results[1:] or results)  # the first fills the disk cache
        rows.append({"import": name, "seconds": seconds[len(seconds) // 2], "modules": int(results[0][1]), "brevitas": results[0][2]})
    return rows


# --- the machine ---------------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    compiler = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True).stdout.strip() if _has("g++") else "absent"
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "vector extensions": " ".join(f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_vpopcntdq") if f in flags) or "none known",
        "load before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "g++": compiler,
        **versions,
    }


def _has(program: str) -> bool:
    import shutil

    return shutil.which(program) is not None


# --- the whole -----------------------------------------------------------------------------------------------------------------------


def chosen(config: Config) -> tuple[list[str], list[str]]:
    """(sections, networks), or SystemExit that names what there is."""
    from _network_speed import CASES

    sections = config.only.split(",")
    if unknown := [s for s in sections if s not in SECTIONS]:
        raise SystemExit(f"--only {unknown[0]}: choose from {', '.join(SECTIONS)}")
    names = config.networks.split(",") if config.networks else [n for n, case in CASES.items() if case.quick or not config.quick]
    if unknown := [n for n in names if n not in CASES]:
        raise SystemExit(f"no network {unknown[0]!r} to measure; there are {', '.join(CASES)}")
    return sections, names if set(sections) & set(OF_NETWORKS) else []


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in asdict(Config()).items():
        kind: dict[str, Any] = {"action": "store_true"} if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(f"--{name}", default=default, help=HELP[name], **kind)
    config = Config(**vars(parser.parse_args(argv)))
    if config.one:
        print(json.dumps(one(config), default=str))
        return {}
    out = Path(config.out)
    if config.page:
        return page.into_docs(json.loads((out / "report.json").read_text(encoding="utf-8")), Path(__file__).resolve().parents[1] / "docs")
    if config.quick:
        config = Config(**{**asdict(config), "rounds": 1})

    console, start = Console(width=None if sys.stdout.isatty() else 160), time.perf_counter()
    sections, names = chosen(config)
    report: dict[str, Any] = {"config": asdict(config), "machine": machine(), "networks": []}
    console.print(f"{config}\n{report['machine']}\n", highlight=False)
    parts: list[tuple[str, Callable[[], Any]]] = []
    if "imports" in sections:
        parts.append(("imports", lambda: report.update(imports=imports(0 if config.quick else min(config.rounds, 3)))))
    for name in names:
        parts.append((name, lambda name=name: report["networks"].append(child(config, name))))  # type: ignore[misc]
    for section in ("training", "size"):
        if section in sections:
            parts.append((section, lambda section=section: report.update({section: child(config, section)})))  # type: ignore[misc]
    for name, work in parts:
        began = time.perf_counter()
        work()
        console.print(f"{name}: measured in {time.perf_counter() - began:.0f} s", highlight=False)
    report["seconds"] = time.perf_counter() - start
    report["targets"] = page.targets(report)
    write_json(out / "report.json", report)
    page.write(report, out)
    for title, header, rows in page.tables(report):
        console.print(page.printed(title, header, rows))
    console.print(f"report: {out / 'report.html'}")
    return report


if __name__ == "__main__":
    main()
