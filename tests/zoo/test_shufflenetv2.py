"""ShuffleNetV2 against the published code's recorded run, block by block with gradients, and against torchvision."""

import numpy as np
import pytest
import torch

import zoo
from zoo.shufflenetv2 import ShuffleBlock

NAME = "shufflenetv2_imagenet"


def near(ours, theirs, of_largest):
    assert np.abs(ours - theirs).max() <= of_largest * np.abs(theirs).max()


def test_recorded_run_of_the_published_model(shared):
    with np.load(shared / "golden/shufflenetv2_random.npz") as arrays:
        golden = dict(arrays)
    state = {k[3:]: v.astype(np.float32) for k, v in golden.items() if k.startswith("sd/")}
    model = zoo.load(zoo.get(NAME), state).eval()
    keys = {k: v.shape for k, v in model.state_dict().items() if "num_batches" not in k}
    assert keys == {k: v.shape for k, v in state.items()} and len(keys) == 282
    seen = {}
    for layer in (1, 2, 3):
        getattr(model, f"layer{layer}").register_forward_hook(lambda m, i, o, layer=layer: seen.__setitem__(layer, o))
    x = torch.from_numpy(golden["input"])
    with torch.no_grad():
        near(model(x.float())[0].numpy(), golden["out/full"], 2e-5)  # float32 sums in another order
        for layer in (1, 2, 3):
            near(seen[layer].numpy(), golden[f"mid/full/layer{layer}"], 2e-5)
        assert np.abs(model.double()(x.double())[0].numpy() - golden["out64/full"]).max() < 1e-9  # the reference data's own limit


@pytest.mark.parametrize("case", ["same", "down"])
def test_blocks_with_gradients(shared, case):
    with np.load(shared / "golden/diracdeltanet_ops.npz") as arrays:
        golden = {k.removeprefix(f"shuffleblock/{case}/"): v for k, v in arrays.items() if k.startswith(f"shuffleblock/{case}/")}
    block = ShuffleBlock(golden["x"].shape[1], golden["y"].shape[1], case == "down").eval()
    block.load_state_dict({k[3:]: torch.from_numpy(v) for k, v in golden.items() if k.startswith("sd/")}, strict=False)
    block = block.double()
    x = torch.from_numpy(golden["x"]).double().requires_grad_()
    y = block(x)
    assert np.abs(y.detach().numpy() - golden["y64"]).max() < 1e-9
    y.backward(torch.from_numpy(golden["gout"]).double())
    near(x.grad.numpy(), golden["grad_x"], 1e-5)  # recorded in float32
    gradients = {k[5:]: v for k, v in golden.items() if k.startswith("grad/")}
    assert {n for n, _ in block.named_parameters()} == set(gradients)
    for name, parameter in block.named_parameters():
        near(parameter.grad.numpy(), gradients[name], 1e-5)


def test_torchvision_is_the_same_network():
    from torchvision.models import shufflenet_v2_x1_0

    theirs = shufflenet_v2_x1_0(weights=None).eval()
    for key, value in theirs.state_dict().items():
        if "running_var" in key:
            value.uniform_(0.5, 2)
        elif "running_mean" in key:
            value.normal_()
    ours = zoo.load(zoo.get(NAME), theirs.state_dict()).eval().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs.double()(x), rtol=0, atol=1e-12)  # one mean over both axes, or over one after the other


def test_bits_are_refused_and_widths_explained():
    with pytest.raises(ValueError, match="never quantized.*diracdeltanet_imagenet"):
        zoo.get(NAME, weight_bits=4)
    with pytest.raises(ValueError, match="never quantized"):
        zoo.get(NAME, act_bits=8)
    with pytest.raises(ValueError, match="even"):
        zoo.get(NAME, base=7)
    with pytest.raises(zoo.CheckpointError, match="layer1.0.conv1.weight"):
        zoo.load(zoo.get(NAME, base=8), zoo.get(NAME, base=12).state_dict())
