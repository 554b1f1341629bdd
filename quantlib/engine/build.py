"""Compiles the engine once per machine and keeps it in the user's cache.

The cache is QUANTLIB_CACHE, else XDG_CACHE_HOME/quantlib, else ~/.cache/quantlib. A library is named after the hash of its source, the
flags, the compiler's version and the processor's features; a lock file lets one process compile while others wait, and a rename makes it
appear whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SOURCE = Path(__file__).parent
COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-w")
_lock = threading.Lock()
_loaded: dict[str, Library | Unavailable] = {}


class Unavailable(RuntimeError):
    """The engine cannot run here; the message says why."""


@dataclass(frozen=True)
class Library:
    """The compiled engine: `ql_run` of packed.cpp, and what the machine offers it."""

    path: Path
    handle: ctypes.CDLL

    @cached_property
    def bytes(self) -> bool:
        """Products of bytes are summed four at a time (AVX-512 VNNI)."""
        return bool(self.handle.ql_features() & 1)

    @cached_property
    def vectors(self) -> bool:
        """Bits are counted in vectors (AVX-512 VPOPCNTDQ)."""
        return bool(self.handle.ql_features() & 2)

    def __str__(self) -> str:
        return f"C++ ({'AVX-512 popcount' if self.vectors else 'scalar popcount'}, {'8-bit' if self.bytes else '16-bit'} products)"


def flags(body: str) -> tuple[str, ...]:
    """Compiler flags of a body: native uses all the processor has; portable only what every x86-64 machine of the last decade has."""
    if body == "portable":
        return (*COMMON, "-march=x86-64-v2") if platform.machine() in ("x86_64", "AMD64") else COMMON
    wide = ("-mprefer-vector-width=512",) if "avx512bw" in _features() else ()
    return (*COMMON, "-march=native", *wide)


def _features() -> str:
    """The processor's feature flags, or its name where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return " ".join(sorted(found.partition(":")[2].split())) or f"{platform.machine()} {platform.processor()}"


def folder() -> Path:
    """Where compiled engines are kept."""
    if own := os.environ.get("QUANTLIB_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quantlib"


def library(body: str) -> Library:
    """The engine for this machine, compiled if need be. body: native or portable. Raises Unavailable."""
    with _lock:
        if body not in _loaded:
            try:
                _loaded[body] = _open(_compiled(body))
            except Unavailable as error:
                _loaded[body] = error
            except (OSError, RuntimeError) as error:
                _loaded[body] = Unavailable(f"the engine's cache cannot be used: {error}")
        found = _loaded[body]
    if isinstance(found, Unavailable):
        raise found
    return found


def _compiled(body: str) -> Path:
    return compiled(f"engine-{body}", SOURCE / "packed.cpp", flags(body), sorted([*SOURCE.glob("*.hpp"), *SOURCE.glob("*.cpp")]))


def compiled(stem: str, main: Path, options: tuple[str, ...], sources: list[Path]) -> Path:
    """The shared library of `main`, which depends on `sources`, from the cache or compiled into it. Raises Unavailable."""
    if sys.byteorder != "little":
        raise Unavailable("the engine packs bits for little-endian machines")
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unavailable("no g++ on PATH")
    parts = [_run(compiler, "--version"), _features(), *options, *(s.name + "\0" + s.read_text() for s in sources)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = folder() / f"{stem}-{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target.with_suffix(".lock")):
        if not target.exists():
            fd, name = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
            os.close(fd)
            try:
                _run(compiler, *options, str(main), "-o", name)
                os.replace(name, target)
            finally:
                Path(name).unlink(missing_ok=True)
    return target


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{command[0]} fails: {done.stderr.strip()[-400:] or done.returncode}")
    return done.stdout


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """One process at a time, where the system has file locks; elsewhere two may compile and the later rename wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(path: Path) -> Library:
    handle = ctypes.CDLL(str(path))
    handle.ql_run.restype = None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    handle.ql_run.argtypes = [pointer, number, pointer, number, number, pointer, pointer, number]
    handle.ql_features.restype = ctypes.c_int64
    handle.ql_features.argtypes = []
    return Library(path, handle)
