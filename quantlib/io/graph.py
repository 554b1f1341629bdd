"""Graph files: one safetensors file that holds every array, with the structure as JSON in its metadata. No pickle, nothing executed.

Layout (format 1): metadata["quantlib"] = {"format", "version", "sha256", "graph"}; in the graph a dataclass is an object of its
fields, an op adds its registered class name under "op", an array is {"array": key} and lies in the file under that key with its dtype.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from quantlib import ops as ops  # registers the ops
from quantlib.ir import Graph, GraphError
from quantlib.ops._base import Op

FORMAT, VERSION = "quantlib.graph", 1
DTYPES = ("int64", "float64", "float32")


class GraphFileError(ValueError):
    """A file that is no graph, is damaged, or was written by a newer version; the message names the file and the place in it."""


def save(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Write `graph` to `path`, whole or not at all: a temporary file in the same folder takes the name only when it is complete.

    load(path) gives back the same graph: every op, array (value, dtype and shape), type, decode, front and name.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    content = _encode(graph, "graph", arrays)
    document = {"format": FORMAT, "version": VERSION, "sha256": _digest(content, arrays), "graph": content}
    data = to_bytes(arrays, metadata={"quantlib": _text(document)})
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> Graph:
    """The graph in `path`: only registered ops are built, every field is checked against its declared type, and Graph checks all intervals.

    Raises FileNotFoundError, or GraphFileError when the file is truncated, foreign, newer than this library, or breaks an invariant.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no graph file at {path}")
    try:
        with safe_open(str(path), framework="np") as f:
            text = (f.metadata() or {}).get("quantlib")
            if text is None:
                raise GraphFileError(f"{path} is a safetensors file, but holds no graph (weights of a network go to zoo.load)")
            document = _document(text, path)
            arrays = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (a file, not a mapping)
        if document.get("sha256") != _digest(document["graph"], arrays):
            raise GraphFileError(f"{path} is damaged or was edited: its content does not match its checksum; save the graph again")
        return _read(Graph, document["graph"], "graph", arrays)
    except SafetensorError as error:
        raise GraphFileError(f"{path} is no graph file, or is truncated: {error}") from None
    except _Mismatch as error:
        raise GraphFileError(f"{path}: {error}") from None
    except GraphError as error:
        raise GraphFileError(f"{path} breaks an invariant: {error}") from None


def _digest(content: Any, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the description and of every array with its name, dtype and shape."""
    digest = hashlib.sha256(_text(content).encode())
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    return digest.hexdigest()


def _text(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _document(text: str, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise GraphFileError(f"{path}: the description of the graph is no JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT or type(document.get("version")) is not int:
        raise GraphFileError(f"{path}: the metadata is not that of a graph file")
    if document["version"] > VERSION:
        raise GraphFileError(f"{path} has format {document['version']}; this library reads up to {VERSION}: install a newer quantlib")
    if "graph" not in document:
        raise GraphFileError(f"{path}: the description has no graph")
    return document


# Writing: values -> JSON, arrays aside.


def _encode(value: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, (np.ndarray, np.floating)):
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        if array.dtype.name not in DTYPES:
            raise TypeError(f"{where} is an array of {array.dtype}; a graph holds {', '.join(DTYPES)}")
        arrays[where] = array
        return {"array": where}
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value) if f.init]
        body = {n: _encode(getattr(value, n), f"{where}.{n}", arrays) for n in names}
        return {"op": type(value).__name__, **body} if isinstance(value, Op) else body
    if isinstance(value, (tuple, list)):
        return [_encode(v, f"{where}.{i}", arrays) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    raise TypeError(f"{where} is a {type(value).__name__}, which a graph file cannot hold")


# Reading: JSON -> values, guided by the declared types of the dataclasses.


class _Mismatch(ValueError):
    pass


_Arrays = Mapping[str, np.ndarray]


def _array(key: Any, where: str, arrays: _Arrays) -> np.ndarray:
    if not isinstance(key, str) or key not in arrays:
        raise _Mismatch(f"{where}: the file has no array {key!r}")
    if arrays[key].dtype.name not in DTYPES:
        raise _Mismatch(f"{where}: array of {arrays[key].dtype}, expected one of {', '.join(DTYPES)}")
    return arrays[key]


@cache
def _hints(cls: type) -> Mapping[str, Any]:
    return typing.get_type_hints(cls, localns={"Op": Op})


def _read(hint: Any, value: Any, where: str, arrays: _Arrays) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        reasons = []
        for member in typing.get_args(hint):
            try:
                return _read(member, value, where, arrays)
            except _Mismatch as error:
                reasons.append(str(error))
        raise _Mismatch(reasons[0] if len(set(reasons)) == 1 else f"{where}: {_short(value)} fits none of: {'; '.join(reasons)}")
    if origin in (tuple, list, Sequence):
        return _read_tuple(typing.get_args(hint), value, where, arrays)
    if hint is None or hint is type(None):
        if value is not None:
            raise _Mismatch(f"{where}: expected null, found {_short(value)}")
        return None
    if hint in (np.ndarray, Any):  # Any: a scale, array-like on the way in and an array once made
        if not isinstance(value, dict) or set(value) != {"array"}:
            raise _Mismatch(f"{where}: expected an array, found {_short(value)}")
        return _array(value["array"], where, arrays)
    if isinstance(hint, type) and issubclass(hint, Op):
        return _read_op(value, where, arrays)
    if isinstance(hint, type) and is_dataclass(hint):
        return _read_fields(hint, value, where, arrays)
    if hint is float and type(value) is int:
        return float(value)
    if hint in (bool, int, float, str):
        if type(value) is not hint:
            raise _Mismatch(f"{where}: expected {hint.__name__}, found {_short(value)}")
        return value
    raise TypeError(f"{where}: a graph file cannot hold a field declared {hint}")


def _read_tuple(members: tuple[Any, ...], value: Any, where: str, arrays: _Arrays) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _Mismatch(f"{where}: expected a list, found {_short(value)}")
    if len(members) == 2 and members[1] is Ellipsis or len(members) == 1:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise _Mismatch(f"{where}: expected {len(members)} entries, found {len(value)}")
    return tuple(_read(m, v, f"{where}.{i}", arrays) for i, (m, v) in enumerate(zip(members, value, strict=True)))


def _read_op(value: Any, where: str, arrays: _Arrays) -> Op:
    name = value.get("op") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in Op.registry:
        raise _Mismatch(f"{where}: no op is registered as {_short(name)}; import the module that defines it, or install a newer quantlib")
    return _read_fields(Op.registry[name], {k: v for k, v in value.items() if k != "op"}, where, arrays)


def _read_fields(cls: type, value: Any, where: str, arrays: _Arrays) -> Any:
    """A dataclass from its fields: none unknown, none missing that has no default, each of its declared type."""
    if not isinstance(value, dict):
        raise _Mismatch(f"{where}: expected a {cls.__name__}, found {_short(value)}")
    declared = {f.name: f for f in fields(cls) if f.init}
    unknown = [k for k in value if k not in declared]
    required = [n for n, f in declared.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [n for n in required if n not in value]
    if unknown or missing:
        said = f"unknown field {unknown[0]}" if unknown else f"field {missing[0]} is missing"
        raise _Mismatch(f"{where} ({cls.__name__}): {said}")
    hints = _hints(cls)
    read = {n: _read(hints[n], v, f"{where}.{n}", arrays) for n, v in value.items()}
    try:
        return cls(**read)
    except GraphError:
        raise
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise _Mismatch(f"{where} ({cls.__name__}): {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
