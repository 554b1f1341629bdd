"""Weights out of whole modules that torch.save pickled (`.t7` files of published PyTorch code), without running anything in them.

The file is read by an unpickler that knows a closed list of names. Module classes become inert stand-ins that only keep their attributes,
tensors are notes of where their numbers lie; the state dict is rebuilt by walking the stand-ins. Both containers are read: the zip archive
of torch >= 1.6, and the older sequence of pickles followed by the numbers, with its persistent ids ('storage', ...) and ('module', class,
source file, source text), whose source text is ignored.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from quantlib.io.checkpoints import CheckpointError

FILE_LIMIT = 1 << 30  # bytes of a file
PICKLE_LIMIT = 1 << 26  # bytes of a pickle in a zip archive
MODULE_LIMIT = 10_000  # modules of a network
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MODULES = ("torch.nn.modules.", "torch.nn.backends.", "torch.nn.parallel.", "models.")
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

Attributes = dict[str, int | float | bool]


@dataclass
class _Storage:
    """Numbers of one dtype somewhere in the file; data is known once the pickle has been read."""

    key: str
    dtype: torch.dtype
    numel: int
    data: bytes | None = None


@dataclass
class _View:
    """A tensor: a strided view of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, label: str) -> Tensor:
        numbers = (self.offset, *self.size, *self.stride)
        whole = all(type(n) is int and n >= 0 for n in numbers) and len(self.size) == len(self.stride)
        count = math.prod(self.size) if whole else 0
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride)) if whole and count else 0
        data = self.storage.data
        if not whole or data is None or count > self.storage.numel or (count and last >= self.storage.numel):
            raise CheckpointError(f"{label}: a tensor of shape {self.size} does not lie inside its storage; the file is damaged")
        if not count:
            return torch.zeros(self.size, dtype=self.storage.dtype)
        return torch.frombuffer(bytearray(data), dtype=self.storage.dtype).as_strided(self.size, self.stride, self.offset).clone()


class _Function:
    """One of the few functions that the unpickler may call; nothing can be set on it."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it sets an attribute of a function")


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _View(storage, offset, tuple(size), tuple(stride))


def _same(value: Any, *_: Any) -> Any:
    return value


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Knows `_MODULES`, storages, and what tensors and dictionaries are rebuilt with; everything else is refused by name.

    The implementation in Python, because that in C sizes its memo by a number in the file.
    """

    def __init__(self, file: IO[bytes], label: str) -> None:
        super().__init__(file, encoding="utf-8")
        self.label = label
        self.storages: dict[str, _Storage] = {}
        self.classes: dict[str, type] = {}
        self.known: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
            "__builtin__.set": set,
            "torch.Size": _Function(_same),
            "torch._utils._rebuild_tensor": _Function(_view),
            "torch._utils._rebuild_tensor_v2": _Function(_view),
            "torch._utils._rebuild_parameter": _Function(_same),
            "torch.nn.parameter.Parameter": _Function(_same),
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self.known:
            return self.known[full]
        if module == "torch" and name in _DTYPES:
            return name
        if f"{module}.".startswith(_MODULES) and name.isidentifier():
            return self.classes.setdefault(full, type(name, (_StandIn,), {}))
        raise pickle.UnpicklingError(full)

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 2:
            raise pickle.UnpicklingError("a persistent id that torch.save does not write")
        if pid[0] == "module":
            return pid[1]
        if pid[0] != "storage" or len(pid) < 5 or pid[1] not in _DTYPES or type(pid[4]) is not int or pid[4] < 0:
            raise pickle.UnpicklingError("a persistent id that torch.save does not write")
        key, dtype = str(pid[2]), _DTYPES[pid[1]]
        made = self.storages.setdefault(key, _Storage(key, dtype, pid[4]))
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a view of a storage, which torch.save stopped writing before 0.4")
        return made


class _StandIn:
    """In the place of a module: keeps the attributes, computes nothing. Made anew for every file, so that no file changes another."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)})


def _unpickle(file: IO[bytes], label: str) -> tuple[Any, dict[str, _Storage]]:
    reader = _Unpickler(file, label)
    try:
        return reader.load(), reader.storages
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{label} is a pickle that holds more than plain tensors and modules ({error}). Unpickling it can run code, so it is refused. "
            "Where it was made, write the weights alone: torch.save(model.state_dict(), path), or a .safetensors file"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{label} cannot be read as a torch.save file: {error!r}") from None


def _from_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        (name,) = [n for n in members if n.endswith("/data.pkl") and n.count("/") == 1] or [""]
        if not name or members[name].file_size > PICKLE_LIMIT:
            raise CheckpointError(f"{path.name} is a zip archive without the data.pkl of torch.save, or with one of more than 64 MiB")
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise CheckpointError(f"{path.name} is a compressed archive; torch.save stores its members as they are")
        folder = name.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise CheckpointError(f"{path.name} was written on a big-endian machine; only little-endian numbers are read")
        content, storages = _unpickle(BytesIO(archive.read(name)), path.name)
        for storage in storages.values():
            member = f"{folder}data/{storage.key}"
            if member not in members or members[member].file_size < storage.numel * storage.dtype.itemsize:
                raise CheckpointError(f"{path.name}: the numbers of storage {storage.key} are missing; the file is damaged")
            storage.data = archive.read(member)
    return content


def _from_pickles(path: Path) -> Any:
    file = BytesIO(path.read_bytes())  # reads past its end give what there is, whatever length a damaged pickle states
    head = [_unpickle(file, path.name)[0] for _ in range(2)]
    system = _unpickle(file, path.name)[0]
    if head != [_MAGIC, _PROTOCOL] or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path.name} does not begin as torch.save files do")
    content, storages = _unpickle(file, path.name)
    order, _ = _unpickle(file, path.name)
    if not isinstance(order, list) or not {str(k) for k in order} >= set(storages):
        raise CheckpointError(f"{path.name}: the list of storages is not complete; the file is damaged")
    for key in order:
        storage = storages.get(str(key))
        count = int.from_bytes(file.read(8), "little", signed=True)
        if storage is None or count != storage.numel:
            raise CheckpointError(f"{path.name}: storage {key} has another size than its tensors say; the file is damaged")
        storage.data = file.read(count * storage.dtype.itemsize)
        if len(storage.data) != count * storage.dtype.itemsize:
            raise CheckpointError(f"{path.name} is cut short in storage {key}")
    return content


def _content(path: Path) -> Any:
    if path.stat().st_size > FILE_LIMIT:
        raise CheckpointError(f"{path.name} has {path.stat().st_size:,} bytes, more than the {FILE_LIMIT:,} that are read")
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        return _from_zip(path) if zipped else _from_pickles(path)
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path.name} cannot be read as a torch.save file: {error}") from None


def _network(content: Any, label: str) -> Any:
    """The module, or the mapping of tensors, that the file is about: the content itself or one entry of a training checkpoint."""

    def is_one(value: Any) -> bool:
        tensors = isinstance(value, Mapping) and bool(value) and all(isinstance(v, _View) for v in value.values())
        return tensors or isinstance(value, _StandIn)

    if not is_one(content):
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{label} holds a {type(content).__name__}, not a network")
        found = [key for key, value in content.items() if is_one(value)]
        if len(found) != 1:
            raise CheckpointError(f"{label} holds {len(found)} networks ({', '.join(map(str, found or list(content)[:8]))}), not one")
        content = content[found[0]]
    wrapped = isinstance(content, _StandIn) and type(content).__name__ in ("DataParallel", "DistributedDataParallel")
    return _named(content, "_modules").get("module", content) if wrapped else content


def _walk(network: Any, label: str) -> Iterator[tuple[str, _StandIn]]:
    """Every module with its dotted path and a dot behind it, the network itself first."""
    stack, count = [("", network)], 0
    while stack:
        prefix, module = stack.pop()
        if not isinstance(module, _StandIn):
            if module is not None:
                raise CheckpointError(f"{label}: {prefix[:-1]} is no module but a {type(module).__name__}")
            continue
        count += 1
        if count > MODULE_LIMIT or prefix.count(".") > 64:
            raise CheckpointError(f"{label} holds more than {MODULE_LIMIT:,} modules, or one inside itself")
        yield prefix, module
        stack += [(f"{prefix}{name}.", child) for name, child in reversed(list(_named(module, "_modules").items()))]


def _named(module: _StandIn, kind: str) -> Mapping[str, Any]:
    entries = vars(module).get(kind, {})
    return entries if isinstance(entries, Mapping) and all(isinstance(k, str) for k in entries) else {}


def read(path: str | Path) -> dict[str, Tensor]:
    """The state dict of the network in a file: of a pickled module, of a state dict, or of one of them inside a training checkpoint.

    Raises CheckpointError for names off the list (and says which), compressed or cut files, files above 1 GiB, tensors that reach
    beyond their numbers, and anything that torch.save does not write.
    """
    path = Path(path)
    network = _network(_content(path), path.name)
    if isinstance(network, Mapping):
        return {str(key): view.tensor(path.name) for key, view in network.items()}
    tensors = {}
    for prefix, module in _walk(network, path.name):
        hidden = vars(module).get("_non_persistent_buffers_set", set())
        for kind in ("_parameters", "_buffers"):
            for name, value in _named(module, kind).items():
                if isinstance(value, _View) and not (kind == "_buffers" and name in hidden):
                    tensors[prefix + name] = value.tensor(f"{path.name}: {prefix}{name}")
    return tensors


def attributes(path: str | Path) -> Attributes:
    """The plain numbers that modules of the file carry, by dotted path: `conv1.bit`, `layer1.0.quant_act1.act_bit`, `first_weight_bit`."""
    path = Path(path)
    network = _network(_content(path), path.name)
    if isinstance(network, Mapping):
        return {}
    return {
        prefix + name: value
        for prefix, module in _walk(network, path.name)
        for name, value in vars(module).items()
        if type(value) in (int, float, bool) and not name.startswith("_")
    }
