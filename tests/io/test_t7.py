"""Pickled modules: look-alikes of the published files in both containers, and files that try to do harm."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from quantlib.io import t7
from quantlib.io.checkpoints import CheckpointError
from quantlib.layers import Shift2d
from zoo.diracdeltanet import options_of

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
OPTIONS = {"base": 8, "expansion": 1.5, "blocks": (2, 1), "features": 12, "num_classes": 5}
BITS = {"weight_bits": 4, "act_bits": 3, "first_weight_bits": 8, "first_act_bits": 7, "last_weight_bits": 6, "last_act_bits": 5,
        "fc_weight_bits": 2, "second_weight_bits": 16}  # fmt: skip
PLACES = {"conv1": 8, "conv2": 16, "conv3": 6, "linear": 2, "quant_act1": 7, "quant_act2": 3, "quant_act3": 5}


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Classes under the names of the published code."""
    module = types.ModuleType("models.diracdeltanet")
    names = "DiracDeltaNet DiracDeltaBlock QuantConv_init QuantLinear_init ActQuant_init ActQuant_init_fixed Shift3x3"
    for name in names.split():
        setattr(module, name, type(name, (nn.Module,), {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return vars(module)


def look_alike(model: nn.Module, theirs: dict[str, Any]) -> nn.Module:
    """The published module tree, with the published attribute and parameter names, around the tensors of one of our networks."""

    def made(kind: str, **attributes: Any) -> nn.Module:
        module = theirs[kind]()
        for name, value in attributes.items():
            setattr(module, name, value)
        return module

    def convert(module: nn.Module, path: str) -> nn.Module:
        place = path.rpartition(".")[2] if "layer" not in path else ""
        kind = type(module).__name__
        if kind == "TanhConv2d":
            return made("QuantConv_init", bit=PLACES.get(place, 4), weight=module.weight, stride=(1, 1), bias=None)
        if kind == "TanhLinear":
            return made("QuantLinear_init", bit=2, weight=module.weight, bias=module.bias)
        if kind == "DividedClip":
            return made("ActQuant_init", act_bit=PLACES.get(place, 3), scale_coef=module.scale_coef, fixed_rescale=module.output_range)
        if isinstance(module, Shift2d):
            return made("Shift3x3", kernel=nn.Parameter(module.kernel(), requires_grad=False))
        if isinstance(module, nn.BatchNorm2d):
            return module
        outer = theirs["DiracDeltaNet"]() if not path else nn.Sequential() if kind == "Sequential" else theirs["DiracDeltaBlock"]()
        for name, child in module.named_children():
            if type(child).__name__ not in ("ShiftShuffle", "Identity", "ReLU"):
                outer.add_module(name, convert(child, f"{path}.{name}".lstrip(".")))
        return outer

    network = convert(model, "")
    network.weight_bit, network.first_act_bit, network.expansion = 4, 7, 1.5  # type: ignore[assignment]
    return network


def trained() -> nn.Module:
    model = zoo.get("diracdeltanet_imagenet", **OPTIONS, **BITS)
    for value in model.state_dict().values():
        value.copy_(torch.rand_like(value.double()).to(value.dtype) + 0.5)
    return model


def checkpoint(module: nn.Module) -> dict[str, Any]:
    return {"net": module, "acc_1": 68.3, "acc_5": 88.1, "lr": 0.5, "epoch": 89, "weight_decay": 4e-5, "batch_size": 1024}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [checkpoint, lambda m: m, lambda m: checkpoint(nn.DataParallel(m))])
def test_a_published_file_is_read(tmp_path: Path, theirs: dict[str, Any], wrap: Any, zipped: bool) -> None:
    model, path = trained(), tmp_path / "DiracDeltaNet_quantized.t7"
    torch.save(wrap(look_alike(model, theirs)), path, _use_new_zipfile_serialization=zipped)
    assert {"layer1.0.shift2.kernel", "quant_act3.scale_coef", "layer2.0.shortcut.1.running_var"} <= set(t7.read(path))
    assert options_of(path) == OPTIONS | BITS
    loaded = zoo.load(zoo.get("diracdeltanet_imagenet", **OPTIONS, **BITS), path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_options_come_from_the_file(tmp_path: Path, theirs: dict[str, Any], zipped: bool) -> None:
    model, path = trained(), tmp_path / "w.t7"
    torch.save(checkpoint(look_alike(model, theirs)), path, _use_new_zipfile_serialization=zipped)
    assert options_of(path) == OPTIONS | BITS
    zoo.load(zoo.get("diracdeltanet_imagenet", **options_of(path)), path)
    said = t7.attributes(path)
    assert said["layer1.1.conv1.bit"] == 4 and said["quant_act1.fixed_rescale"] == 6.0 and said["weight_bit"] == 4
    with pytest.raises(CheckpointError, match=r"other widths, nothing was loaded; build it with base=8, .*blocks=\(2, 1\)"):
        zoo.load(zoo.get("diracdeltanet_imagenet", num_classes=5, features=12), path)


def test_files_of_torch_0_4_have_no_batch_counters(tmp_path: Path, theirs: dict[str, Any]) -> None:
    model, path = trained(), tmp_path / "w.t7"
    module = look_alike(model, theirs)
    for m in module.modules():
        m._buffers.pop("num_batches_tracked", None)
    torch.save(checkpoint(module), path, _use_new_zipfile_serialization=False)
    assert not [k for k in t7.read(path) if "num_batches" in k]
    loaded = zoo.load(zoo.get("diracdeltanet_imagenet", **OPTIONS), path).state_dict()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.items() if "num_batches" not in k)


def test_another_shift_is_refused(tmp_path: Path, theirs: dict[str, Any]) -> None:
    module = look_alike(trained(), theirs)
    module.shift1.kernel.data = module.shift1.kernel.data.flip(2)  # type: ignore[union-attr]
    torch.save(module, tmp_path / "w.t7")
    with pytest.raises(CheckpointError, match="shift1.kernel is not the shift of DiracDeltaNet"):
        zoo.load(zoo.get("diracdeltanet_imagenet", **OPTIONS), tmp_path / "w.t7")


def test_mixed_bits_and_other_networks_are_refused(tmp_path: Path, theirs: dict[str, Any]) -> None:
    module = look_alike(trained(), theirs)
    module.layer1[1].conv3.bit = 5  # type: ignore[index, union-attr]
    torch.save(module, tmp_path / "mixed.t7")
    with pytest.raises(CheckpointError, match=r"'weight_bits': \[4, 5\]"):
        options_of(tmp_path / "mixed.t7")
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "other.t7")
    with pytest.raises(CheckpointError, match="holds no DiracDeltaNet"):
        options_of(tmp_path / "other.t7")


def test_old_files_carry_source_text_and_strided_tensors(tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    module.weight = nn.Parameter(torch.arange(12.0).reshape(4, 3).t())
    module.register_buffer("some", torch.arange(12.0).half()[3:7])
    module.register_buffer("hidden", torch.zeros(2), persistent=False)
    torch.save(module, tmp_path / "old.t7", _use_new_zipfile_serialization=False)
    assert b"class Linear(Module)" in (tmp_path / "old.t7").read_bytes()  # ('module', class, file, source text)
    tensors = t7.read(tmp_path / "old.t7")
    assert torch.equal(tensors["weight"], torch.arange(12.0).reshape(4, 3).t()) and tensors["weight"].dtype is torch.float32
    assert tensors["some"].tolist() == [3, 4, 5, 6] and set(tensors) == {"weight", "bias", "some"}


# ---------------------------------------------------------------- harm


class Runs:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


HARMFUL = {
    "posix.system|nt.system": lambda: Runs(os.system, "echo never"),
    "builtins.eval|__builtin__.eval": lambda: Runs(eval, "print('never')"),
    "builtins.getattr|__builtin__.getattr": lambda: Runs(getattr, collections.OrderedDict, "fromkeys"),
    "torch.load|torch.serialization.load": lambda: Runs(torch.load, "x"),
    "io.open|_io.open|builtins.open": lambda: Runs(open, "never", "w"),
    "torch.nn.init.constant_": lambda: Runs(nn.init.constant_, 1, 2),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("names", HARMFUL)
def test_code_is_refused_by_name_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], names: str, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"net": nn.Linear(2, 2), "x": HARMFUL[names]()}, tmp_path / "w.t7", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="more than plain tensors") as error:
        t7.read(tmp_path / "w.t7")
    assert any(f"({name})" in str(error.value) for name in names.split("|")), str(error.value)
    assert "never" not in "".join(capfd.readouterr()) and sorted(os.listdir(tmp_path)) == ["w.t7"]


def zip_of(path: Path, data: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"a/data/{name[1:]}", content)
    return path


def tensor_pickle(numel: Any, offset: Any, size: Any, stride: Any) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if obj == "S" else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(
        {"w": Runs(torch._utils._rebuild_tensor_v2, "S", offset, size, stride, False, collections.OrderedDict())}
    )
    return stream.getvalue()


def test_tensors_stay_inside_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "w.t7"
    good = zip_of(path, tensor_pickle(4, 1, (3,), (1,)), _0=struct.pack("<4f", 1, 2, 3, 4))
    assert t7.read(good)["w"].tolist() == [2, 3, 4]
    for numel, offset, size, stride in [(4, 2, (3,), (1,)), (4, -1, (2,), (1,)), (4, 0, (1 << 40,), (0,)), (4, 0, (2,), (-1,)),
                                        (4, 0, (2, 2), (1,)), (4, 0, (2.0,), (1,)), (4, 0, (True,), (1,))]:  # fmt: skip
        zip_of(path, tensor_pickle(numel, offset, size, stride), _0=struct.pack("<4f", 1, 2, 3, 4))
        with pytest.raises(CheckpointError, match="does not lie inside its storage"):
            t7.read(path)
    zip_of(path, tensor_pickle(5, 0, (5,), (1,)), _0=struct.pack("<4f", 1, 2, 3, 4))
    with pytest.raises(CheckpointError, match="numbers of storage 0 are missing"):
        t7.read(path)
    zip_of(path, tensor_pickle(-5, 0, (5,), (1,)))
    with pytest.raises(CheckpointError, match="persistent id"):
        t7.read(path)


def test_pickles_that_are_bombs_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.t7"
    memo = b"\x80\x02}r\xff\xff\xff\x7f."  # a memo entry of number 2^31: the C unpickler would allocate 32 GB
    zip_of(path, memo)
    with pytest.raises(CheckpointError, match="0 networks"):
        t7.read(path)
    for data in (b"", b"\x80\x02", b"\x80\x02X\xff\xff\xff\x7f", b"not a pickle", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00echo\x85R."):
        zip_of(path, data)
        with pytest.raises(CheckpointError, match="w.t7"):
            t7.read(path)
    path.write_bytes(pickle.dumps(t7._MAGIC, 2) + b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0fabc.")  # states 2^60 bytes
    with pytest.raises(CheckpointError, match="cannot be read|holds more than"):
        t7.read(path)
    itself = nn.Sequential()
    itself._modules["0"] = itself
    torch.save(itself, path)
    with pytest.raises(CheckpointError, match="one inside itself"):
        t7.read(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}." + b"0" * 100_000)
    with pytest.raises(CheckpointError, match="compressed archive"):
        t7.read(path)
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for cut in range(1, len(whole), 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            zoo.load(nn.Linear(2, 2), path)
    monkeypatch.setattr(t7, "FILE_LIMIT", 100)
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="more than the 100 that are read"):
        t7.read(path)


def test_one_file_cannot_change_how_the_next_is_read(tmp_path: Path) -> None:
    """Setting attributes on what the unpickler hands out: refused on functions, and stand-ins are made anew for every file."""
    path = tmp_path / "w.t7"
    on_function = b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}X\x05\x00\x00\x00_callK\x01s\x86b."
    zip_of(path, on_function)
    with pytest.raises(CheckpointError):
        t7.read(path)
    on_class = b"\x80\x02ctorch.nn.modules.linear\nLinear\nN}X\x0c\x00\x00\x00__setstate__K\x01s\x86b."
    zip_of(path, on_class)
    with pytest.raises(CheckpointError):
        t7.read(path)
    backend = b"\x80\x02ctorch.nn.backends.thnn\n_get_thnn_function_backend\n)R."  # in files of torch 0.4
    zip_of(path, backend)
    assert t7.read(path) == {}
    torch.save(nn.Linear(2, 3), path)
    assert {k: tuple(v.shape) for k, v in t7.read(path).items()} == {"weight": (3, 2), "bias": (3,)}


def test_state_dicts_in_t7_files_still_load(tmp_path: Path) -> None:
    source: dict[str, Tensor] = nn.Linear(2, 3).state_dict()
    for zipped in (True, False):
        torch.save({"net": source, "epoch": 3}, tmp_path / "w.t7", _use_new_zipfile_serialization=zipped)
        loaded = zoo.load(nn.Linear(2, 3), tmp_path / "w.t7")
        assert torch.equal(loaded.weight, source["weight"])  # type: ignore[arg-type]
