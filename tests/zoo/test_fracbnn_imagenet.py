"""FracBNN for ImageNet against the published code: recorded activations and logits; and its integer networks, narrow and whole."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib.layers import FixedPoint
from zoo import _fracbnn_imagenet_datapath as datapath
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


@pytest.mark.parametrize("options", [{"fixed_point": GRID}, {"fixed_point": "authors"}, {"real_weights": True}, {"num_classes": 7}])
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
    with pytest.raises(ValueError, match="give None, 'authors' or a FixedPoint"):
        zoo.get(NAME, fixed_point="author")
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


@pytest.mark.parametrize("grid,seed", [(ACCELERATOR_GRID, 4), (FixedPoint(16, 8, rounding="half_even"), 5)])
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
    """The accelerator's datapath; tests/test_every_network.py does the same with a grid."""
    model = narrow(7, fixed_point="authors", num_classes=0)
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


# ---------------------------------------------------------------- the accelerator's datapath

# One row per case: M, L; threshold, bn weight and bias, shift_x, shift_y, prelu, second bn weight and bias in units of 1/256; shortcut
# code; then what these steps give in C++ with the types ap_fixed<13,9>, <14,6>, <10,2> and <6,4> of the open ap_types headers: merged
# sum, sum with the shortcut and output in units of 1/16, its 2- and 4-bit codes, the first convolution's normalised M; and four 4-bit
# codes with the code of their average.
AP_FIXED = np.array(
    [
        (-182, 9, 7972, 55, 171, 211, -502, -217, -47, 370, 0, -1945, 287, -30, 0, 0, -615, 8, 6, 11, 1, 7),
        (62, 249, 3768, -26, -23, 483, 391, -106, 37, -204, 13, 1986, 108, 3, 2, 9, -102, 11, 1, 13, 1, 7),
        (-24, 42, -5791, -22, 198, 104, -521, -153, -129, -260, 9, -33, -8, -12, 0, 2, 45, 6, 1, 3, 9, 5),
        (167, 144, 4665, 185, -367, -311, 704, -142, 9, -430, 15, 2550, 1861, 39, 3, 15, 1908, 0, 10, 12, 0, 6),
        (-35, -31, 8191, -35, 151, 104, -296, 217, -116, 269, 10, -374, 55, -8, 1, 4, 86, 8, 2, 3, 10, 6),
        (-409, 171, -7217, 13, 216, -564, 454, -253, 62, -604, 9, -2736, 189, 8, 2, 11, -194, 15, 9, 11, 9, 11),
        (127, -198, 1541, 200, -284, -315, -62, -146, 80, -504, 6, 305, 194, 29, 3, 15, 1570, 9, 12, 3, 9, 8),
        (331, -51, 7853, -9, -176, 712, -101, -177, -118, 507, 15, 2464, 47, 10, 2, 12, -155, 4, 8, 14, 14, 10),
        (478, -15, -8192, 18, -229, -362, -757, -81, -110, 690, 5, 2655, 97, 1, 2, 8, 274, 13, 4, 14, 9, 10),
        (216, 8, 5367, 5, -118, -752, -397, 95, 127, 264, 14, 2352, -14, 10, 2, 12, 60, 9, 2, 8, 0, 5),
        (27, -139, 3674, 85, 74, -543, -194, 94, -92, -639, 0, -449, -93, -7, 1, 4, 148, 12, 6, 11, 15, 11),
        (106, 4, 8191, 56, 105, -765, 541, -94, -43, 446, 15, 1154, 261, -16, 0, 0, 378, 13, 12, 8, 6, 10),
        (160, -174, -7559, -87, 25, 122, 499, -5, 10, 498, 11, 786, 43, 33, 3, 15, -868, 12, 14, 15, 3, 11),
        (394, 115, -353, 37, -88, 294, -355, 32, -25, 117, 1, 3346, 460, -38, 0, 0, 586, 14, 11, 14, 10, 12),
        (-357, -171, 4631, -289, -1396, -591, -373, -121, 617, -543, 11, -2736, 2948, 4095, 3, 15, 4095, 8, 9, 13, 7, 9),
        (-233, -107, -7416, 270, 681, -208, -544, 337, 736, 0, 8, -2490, -3452, -4096, 0, 0, -3889, 4, 14, 5, 13, 9),
        (103, 214, 7757, -18, -72, -733, -47, 25, -48, 729, 6, 2238, -26, 50, 3, 15, -120, 14, 14, 1, 12, 10),
        (5, 127, -8192, 40, -173, -396, 617, 227, 143, -113, 0, 728, 101, 49, 3, 15, 2, 13, 12, 11, 3, 9),
        (-188, 139, -8192, 428, -51, 363, 720, 155, -556, -125, 10, -2009, -1972, 4095, 3, 15, -4096, 3, 14, 14, 5, 9),
        (-465, -115, -2689, 104, -1143, 100, -558, -78, 288, -545, 9, -2736, 327, 334, 3, 15, -1735, 5, 4, 3, 12, 6),
        (-119, 4, -451, 256, 894, -29, 31, 243, 716, -319, 0, -1272, -1170, -3292, 0, 0, -1848, 6, 6, 2, 5, 5),
        (-503, 61, 5017, -94, 29, -645, 340, 275, 80, 764, 14, -2736, 1001, 361, 3, 15, 1506, 11, 5, 4, 2, 6),
        (424, 120, -5172, -259, 1304, -640, 414, 343, 380, -65, 9, 3373, -4067, -4096, 0, 0, -4061, 4, 12, 15, 2, 8),
        (381, -214, -3787, -351, 682, -512, -720, -45, -337, -674, 10, 1598, 343, -494, 0, 0, -4096, 4, 3, 3, 10, 5),
    ]
)


def set_parameter(parameter: Tensor, units: np.ndarray) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(units / 256).reshape(parameter.shape))


def test_the_steps_of_the_accelerator_equal_ap_fixed():
    m, low, threshold, w, b, shift_x, shift_y, slope, w2, b2, code, merged, total, y, code2, code4, first, *pool = AP_FIXED.T
    count = len(AP_FIXED)

    def features(n: np.ndarray) -> Tensor:
        return torch.from_numpy(n / 16).reshape(1, -1, 1, 1)

    def norm(weight: np.ndarray, bias: np.ndarray, **options) -> nn.Module:
        module = datapath.WordBatchNorm2d(count, **options).double().eval()
        module.running_var.fill_(1 - module.eps)
        set_parameter(module.weight, weight)
        set_parameter(module.bias, bias)
        return module

    conv = datapath.WordConv2d(511, count, 1)
    set_parameter(conv.threshold, threshold)
    t = datapath._MERGE(torch.from_numpy(m), torch.from_numpy(low) * (torch.from_numpy(m) >= conv.gate())).numpy()
    assert np.array_equal(t, merged) and 0 < int((m >= conv.gate().numpy()).sum()) < count
    activation = datapath.WordRPReLU(count).double()
    for parameter, units in ((activation.shift_x.bias, shift_x), (activation.prelu.weight, slope), (activation.shift_y.bias, shift_y)):
        set_parameter(parameter, units)
    with torch.no_grad():
        x = activation(norm(w, b)(features(merged)))
        s = datapath.WordAdd()(x, datapath.WordValue()(torch.from_numpy((2 * code - 15) / 15).reshape(1, -1, 1, 1)))
        out = norm(w2, b2)(s)
        assert torch.equal(s, features(total)) and torch.equal(out, features(y))
        assert torch.equal(norm(w, b, first=True)(torch.from_numpy(m.astype(float)).reshape(1, -1, 1, 1)), features(first))
        for bits, codes in ((2, code2), (4, code4)):
            top = 2**bits - 1
            assert np.array_equal(((datapath.WordSign(bits)(out).flatten() + 1) * top / 2).round().numpy(), codes)
        group = torch.from_numpy(np.stack(pool[:4], 1).reshape(1, count, 2, 2))
        value = datapath.WordSign(4)(datapath.WordPool()(datapath.WordValue()((2.0 * group - 15) / 15)))
        assert np.array_equal(((value.flatten() + 1) * 7.5).round().numpy(), pool[4])


def test_zero_and_ties_go_down_in_the_accelerator():
    n = torch.arange(-48, 49)
    for bits, top in ((2, 3), (4, 15)):
        exact = [max(0, min(top, -((16 - top * (int(k) + 16)) // 32))) for k in n]  # ceil of (x + 1) top / 2 - 1/2, in integers
        got = ((datapath.WordSign(bits)(n.double().reshape(1, -1, 1, 1) / 16).flatten() + 1) * top / 2).round()
        assert got.tolist() == exact
    assert datapath.WordSign(2)(torch.zeros(1, 1, 1, 1)).item() == pytest.approx(-1 / 3)  # a float32 third


def test_every_code_of_the_accelerator_s_datapath():
    whole = narrow(6, fixed_point="authors")
    model = zoo.load(zoo.get(NAME, fixed_point="authors", num_classes=0, width=1 / 16), whole.state_dict()).eval()
    graph = ql.convert(model, (3, 64, 64))
    check = ql.verify(model, graph, pixels(2, 64))
    assert check.ok, str(check)
    assert not any(m.num_beyond for m in model.modules() if isinstance(m, datapath.WordConv2d))  # at most 576 products, far from 511
    y = ql.run(graph, pixels(2, 64))
    assert y.shape == (2, 64) and bool((y.abs() <= 1).all()) and len(torch.unique(y)) > 20
    with torch.no_grad():  # the host's part: the float classifier
        host = whole.fc(y)
        assert torch.allclose(whole(pixels(2, 64)), host, atol=1e-5, rtol=0)  # float32 sums of 64 terms
    with pytest.raises(ql.ConversionError, match="fc"):
        ql.convert(whole, (3, 32, 32))


def test_sums_beyond_the_accelerator_s_registers_are_counted():
    conv = datapath.WordConv2d(600, 1, 1)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        assert conv(torch.full((1, 600, 1, 2), 1.0)).flatten().tolist() == [datapath.HIGH / 16] * 2
        assert conv.num_beyond == 2
        conv(torch.tensor([1.0, -1.0]).repeat(300).reshape(1, 600, 1, 1))
        assert conv.num_beyond == 0


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
