"""What the FuSeConv recipes add to training: optimizer, rates, averages, phases, crops; each against a closed form or a plain loop."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from quantlib.training import Course, EachStep, Fit, Images, Ramp, RMSprop, Staircase, TrainingError, fit
from quantlib.training.average import MovingAverage
from quantlib.training.checkpoint import load_checkpoint
from quantlib.training.data import Augment, ImageFiles, Phases, middle_area, normalised, random_area_by_height, resized
from quantlib.training.loop import _Run
from quantlib.training.rectangles import RectangularFiles


def made(count=64, side=4):
    codes = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    return Images(codes, (codes[:, 0, 0, 0] > 127).long(), "made")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def test_rmsprop_is_the_formula_with_epsilon_inside_the_root():
    torch.manual_seed(1)
    w = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = RMSprop(momentum=0.9, alpha=0.8, eps=1e-3).build([w], 0.05, 0.1)
    plain, v, m = w.detach().numpy().copy(), np.zeros(5), np.zeros(5)
    for step in range(6):
        gradient = torch.sin(w.detach() + step)
        w.grad = gradient.clone()
        optimizer.step()
        g = np.sin(plain + step) + 0.1 * plain
        v = 0.8 * v + 0.2 * g * g
        m = 0.9 * m + g / np.sqrt(v + 1e-3)
        plain = plain - 0.05 * m
        np.testing.assert_allclose(w.detach().numpy(), plain, rtol=1e-14)  # float64 sums in another order
    first = nn.Parameter(torch.zeros(1))
    first.grad = torch.ones(1)
    RMSprop().build([first], 1.0, 0.0).step()
    assert float(first.detach()) == -float(1 / torch.tensor(0.1 + 1e-3).sqrt())  # v starts at 0, not at 1


def test_weight_decay_is_the_gradient_of_the_published_penalty():
    decayed, penalised = (nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64)) for _ in range(2))
    a, b = RMSprop().build([decayed], 0.01, 1e-2), RMSprop().build([penalised], 0.01, 0.0)
    for _ in range(4):
        for w, optimizer, penalty in ((decayed, a, 0.0), (penalised, b, 0.5 * 1e-2)):
            optimizer.zero_grad()
            (w.cos().sum() + penalty * (w**2).sum()).backward()
            optimizer.step()
    torch.testing.assert_close(decayed, penalised, rtol=1e-14, atol=0)  # the same sum in another order


@pytest.mark.parametrize(("batch", "images"), [(256, 5000), (1024, 30_000), (768, 12_345)])
def test_staircase_with_warm_up_is_the_published_rate_of_every_iteration(batch, images):
    """0.97 per 2.4 epochs; above the base rate 5 epochs in a line up to lr, after which the exponent has counted from the start."""
    steps, base = math.ceil(images / batch), 0.016
    lr = base * batch / 256
    stairs = Staircase(0.97, 2.4 * steps)
    schedule = EachStep(Ramp(5 * steps, base / lr, stairs) if lr > base else stairs)
    for i in range(20 * steps):
        if lr > base and i <= 5 * steps:
            r = base / lr
            wanted = r + i / (5 * steps) * (1 - r)
        else:
            wanted = 0.97 ** math.floor(i / (2.4 * steps))
        assert schedule.factor(i, 20 * steps) == pytest.approx(wanted, rel=1e-15)  # the line is summed in another order


def test_a_course_goes_through_its_points():
    course = Course(((0, 1.0, 2.0), (2, 0.5, 0.5), (3, 0.25, 0.25)))
    steps = 4
    found = [course.within(e, (b + 1) / steps, 4) for e in range(4) for b in range(steps)]
    assert found == [1 + (e * steps + b) / (2 * steps) for e in range(2) for b in range(1, 5)] + [0.5] * 4 + [0.25] * 4
    assert [course.factor(e, 4) for e in range(4)] == [1.5, 2.0, 0.5, 0.25]


def test_moving_average_is_the_recurrence_over_weights_and_statistics():
    model = net()
    average, plain = MovingAverage(model, 0.5), {k: v.double().clone() for k, v in model.state_dict().items()}
    for n in range(1, 20):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(4, 3, 4, 4))  # moves the statistics
        average.update(n)
        d = min(0.5, (1 + n) / (10 + n))
        for key, value in model.state_dict().items():
            plain[key] = d * plain[key] + (1 - d) * value.double() if value.is_floating_point() else value.clone()
    assert set(average.shadow) == {k for k in plain if not k.endswith("num_batches_tracked")}
    own = {k: v.clone() for k, v in model.state_dict().items()}
    with average.applied():
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value.double(), plain[key].double(), rtol=1e-5, atol=1e-5)  # float32 against float64
    assert all(torch.equal(own[k], v) for k, v in model.state_dict().items())


SETTINGS = Fit(
    4, batch=16, lr=0.01, weight_decay=1e-3, optimizer=RMSprop(), schedule=EachStep(Ramp(3, 0.5, Staircase(0.5, 5))), average=0.9,
    batches=((2, 8), (3, 32)), save_every=1, flip=True,
)  # fmt: skip


def test_averages_are_tested_kept_and_resumed_exactly(tmp_path, monkeypatch):
    data = made()
    whole = net()
    rows = fit(whole, data, data, SETTINGS, out=tmp_path / "whole")
    killed, saves = net(), []
    save = _Run._save

    def dies(self):
        save(self)
        saves.append(1)
        if len(saves) == 9:  # within the third epoch, whose batches have another size
            raise KeyboardInterrupt

    monkeypatch.setattr(_Run, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(killed, data, data, SETTINGS, out=tmp_path / "cut")
    monkeypatch.setattr(_Run, "_save", save)
    again = net()
    rest = fit(again, data, data, SETTINGS, out=tmp_path / "cut", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert [replace(r, seconds=0) for r in rows] == [replace(r, seconds=0) for r in rest]
    (last, _), (cut, _) = (load_checkpoint(tmp_path / name / "last.safetensors") for name in ("whole", "cut"))
    assert any(k.startswith("average/") for k in last) and all(torch.equal(last[k], cut[k]) for k in last)
    best, _ = load_checkpoint(tmp_path / "whole" / "best.safetensors")
    if rows[-1].test_accuracy == max(row.test_accuracy for row in rows):
        assert all(torch.equal(best[k.removeprefix("average/")], last[k]) for k in last if k.startswith("average/"))
    plain = fit(net(), data, data, replace(SETTINGS, average=0.0))
    assert [row.loss for row in plain] == [row.loss for row in rows]  # the average never trains


def test_later_epochs_have_batches_of_their_own():
    sizes = []

    class Seen(nn.Module):
        def forward(self, outputs, labels, images):
            sizes.append(len(labels))
            return F.cross_entropy(outputs, labels)

    fit(net(), made(), made(16), replace(SETTINGS, average=0.0), Seen())
    assert sizes == [16] * 4 + [16] * 4 + [8] * 8 + [32] * 2
    with pytest.raises(TrainingError, match="batch of 100"):
        fit(net(), made(), made(), replace(SETTINGS, batches=((1, 100),), drop_last=True))


@given(st.integers(8, 500), st.integers(8, 500), st.integers(0, 2**32), st.sampled_from([0.08, 0.5]))
def test_crops_by_height_are_inside_and_of_the_published_areas(width, height, seed, least):
    generator = np.random.default_rng(seed)
    left, top, w, h = area = random_area_by_height(width, height, generator, least)
    assert 0 <= left <= width - w and 0 <= top <= height - h and w > 0 and h > 0
    if area == middle_area(width, height, 7 / 8):
        return
    assert max(least, 0.1) * width * height <= w * h <= width * height
    assert round(h * 3 / 4) <= w <= round(h * 4 / 3)  # the width is the rounded product of the height and a ratio in 3:4 .. 4:3


def test_crops_by_height_draw_ratio_and_height_uniformly():
    """The ratio is uniform itself, not its logarithm, and the height an integer between the two limits."""
    generator = np.random.default_rng(0)
    drawn = [random_area_by_height(1000, 1000, generator) for _ in range(4000)]
    ratios = np.array([w / h for _, _, w, h in drawn if (w, h) != (875, 875)])
    small = ratios[[w * h < 300_000 for _, _, w, h in drawn if (w, h) != (875, 875)]]  # where the image does not cut ratios off
    assert len(small) > 800
    counts = np.histogram(small, 4, (3 / 4, 4 / 3))[0]
    assert counts.min() > 0.75 * len(small) / 4 and counts.max() < 1.3 * len(small) / 4


def test_the_middle_is_cut_out_and_then_resized(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    files = ImageFiles((str(tmp_path / "a.png"),), torch.zeros(1).long(), "a", size=28, resize=32, cut_first=True, resample="bicubic")
    middle = pixels[19:71, 4:56]  # int(60 * 28 / 32) = 52 of the shorter side
    wanted = np.asarray(Image.fromarray(middle).resize((28, 28), Image.Resampling.BICUBIC))
    assert np.array_equal(files.test_pixels(files.decode(0)), wanted)


def test_phases_take_turns(tmp_path):
    paths = []
    for n in range(3):
        Image.fromarray(np.full((40, 50, 3), 80 * n, np.uint8)).save(tmp_path / f"{n}.png")
        paths.append(str(tmp_path / f"{n}.png"))
    parts = tuple(
        (first, ImageFiles(tuple(paths), torch.arange(3), "p", size=s, resize=s, unreadable={})) for first, s in ((0, 8), (2, 16))
    )
    data = Phases(parts)
    assert len(data) == 3 and data.name == "p, from epoch 2 16 pixels"
    for epoch, side in ((0, 8), (1, 8), (2, 16), (5, 16)):
        ((x, y),) = data.read([torch.tensor([2, 0])], None, (0, epoch))
        assert x.shape == (2, 3, side, side) and y.tolist() == [2, 0]
    (tmp_path / "1.png").write_bytes(b"broken")
    list(data.read([torch.arange(3)], None, (0, 3)))
    assert list(data.unreadable) == [paths[1]]


def test_small_images_are_enlarged_as_by_an_image_library():
    codes = made(2, 8).codes
    ours = resized(codes, 21)
    for code, image in zip(codes, ours):
        library = np.asarray(Image.fromarray(code.permute(1, 2, 0).numpy()).resize((21, 21), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(image.numpy().astype(int) - library).max() <= 1  # the library rounds after either axis
    assert resized(codes, 0) is codes and resized(codes, 8) is codes


def test_images_are_enlarged_shifted_and_then_normalised():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
    data = replace(made(4, 8), side=16, mean=mean, std=std)
    ((x, _),) = data.read([torch.arange(4)], None, (0, 0))
    channel = torch.tensor(mean).reshape(3, 1, 1), torch.tensor(std).reshape(3, 1, 1)
    assert torch.equal(x, (resized(data.codes, 16).float() / 255 - channel[0]) / channel[1])
    assert torch.equal(normalised(x, (0.0,), (1.0,)), x)


def test_rectangles_are_sorted_by_ratio_and_rounded_down(tmp_path):
    """Eight images, two batches: each is resized, and the middle of its batch's rectangle cut out."""
    sizes = [(40, 80), (80, 40), (50, 60), (64, 64), (60, 50), (90, 60), (44, 66), (70, 50)]
    draw, paths = np.random.default_rng(0), []
    for n, (w, h) in enumerate(sizes):
        Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
        paths.append(str(tmp_path / f"{n}.png"))
    data = RectangularFiles(tuple(paths), torch.arange(8), "r", size=24, resize=27, mean=(0.0,), std=(1.0,))
    found = list(data.read(torch.arange(8).split(5), None, (0, 0)))
    order = sorted(range(8), key=lambda n: round(sizes[n][0] / sizes[n][1], 5))
    assert [y.tolist() for _, y in found] == [order[:5], order[5:]]
    for (x, _), members in zip(found, (order[:5], order[5:])):
        r = sum(round(sizes[n][0] / sizes[n][1], 5) for n in members) / len(members)
        high, wide = (math.floor(int(24 / r) / 8) * 8, 24) if r < 1 else (24, math.floor(int(24 * r) / 8) * 8)
        assert x.shape == (len(members), 3, high, wide)
        for image, n in zip(x, members):
            w, h = (int(27 * side / min(sizes[n])) for side in sizes[n])
            left, top = round((w - wide) / 2), round((h - high) / 2)
            with Image.open(paths[n]) as picture:
                wanted = picture.convert("RGB").resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + wide, top + high))
            assert np.array_equal((image * 255).round().numpy().transpose(1, 2, 0), np.asarray(wanted))
    ((x, y),) = data.read([torch.arange(3)], Augment(), (0, 0))
    assert x.shape == (3, 3, 24, 24) and y.tolist() == [0, 1, 2]  # training images are squares
