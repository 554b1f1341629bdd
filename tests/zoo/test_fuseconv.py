"""The FuSeConv networks against outputs, blocks, counts and cycles of the published code, and their quantized forms in integers."""

from __future__ import annotations

import csv
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib import ops
from quantlib.layers import FuSeConv2d
from zoo import _fuse_keys as keys
from zoo._fuse_blocks import Arithmetic, Bottleneck, Row, Separable
from zoo.fuseconv import FAMILIES, KINDS, REDUCED, TITLES

NETWORKS = {
    "MobileNetV1": "mobilenet_v1", "MobileNetV2": "mobilenet_v2", "MnasNetB1": "mnasnet_b1", "MobileNetV3Small": "mobilenet_v3_small",
    "MobileNetV3Large": "mobilenet_v3_large", "ResNet50": "resnet50",
}  # fmt: skip
SUFFIX = {"baseline": "", **{suffix.removeprefix("_fuse_"): suffix for suffix, fuse, _ in KINDS if fuse}}
IDS = [f"{n}/{v}" for n in NETWORKS for v in ("baseline", "half", "full", "half_hybrid")]
QUICK = {
    "MobileNetV1/half",
    "MobileNetV2/full",
    "MnasNetB1/half_hybrid",
    "MobileNetV3Small/full",
    "MobileNetV3Small/baseline",
    "ResNet50/half",
}
TRAINER = ["imagenet_pipeline/MnasNetB1/full", "imagenet_pipeline/MobileNetV3Small/full"]


def slow_unless(quick: bool, *values: Any) -> Any:
    return pytest.param(*values) if quick else pytest.param(*values, marks=pytest.mark.slow)


def registered(network: str, variant: str) -> str:
    return f"{NETWORKS[network]}{SUFFIX[variant]}_imagenet"


def filled(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weights of the recorded runs: random numbers seeded by the name of the entry."""
    random, leaf = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF), name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    if leaf in ("running_mean", "bias"):
        value = 0.1 * random.standard_normal(shape)
    elif leaf == "running_var" or len(shape) == 1:
        value = random.uniform(0.5, 1.5, shape)
    else:
        value = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


@cache
def outputs(path: Path) -> Any:
    return np.load(path / "golden" / "fuseconv_outputs.npz")


def published_state(golden: Any, at: str) -> dict[str, Tensor]:
    shapes = [tuple(int(n) for n in str(s).split("x")) if str(s) else () for s in golden[f"{at}/shapes"]]
    return {str(k): filled(str(k), s) for k, s in zip(golden[f"{at}/keys"], shapes, strict=True)}


@pytest.mark.parametrize("at", [slow_unless(i in QUICK, i) for i in IDS] + [slow_unless("V3" in i, i) for i in TRAINER])
def test_published_logits(at: str, shared: Path) -> None:
    golden = outputs(shared)
    options: dict[str, Any] = {"variant": "trainer"} if at.startswith("imagenet_pipeline") else {}
    model = zoo.get(registered(*at.split("/")[-2:]), **options).eval()
    zoo.load(model, published_state(golden, at))
    x = np.random.RandomState(int(golden[f"{at}/input_seed"])).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        ours = model(torch.from_numpy(x))[0].numpy()
    theirs = golden[f"{at}/logits"]
    # float32 sums in another order: the tolerance of the golden, 8 times the distance of its own float32 and float64
    assert np.abs(ours - theirs).max() <= 1e-3 * theirs.std()
    if "Mnas" in at or "V3" in at:
        assert model.stem[1].eps == (1e-3 if options else 1e-5)


BLOCKS = {
    "MobileNetV1": ("mobilenet_v1", {"relu": "relu"}),
    "MobileNetV2": ("mobilenet_v2", {}),
    "MnasNet": ("mnasnet_b1", {}),
    "MnasNetStem": ("mnasnet_b1", {}),
    "MobileNetV3": ("mobilenet_v3", {}),
}


def block_of(family: str, kind: str, case: str, channels: int) -> tuple[nn.Module, list[keys.Pair]]:
    """The block of a golden case, such as MobileNetV3/half/k5s2o8se1HS, and its published names."""
    a, fuse = Arithmetic(), None if kind == "baseline" else kind
    number = {c: int("".join(d for d in case[case.index(c) + len(c) :].split("s" if c == "k" else " ")[0][:2] if d.isdigit()))
              for c in ("o", "k", "t", "s") if c in case.replace("se", "")}  # fmt: skip
    if family == "ResNet50":
        block: Any = Bottleneck(channels, 4, 2 if "ds" in case else 1, a, fuse)  # type: ignore[arg-type]
        return block, [(o.removeprefix("."), tuple(t.removeprefix(".") for t in ts)) for o, ts in keys.bottleneck(block, "")]
    stride = number.get("s", 1)
    if family == "MobileNetV1":
        block = Separable(
            channels, Row(channels, 12, 3, stride, "relu", widen=False), a, fuse, middle_act="none" if fuse else "relu", out_act="relu"
        )  # type: ignore[arg-type]
    elif family == "MobileNetV2":
        t = number["t"]
        row = Row(channels * t, number["o"], 3, stride, "relu6", widen=t > 1)
        block = Separable(channels, row, a, fuse, middle_act="relu6", residual=True, idle=bool(fuse) and t == 1)  # type: ignore[arg-type]
    elif family == "MnasNetStem":
        block = Separable(channels, Row(channels, 6, 3, 1, "relu6", widen=False), a, fuse, middle_act="relu6")  # type: ignore[arg-type]
    elif family == "MnasNet":
        row = Row(channels * 3, number["o"], number["k"], stride, "relu6")
        block = Separable(channels, row, a, fuse, middle_act="relu6", residual=True)  # type: ignore[arg-type]
    else:
        act = "hswish" if case.endswith("HS") else "relu"
        row = Row(16, number["o"], number["k"], stride, act, squeeze="se1" in case)  # type: ignore[arg-type]
        block = Separable(channels, row, a, fuse, middle_act=act, residual=True)  # type: ignore[arg-type]
    return block, list(keys.separable(BLOCKS[family][0], block, "", ""))


def test_published_blocks(shared: Path) -> None:
    """Every recorded block, in eval mode and with batch statistics."""
    golden = np.load(shared / "golden" / "fuseconv_ops.npz")
    cases = sorted(k.removesuffix("/x") for k in golden.files if k.startswith("block/") and k.endswith("/x"))
    assert len(cases) == 45
    for at in cases:
        _, family, kind, *rest = at.split("/")
        x = torch.from_numpy(golden[f"{at}/x"])
        block, pairs = block_of(family, kind, rest[0] if rest else "", x.shape[1])
        state = {k.removeprefix(f"{at}/w/"): torch.from_numpy(golden[k]) for k in golden.files if k.startswith(f"{at}/w/")}
        pairs = [(o.removeprefix("."), tuple(t.removeprefix(".") for t in ts)) for o, ts in pairs]
        state = keys.translate(pairs, state)
        state |= {k: v for k, v in block.state_dict().items() if k.endswith("num_batches_tracked")}
        zoo.load(block, state)
        with torch.no_grad():
            for mode, wanted in ((False, "y"), (True, "y_train")):
                # float32 sums in another order
                torch.testing.assert_close(block.train(mode)(x), torch.from_numpy(golden[f"{at}/{wanted}"]), rtol=2e-5, atol=2e-5, msg=at)


def table(shared: Path) -> list[dict[str, str]]:
    with (shared / "golden" / "fuseconv_table.csv").open() as file:
        return list(csv.DictReader(file))


COPIES = {"half_x2": ("half", 2), "half_x2_hybrid": ("half_hybrid", 2), "full_x2_hybrid": ("full_hybrid", 2)}
ROWS = [(n, v) for n in NETWORKS for v in (*SUFFIX, *(COPIES if n == "ResNet50" else ()))]


@pytest.mark.parametrize(("network", "variant"), [slow_unless(n == "MobileNetV3Small" or v == "half_x2", n, v) for n, v in ROWS])
def test_published_counts_and_cycles(network: str, variant: str, shared: Path) -> None:
    """Parameters, MACs and the cycles on every array of the recorded table, exactly."""
    rows = [r for r in table(shared) if (r["network"], r["variant"]) == (network, variant)]
    plain, copies = COPIES.get(variant, (variant, 1))
    model = zoo.get(registered(network, plain), **({"copies": copies} if copies > 1 else {}))
    assert sum(p.numel() for p in model.parameters()) == int(rows[0]["params"])
    assert ql.analysis.count(model, (3, 224, 224)).macs == int(rows[0]["macs_total"])
    for row in rows:
        latency = ql.analysis.systolic_latency(model, (3, 224, 224), int(row["array_x"]), int(row["array_y"]), row["hardware"].lower())  # type: ignore[arg-type]
        ours = (latency.cycles, latency.pointwise, latency.depthwise, latency.other)
        assert ours == tuple(int(row[c]) for c in ("cycles", "cycles_pointwise", "cycles_depthwise", "cycles_other")), row


def test_idle_layers_are_built_and_never_run() -> None:
    model = zoo.get("mobilenet_v2_fuse_half_imagenet")
    idle = model.blocks[0].widen
    assert sum(p.numel() for p in idle.parameters()) == 1088 and model.blocks[0].widen_act is None
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in idle.parameters())


def test_hybrids_have_the_published_blocks() -> None:
    chosen = {n: [i + 1 for i in f.hybrid] for n, f in FAMILIES.items()}  # numbered as in the published names, from 1 behind the stem
    assert chosen["mobilenet_v2"] == chosen["mnasnet_b1"] == list(range(2, 11))
    assert chosen["mobilenet_v3_small"] == [3, 5, 6, 7, 8] and chosen["mobilenet_v3_large"] == list(range(2, 9))
    assert chosen["mobilenet_v1"] == [1, 2, 3, 4, 5]
    model = zoo.get("mobilenet_v3_small_fuse_full_hybrid_imagenet", width=0.25)
    assert [i + 1 for i, b in enumerate(model.blocks) if isinstance(b.spatial, FuSeConv2d)] == [3, 5, 6, 7, 8]


def test_a_saved_network_loads_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    model = zoo.get("mnasnet_b1_fuse_half_imagenet", width=0.25)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ours.pth")
    twin = zoo.load(zoo.get("mnasnet_b1_fuse_half_imagenet", width=0.25), tmp_path / "ours.pth").eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(twin(x), model.eval()(x))
    with pytest.raises(zoo.CheckpointError, match="does not fit MobileNet"):
        zoo.load(zoo.get("mnasnet_b1_imagenet", width=0.25), tmp_path / "ours.pth")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"weight_bits": 4}, "together"), ({"variant": "paper"}, "models or trainer"), ({"width": 0}, "positive")],
)
def test_refused_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        zoo.get("mobilenet_v2_imagenet", **options)
    with pytest.raises(ValueError, match="only FuSe layers have copies"):
        zoo.get("resnet50_imagenet", copies=2)


# ---------------------------------------------------------------- in integers


def randomised(name: str, **options: Any) -> nn.Module:
    """Every constant off its initial value, some norms and thus some tails falling."""
    torch.manual_seed(5)
    model = zoo.get(name, **{**REDUCED, **options}).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            noise = torch.randn(value.shape)
            if key.endswith("running_var"):
                value.copy_(0.5 + 2 * noise.abs())
            elif value.is_floating_point():
                value.add_(0.2 * noise)
    return model


SMALL = ["mobilenet_v2_fuse_half_imagenet", "mobilenet_v3_small_imagenet", "resnet50_fuse_half_hybrid_imagenet"]
ALL = [f"{name}{suffix}_imagenet" for name in TITLES for suffix, _, _ in KINDS]


@pytest.mark.parametrize("name", [slow_unless(n in SMALL, n) for n in ALL])
def test_every_family_in_integers(name: str) -> None:
    model = randomised(name)
    graph = ql.convert(model, (3, 32, 32))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    check = ql.verify(model, graph, images)
    assert check.ok, str(check)
    gates = [n for n in graph.nodes if isinstance(n.op, ops.Multiply)]
    squeezed = sum(isinstance(m, Separable) and m.squeeze is not None for m in model.modules())
    assert len(gates) == squeezed and all(graph.by_name[g.inputs[1]].type.shape[1:] == (1, 1) for g in gates)
    blocks = [m for m in model.modules() if isinstance(m, Separable | Bottleneck)]
    if name.startswith("resnet"):
        joined = len(blocks)
    else:  # a shortcut within a group that shares its quantizer
        joined = sum(a.join is b.join is not None for a, b in zip(blocks, blocks[1:]))
        assert joined or name.startswith("mobilenet_v1")
    assert sum(isinstance(n.op, ops.Add) for n in graph.nodes) == joined


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2_fuse_half_imagenet", "mnasnet_b1_fuse_full_imagenet", "mobilenet_v3_large_imagenet",
                                  "resnet50_fuse_full_imagenet", "mobilenet_v3_small_fuse_half_hybrid_imagenet"])  # fmt: skip
def test_every_family_in_cpp(name: str, tmp_path: Path) -> None:
    graph = ql.convert(randomised(name), (3, 32, 32))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours = ql.run(graph, images, integers=True)
    theirs = ql.export(graph, tmp_path / "hls", part="xczu9eg").csim(images, integers=True)
    assert all(torch.equal(ours[edge], theirs[edge]) for edge in ours)
