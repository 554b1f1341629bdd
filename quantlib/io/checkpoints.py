"""Reads weights from foreign files without running what is in them, and copies them into a model completely or not at all."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Source = str | os.PathLike[str] | Mapping[str, Any]
_SHOWN = 8


class CheckpointError(ValueError):
    """A file that is unsafe or unreadable, or weights that do not fit the model; the model is untouched."""


def load(model: nn.Module, source: Source) -> nn.Module:
    """Copies the weights of `source` into `model` and returns it.

    source: a path (.pt .pth .pth.tar .ckpt .t7 .npz .safetensors .h) or a mapping key -> array. A `module.` prefix is removed, and a
    model with a method `translate_checkpoint(tensors) -> tensors` recognises its authors' layouts. Strict: CheckpointError shows missing,
    extra and misshapen keys and values that are not finite; everything is checked before the first value is copied. UserWarning where keys
    of one shared tensor hold different values.
    """
    label = "the mapping" if isinstance(source, Mapping) else Path(source).name
    tensors = _without_prefix(read(source))
    translate = getattr(model, "translate_checkpoint", None)
    if translate is not None:
        tensors = translate(tensors)
    _check_values(tensors, label)
    _check_fit(model, tensors, label)
    _warn_of_disagreement(model.state_dict(), tensors, label)
    model.load_state_dict(tensors)
    return model


def read(source: Source) -> Tensors:
    """The tensors of a file or a mapping, by their own keys, on the CPU. CheckpointError on anything but plain tensors."""
    if isinstance(source, Mapping):
        if any(isinstance(value, Mapping) for value in source.values()):
            return _state_dict(source, "the mapping")
        return {str(key): _tensor(key, value) for key, value in source.items()}
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    name = path.name.lower()
    for ending, reader in _READERS.items():
        if name.endswith(ending):
            return reader(path)
    raise CheckpointError(f"{path.name}: unknown ending; readable are {' '.join(_READERS)}")


def _tensor(key: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise CheckpointError(f"{key} holds {array.dtype}, not numbers")
    return torch.from_numpy(np.array(array))


def _read_torch(path: Path) -> Tensors:
    return _state_dict(torch_content(path), path.name)


def torch_content(path: Path) -> Any:
    """What a torch.save file holds, on the CPU: tensors, numbers, text and containers of them. CheckpointError on anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "it is not a torch.save file"
        )
        raise CheckpointError(
            f"{path.name} is a pickle that holds more than plain tensors ({reason}). Unpickling it can run code, so it is refused. "
            "Where it was made, write the weights alone: torch.save(model.state_dict(), path), or a .safetensors file"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path.name} cannot be read as a torch.save file: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None


def _is_torch_file(path: Path) -> bool:
    """A zip archive, or a pickle of protocol 2: the two things torch.save has ever written."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _state_dict(content: Any, label: str) -> Tensors:
    """The state dict itself, or the only one inside a training checkpoint such as {"state_dict": ..., "epoch": 7}.

    Lists of integers under "model_params" are facts about the model, such as its bits: tensors "model_params.<name>" for its
    translate_checkpoint to compare.
    """

    def is_state(value: Any) -> bool:
        return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())

    if is_state(content):
        return {str(key): value for key, value in content.items()}
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{label} holds a {type(content).__name__}, not a state dict")
    inner = [key for key, value in content.items() if is_state(value)]
    if len(inner) != 1:
        found = f"{len(inner)} state dicts ({', '.join(map(str, inner))}); pass one of them as a mapping" if inner else "no state dict"
        raise CheckpointError(f"{label} holds {found}; its keys are {', '.join(map(str, list(content)[:_SHOWN]))}")
    return {str(key): value for key, value in content[inner[0]].items()} | _model_params(content.get("model_params"))


def _model_params(params: Any) -> Tensors:
    if not isinstance(params, Mapping):
        return {}
    lists = {key: value for key, value in params.items() if isinstance(value, list) and value and all(isinstance(v, int) for v in value)}
    return {f"model_params.{key}": torch.tensor(value) for key, value in lists.items()}


def _read_npz(path: Path) -> Tensors:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: _tensor(key, archive[key]) for key in archive.files}
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from None
    except Exception as error:  # damaged archives raise many kinds
        refused = "Object arrays" in str(error) or "pickled" in str(error)
        reason = "it holds pickled objects, and unpickling can run code" if refused else str(error)
        raise CheckpointError(f"{path.name} is refused: {reason}") from None


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None


def _read_t7(path: Path) -> Tensors:
    from quantlib.io.t7 import read as read_t7  # lazily: it raises this file's CheckpointError

    if not _is_torch_file(path):
        raise CheckpointError(f"{path.name} is a Lua Torch7 file; only what torch.save wrote can be read")
    return read_t7(path)


def _read_header(path: Path) -> Tensors:
    from quantlib.io.fracbnn_header import read as read_header  # lazily: it raises this file's CheckpointError

    return read_header(path)


_READERS: dict[str, Callable[[Path], Tensors]] = {
    **dict.fromkeys((".pt", ".pth", ".pth.tar", ".ckpt"), _read_torch),
    ".t7": _read_t7,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".h": _read_header,
}


def _without_prefix(tensors: Tensors) -> Tensors:
    for prefix in ("_orig_mod.", "module."):
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key[len(prefix) :]: value for key, value in tensors.items()}
    return tensors


def _check_values(tensors: Tensors, label: str) -> None:
    for key, value in tensors.items():
        bad = int((~torch.isfinite(value)).sum()) if value.is_floating_point() else 0
        if bad:
            raise CheckpointError(f"{label}: {key} holds {bad} of {value.numel()} values that are NaN or infinite; nothing was loaded")


def _check_fit(model: nn.Module, tensors: Tensors, label: str) -> None:
    """Compares keys, shapes and kinds, then tries the weights on a copy, whose layers may know keys that the fresh state dict lacks."""
    own = model.state_dict()
    wrong = {
        key: f"checkpoint {tuple(tensors[key].shape)}, model {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    }
    wrong |= {
        key: f"checkpoint {tensors[key].dtype}, model {own[key].dtype}"
        for key in own
        if key in tensors and key not in wrong and tensors[key].is_floating_point() and not own[key].is_floating_point()
    }
    fitting = {key: value for key, value in tensors.items() if key not in wrong}
    try:
        result = copy.deepcopy(model).load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{label} does not fit {type(model).__name__}; nothing was loaded.\n{error}") from None
    missing = [key for key in result.missing_keys if key not in wrong]
    extra = list(result.unexpected_keys)
    if not (wrong or missing or extra):
        return
    near = {key: get_close_matches(key, extra, n=1, cutoff=0.8) for key in missing[:_SHOWN]}
    lines = [f"{label} does not fit {type(model).__name__} ({len(own)} entries expected, {len(tensors)} found); nothing was loaded."]
    lines += _listed(
        "missing", [f"{k} {tuple(own[k].shape) if k in own else ''}" + (f"  (near: {near[k][0]})" if near.get(k) else "") for k in missing]
    )
    lines += _listed("extra", [f"{k} {tuple(tensors[k].shape)}" for k in extra])
    lines += _listed("misfit", [f"{k}: {text}" for k, text in wrong.items()])
    raise CheckpointError("\n".join(lines))


def _warn_of_disagreement(own: Tensors, tensors: Tensors, label: str) -> None:
    """UserWarning where keys of one tensor, of a module used in several places, hold different values: one of them is not what counts."""
    first: dict[tuple[int, torch.Size], str] = {}
    differing = []
    for key in (key for key, value in own.items() if key in tensors and value.numel()):
        same = first.setdefault((own[key].data_ptr(), own[key].shape), key)
        if not torch.equal(tensors[same], tensors[key].to(tensors[same].dtype)):
            differing.append(f"{key} is {same}")
    if differing:
        lines = [f"{label} holds different values for keys that are one tensor of the model, and the last one counts:"]
        warnings.warn("\n".join(lines + _listed("disagree", differing)), stacklevel=3)


def _listed(title: str, rows: list[str]) -> list[str]:
    if not rows:
        return []
    more = [f"    and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    return [f"  {title} {len(rows)}:", *(f"    {row.rstrip()}" for row in rows[:_SHOWN]), *more]
