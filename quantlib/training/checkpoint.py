"""Checkpoints: one safetensors file each, its JSON inside as metadata, written whole or not at all.

Tensors and JSON share a file because one rename is atomic and two are not: a run killed between them would find halves that disagree.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot continue this run; the message says what differs."""


def write_bytes(path: Path, content: bytes) -> Path:
    """Writes under a temporary name in the same folder, flushes to the disk, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def save_checkpoint(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """tensors and facts (JSON) into one file."""
    return write_bytes(path, save({k: v.detach().cpu().contiguous() for k, v in own_memory(tensors).items()}, {"json": json.dumps(facts)}))


def own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module that a model holds in several places gives one tensor several keys: the second and later ones become copies."""
    seen: set[int] = set()
    apart = {}
    for key, value in tensors.items():
        apart[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return apart


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        facts = json.loads((file.metadata() or {}).get("json", "null"))
        if facts is None:
            raise CheckpointError(f"{path}: no checkpoint of this library, it carries no JSON")
        return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118


def pick(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins with prefix, without it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
