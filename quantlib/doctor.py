"""`python -m quantlib doctor`: what is installed, what is known not to work together, and what was found on this machine.

Reads only, and imports nothing but the standard library: packages are tried in a child process, so that a broken or missing torch is one
line of the report.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# (package, import name, lowest, below, why): the ranges of pyproject.toml; a test compares them.
REQUIRED = (
    ("torch", "torch", (2, 11), (2, 15), ""),
    ("torchvision", "torchvision", (0, 26), (0, 30), ""),
    ("brevitas", "brevitas.nn", (0, 13, 4), (0, 13, 5), "quantlib reads its internals, which change between releases"),
    ("numpy", "numpy", (1, 26), None, ""),
    ("scipy", "scipy", (1, 11), None, ""),
    ("safetensors", "safetensors", (0, 4, 3), None, ""),
)
OPTIONAL = ("scikit-learn", "matplotlib", "rich", "onnx", "qonnx", "onnxruntime", "pytest", "hypothesis", "ruff", "mypy")
PYTHON = ((3, 10), (3, 13))
VENDOR_TOOLS = ("vitis_hls", "vitis-run", "vivado", "vivado_hls", "v++", "xsct")
CPU_FLAGS = ("popcnt", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vpopcntdq", "avx512_vnni", "avx_vnni", "asimd", "asimddp")
SETTINGS = ("QUANTLIB_ENGINE", "QUANTLIB_CACHE", "QUANTLIB_SHARED", "CXX", "OMP_NUM_THREADS", "BREVITAS_JIT")
GET_COMPILER = "Debian, Ubuntu: sudo apt install g++; Fedora: sudo dnf install gcc-c++; conda: conda install -c conda-forge gxx"

_PROBE = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
found = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        found[name] = "ok"
    except BaseException as error:
        found[name] = (type(error).__name__ + ": " + str(error).strip().split("\\n")[0])[:300]
torch = sys.modules.get("torch") if found.get("torch") == "ok" else None
if torch is not None:
    try:
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["torch_gpus"], found["torch_threads"] = gpus, torch.get_num_threads()
    except Exception as error:
        found["torch_gpus"] = str(error).split("\\n")[0]
print(json.dumps(found))
"""


def version(package: str) -> str | None:
    """Installed version with its build tag (2.14.1+cu130, 2.14.1+cpu), read from the files of the package without importing it."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        text = Path(str(distribution.locate_file(f"{package}/version.py"))).read_text(encoding="utf-8")
        tagged = re.search(r"^__version__(?:\s*:[^=]*)?\s*=\s*['\"]([^'\"]+)['\"]", text, re.M)
    except (OSError, UnicodeDecodeError):
        tagged = None
    plain = distribution.version
    return tagged.group(1) if tagged and tagged.group(1).split("+")[0] == plain.split("+")[0] else plain


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version: "2.14.1+cu130" -> (2, 14, 1)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(n) for n in match.group().split(".")) if match else ()


def judge(versions: dict[str, str | None], python: tuple[int, int]) -> list[str]:
    """What is known not to work about this set of versions, a sentence each, with the remedy."""
    bad = []
    if not PYTHON[0] <= python < PYTHON[1]:
        bad.append(f"Python {python[0]}.{python[1]}: quantlib supports {PYTHON[0][0]}.{PYTHON[0][1]} to {PYTHON[1][0]}.{PYTHON[1][1] - 1}")
    for package, _, lowest, below, why in REQUIRED:
        found = versions.get(package)
        wanted = f">={_dotted(lowest)}" + (f",<{_dotted(below)}" if below else "")
        if below == (*lowest[:-1], lowest[-1] + 1) and len(lowest) == 3:
            wanted = f"=={_dotted(lowest)}"
        if found is None:
            bad.append(f"{package} is missing: pip install '{package}{wanted}'")
        elif release(found) < lowest or (below and release(found) >= below):
            bad.append(f"{package} {found}: quantlib needs {wanted}{f' ({why})' if why else ''}: pip install '{package}{wanted}'")
    torch, vision = versions.get("torch"), versions.get("torchvision")
    if torch and vision and release(torch)[:1] == (2,) and release(vision)[:1] == (0,):
        if release(vision)[1] != release(torch)[1] + 15:
            bad.append(f"torchvision {vision} was built for another torch than {torch}: install torchvision 0.{release(torch)[1] + 15}")
        elif _cpu_only(torch) != _cpu_only(vision):
            bad.append(
                f"torch {torch} with torchvision {vision}: one is a CPU-only build, the other is not, and importing torchvision may fail "
                "with 'operator torchvision::nms does not exist': install both from the same source"
            )
    return bad


def _cpu_only(text: str) -> bool:
    return text.partition("+")[2].startswith("cpu")


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _run(*command: str, seconds: float = 20) -> str | None:
    """Output of a command, None when it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _imports() -> dict[str, Any]:
    names = [name for _, name, *_ in REQUIRED]
    said = _run(sys.executable, "-B", "-c", _PROBE, *names, seconds=180)
    try:
        return json.loads((said or "").splitlines()[-1])
    except (ValueError, IndexError):
        return dict.fromkeys(names, "the process that imported the packages died or took over three minutes")


def _cpu() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M)[:1]).split())
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = model.group(1).strip() if model else platform.processor() or platform.machine()
    return {"name": name, "cores": cores, "features": [f for f in CPU_FLAGS if f in flags]}


def _gpus() -> list[str]:
    listed = _run("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return listed.splitlines() if listed else []


def _short(path: str | Path) -> str:
    """A path with the home folder written as ~, fit to be pasted in public."""
    text, home = str(path), str(Path.home())
    return "~" + text[len(home) :] if home != "/" and (text == home or text.startswith(home + os.sep)) else text


def _shared() -> dict[str, Any]:
    named = os.environ.get("QUANTLIB_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    inside = {f: sum(1 for _ in (folder / f).iterdir()) if (folder / f).is_dir() else 0 for f in ("golden", "data")}
    where = "QUANTLIB_SHARED" if named else "the folder `shared` beside the project"
    return {"folder": _short(folder) if any(inside.values()) else None, "looked_at": where, "files": inside}


def examine() -> dict[str, Any]:
    """What the report says, as plain values. `problems` is empty when nothing is known to be wrong; `hints` cost comfort or speed only."""
    versions = {package: version(package) for package, *_ in REQUIRED}
    imports = _imports()
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    cpu, gpus = _cpu(), _gpus()
    problems = judge(versions, sys.version_info[:2])
    for package, name, *_ in REQUIRED:
        if versions[package] is not None and imports.get(name) != "ok":
            problems.append(f"`import {name}` fails: {imports.get(name)}")
    hints = [] if compiler else [f"no C++ compiler: hls.csim needs one, and run is slower without. {GET_COMPILER}"]
    if gpus and not imports.get("torch_gpus"):
        hints.append("a GPU is there, but this torch does not use it: a CPU-only build, or a driver older than the build needs")
    return {
        "quantlib": version("quantlib-fpga") or "not installed as a package",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "virtual_environment": sys.prefix != sys.base_prefix,
        "packages": versions,
        "optional": {p: v for p in OPTIONAL if (v := version(p))},
        "imports": {name: imports.get(name) for _, name, *_ in REQUIRED},
        "compiler": {"path": _short(compiler), "version": (_run(compiler, "--version") or "?").splitlines()[0]} if compiler else None,
        "make": bool(shutil.which("make")),
        "settings": {name: _short(os.environ[name]) for name in SETTINGS if name in os.environ},
        "cpu": cpu,
        "torch_threads": imports.get("torch_threads"),
        "gpus": gpus,
        "torch_gpus": imports.get("torch_gpus", []),
        "vendor_tools": {t: _short(path) for t in VENDOR_TOOLS if (path := shutil.which(t))},
        "shared_data": _shared(),
        "problems": problems,
        "hints": hints,
    }


def report(found: dict[str, Any]) -> str:
    """The examination as text to paste into a bug report."""
    cpu = found["cpu"]
    rows = [
        ("quantlib", found["quantlib"]),
        ("python", found["python"] + (" in a virtual environment" if found["virtual_environment"] else "")),
        ("platform", found["platform"]),
        *((p, v or "missing") for p, v in found["packages"].items()),
        ("optional", ", ".join(f"{p} {v}" for p, v in found["optional"].items()) or "none"),
        ("compiler", f"{found['compiler']['version']} ({found['compiler']['path']})" if found["compiler"] else f"none. {GET_COMPILER}"),
        ("make", "found" if found["make"] else "missing"),
        ("settings", ", ".join(f"{name}={value}" for name, value in found["settings"].items()) or "none"),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores usable, {' '.join(cpu['features']) or 'features unknown'}"),
        ("gpu", "; ".join(found["gpus"]) or "none"),
        ("torch sees", f"{', '.join(found['torch_gpus']) or 'no GPU'}" if isinstance(found["torch_gpus"], list) else found["torch_gpus"]),
        ("vendor tools", ", ".join(f"{t} ({p})" for t, p in found["vendor_tools"].items()) or "none on PATH (csim needs none)"),
        ("shared data", found["shared_data"]["folder"] or f"not found (looked at {found['shared_data']['looked_at']}; only tests need it)"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    lines += ["", *(f"PROBLEM  {p}" for p in found["problems"]), *(f"hint     {h}" for h in found["hints"])]
    return "\n".join([*lines, "" if found["problems"] else "no known problem"]).rstrip()
