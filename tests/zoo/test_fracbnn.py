"""FracBNN against the published code: recorded activations, logits of the float model and of the accelerator, accuracy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantlib as ql
import zoo
from zoo import _fracbnn_datapath as datapath
from zoo.fracbnn import GRID


def real(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, size: int = 64) -> np.ndarray:
    return torch.cat([model.eval()(part) for part in x.split(size)]).numpy()


@pytest.fixture(scope="module")
def images(shared):
    with np.load(shared / "golden/fracbnn_cifar10_hls_logits.npz") as golden, np.load(shared / "data/cifar10_test_2000.npz") as data:
        return {**golden, "images": data["images"][golden["order"]]}


@pytest.fixture(scope="module")
def lossless(shared):
    with np.load(shared / "data/cifar10_test_lossless_846.npz") as data:
        return dict(data)


def authors(shared, **options) -> nn.Module:
    return zoo.load(zoo.get("fracbnn_cifar10", **options), shared / "data/fracbnn_cifar10_authors.npz").eval()


def test_keys_are_the_published_ones(shared):
    with np.load(shared / "golden/fracbnn_cifar10_random.npz") as golden:
        published = {k: golden[k].shape for k in golden.files if k.startswith(("conv", "bn", "layer", "linear"))}
    for options in ({}, {"fixed_point": "authors"}, {"fixed_point": GRID}, {"real_weights": True}):
        assert {k: tuple(v.shape) for k, v in zoo.get("fracbnn_cifar10", **options).state_dict().items()} == published


def test_recorded_activations_of_the_published_model(shared):
    model = zoo.load(zoo.get("fracbnn_cifar10"), shared / "golden/fracbnn_cifar10_random.npz").eval()
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    with np.load(shared / "golden/fracbnn_cifar10_random.npz") as golden:
        assert np.array_equal(real(golden["image_u8"]).numpy(), golden["input"])
        y = logits(model, torch.from_numpy(golden["input"]))
        for key in (k for k in golden.files if k.startswith("probe/") and k.split("/")[1] in seen):
            ours = seen[key.split("/")[1]]
            ours = ours if key == "probe/encoder" else ours.flatten(1)[:, ::13]
            # float32 sums of the same terms in another order: an ulp or two of values up to 100
            np.testing.assert_allclose(ours.numpy(), golden[key], atol=1e-4, rtol=0, err_msg=key)
        np.testing.assert_allclose(y, golden["output"], atol=1e-4, rtol=0)  # the tolerance that the reference data states
        gated = [m for m in model.modules() if hasattr(m, "num_high")]
        assert [float(m.num_high) / m.num_out for m in gated] == golden["mask_density"].tolist()


def test_float_logits_with_the_authors_weights(shared, images):
    with np.load(shared / "golden/fracbnn_cifar10_authors_logits.npz") as golden:
        np.testing.assert_allclose(logits(authors(shared), real(images["images"])), golden["logits"], atol=1e-4, rtol=0)  # as above


def test_folded_batch_normalisation_is_restored_exactly(shared):
    model = authors(shared, fixed_point="authors")
    with np.load(shared / "data/fracbnn_cifar10_authors.npz") as header:
        for name, module in model.named_modules():
            if isinstance(module, datapath.DatapathBatchNorm2d):
                key = name.replace(".", "_")
                for ours, theirs in zip(module.folded(), (header[f"{key}_weight"], header[f"{key}_bias"]), strict=True):
                    expected = np.clip(np.floor(256 * theirs.astype(np.float64) + 0.5), -2048, 2047)
                    assert np.array_equal(ours.detach().numpy(), expected), name


def test_accelerator_logits_are_equal(shared, images):
    """64 images of the compiled accelerator: every logit, no tolerance."""
    assert np.array_equal(logits(authors(shared, fixed_point="authors"), real(images["images"])), images["hls_logits"])


def test_the_accelerator_model_gives_the_same_in_float64(shared, images):
    model = authors(shared, fixed_point="authors")
    x = real(images["images"][:4])
    assert np.array_equal(logits(model.double(), x.double()), images["hls_logits"][:4])


def codes(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module")
def accelerator(shared):
    return ql.convert(authors(shared, fixed_point="authors"), (3, 32, 32))


def test_integers_equal_the_accelerator(accelerator, images):
    assert np.array_equal(ql.run(accelerator, codes(images["images"])).numpy(), images["hls_logits"])


@pytest.mark.parametrize("mode", ["fast", "fifo"])
def test_compiled_cpp_equals_the_accelerator(accelerator, images, mode, tmp_path):
    hls = ql.export(accelerator, tmp_path / "hls", part="xczu3eg")
    assert np.array_equal(hls.csim(codes(images["images"][:6]), mode=mode).numpy(), images["hls_logits"][:6])


def test_every_code_of_the_trained_network_on_the_grid(shared, images):
    model = authors(shared, fixed_point=GRID)
    check = ql.verify(model, ql.convert(model, (3, 32, 32)), codes(images["images"][:4]))
    assert check.ok, str(check)


@pytest.mark.slow
def test_all_images_in_integers_and_in_cpp(accelerator, images, lossless, tmp_path):
    hls = ql.export(accelerator, tmp_path / "hls", part="xczu3eg")
    for pictures, expected in ((images["images"], images["hls_logits"]), (lossless["images"], images["lossless_hls_logits"])):
        x = codes(pictures)
        assert np.array_equal(torch.cat([ql.run(accelerator, part) for part in x.split(64)]).numpy(), expected)
        assert np.array_equal(hls.csim(x).numpy(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("bits,fraction", [(16, 8), (16, 9), (13, 6)])
def test_other_grids_convert(shared, images, bits, fraction):
    model = authors(shared, fixed_point=ql.FixedPoint(bits, fraction))
    graph = ql.convert(model, (3, 32, 32))
    x = codes(images["images"][:4])
    assert ql.verify(model, graph, x).ok


@pytest.mark.slow
def test_accelerator_logits_of_846_images(shared, images, lossless):
    y = logits(authors(shared, fixed_point="authors"), real(lossless["images"]))
    assert np.array_equal(y, images["lossless_hls_logits"])
    assert round(100 * float((y.argmax(1) == lossless["labels"]).mean()), 2) == 88.06


@pytest.mark.slow
def test_published_accuracy_and_the_grid_of_ours(shared, lossless):
    x, labels = real(lossless["images"]), lossless["labels"]
    plain = 100 * float((logits(authors(shared), x).argmax(1) == labels).mean())
    grid = 100 * float((logits(authors(shared, fixed_point=GRID), x).argmax(1) == labels).mean())
    assert round(plain, 2) == 89.48
    assert grid >= plain - 0.3
    measured = {claim.what: claim.value for claim in zoo.card("fracbnn_cifar10").measured}
    assert round(grid, 2) in measured.values() and round(plain, 2) in measured.values()


def test_header_layout_with_a_missing_array_is_refused(shared):
    with np.load(shared / "data/fracbnn_cifar10_authors.npz") as header:
        arrays = dict(header)
    del arrays["layer2_1_conv2_threshold"]
    model = zoo.get("fracbnn_cifar10")
    before = model.conv1.weight.clone()
    with pytest.raises(zoo.CheckpointError, match=r"missing 1:\n    layer2.1.conv2.threshold \(1, 32, 1, 1\)"):
        zoo.load(model, arrays)
    assert torch.equal(model.conv1.weight, before)


def test_other_class_counts_and_the_first_training_step():
    model = zoo.get("fracbnn_digits", num_classes=7, real_weights=True)
    model(torch.rand(4, 1, 8, 8)).sum().backward()
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 7)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not set(model.conv1.weight.unique().tolist()) <= {-1.0, 1.0}


def test_every_join_lies_on_the_grid():
    model = zoo.get("fracbnn_digits").eval()
    seen = []
    for module in model.modules():
        if type(module).__name__ in ("Block", "Shortcut"):
            module.register_forward_hook(lambda m, i, o: seen.append(o))
    model(torch.rand(2, 1, 8, 8))
    assert seen and all(torch.equal(v * 2**GRID.fraction, (v * 2**GRID.fraction).round()) for v in seen)


def test_the_mean_of_the_accelerator_needs_a_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        datapath.DatapathMean()(torch.zeros(1, 2, 3, 3))
