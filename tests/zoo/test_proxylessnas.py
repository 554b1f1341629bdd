"""Quantized ProxylessNAS against a recorded run of the published code: every stored code, accumulator and integer logit."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib import evaluator
from quantlib.layers import ScaledIntConv2d, SharedHardTanh
from zoo.proxylessnas import REDUCED, Pixels

NAME = "proxylessnas_4b5b_imagenet"
QUANTIZED = ("proxylessnas_4b_imagenet", NAME)
SMALL = {"width": 1 / 8, "stages": REDUCED, "image_size": 32, "num_classes": 10}
SCALE = "act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
SCALE_2019 = "act_quant_proxy.fused_activation_quant_proxy.tensor_quant.scaling_impl.learned_value"
Arrays = dict[str, np.ndarray]


def small(seed: int = 1, name: str = NAME, **options) -> nn.Module:
    """Statistics that spread the codes, gammas of both signs and one zero, scales off their first values."""
    random = torch.Generator().manual_seed(seed)
    model = zoo.get(name, **(SMALL | options)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value, low, high in ((module.weight, -2, 4), (module.bias, -1, 4), (module.running_mean, -1, 1)):
                    value.uniform_(low, high, generator=random)
                module.running_var.uniform_(0.5, 4, generator=random)
                module.weight[0] = 0
        for key, value in model.named_parameters():
            if key.endswith(SCALE):
                value.add_(torch.randn(value.shape, generator=random) / 2)
    return model


def pixels(count: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def real(x: Tensor) -> Tensor:
    return (x.float() - 128) / 128


def codes_of(module: nn.Module, y: Tensor) -> np.ndarray:
    """The integers of an activation, which must lie on its grid."""
    units = (getattr(y, "value", y) / module.act_quant(torch.zeros(1, 1, 1, 1)).scale).detach()
    assert float((units - units.round()).abs().max()) < 1e-4
    return units.round().numpy()


# ---------------------------------------------------------------- the published arithmetic


@pytest.fixture(scope="module")
def golden(shared) -> Arrays:
    with np.load(shared / "golden/proxylessnas_4b_5b_random.npz") as arrays:
        return {key: arrays[key] for key in arrays.files if key != "meta"}


@pytest.fixture(scope="module")
def published(golden) -> dict[str, Tensor]:
    """The state dict of the recorded run: 449 keys of 2019 but for num_batches_tracked, which old files lack."""
    return {key[3:]: torch.from_numpy(value.astype(np.float32)) for key, value in golden.items() if key.startswith("sd/")}


@pytest.fixture(scope="module")
def model(published) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return zoo.load(zoo.get(NAME), published).eval()


@pytest.fixture(scope="module")
def image(golden) -> Tensor:
    return torch.from_numpy(golden["input_u8"])[None]


@pytest.fixture(scope="module")
def outputs(model, image) -> dict[str, Tensor]:
    """What every module gave on the recorded image."""
    seen: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, nn.BatchNorm2d | ScaledIntConv2d) or not any(name.startswith(f"{n}.") for n in ("output", "final_pool"))
    ]
    with torch.no_grad():
        seen[""] = model(real(image))
    for hook in hooks:
        hook.remove()
    return seen


def activation(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(f"{name.removesuffix('.add')}.shared_act" if name.endswith(".add") else f"{name}.activ")


def test_every_recorded_code(golden, model, outputs):
    stored = [key[5:] for key in golden if key.startswith("code/")]
    assert len(stored) == 30 and sum(golden[f"code/{name}"].size for name in stored) == 3_719_296
    for name in stored:
        activ = activation(model, name)
        assert np.array_equal(codes_of(activ, outputs[name.removesuffix(".add")]), golden[f"code/{name}"]), name
        scale = activ.act_quant(torch.zeros(1, 1, 1, 1)).scale.detach().numpy()
        # 2^v / L in float32, an ulp
        assert scale.shape == golden[f"scale/{name}"].shape and np.allclose(scale, golden[f"scale/{name}"], rtol=2e-7, atol=0)


def test_recorded_pool_bias_and_logits(golden, model, outputs):
    pool = outputs["final_pool"]
    assert np.array_equal((pool.value / pool.scale).round().flatten(1).numpy(), golden["pool_code"])
    assert float(pool.scale) == pytest.approx(float(golden["pool_scale"]), rel=2e-7)  # as above
    with torch.no_grad():
        bias = model.output.bias_quant(model.output.bias, pool.flatten(1), model.output.quant_weight())
    assert np.array_equal((bias.value / bias.scale).round().numpy(), golden["bias_int"])
    assert int(bias.bit_width) == 19 == int(golden["logit_bits"])
    y = outputs[""].double().numpy()
    assert np.array_equal(np.rint(y / golden["logit_scale"]), golden["logit_int"])
    np.testing.assert_allclose(y, golden["logits"], rtol=1e-5, atol=1e-6)  # the tolerance that the reference data states


def test_float_network(shared, golden, image):
    with np.load(shared / "golden/proxylessnas_float_random.npz") as reference:
        kept = {key[3:]: value for key, value in golden.items() if key.endswith(("conv.weight", "output.weight", "output.bias"))}
        norms = {key[3:]: reference[key] for key in reference.files if ".bn." in key}
        float_model = zoo.load(zoo.get("proxylessnas_float_imagenet"), {**kept, **norms}).eval()
        assert np.array_equal(reference["input_u8"], golden["input_u8"])
        seen: dict[str, Tensor] = {}
        for key in (k for k in reference.files if k.startswith("out/")):
            float_model.get_submodule(key[4:]).register_forward_hook(lambda m, i, o, key=key: seen.__setitem__(key, o))
        with torch.no_grad():
            y = float_model(real(image)).numpy()
        np.testing.assert_allclose(y, reference["logits"], atol=1e-4, rtol=0)  # the tolerance that the reference data states
        for key, value in seen.items():
            got = value[:, : reference[key].shape[1]].numpy()
            np.testing.assert_allclose(got, reference[key], atol=1e-4, rtol=0, err_msg=key)  # as above


# ---------------------------------------------------------------- integers of the whole network


@pytest.fixture(scope="module")
def graph(model) -> ql.Graph:
    return ql.convert(model, (3, 224, 224))


def edge_of(name: str) -> str:
    return f"{name.removesuffix('.add')}.shared_act" if name.endswith(".add") else f"{name}.activ"


def test_recorded_integers_at_their_edges(golden, graph, image):
    edges = {key: f"{key[4:]}.conv" for key in golden if key.startswith("acc/")}
    edges |= {key: edge_of(key[5:]) for key in golden if key.startswith("code/")}
    edges |= {"pool_sum": "final_pool", "pool_code": "final_pool.requant"}
    assert len(edges) == 36
    values = evaluator.execute(graph, evaluator.encode(graph, image), [*edges.values(), "output"])
    for key, edge in edges.items():
        assert np.array_equal(values[edge].numpy().reshape(golden[key].shape), golden[key]), key
    (decode,) = graph.decodes
    bias = decode.bias.reshape(-1) / decode.gains[0].reshape(-1)
    assert np.abs(bias - np.rint(bias)).max() < 1e-9 and np.array_equal(np.rint(bias), golden["bias_int"])
    assert np.array_equal(values["output"].numpy() + np.rint(bias), golden["logit_int"])
    assert torch.equal(ql.run(graph, image), ql.run(graph, real(image)))
    np.testing.assert_allclose(ql.run(graph, image).numpy(), golden["logits64"], rtol=1e-6, atol=0)  # scale * integer, scales from float32


def test_no_code_of_the_whole_network_differs(model, graph, image):
    check = ql.verify(model, graph, image)
    assert check.ok and check.mismatches == 0, str(check)
    assert check.codes > 16_000_000
    gammas = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert int((gammas < 0).sum()) == 4675 and int((gammas == 0).sum()) == 60
    flipped = sum(int((node.op.sign < 0).sum()) for node in graph if type(node.op).__name__ == "Threshold")
    assert flipped > 4000  # constant rows have no direction
    per_channel = [n for n in graph if n.name.endswith("bc_conv.activ")]
    assert len(per_channel) == 19 and all(n.type.scale.size == n.type.shape[0] for n in per_channel)


def test_every_accumulator_fits_the_stated_word(golden, graph):
    for key in (k for k in golden if k.startswith("acc_bits/")):  # that count is for unsigned inputs: one sign bit more
        assert graph.by_name[f"{key[9:]}.conv"].type.bits <= int(golden[key]) + 1


@pytest.mark.slow
def test_compiled_cpp_of_the_whole_network(graph, image, tmp_path):
    hls = ql.export(graph, tmp_path / "hls", part="xczu15eg")
    x = torch.cat([image, pixels(1, 224)])
    ours, theirs = ql.run(graph, x, integers=True), hls.csim(x, integers=True)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[edge], theirs[edge]) for edge in ours)
    assert torch.equal(hls.csim(real(x)), ql.run(graph, x))
    assert torch.equal(hls.csim(image, mode="fifo"), ql.run(graph, image))  # 13 residual branches on FIFOs of the generated depths


# ---------------------------------------------------------------- structure


def units(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "Unit"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_counts(name, outputs):
    model = zoo.get(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(shapes) == 449 and sum(math.prod(s) for s in shapes.values()) == 6_914_451
    parameters = {key: p.numel() for key, p in model.named_parameters()}
    convs = {n: m for n, m in model.named_modules() if isinstance(m, ScaledIntConv2d)}
    depthwise = {n: m for n, m in convs.items() if m.groups > 1}
    assert sum(parameters.values()) == 6_867_077 and len(convs) == 61 and len(depthwise) == 20
    assert sum(m.weight.numel() for m in convs.values()) == 5_017_288
    assert sum(m.weight.numel() for m in depthwise.values()) == 373_944
    assert sum(n for key, n in parameters.items() if ".bn." in key) == 47_280
    scales = [p for key, p in model.named_parameters() if key.endswith(SCALE)]
    assert sum(p.numel() for p in scales) == 9_509
    assert sorted(p.dim() for p in scales) == [0] * 29 + [4] * 19
    assert len({id(u.shared_act) for u in units(model)}) == 7 == sum(isinstance(m, SharedHardTanh) for m in model.modules())
    assert sum(u.shortcut for u in units(model)) == 13
    macs = {n: outputs[n].numel() * m.weight[0].numel() for n, m in convs.items()}
    assert sum(macs[n] for n in depthwise) == 57_311_184
    assert sum(macs.values()) - 57_311_184 == 521_780_224
    assert sum(macs.values()) + 1_792_000 == 580_883_408 == zoo.card(name).macs


def test_bit_widths():
    def bits(name: str) -> dict[str, tuple[int, int]]:
        blocks = {n: m for n, m in zoo.get(name).named_modules() if type(m).__name__ == "ConvBlock"}
        return {n: (int(b.conv.quant_weight().bit_width), b.activ.bits) for n, b in blocks.items()}

    ours = bits(NAME)
    assert ours.pop("features.init_block") == (8, 4) and ours.pop("features.final_block") == (4, 4)
    assert len(ours) == 59
    for name, pair in ours.items():
        assert pair == {"bc_conv": (4, 5), "dw_conv": (5, 4), "pw_conv": (4, 4)}[name.rsplit(".", 1)[1]]
    assert {pair for n, pair in bits("proxylessnas_4b_imagenet").items() if n != "features.init_block"} == {(4, 4)}
    options = {"bit_width": 3, "depthwise_bit_width": 6, "first_layer_bit_width": 7, "hard_tanh_threshold": 5.0}
    model = zoo.get(NAME, **(SMALL | options))
    unit = model.features.stage2.unit1.body
    assert [int(m.conv.quant_weight().bit_width) for m in (model.features.init_block, unit.bc_conv, unit.dw_conv, unit.pw_conv)] == [
        7,
        3,
        6,
        3,
    ]
    assert [m.activ.bits for m in (model.features.init_block, unit.bc_conv, unit.dw_conv, unit.pw_conv)] == [3, 6, 3, 3]


def test_first_values():
    model = zoo.get(NAME, **SMALL, hard_tanh_threshold=5.0)
    for path, module in model.named_modules():
        if hasattr(module, "act_quant") and hasattr(module, "bits"):
            expected = math.log2(5 if isinstance(module, SharedHardTanh) else 6)
            assert torch.equal(next(module.parameters()).detach(), torch.full_like(next(module.parameters()), expected)), path
    for conv in (m for m in model.modules() if isinstance(m, ScaledIntConv2d)):
        bound = math.sqrt(6 / conv.weight[0].numel())
        assert float(conv.weight.detach().abs().max()) <= bound
    dense = model.features.final_block.conv.weight
    assert float(dense.detach().abs().max()) > 0.99 * math.sqrt(6 / dense[0].numel())
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


def test_the_printed_graph_shows_the_shared_quantizers():
    model = small()
    assert sum(isinstance(m, SharedHardTanh) for m in model.modules()) == 4
    graph = ql.convert(model, (3, 32, 32))
    assert not {"Join", "AffineJoin", "Lut"} & {type(node.op).__name__ for node in graph}
    adds = [node for node in graph if type(node.op).__name__ == "Add"]
    assert [node.name for node in adds] == [f"features.{unit}.add" for unit in ("stage2.unit2", "stage3.unit2")]
    for node in adds:
        assert (node.type.lo, node.type.hi) == (-16, 14)
        (after,) = graph.consumers[node.name]
        unit = node.name.removesuffix(".add")
        assert after.name == f"{unit}.shared_act" and (after.type.lo, after.type.hi) == (-8, 7)
        assert np.array_equal(after.op.thresholds, np.arange(-7, 8)[None]) and after.type.same_scale(node.type)  # it only clamps
        body = graph.by_name[f"{unit}.body.pw_conv.activ"]
        assert body.name in node.inputs and type(body.op).__name__ == "Threshold"
        first = f"{unit.rsplit('unit', 1)[0]}unit1.body.pw_conv.activ"
        for shared in (body, after):
            assert shared.source == f"{shared.name} is {first}" and f"{shared.name} is {first}" in str(graph)


# ---------------------------------------------------------------- the reduced network


@pytest.mark.parametrize(
    "options",
    [
        {"bit_width": 2, "depthwise_bit_width": 3, "first_layer_bit_width": 2, "hard_tanh_threshold": 2.0},
        {"bit_width": 6, "depthwise_bit_width": 7},
    ],
)
def test_other_bit_widths_convert(options):
    model = small(3, **options)
    check = ql.verify(model, ql.convert(model, (3, 32, 32)), pixels(2))
    assert check.ok, str(check)


def test_float_is_refused_with_the_place():
    with pytest.raises(ql.ConversionError, match="features.init_block.conv"):
        ql.convert(zoo.get("proxylessnas_float_imagenet", **SMALL).eval(), (3, 32, 32))


def test_compiled_cpp_of_the_reduced_network(tmp_path):
    model = small(5)
    graph = ql.convert(model, (3, 32, 32))
    x = pixels(3)
    assert ql.verify(model, graph, x).ok
    hls = ql.export(graph, tmp_path / "hls", part="xczu3eg")
    ours, theirs = ql.run(graph, x, integers=True), hls.csim(x, integers=True)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[edge], theirs[edge]) for edge in ours)
    assert len(torch.unique(ours["output"])) > 20


def test_a_step_of_training_reaches_every_parameter():
    model = zoo.get(NAME, **SMALL)
    pooled = model.pooled(real(pixels(8)))
    assert float(pooled.scale.detach()) == float(model.features.final_block.activ.act_quant(torch.zeros(1, 1, 1, 1)).scale.detach())
    dropped = [F.dropout(pooled, 0.2, True) for _ in range(3)]
    loss = sum(F.cross_entropy(model.output(d), torch.arange(8)) for d in dropped)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
    model.eval()
    with torch.no_grad():
        x = real(pixels(2))
        assert torch.equal(model(x), model.output(model.pooled(x)))


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="image_size=100: the strides of these stages want a multiple of 32"):
        zoo.get(NAME, image_size=100)
    with pytest.raises(ValueError, match="width=0.1: .* must be whole numbers"):
        zoo.get(NAME, width=0.1)
    with pytest.raises(ValueError, match="image_size=0"):
        zoo.get(NAME, image_size=0)
    with pytest.raises(ValueError, match=r"the row \(24, 1, 4, 1\) is not .* odd kernel"):
        zoo.get(NAME, stages=(((24, 1, 4, 1),),))
    for name in ("bit_width", "depthwise_bit_width", "first_layer_bit_width"):
        for bits in (1, 4.0, "4"):
            with pytest.raises(ValueError, match=f"{name}={bits!r}: give a whole number of bits, 2 or more"):
                zoo.get(NAME, **SMALL, **{name: bits})
    assert zoo.names("proxylessnas*") == sorted((*QUANTIZED, "proxylessnas_float_imagenet"))


# ---------------------------------------------------------------- the image


def test_pixels_have_the_published_codes():
    v = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    expected = torch.arange(-128, 128).reshape(1, 1, 16, 16).expand(1, 3, 16, 16) / 128
    mean, std = (torch.tensor(c).reshape(3, 1, 1) for c in zoo.card(NAME).normalisation)
    layer = Pixels()
    for x in (v, real(v), v.float().div(255).sub(mean).div(std)):  # the last as a loader normalises
        assert torch.equal(layer(x), expected)
    assert layer(torch.tensor([-9.0, 9.0])).tolist() == [-1.0, 127 / 128]
    graph = ql.convert(layer, (3, 16, 16))
    assert (graph.input.type.lo, graph.input.type.hi) == (0, 255)
    for x in (v, real(v), 3 * torch.randn(2, 3, 16, 16), torch.tensor([-1e30, 1e30, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)):
        assert torch.equal(ql.run(graph, x), layer(x))
    assert ql.verify(layer, graph, v).ok


@pytest.mark.parametrize("name", [NAME, "proxylessnas_float_imagenet"])
def test_networks_take_pixels(name):
    """uint8 pixels or their floats; other integers would be clipped without a word, so they are refused."""
    model, x = zoo.get(name, **SMALL).eval(), pixels(2)
    with torch.no_grad():
        assert torch.equal(model(x), model(real(x)))
        with pytest.raises(TypeError, match="the image holds torch.int64: give uint8 pixels"):
            model(x.long())


def test_an_image_of_stated_codes():
    model = small(6)
    stated = ql.convert(model, (3, 32, 32), input=ql.Grid(-128, 127, 2.0**-7))
    x = pixels(2)
    assert torch.equal(ql.run(stated, x.int() - 128), ql.run(ql.convert(model, (3, 32, 32)), x))
    assert ql.verify(model, stated, real(x)).ok


# ---------------------------------------------------------------- checkpoints


def state_2019(model: nn.Module, entries: int) -> dict[str, Tensor]:
    """A state dict as the code of 2019 wrote it: 449 entries, or 717 with placeholders and copies of the weights."""
    old = {key.replace(SCALE, SCALE_2019): value.clone() for key, value in model.state_dict().items()}
    if entries == 717:
        names = [n for n, m in model.named_modules(remove_duplicate=False) if hasattr(m, "act_quant")]
        weights = [n.removesuffix(".weight") for n in old if n.endswith("conv.weight") or n == "output.weight"]
        nothing = torch.zeros(())
        old |= {f"{n}.act_quant_proxy.zero_hw_sentinel": nothing for n in names}
        old |= {f"{n}.{kind}_quant.zero_hw_sentinel": nothing for n in weights for kind in ("weight", "bias")}
        old["final_pool.accumulator_quant.zero_hw_sentinel"] = nothing
        copies = "weight_quant.tensor_quant.scaling_impl.parameter_list_stats.first_tracked_param.parameter"
        old |= {f"{n}.{copies}": old[f"{n}.weight"] for n in weights}
    return old


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_keys_are_the_published_ones(published, model):
    counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
    old = state_2019(model, 449)
    assert {key: tuple(value.shape) for key, value in old.items() if key not in counters} == {
        k: tuple(v.shape) for k, v in published.items()
    }
    assert len(published) == 388 and len(state_2019(model, 449)) == 449 and len(state_2019(model, 717)) == 717
    assert all(torch.equal(value, old[key]) for key, value in published.items())
    assert sum("shared_act" in key or "pw_conv.activ" in key for key in old) == 40


@pytest.mark.parametrize(
    "entries,prefix,suffix", [(449, "", "learned_value"), (449, "module.", "value"), (717, "module.", "learned_value"), (717, "", "value")]
)
@pytest.mark.filterwarnings("error")
def test_checkpoints_of_2019(entries, prefix, suffix, tmp_path):
    saved = small(4)
    state = {f"{prefix}{k.replace('learned_value', suffix)}": v for k, v in state_2019(saved, entries).items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"epoch": 20, "state_dict": state, "best_prec1": 75.0, "optimizer": optimizer}, tmp_path / "best.pth.tar")
    for source in (state, tmp_path / "best.pth.tar"):
        assert same(zoo.load(zoo.get(NAME, **SMALL), source), saved)


@pytest.mark.filterwarnings("error")
def test_the_second_step_starts_from_the_first():
    first = small(4, "proxylessnas_4b_imagenet")
    second = zoo.load(zoo.get(NAME, **SMALL), state_2019(first, 717)).eval()
    assert same(first, second)
    assert second.features.stage2.unit1.body.bc_conv.activ.bits == 5 and not torch.equal(first(pixels(1)), second(pixels(1)))


@pytest.mark.parametrize("name", QUANTIZED)
def test_float_weights_leave_the_scales_and_say_so(name, tmp_path):
    with torch.no_grad():
        start = zoo.get("proxylessnas_float_imagenet", **SMALL)
        for p in start.parameters():
            p.normal_()
    torch.save(start.state_dict(), tmp_path / "mobile14.pth")
    fresh = zoo.get(name, **SMALL)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.warns(UserWarning, match="no learned scales") as caught:
        zoo.load(fresh, tmp_path / "mobile14.pth")
    (warning,) = caught
    listed = [line.split()[0] for line in str(warning.message).splitlines()[1:]]
    scales = [key for key in before if key.endswith(SCALE)]
    assert listed == scales and warning.filename == __file__ and f"so {len(scales)} entries" in str(warning.message)
    after, weights = fresh.state_dict(), start.state_dict()
    assert set(after) == set(weights) | set(scales)
    assert all(torch.equal(after[key], (before if key in scales else weights)[key]) for key in after)


def test_a_single_missing_scale_is_an_error():
    state = state_2019(small(), 449)
    del state[f"features.stage2.unit1.body.dw_conv.activ.{SCALE_2019}"]
    model = small(2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(zoo.CheckpointError, match=r"missing 1:\n    features.stage2.unit1.body.dw_conv.activ"):
        zoo.load(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_names_of_one_shared_scale_that_disagree():
    """A shared hardtanh stands under two names per unit; a file whose values differ is loaded with the last one, and that is said."""
    state, model = state_2019(small(), 449), small(2)
    unit = "features.stage2.unit2"
    state[f"{unit}.shared_act.{SCALE_2019}"] += 1
    first = f"features.stage2.unit1.body.pw_conv.activ.{SCALE}"
    with pytest.warns(UserWarning, match=rf"disagree 1:\n    {unit}.shared_act.{SCALE} is {first}$") as caught:
        zoo.load(model, state)
    assert caught[0].filename == __file__
    assert torch.equal(model.state_dict()[first], state[f"{unit}.shared_act.{SCALE_2019}"])


def test_quantized_weights_do_not_fit_the_float_network():
    with pytest.raises(zoo.CheckpointError, match="extra"):
        zoo.load(zoo.get("proxylessnas_float_imagenet", **SMALL), state_2019(small(), 449))
