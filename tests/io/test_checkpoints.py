"""Foreign weights: every format, and everything that must be refused with the model left as it was."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from quantlib.io.checkpoints import CheckpointError, load, read


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.bn = nn.BatchNorm2d(3)


def source_net() -> Net:
    torch.manual_seed(7)
    net = Net()
    with torch.no_grad():
        for value in net.state_dict().values():
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.tensor(5))
    return net


def arrays() -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in source_net().state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("ending", [".pt", ".pth", ".pth.tar", ".t7", ".ckpt"])
@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3, "best": 0.5}, lambda s: {"net": s, "optimizer": {"a": 1}}]
)
def test_torch_files(tmp_path, ending, wrap):
    path = tmp_path / f"w{ending}"
    torch.save(wrap(source_net().state_dict()), path)
    assert same(load(Net(), path), source_net())


def test_npz_safetensors_mapping(tmp_path):
    from safetensors.torch import save_file

    np.savez(tmp_path / "w.npz", **arrays())
    save_file(source_net().state_dict(), tmp_path / "w.safetensors")
    for source in (tmp_path / "w.npz", tmp_path / "w.safetensors", str(tmp_path / "w.npz"), arrays(), source_net().state_dict()):
        assert same(load(Net(), source), source_net())


def test_half_precision_arrays_are_widened():
    half = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in arrays().items()}
    assert torch.equal(load(Net(), half).conv.weight, source_net().conv.weight.half().float())


def test_module_prefix_is_removed():
    assert same(load(Net(), {f"module.{k}": v for k, v in arrays().items()}), source_net())


def test_c_header(tmp_path):
    path = tmp_path / "w.h"
    path.write_text(
        "// weights\n#include <x>\n"
        "const float a_weight[2][3] = {{1, -2.5e-1f, 3.}, {4, 5, /* six */ 6}};\nfloat none[1] = {};\nint n[2]={7,8};\n"
    )
    tensors = read(path)
    assert (
        tensors["a_weight"].tolist() == [[1, -0.25, 3], [4, 5, 6]] and tensors["n"].tolist() == [7, 8] and set(tensors) == {"a_weight", "n"}
    )
    path.write_text("float a[2][3] = {1, 2, 3};")
    with pytest.raises(CheckpointError, match=r"a\[2\]\[3\] lists 3 values, its shape needs 6"):
        read(path)


def refused(source, *parts: str) -> None:
    net = source_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load(net, source)
    for part in parts:
        assert part in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_missing_extra_and_misshapen_keys_are_all_shown():
    state = {k: v + 1 for k, v in arrays().items()}
    state["conv.wieght"] = state.pop("conv.weight")
    state["bn.bias"] = np.zeros(4, np.float32)
    refused(
        state,
        "missing 1",
        "conv.weight (3, 2, 1, 1)  (near: conv.wieght)",
        "extra 1",
        "bn.bias: checkpoint (4,), model (3,)",
        "nothing was loaded",
    )


def test_real_values_do_not_enter_an_integer_buffer():
    refused({**arrays(), "bn.num_batches_tracked": np.array(1.5)}, "bn.num_batches_tracked: checkpoint torch.float64, model torch.int64")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(bad):
    state = {k: v + 1 for k, v in arrays().items()}
    state["bn.weight"][1] = bad
    refused(state, "bn.weight holds 1 of 3 values that are NaN or infinite")


class Trap:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("ending", [".pt", ".t7", ".pth"])
def test_a_pickle_with_code_is_refused(tmp_path, ending, capsys):
    path = tmp_path / f"w{ending}"
    torch.save({"conv.weight": torch.zeros(1), "x": Trap()}, path)
    refused(path, "more than plain tensors", "torch.save(model.state_dict(), path)")
    path.write_bytes(pickle.dumps(Trap(), protocol=2))
    refused(path, "refused")
    assert "never" not in capsys.readouterr().out


def test_a_whole_module_is_refused(tmp_path):
    torch.save(source_net(), tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "more than plain tensors")


def test_object_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", **{"conv.weight": np.array([Trap()], dtype=object)})
    refused(tmp_path / "w.npz", "pickled objects")


def test_files_that_are_something_else(tmp_path):
    refused(tmp_path / "none.pt", "no file")
    for name, content, part in [
        ("w.pt", b"hello", "torch.save file"),
        ("w.t7", b"\x04\x00\x00\x00\x01\x00\x00\x00", "Lua Torch7"),
        ("w.npz", b"PK\x03\x04 cut", "w.npz"),
        ("w.safetensors", b"xx", "w.safetensors"),
        ("w.onnx", b"", "unknown ending"),
        ("w.h", b"int x = 3;", "no array"),
    ]:
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, part)
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "list")
    torch.save({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.zeros(1)}}, tmp_path / "two.pt")
    refused(tmp_path / "two.pt", "2 state dicts (model, ema)")
    refused({"conv.weight": np.array(["a"])}, "not numbers")


def test_the_zoo_offers_the_same_load():
    assert zoo.load is load and zoo.CheckpointError is CheckpointError
