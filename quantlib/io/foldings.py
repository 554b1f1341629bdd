"""A folding of a network as a JSON file that people edit: layer -> lanes, memory style and packing.

    {"network": "ultranet_dacsdc", "layers": {"layers.conv0": {"pe": 16, "simd": 3}, "layers.conv1": {"pe": 4, "memory": "bram"}}}

What a layer leaves out has its default in `quantlib.schedule.Folding`. FIFO depths are not in it: they follow from the folding.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from quantlib.ir import Graph
from quantlib.schedule import Folding, Schedule, check_folding

DEFAULTS = asdict(Folding())


class FoldingFileError(ValueError):
    """A file that is no folding of this graph; the message names the layer and what would do."""


def save(schedule: Schedule, path: str | os.PathLike[str], network: str = "") -> None:
    """Every layer's folding, defaults left out except pe and simd. Whole or not at all."""
    path = Path(path)
    layers = {name: _written(stage.folding) for name, stage in schedule.items()}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in layers.items())
    text = f'{{"network": {json.dumps(network)}, "layers": {{\n{rows}\n}}}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _written(folding: Folding) -> dict[str, Any]:
    return {k: v for k, v in asdict(folding).items() if k in ("pe", "simd") or v != DEFAULTS[k]}


def load(path: str | os.PathLike[str], graph: Graph) -> dict[str, Folding]:
    """Layer -> folding, for the layers that the file names; each is one of `graph` and divides its channels.

    Raises FileNotFoundError, or FoldingFileError: no JSON of this form, an unknown layer (with the nearest names) or key, a value of a
    wrong type, lanes that do not divide (with what they must divide).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no folding file at {path}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise FoldingFileError(f"{path} is no JSON: {error}") from None
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, dict):
        raise FoldingFileError(f'{path}: expected {{"layers": {{"name of a layer": {{"pe": 4, "simd": 2}}}}}}')
    return {name: _folding(path, graph, name, values) for name, values in layers.items()}


def _folding(path: Path, graph: Graph, name: str, values: Any) -> Folding:
    if name not in graph.by_name:
        near = get_close_matches(name, list(graph.by_name), n=3, cutoff=0.3)
        raise FoldingFileError(f"{path}: {graph.name} has no layer {name!r}; near it: {', '.join(near) or ', '.join(graph.by_name)}")
    if not isinstance(values, Mapping):
        raise FoldingFileError(f'{path}, {name}: {values!r} is no folding; write {{"pe": 4, "simd": 2}}')
    for key, value in values.items():
        if key not in DEFAULTS:
            raise FoldingFileError(f"{path}, {name}: no key {key!r}; there are {', '.join(f.name for f in fields(Folding))}")
        if type(value) is not type(DEFAULTS[key]):
            raise FoldingFileError(f"{path}, {name}: {key} = {value!r} is no {type(DEFAULTS[key]).__name__}")
    node = graph.by_name[name]
    try:
        folding = Folding(**values)
        check_folding(node, graph.types(node), folding)
    except ValueError as error:
        raise FoldingFileError(f"{path}, {name}: {error}") from None
    return folding
