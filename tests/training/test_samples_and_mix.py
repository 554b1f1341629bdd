"""Multi-sample dropout and mixed images: against the same written out, bit by bit, and in the training loop."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from quantlib.layers import LearnedScaleReLU, ScaledIntConv2d, ScaledIntLinear, SharedHardTanh, TruncAvgPool
from quantlib.training import CheckpointError, CrossEntropy, Fit, Images, accuracy, fit, predictions
from quantlib.training.checkpoint import save_checkpoint
from quantlib.training.mix import MixedImages, MixedLoss, rectangle
from quantlib.training.samples import DropoutSamples, MeanOverSamples, dropped, prediction, right_on_average


class Net(nn.Module):
    """The end of quantized ProxylessNAS: a shared quantizer, ReLU, truncating pool, linear layer with a quantized bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.bn = ScaledIntConv2d(1, 6, 3, padding=1, bits=4), nn.BatchNorm2d(6)
        self.shared = SharedHardTanh(4, init=4.0)
        self.again = self.shared
        self.relu, self.pool = LearnedScaleReLU(4, init=2.0, return_quant_tensor=True), TruncAvgPool(4)
        self.output = ScaledIntLinear(6, 5, bits=4, per_channel=False, bias_bits=12)
        self.passes = 0

    def pooled(self, x):
        self.passes += 1
        return self.pool(self.relu(self.shared(self.bn(self.conv(x))))).flatten(1)

    def forward(self, x):
        return self.output(self.pooled(x))


def data(count=40):
    generator = np.random.default_rng(1)
    codes = torch.from_numpy(generator.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8))
    return Images(codes, torch.from_numpy(generator.integers(0, 5, count)), "made")


def test_samples_are_separate_passes_with_the_same_masks():
    """Outputs, loss and every gradient of 7 samples equal 7 passes of the classifier, bit by bit, and the backbone runs once."""
    x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 5, (8,))
    ours, theirs = Net(), Net()
    sampled = DropoutSamples(ours, samples=7, rate=0.2)
    torch.manual_seed(11)
    outputs = sampled(x)
    loss = MeanOverSamples(CrossEntropy(0.1))(outputs, y, x)
    loss.backward()
    assert ours.passes == 1 and outputs.shape == (7, 8, 5)

    features = theirs.pooled(x)
    torch.manual_seed(11)
    masks = [F.dropout(torch.ones(8, 6), 0.2) for _ in range(7)]  # 0 or 1 / 0.8
    assert len({m.numpy().tobytes() for m in masks}) == 7
    torch.manual_seed(11)
    separate = []
    for mask in masks:
        value = F.dropout(features.value, 0.2)
        assert torch.equal(value, features.value * mask)
        separate.append(theirs.output(features.set(value=value)))
    reference = torch.stack([F.cross_entropy(out, y, label_smoothing=0.1) for out in separate]).mean()
    reference.backward()
    assert torch.equal(outputs, torch.stack(separate)) and torch.equal(loss, reference)
    assert torch.equal(prediction(outputs), torch.stack(separate).mean(0))
    assert torch.equal(right_on_average(outputs, y), torch.stack(separate).mean(0).argmax(1) == y)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_dropped_values_keep_the_grid_they_came_from():
    features = Net().eval().pooled(torch.rand(3, 1, 4, 4))
    torch.manual_seed(0)
    after = dropped(features, 0.5)
    torch.manual_seed(0)
    assert torch.equal(after.value, dropped(features.value, 0.5)) and (after.value != features.value).any()
    assert torch.equal(after.scale, features.scale) and torch.equal(after.bit_width, features.bit_width)


def test_evaluation_is_one_pass_without_dropout():
    model = Net().eval()
    x = torch.rand(4, 1, 4, 4)
    assert torch.equal(DropoutSamples(model, 3, 0.2).eval()(x), model(x))
    with pytest.raises(ValueError, match="samples=0"):
        DropoutSamples(model, 0, 0.2)
    with pytest.raises(TypeError, match="Linear has no method pooled"):
        DropoutSamples(nn.Linear(1, 1), 2, 0.2)


def test_trained_as_samples(tmp_path):
    """The loop calls the wrapper once per step, tests and saves the model, and refuses to continue as another wrapper."""
    images, settings = data(), Fit(epochs=2, batch=8, lr=0.05, save_every=2)
    loss = MeanOverSamples(CrossEntropy(0.1))

    def run(samples, out, resume=False):
        model = Net()
        wrapper = DropoutSamples(model, samples, 0.2)
        rows = fit(model, images, images, settings, loss, out=out, score=right_on_average, trained_as=wrapper, resume=resume)
        return model, rows

    model, rows = run(4, tmp_path)
    assert model.passes == 2 * (5 + 5)  # training and test batches of two epochs
    best = load_file(tmp_path / "best.safetensors")
    assert set(best) == set(model.state_dict()) and "again.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value" in best
    twin = Net()
    twin.load_state_dict(best)
    assert accuracy(predictions(twin, images), images.labels) == max(r.test_accuracy for r in rows)
    assert run(4, tmp_path, resume=True)[1] == rows
    with pytest.raises(CheckpointError, match="samples=4, rate=0.2.*samples=3"):
        run(3, tmp_path, resume=True)
    facts = json.loads((tmp_path / "best.json").read_text())
    assert facts["run"]["kinds"]["trained_as"] == "DropoutSamples(samples=4, rate=0.2)"


def test_a_run_goes_on_exactly_where_it_stopped(tmp_path):
    """Stopped in the middle of an epoch, with masks and mixtures on: weights, rows and checkpoints are those of the run that was not."""
    images, settings = data(), Fit(epochs=3, batch=8, lr=0.05, save_every=2)

    def run(out, stop=0):
        model = Net()
        mix = MixedImages(DropoutSamples(model, 3, 0.2), 1.0)
        loss = MixedLoss(MeanOverSamples(CrossEntropy(0.1)), mix)
        if stop:
            count = iter(range(stop))

            def breaks(*_):
                if next(count, None) is None:
                    raise KeyboardInterrupt

            mix.register_forward_pre_hook(breaks)
        rows = fit(model, images, images, settings, loss, out=out, score=right_on_average, trained_as=mix, resume=True)
        return [(r.loss, r.train_accuracy, r.test_accuracy) for r in rows]

    whole = run(tmp_path / "whole")
    for stop in (3, 6, 1):  # after 3 steps; 6 after the checkpoint of step 2; 1 after the one of step 2 of the second epoch
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", stop)
    assert run(tmp_path / "parts") == whole
    for name in ("best.safetensors", "log.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_tensors_with_several_names_are_saved_under_each(tmp_path):
    v = torch.randn(3)
    path = save_checkpoint(tmp_path / "c.safetensors", {"a": v, "b": v, "c": torch.zeros(0), "d": torch.zeros(0)}, {})
    back = load_file(path)
    assert torch.equal(back["a"], v) and torch.equal(back["b"], v) and set(back) == set("abcd")


# ---------------------------------------------------------------- mixed images


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_mixed_images_and_their_loss(kind):
    """Pixels come from the image or its partner in the share that weighs the labels; the loss is that of weighted labels."""
    x, y = torch.rand(6, 2, 9, 7), torch.randint(0, 4, (6,))
    mix = MixedImages(nn.Identity(), rate=1.0, chance=1.0, kind=kind)
    loss, weights = MixedLoss(CrossEntropy(0.1), mix), []
    for seed in range(12):
        torch.manual_seed(seed)
        mixed = mix(x)
        partner = x[mix.partner]
        weights.append(mix.weight)
        if kind == "mixup":
            assert torch.equal(mixed, mix.weight * x + (1 - mix.weight) * partner)
        else:
            theirs = ((mixed == partner) & (x != partner)).any(1)
            share = theirs[mix.partner != torch.arange(6)].float().mean((1, 2))  # an image may be its own partner
            assert ((mixed == x) | (mixed == partner)).all()
            # a mean of ones in float32 against a quotient of integers
            torch.testing.assert_close(1 - share, torch.full_like(share, mix.weight), rtol=0, atol=1e-6)
        target = mix.weight * F.one_hot(y, 4) + (1 - mix.weight) * F.one_hot(y[mix.partner], 4)
        outputs = torch.randn(6, 4)
        soft = 0.9 * target + 0.1 / 4
        # two weighted means of float32 logarithms against one
        torch.testing.assert_close(loss(outputs, y, x), -(soft * outputs.log_softmax(1)).sum(1).mean(), rtol=0, atol=1e-6)
    assert len(set(weights)) > 6 and 0 <= min(weights) <= max(weights) <= 1
    assert torch.equal(mix.eval()(x), x)


def test_chance_of_mixing():
    x = torch.rand(4, 1, 3, 3)
    mix = MixedImages(nn.Identity(), 1.0, chance=0.5, kind="mixup")
    torch.manual_seed(0)
    unchanged = sum(torch.equal(mix(x), x) for _ in range(200))
    assert 70 < unchanged < 130  # 100, standard deviation 7
    never = MixedImages(nn.Identity(), 1.0, chance=0.0)
    assert torch.equal(never(x), x) and never.weight == 1
    loss, out, y = MixedLoss(CrossEntropy(), never), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.equal(loss(out, y, x), F.cross_entropy(out, y))
    with pytest.raises(ValueError, match="'blend'"):
        MixedImages(nn.Identity(), 1.0, 0.5, "blend")


def test_rectangles_lie_inside():
    torch.manual_seed(1)
    for weight in (0.0, 0.3, 0.9, 1.0):
        spans = [rectangle(20, 30, weight) for _ in range(50)]
        assert all(0 <= r.start <= r.stop <= 20 and 0 <= c.start <= c.stop <= 30 for r, c in spans)
        side = (1 - weight) ** 0.5
        assert max(r.stop - r.start for r, _ in spans) == 2 * (int(20 * side) // 2)


def test_mixed_dropout_samples_train():
    images, model = data(), Net()
    mix = MixedImages(DropoutSamples(model, 2, 0.2), 1.0)
    loss = MixedLoss(MeanOverSamples(CrossEntropy(0.1)), mix)
    rows = fit(model, images, images, Fit(2, 8, lr=0.05), loss, score=right_on_average, trained_as=mix)
    again = Net()
    mix = MixedImages(DropoutSamples(again, 2, 0.2), 1.0)
    assert repr(mix) == "MixedImages(DropoutSamples(samples=2, rate=0.2), rate=1.0, chance=0.5, kind='cutmix')"
    loss = MixedLoss(MeanOverSamples(CrossEntropy(0.1)), mix)
    same = fit(again, images, images, Fit(2, 8, lr=0.05), loss, score=right_on_average, trained_as=mix)
    assert [r.loss for r in rows] == [r.loss for r in same]
