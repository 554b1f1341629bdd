"""FracBNN for ImageNet against the published code: recorded activations and logits; and its integer networks, narrow and whole."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib.layers import FixedPoint
from zoo.fracbnn_imagenet import GRID, MEAN, STD, NormalisedThermometerEncoder

NAME = "fracbnn_imagenet"
ACCELERATOR_GRID = FixedPoint(bits=13, fraction=4)


def random_state(model: nn.Module, seed: int = 1) -> nn.Module:
    """Statistics, slopes and scales of both signs, thresholds that open about half of the gates."""
    torch.manual_seed(seed)
    for key, value in model.state_dict().items():
        if "running_var" in key:
            value.copy_(0.5 + value.numel() ** 0.5 * torch.rand_like(value))
        elif value.is_floating_point() and not key.startswith("img_"):
            value.add_(0.3 * torch.randn_like(value))
    return model.eval()


def narrow(seed: int = 1, **options) -> nn.Module:
    return random_state(zoo.get(NAME, **{"fixed_point": GRID, "width": 1 / 16, "num_classes": 10, **options}), seed)


def pixels(count: int, size: int, seed: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalised(v: Tensor) -> Tensor:
    """A loader's arithmetic in float32: to [0, 1], subtract the mean, divide by the deviation."""
    mean, std = (torch.tensor(c).reshape(3, 1, 1) for c in (MEAN, STD))
    return v.float().div(255).sub(mean).div(std)


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden/fracbnn_imagenet_random.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def golden_pixels(golden):
    return torch.from_numpy(np.ascontiguousarray(golden["image_u8"].transpose(0, 3, 1, 2)))


# ---------------------------------------------------------------- the published arithmetic


def test_recorded_run_of_the_published_model(golden, golden_pixels):
    model = zoo.load(zoo.get(NAME), golden).eval()
    published = {k: golden[k].shape for k in golden if k.startswith(("model.", "fc.", "img_"))}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == published and len(published) == 400
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    with torch.no_grad():
        y = model(torch.from_numpy(golden["input"])).numpy()
    np.testing.assert_allclose(y, golden["output"], atol=1e-4, rtol=0)  # the tolerance that the reference data states
    for block in range(14):
        key = f"probe/model.{block}"  # float32 sums of the same terms in another order
        np.testing.assert_allclose(seen[key[6:]][0].flatten()[::61].numpy(), golden[key], atol=1e-5, rtol=0, err_msg=key)
    bits = seen["encoder"].reshape(3, 32, 224, 224)
    assert np.array_equal((bits > 0).sum(1).numpy(), golden["probe/encoder_level"])
    gated = [m for m in model.modules() if hasattr(m, "num_high")]
    assert [float(m.num_high) / m.num_out for m in gated] == golden["mask_density"].tolist()
    assert torch.equal(normalised(golden_pixels), torch.from_numpy(golden["input"]))
    with torch.no_grad():
        assert np.array_equal(model(golden_pixels).numpy(), y)  # uint8 pixels are normalised inside

    weights = {n: p.numel() for n, p in model.named_parameters()}
    binary = sum(size for n, size in weights.items() if n.endswith("0.weight"))
    macs = {
        n: seen[n].numel() * m.weight[0].numel() for n, m in model.named_modules() if getattr(m, "weight", torch.empty(0)).dim() in (2, 4)
    }
    assert sum(weights.values()) == 29_393_192 == zoo.card(NAME).parameters
    assert binary == 28_280_832 and sum(s for n, s in weights.items() if n.endswith("threshold")) == 10_912
    assert sum(macs.values()) == 5_164_736_512 == zoo.card(NAME).macs
    assert macs["model.0.0"] == 346_816_512 and macs["fc"] == 1_024_000
    assert sum(m.num_out for m in gated) == 4_641_280


@pytest.mark.parametrize("options", [{"fixed_point": GRID}, {"real_weights": True}, {"num_classes": 7}])
def test_options_keep_the_keys(options):
    keys = set(zoo.get(NAME, width=1 / 32).state_dict())
    assert set(zoo.get(NAME, width=1 / 32, **options).state_dict()) == keys and len(keys) == 400


def test_published_checkpoints_lose_placeholder_teacher_and_prefix(tmp_path):
    model = narrow(fixed_point=None)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    state |= {"module.encoder.placeholder": torch.zeros(1, 3, 32, 8, 8), "module.teacher.layer1.0.conv1.weight": torch.zeros(2, 2, 1, 1)}
    torch.save(state, tmp_path / "model_binput-pg-quant-shortcut-finetune.pt")
    copy = zoo.load(zoo.get(NAME, width=1 / 16, num_classes=10), tmp_path / "model_binput-pg-quant-shortcut-finetune.pt")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in copy.state_dict().items())
    del state["module.model.3.pointwise.0.threshold"]
    with pytest.raises(zoo.CheckpointError, match=r"missing 1:\n    model.3.pointwise.0.threshold"):
        zoo.load(zoo.get(NAME, width=1 / 16, num_classes=10), state)


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="10-bit sums wrap"):
        zoo.get(NAME, fixed_point="authors")
    for width in (0.01, 0, -1):
        with pytest.raises(ValueError, match="must be a whole number"):
            zoo.get(NAME, width=width)


def test_the_first_training_step_reaches_every_parameter():
    model = zoo.get(NAME, real_weights=True, width=1 / 8, num_classes=5)
    model(normalised(pixels(4, 64))).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------- pixels and normalised images


class Encoded(nn.Module):
    """The encoder alone, as a network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1))
        self.encoder = NormalisedThermometerEncoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, self.mean, self.std)


def test_levels_of_all_pixels():
    """In numpy float32. Normalising moves some ties: red 4, 12, 28 and 44 among them."""
    v = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    v32, mean, std = np.arange(256, dtype=np.float32), *(np.array(c, dtype=np.float32)[:, None] for c in (MEAN, STD))
    back = (v32 / np.float32(255) - mean) / std * std + mean
    levels = np.clip(np.rint(back * np.float32(255) / np.float32(8)), 0, 32)
    got = (Encoded()(v).reshape(3, 32, 256) > 0).sum(1).numpy()
    assert np.array_equal(got, levels)
    moved = np.flatnonzero(levels[0] != np.rint(np.arange(256) / 8))
    assert {4, 12, 28, 44} <= set(moved.tolist()) and all(n % 8 == 4 for n in moved) and 4 <= len(moved) <= 5


def test_integers_of_the_encoder_take_pixels_and_any_float():
    model = Encoded()
    graph = ql.convert(model, (3, 16, 16))
    assert (graph.input.type.lo, graph.input.type.hi) == (0, 255)
    v = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    assert torch.equal(ql.run(graph, v), model(v)) and torch.equal(ql.run(graph, normalised(v)), model(v))
    assert graph.front is not None
    edges = torch.from_numpy(np.resize(graph.front.thresholds, (3, 256)))  # the least float of every pixel but 0, and the one below
    for x in (edges, torch.nextafter(edges, torch.tensor(-torch.inf)), 3 * torch.randn(3, 256), torch.tensor([-1e30, 1e30]).repeat(3, 128)):
        x = x.reshape(1, 3, 16, 16)
        assert torch.equal(ql.run(graph, x), model(x))
    check = ql.verify(model, graph, v)
    assert check.ok, str(check)


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize("grid,seed", [(GRID, 3), (ACCELERATOR_GRID, 4), (FixedPoint(16, 8, rounding="half_even"), 5)])
def test_every_code_of_a_narrow_network(grid, seed):
    model = narrow(seed, fixed_point=grid)
    graph = ql.convert(model, (3, 64, 64))
    for x in (pixels(2, 64), torch.randn(2, 3, 64, 64)):
        check = ql.verify(model, graph, x)
        assert check.ok, str(check)
        assert check.codes > 500_000
    assert torch.equal(ql.run(graph, normalised(pixels(2, 64))), ql.run(graph, pixels(2, 64)))


def test_every_sum_is_an_integer_sum():
    graph = ql.convert(narrow(), (3, 64, 64))
    kinds = [type(node.op).__name__ for node in graph]
    assert kinds.count("Add") == 26 == kinds.count("FractionalConv2d") and not {"Join", "AffineJoin", "Lut"} & set(kinds)
    for node in graph:
        if type(node.op).__name__ == "Add":
            assert float(node.type.scale) == 2.0**-GRID.fraction and node.type.bits <= GRID.bits + 1
            readers = {type(r.op).__name__ for r in graph.consumers[node.name]}  # the next two signs, or the average's grid
            assert readers in ({"Threshold"}, {"Requant"})


def test_compiled_cpp_of_a_narrow_network(tmp_path):
    model = narrow(7, fixed_point=ACCELERATOR_GRID)
    graph = ql.convert(model, (3, 32, 32))
    x = pixels(2, 32)
    hls = ql.export(graph, tmp_path / "hls", part="xczu3eg")
    ours, theirs = ql.run(graph, x, integers=True), hls.csim(x, integers=True)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[edge], theirs[edge]) for edge in ours)
    assert torch.equal(hls.csim(normalised(x)), ql.run(graph, x))


def test_an_image_whose_grid_the_user_states():
    """Normalised images on a grid of the user's own, one scale for all colours."""
    model = Encoded()
    graph = ql.convert(model, (3, 32, 32), input=ql.Grid(-128, 127, 1 / 48))
    n = torch.randint(-128, 128, (2, 3, 32, 32))
    real = n.double() * (1 / 48)
    assert torch.equal(ql.run(graph, n), model(real).float()) and torch.equal(ql.run(graph, real), model(real).float())


def test_without_a_grid_the_last_average_has_no_integers():
    with pytest.raises(ql.ConversionError, match="FixedPoint"):
        ql.convert(narrow(fixed_point=None, width=1 / 32), (3, 32, 32))
    with pytest.raises(ql.ConversionError, match="real_weights"):
        ql.convert(narrow(real_weights=True, width=1 / 32), (3, 32, 32))


@pytest.mark.slow
def test_the_whole_network_on_a_full_image(golden, golden_pixels, tmp_path):
    """28 M binary weights, 224 x 224: every code of two images, and the C++ on the recorded one."""
    model = zoo.load(zoo.get(NAME, fixed_point=GRID), golden).eval()
    graph = ql.convert(model, (3, 224, 224))
    for x in (golden_pixels, torch.from_numpy(golden["input"]) + 0.1):
        check = ql.verify(model, graph, x)
        assert check.ok, str(check)
        assert check.codes > 30_000_000
    hls = ql.export(graph, tmp_path / "hls", part="xczu3eg")
    ours, theirs = ql.run(graph, golden_pixels, integers=True), hls.csim(golden_pixels, integers=True)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[edge], theirs[edge]) for edge in ours)
    assert torch.equal(hls.csim(torch.from_numpy(golden["input"])), ql.run(graph, golden_pixels))
