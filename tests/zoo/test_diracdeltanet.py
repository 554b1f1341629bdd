"""DiracDeltaNet against the published code: recorded runs, blocks with gradients, counts; its options; its integers and its hardware."""

import re
import runpy
from fractions import Fraction
from math import gcd, lcm, prod

import numpy as np
import pytest
import torch
from test_every_network import randomised
from torch import nn

import quantlib as ql
import zoo
from quantlib import ops
from quantlib.layers import DividedClip, Shift2d, TanhConv2d, TanhLinear
from zoo.diracdeltanet import CLIP, INTEGERS, Bits, DiracDeltaBlock, inherit, options_of

NAME = "diracdeltanet_imagenet"
VARIANTS = "full w16a16 w8a8 w4a4 w4a4_first8_last8_fc8 w2a4 w1a4_fc8 w4a4_scratch w4a4_first8_scratch".split()
FLOAT32 = {"full": 2e-5, "w16a16": 6e-4}  # of the L2 norm, as the reference data states; 0.05 where a flipped code travels on
SMALL = {"base": 8, "blocks": (2, 2, 1), "features": 16, "num_classes": 7}
FREE = (ops.Shift, ops.Select, ops.Concat, ops.MaxPool, ops.Reshape)


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden/diracdeltanet_random.npz") as arrays:
        return dict(arrays)


def published(golden, variant, **more):
    """The recorded network of one variant: shared weights with the variant's own statistics."""
    names = ("weight_bits", "act_bits", "first_weight_bits", "first_act_bits", "last_weight_bits", "last_act_bits", "fc_weight_bits")
    *bits, from_scratch = golden[f"bits/{variant}"].tolist()
    model = zoo.get(NAME, **dict(zip(names, bits, strict=True)), from_scratch=bool(from_scratch), **more)
    state = {k[3:]: v for k, v in golden.items() if k.startswith("sd/")}
    state |= {k.removeprefix(f"ov/{variant}/"): v for k, v in golden.items() if k.startswith(f"ov/{variant}/")}
    return zoo.load(model, {k: v.astype(np.float32) for k, v in state.items()}).eval()


def near(ours, theirs, of_largest):
    assert np.abs(ours - theirs).max() <= of_largest * np.abs(theirs).max()


# ---------------------------------------------------------------- the published arithmetic


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_runs_of_the_published_model(golden, variant):
    model = published(golden, variant)
    seen = {}
    for layer in (1, 2, 3):
        getattr(model, f"layer{layer}").register_forward_hook(lambda m, i, o, layer=layer: seen.__setitem__(layer, o.numpy()))
    x = torch.from_numpy(golden["input"])
    with torch.no_grad():
        single = model(x.float())[0].numpy()
        theirs = golden[f"out/{variant}"]
        assert np.linalg.norm(single - theirs) < FLOAT32.get(variant, 0.05) * np.linalg.norm(theirs)
        if variant == "full":
            for layer in (1, 2, 3):
                middle = golden[f"mid/full/layer{layer}"]
                assert np.linalg.norm(seen[layer] - middle) < 1e-4 * np.linalg.norm(middle)  # two float32 runs: 4e-5 apart in layer3
        exact = model.double()(x.double())[0].numpy()
    assert np.abs(exact - golden[f"out64/{variant}"]).max() < 1e-9  # the reference data's own limit
    for layer in (1, 2, 3):
        if f"mid/{variant}/layer{layer}_code" in golden:
            assert np.array_equal(np.rint(seen[layer] * 7.5), golden[f"mid/{variant}/layer{layer}_code"])


@pytest.mark.parametrize("bits", ["w32a32", "w8a8", "w4a4", "w1a4"])
@pytest.mark.parametrize("case", ["same", "down", "first"])
def test_blocks_with_gradients(shared, case, bits):
    with np.load(shared / "golden/diracdeltanet_ops.npz") as arrays:
        key = f"block/{case}_{bits}/"
        golden = {k.removeprefix(key): v for k, v in arrays.items() if k.startswith(key)}
    widths = golden["x"].shape[1], golden["y"].shape[1]
    weight, act = map(int, bits[1:].split("a"))
    block = DiracDeltaBlock(*widths, 2.0, Bits(weight, act), downsample=case != "same", split=case == "first").eval()
    ours = {k: k.replace(CLIP, "scale_coef") for k in block.state_dict() if "num_batches" not in k}
    block.load_state_dict({k: torch.from_numpy(golden[f"sd/{v}"]) for k, v in ours.items()}, strict=False)
    assert {f"sd/{v}" for v in ours.values()} | {"sd/shift2.kernel"} == {k for k in golden if k.startswith("sd/")}
    assert np.array_equal(block.shift2.kernel().numpy(), golden["sd/shift2.kernel"])
    block = block.double()
    x = torch.from_numpy(golden["x"]).double().requires_grad_()
    y = block(x)
    assert np.abs(y.detach().numpy() - golden["y64"]).max() < 1e-9
    y.backward(torch.from_numpy(golden["gout"]).double())
    near(x.grad.numpy(), golden["grad_x"], 1e-5)  # recorded in float32
    gradients = {k[5:]: v for k, v in golden.items() if k.startswith("grad/")}
    assert {ours[n] for n, _ in block.named_parameters()} == set(gradients)
    for name, parameter in block.named_parameters():
        near(parameter.grad.numpy(), gradients[ours[name]], 3e-5 if name.endswith(CLIP) else 1e-5)  # a clip's terms nearly cancel


def test_counts_of_the_published_networks():
    for base, trainable, with_kernels, products in [(116, 2_929_615, 2_968_063, 269_229_440), (128, 3_286_699, 3_329_035, 316_651_520)]:
        model = zoo.get(NAME, base=base).eval()
        shifts = [m for m in model.modules() if isinstance(m, Shift2d)]
        assert len(shifts) == 18
        assert sum(p.numel() for p in model.parameters()) == trainable
        assert trainable + sum(m.kernel().numel() for m in shifts) == with_kernels
        counts = ql.analysis.count(model, (3, 224, 224))
        assert (counts.parameters, counts.macs) == (trainable, products)
    weights = [m.weight.numel() for m in zoo.get(NAME).modules() if isinstance(m, TanhConv2d)]
    assert sum(weights) == 1_889_000 and weights[0] == 96 and weights[1] == 2_048 and weights[-1] == 475_136
    assert sum(isinstance(m, DividedClip) for m in zoo.get(NAME).modules()) == 35


def test_state_dict_is_the_published_one(golden):
    ours = {k.replace(CLIP, "scale_coef"): tuple(v.shape) for k, v in zoo.get(NAME).state_dict().items() if "num_batches" not in k}
    theirs = {k[3:]: v.shape for k, v in golden.items() if k.startswith("sd/") and not k.endswith(".kernel")}
    assert ours == theirs and len(theirs) == 245 - 18
    assert set(zoo.get(NAME).state_dict()) == set(zoo.get(NAME, weight_bits=1, act_bits=4, **INTEGERS).state_dict())


# ---------------------------------------------------------------- options


def test_first_values_and_ranges():
    model = zoo.get(NAME, weight_bits=4, act_bits=4, first_weight_bits=8, **SMALL)
    clips = {n: (m.output_range, float(m.scale_coef.detach())) for n, m in model.named_modules() if isinstance(m, DividedClip)}
    assert clips.pop("quant_act1") == (6.0, 6.0) and clips.pop("quant_act3") == (10.0, 10.0) and set(clips.values()) == {(2.0, 2.0)}
    assert isinstance(model.linear, TanhLinear) and model.conv1.bits == 8 and model.conv2.bits == model.layer2[0].conv3.bits == 4
    assert zoo.get(NAME, weight_bits=4, first_weight_bits=8, from_scratch=True, **SMALL).conv2.bits == 8
    assert zoo.get(NAME, weight_bits=4, first_weight_bits=8, from_scratch=True, second_weight_bits=2, **SMALL).conv2.bits == 2
    for wrong, message in [({"base": 10}, "multiple of 4"), ({"blocks": (2, 0)}, "at least one"), ({"image": "uint8"}, "'int8'")]:
        with pytest.raises(ValueError, match=message):
            zoo.get(NAME, **{**SMALL, **wrong})


def test_one_bit_sets_and_the_offset_of_the_classifier():
    x = torch.randn(4, 3, 32, 32)
    state = randomised(NAME, SMALL).state_dict()
    nets = {o: zoo.load(zoo.get(NAME, weight_bits=1, fc_weight_bits=8, **dict([o]), **SMALL), state).eval() for o in
            (("signs", False), ("signs", True), ("fc_offset", False))}  # fmt: skip
    sets = {o: set(net.layer1[0].conv1.quant_weight().value.detach().unique().tolist()) for o, net in nets.items()}
    assert sets["signs", False] == {-1.0, 0.0} and sets["signs", True] == {-1.0, 1.0}
    with torch.no_grad():
        apart = nets["fc_offset", False](x) - nets["signs", False](x)
    assert torch.allclose(apart, apart[:, :1].expand_as(apart), rtol=0, atol=1e-5) and float(apart.abs().min()) > 1e-4  # float32 sums
    codes = (255 * nets["fc_offset", False].linear.quant_weight().value.detach()).round()
    assert float(codes.min()) >= -128 and float(codes.max()) <= 127


def test_fine_tuning_copies_and_resets_clips_once():
    full = zoo.get(NAME, **SMALL)
    with torch.no_grad():
        full.layer1[0].quant_act1.scale_coef.fill_(0.05)
        full.layer1[0].quant_act2.scale_coef.fill_(-3.0)
        full.layer2[0].quant_act1.scale_coef.fill_(9.5)
    tuned = zoo.load(zoo.get(NAME, weight_bits=4, act_bits=4, **SMALL), inherit(full.state_dict()))
    clips = {n: float(m.scale_coef.detach()) for n, m in tuned.named_modules() if isinstance(m, DividedClip)}
    reset = {"layer1.0.quant_act1", "layer1.0.quant_act2", "quant_act3"}  # an untouched 10 is outside, 6 and 2 are inside
    assert {n for n, v in clips.items() if v == 1.0} == reset and clips["layer2.0.quant_act1"] == 9.5 and clips["quant_act1"] == 6.0
    plain = zoo.load(zoo.get(NAME, weight_bits=4, act_bits=4, **SMALL), full.state_dict())
    assert float(plain.quant_act3.scale_coef.detach()) == 10.0 and float(plain.layer1[0].quant_act2.scale_coef.detach()) == -3.0
    with torch.no_grad():
        tuned.conv1.weight.add_(1)
        tuned.bn1.weight.add_(1)
    assert not torch.equal(tuned.conv1.weight, full.conv1.weight) and float(full.bn1.weight.detach().max()) == 1.0
    assert set(inherit({"conv1.weight": torch.ones(1), "a.scale_coef": torch.tensor([10.0])})["a.scale_coef"].tolist()) == {1.0}


def test_other_widths_are_explained():
    state = zoo.get(NAME, **SMALL).state_dict()
    with pytest.raises(zoo.CheckpointError, match=r"build it with base=8, blocks=\(2, 2, 1\), features=16, num_classes=7$"):
        zoo.load(zoo.get(NAME), state)
    assert callable(options_of)


# ---------------------------------------------------------------- integers and hardware


@pytest.fixture(scope="module")
def reduced():
    model = randomised(NAME, {"weight_bits": 4, "act_bits": 4, **INTEGERS, **SMALL})
    return model, ql.convert(model, (3, 32, 32))


def pixels(count, size=32):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 8, "act_bits": 8, "second_weight_bits": 16},
        {"weight_bits": 1, "act_bits": 4},
        {"weight_bits": 4, "act_bits": 1, "fc_offset": False},
    ],
)
def test_every_width_becomes_integers(options):
    model = randomised(NAME, {**INTEGERS, **SMALL, "base": 4, "blocks": (2, 1), **options})
    graph = ql.convert(model, (3, 32, 32))
    check = ql.verify(model, graph, pixels(2))
    assert check.ok, str(check)
    if options["act_bits"] == 8:  # a multiply and a shift, not 255 thresholds
        assert all(isinstance(graph.by_name[f"layer1.1.quant_act{i}"].op, ops.Requant) for i in (1, 2))


@pytest.mark.parametrize(
    "left_real,place",
    [
        ({"image": None}, "conv1"),
        ({"first_weight_bits": 32}, "conv1"),
        ({"first_act_bits": 32}, "quant_act1"),
        ({"second_weight_bits": 32}, "conv2"),
        ({"weight_bits": 32, "second_weight_bits": 4}, "layer1.0.conv1"),
        ({"act_bits": 32}, "quant_act2"),
        ({"last_weight_bits": 32}, "conv3"),
        ({"last_act_bits": 32}, "quant_act3"),
        ({"fc_weight_bits": 32}, "linear"),
    ],
)
def test_a_real_valued_layer_is_refused_by_name(left_real, place):
    model = zoo.get(NAME, **{"weight_bits": 4, "act_bits": 4, **INTEGERS, **SMALL, "base": 4, "blocks": (1,), **left_real}).eval()
    with pytest.raises(ql.ConversionError, match=f"^{re.escape(place)}: ") as error:
        ql.convert(model, (3, 32, 32))
    assert any(word in str(error.value) for word in ("not quantized", "not an integer quant tensor", "ql.Grid"))


def test_all_branches_share_one_scale_exactly(reduced):
    _, graph = reduced
    inner = [n.type.scale for n in graph if n.name.startswith("layer") and not isinstance(n.op, ops.Conv2d)]
    assert len(inner) > 20 and {float(s) for s in inner} == {2.0 / 15}
    scales = {n: float(graph.by_name[n].type.scale) for n in ("image", "quant_act1", "quant_act2", "quant_act3", "adaptive_avg_pool2d")}
    assert scales == {"image": 1 / 48, "quant_act1": 6 / 255, "quant_act2": 2 / 15, "quant_act3": 10 / 255, "adaptive_avg_pool2d": 10 / 255}
    joins = [n for n in graph if isinstance(n.op, ops.Concat)]
    assert len(joins) == 5 and not any(type(n.op).__name__ in ("Join", "AffineJoin", "Rearrange") for n in graph)


def test_shift_shuffle_concat_and_pool_multiply_nothing(reduced, root, tmp_path):
    """In the plan no DSP, in the C++ only kernels that move and compare: line-buffer addresses, tables of channel numbers, maxima."""
    _, graph = reduced
    plan = ql.estimate(graph, part="xczu9eg")
    free = {n.name for n in graph if isinstance(n.op, FREE)}
    assert len([n for n in graph if isinstance(n.op, ops.Shift)]) == 2 + 5 and len(free) > 20
    assert sum(row.cost.dsp for row in plan.rows if row.name in free) == 0 and plan.total.dsp > 0
    ql.export(graph, tmp_path / "hls", part="xczu9eg")
    text = (tmp_path / "hls/src/network.hpp").read_text()
    stages = re.findall(r'QL_STAGE\("(\w+)",\s+ql::(\w+)(?:<ql::(\w+))?', text)
    of_free = {}
    for stage, kernel, first in stages:
        name = max((n for n in graph.by_name if stage.startswith(n.replace(".", "_") + "_")), key=len)
        if name in free:
            of_free.setdefault(type(graph.by_name[name].op).__name__, set()).add(f"{kernel}<{first}>" if first else kernel)
    glue = {"fork", "gather", "scatter", "repack"}
    assert {op: kernels - glue for op, kernels in of_free.items()} == {
        "Shift": {"shift"}, "Select": {"select"}, "Concat": {"concat"}, "MaxPool": {"window", "reduce<Max>", "reduce_map<Max>"}
    }  # fmt: skip
    for header in ("shift", "select", "concat"):
        code = re.sub(r"//[^\n]*", "", (root / f"quantlib/ops/{header}.hpp").read_text())
        data = re.findall(r"\.v\[[^]]*\]\s*\*|\*\s*\w+\.v\[", code)
        assert not data, f"{header}.hpp multiplies what it carries: {data}"
    assert sum(k in ("matvec", "matvec_of", "packed") for _, k, _ in stages) == sum(isinstance(n.op, ops.Conv2d | ops.Dense) for n in graph)


def test_image_of_a_graph_is_the_pixel(reduced):
    model, graph = reduced
    x = pixels(2)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in zoo.card(NAME).normalisation)
    assert graph.input.type.lo == 0 and graph.input.type.hi == 255
    assert torch.equal(ql.run(graph, x), ql.run(graph, (x / 255 - mean) / std))
    bare = zoo.load(zoo.get(NAME, **{"weight_bits": 4, "act_bits": 4, **INTEGERS, **SMALL, "image": None}), model.state_dict()).eval()
    stated = ql.convert(bare, (3, 32, 32), input=ql.Grid(-128, 127, 1 / 48))
    with torch.no_grad():
        codes = (48 * model.image(x)).round().to(torch.int8)
    assert torch.equal(ql.run(stated, codes), ql.run(graph, x))
    unnormalised = ql.convert(bare, (3, 32, 32), input=ql.Grid(0, 255, 1 / 255))
    assert ql.verify(bare, unnormalised, x).ok and unnormalised.by_name["conv1"].inputs == ("input",)


@pytest.fixture(scope="module")
def whole(golden):
    """The published network at full size with the recorded weights, in integers."""
    model = published(golden, "w4a4_first8_last8_fc8", image="int8")
    return model, ql.convert(model, (3, 224, 224))


def test_whole_network_in_integers(whole):
    model, graph = whole
    x = pixels(1, 224)
    check = ql.verify(model, graph, x)
    assert check.ok and check.codes > 11_000_000, str(check)
    convs = [n for n in graph if isinstance(n.op, ops.Conv2d)]
    sizes = {n.name: prod(n.type.shape[1:]) * n.op.weight.size for n in convs}
    assert sum(sizes.values()) + graph.by_name["linear"].op.weight.size == zoo.card(NAME).macs
    assert sum(isinstance(n.op, ops.Shift) for n in graph) == 18


@pytest.mark.slow
def test_whole_network_in_cpp(whole, tmp_path):
    _, graph = whole
    x = pixels(1, 224)
    hls = ql.export(graph, tmp_path / "hls", part="xczu9eg")
    ours, theirs = ql.run(graph, x, integers=True), hls.csim(x, integers=True)
    assert all(torch.equal(ours[edge], theirs[edge]) for edge in ours)


def page(root, language):
    text = (root / "docs" / "diracdeltanet.md").read_text(encoding="utf-8")
    return text, "".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M))


def test_numbers_of_the_page(root):
    text, _ = page(root, "text")
    exact = [(Fraction(v, 255) - Fraction(str(m))) / Fraction(str(s)) for m, s in zip(*zoo.card(NAME).normalisation) for v in range(256)]
    step = lcm(*(x.denominator for x in exact))
    units = [int(x * step) for x in exact]
    assert gcd(*units) == 1 and f"1 / {step:,}: the image's 8 bits would become {max(map(abs, units)).bit_length() + 1}," in text
    for bits in (4, 1):
        layers = [m for m in zoo.get(NAME, weight_bits=bits, act_bits=4, **INTEGERS).modules() if isinstance(m, TanhConv2d | TanhLinear)]
        held = sum(m.weight.numel() * (m.bits + isinstance(m, TanhLinear)) for m in layers)  # the classifier's codes take one bit more
        assert f"{held / 1e6:.1f} Mbit ({bits}/4)" in text
    assert f"holds {216 * 36 * 1024 / 1e6:.1f} Mbit" in text and f"{47.09 / 66.3:.2f} G operations a frame" in text
    for macs, base in [(269_229_440, 116), (316_651_520, 128)]:
        assert f"2 x {macs:,}" in text and f"{2 * macs / 1e9:.2f} G (`base={base}`)" in text
    assert f"{66.3 * 269_229_440 / 250e6:.0f} products a cycle" in text


@pytest.mark.slow
def test_the_table_of_the_page_is_what_its_code_prints(root, tmp_path, capsys):
    (tmp_path / "page.py").write_text(page(root, "python")[1], encoding="utf-8")
    runpy.run_path(str(tmp_path / "page.py"))
    assert capsys.readouterr().out == page(root, "text")[1]


def test_training_reaches_every_parameter():
    model = zoo.get("diracdeltanet_cifar10", weight_bits=1, act_bits=4, base=16, blocks=(2, 1), features=32).train()
    model(torch.randn(8, 3, 32, 32)).log_softmax(1)[:, 0].sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert isinstance(model, nn.Module) and sum(float(p.grad.abs().sum()) > 0 for p in model.parameters()) > 0.9 * len(
        list(model.parameters())
    )
