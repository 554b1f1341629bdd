"""The loop: it learns, repeats itself, says what is wrong, and continues after a kill as if nothing had happened."""

import json
import os
import random
import signal
import time

import pytest
import torch
from PIL import Image
from torch import nn

from quantlib.layers import BinaryConv2d, FractionalConv2d, QuantSign, RPReLU
from quantlib.training import (
    SGD,
    CheckpointError,
    Constant,
    DataError,
    EachStep,
    Fit,
    Group,
    Images,
    Linear,
    Ramp,
    Steps,
    TrainingError,
    accuracy,
    checkpoint,
    confusion,
    fit,
    image_files,
    predictions,
    right_among,
)
from quantlib.training.checkpoint import load_checkpoint, save_checkpoint
from quantlib.training.report import write


def made(count: int = 200, size: int = 2) -> Images:
    codes = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    return Images(codes, (codes[:, 0, 0, 0] > 127).long(), "made")


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def small_net() -> nn.Module:
    """Everything that carries state: batch normalisation, dropout, gates, learned shifts."""
    torch.manual_seed(0)
    return nn.Sequential(
        BinaryConv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), QuantSign(2), FractionalConv2d(4, 4, 3), nn.BatchNorm2d(4), RPReLU(4),
        nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


def test_fit_learns_and_repeats():
    data = made()

    def run():
        return fit(line(), data, data, Fit(epochs=5, lr=0.1, batch=16))

    first, second = run(), run()
    assert first[-1].test_accuracy > 0.9 and [r.loss for r in first] == [r.loss for r in second]
    assert [round(r.lr, 6) for r in first] == [0.1, 0.08, 0.06, 0.04, 0.02]
    assert all(r.images == 200 and r.images_per_second > 0 for r in first)


def test_one_step_is_plain_gradient_descent():
    """One batch of everything, against the same written out."""
    data, model, twin = made(8), line(), line()
    fit(model, data, data, Fit(1, 8, lr=0.5, weight_decay=0.25, optimizer=SGD(momentum=0.0), schedule=Constant()))
    nn.functional.cross_entropy(twin(data.codes.float() / 255), data.labels).backward()
    for ours, p in zip(model.parameters(), twin.parameters(), strict=True):
        # the batch arrives in another order, and its sums are rounded in that order
        torch.testing.assert_close(ours.detach(), (p - 0.5 * (p.grad + 0.25 * p)).detach(), rtol=0, atol=1e-6)


def test_groups_are_trained_with_their_own_settings(tmp_path):
    """Two epochs of one batch each against the same written out: the bias has its own rate and a moving momentum; a score of our own."""
    data, model, twin = made(8), line(), line()
    group = Group("bias", lr=0.25, momentum=0.5, schedule=Steps((1,), 0.5), momentum_schedule=Ramp(1, 0.5))
    settings = Fit(2, 8, lr=0.5, optimizer=SGD(momentum=0.0), schedule=Constant(), groups=(group,))
    rows = fit(model, data, data, settings, out=tmp_path, score=distance, note=lambda: {"weights": 8})
    velocity = torch.zeros(2)
    for lr, momentum in ((0.25, 0.25), (0.125, 0.5)):
        twin.zero_grad()
        nn.functional.cross_entropy(twin(data.codes.float() / 255), data.labels).backward()
        velocity = momentum * velocity + twin[1].bias.grad
        with torch.no_grad():
            twin[1].bias -= lr * velocity
            twin[1].weight -= 0.5 * twin[1].weight.grad
    for ours, p in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), p.detach(), rtol=0, atol=1e-6)  # another order of the batch, rounded in that order
    assert [row.notes for row in rows] == [{"weights": 8}] * 2
    assert rows[1].test_accuracy == pytest.approx(float(distance(predictions(model, data), data.labels).mean()), abs=1e-7)  # float32 scores
    assert json.loads((tmp_path / "best.json").read_text())["notes"] == {"weights": 8}
    assert fit(line(), data, data, settings, out=tmp_path, resume=True, score=distance) == rows
    with pytest.raises(CheckpointError, match="kinds was .*distance"):
        fit(line(), data, data, settings, out=tmp_path, resume=True)


def distance(outputs, labels):
    return (outputs.softmax(1)[torch.arange(len(labels)), labels]).clamp(0, 1)


def test_a_checkpoint_of_an_older_version_continues(tmp_path):
    """A setting that the checkpoint does not know had its default."""
    data = made(16)
    fit(line(), data, data, Fit(1, 8), out=tmp_path)
    tensors, facts = load_checkpoint(tmp_path / "last.safetensors")
    del facts["run"]["settings"]["groups"]
    for row in facts["rows"]:
        del row["notes"]
    save_checkpoint(tmp_path / "last.safetensors", tensors, facts)
    assert len(fit(line(), data, data, Fit(1, 8), out=tmp_path, resume=True)) == 1
    with pytest.raises(CheckpointError, match="groups was \\[\\], now"):
        fit(line(), data, data, Fit(1, 8, groups=(Group("bias", lr=1.0),)), out=tmp_path, resume=True)


def test_images_that_are_shares_of_256():
    data = made(4)
    halves = Images(data.codes, data.labels, "made", levels=256)
    assert torch.equal(next(iter(halves.read([torch.arange(4)], None, (0, 0))))[0], data.codes / 256)
    seen = []
    predictions(nn.Sequential(nn.Flatten(), Spy(seen)), halves)
    assert torch.equal(seen[0], data.codes.flatten(1) / 256)


class Spy(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(x)
        return x


def test_a_rate_for_each_step_and_further_scores(tmp_path):
    """Three epochs of two steps, written out: rates 1, 4/5, ... 0 of 0.5, and the means of two more numbers."""
    data, seen = made(8), []

    class Watched(SGD):
        def build(self, parameters, lr, weight_decay):
            optimizer = super().build(parameters, lr, weight_decay)
            optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(o.param_groups[0]["lr"]))
            return optimizer

    def settings(epochs=3):
        return Fit(epochs, 4, lr=0.5, optimizer=Watched(), schedule=EachStep(Linear(over=-1)))

    def entropy(outputs, labels):
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    calls = []
    also = {"top-5": right_among, "cross entropy": entropy}
    model = line()
    rows = fit(model, data, data, settings(), out=tmp_path, also=also, each_epoch=lambda rows: calls.append(len(rows)))
    assert seen == [0.5 * (1 - t / 5) for t in range(6)] and [r.lr for r in rows] == [0.5, 0.5 * (1 - 2 / 5), 0.5 * (1 - 4 / 5)]
    assert calls == [1, 2, 3] and [r.more["train top-5"] for r in rows] == [1.0] * 3  # there are two classes
    assert [round(r.more["train cross entropy"], 5) for r in rows] == [round(r.loss, 5) for r in rows]  # sums of float32 in other orders
    # a mean of batches' float32 sums against one mean
    assert rows[-1].more["test cross entropy"] == pytest.approx(entropy(predictions(model, data), data.labels).mean().item(), rel=1e-6)
    header, *lines = (tmp_path / "log.csv").read_text().splitlines()
    assert header.endswith(",images,train top-5,train cross entropy,test top-5,test cross entropy") and len(lines) == 3
    assert fit(line(), data, data, settings(), out=tmp_path, resume=True, also=also) == rows
    with pytest.raises(CheckpointError, match="also"):
        fit(line(), data, data, settings(), out=tmp_path, resume=True)


def test_images_per_epoch_and_last_batch():
    data = made(50)
    assert [r.images for r in fit(line(), data, data, Fit(2, 8, images=20))] == [20, 20]
    assert [r.images for r in fit(line(), data, data, Fit(1, 8, drop_last=True))] == [48]
    with pytest.raises(TrainingError, match="fewer than one batch of 64"):
        fit(line(), data, data, Fit(1, 64, drop_last=True))


def test_what_a_run_leaves(tmp_path):
    data, model = made(60), line()
    rows = fit(model, data, data, Fit(4, 16, lr=0.05, tensorboard=True), out=tmp_path)
    log = (tmp_path / "log.csv").read_text().splitlines()
    assert log[0] == "number,loss,train_accuracy,test_accuracy,lr,images" and len(log) == 5
    assert [float(line.split(",")[1]) for line in log[1:]] == [r.loss for r in rows]
    best = max(range(4), key=lambda k: (rows[k].test_accuracy, k))
    assert json.loads((tmp_path / "best.json").read_text())["epoch"] == best + 1
    weights, _ = load_checkpoint(tmp_path / "best.safetensors")
    twin = line()
    twin.load_state_dict(weights)
    assert accuracy(predictions(twin, data), data.labels) == rows[best].test_accuracy
    last, _ = load_checkpoint(tmp_path / "last.safetensors")
    assert torch.equal(last["model/1.weight"], model[1].weight)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "best.json", "best.safetensors", "last.safetensors", "log.csv", "speed.csv",
    ]  # fmt: skip


def test_a_finished_run_resumes_to_itself_and_other_settings_are_refused(tmp_path):
    data, model = made(40), line()
    rows = fit(model, data, data, Fit(2, 16), out=tmp_path)
    again = line()
    assert fit(again, data, data, Fit(2, 16), out=tmp_path, resume=True) == rows
    assert torch.equal(again[1].weight, model[1].weight)
    with pytest.raises(CheckpointError, match="batch was 16, now 8; schedule"):
        fit(line(), data, data, Fit(2, 8, schedule=Steps((1.0,))), out=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="40 images"):
        fit(line(), made(39), data, Fit(2, 16), out=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="test was 'made, 40 images', now 'made, 41 images'"):
        fit(line(), data, made(41), Fit(2, 16), out=tmp_path, resume=True)
    save_checkpoint(tmp_path / "last.safetensors", {"a": torch.zeros(1)}, None)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        fit(line(), data, data, Fit(2, 16), out=tmp_path, resume=True)


def test_a_fresh_start_forgets_the_old_run(tmp_path):
    data, model = made(40), line()
    fit(line(), data, data, Fit(2, 16), out=tmp_path)
    with torch.no_grad():
        model[1].weight.fill_(float("nan"))
    with pytest.raises(TrainingError):
        fit(model, data, data, Fit(2, 16), out=tmp_path)
    assert not (tmp_path / "last.safetensors").exists()


@pytest.mark.slow
def test_compiled_training():
    """torch.compile sums in another order, so only the course is compared."""
    data = made(64, 6)
    plain, compiled = (fit(small_net(), data, data, Fit(2, 16, compile=c)) for c in (False, True))
    assert all(abs(a.loss - b.loss) < 0.1 for a, b in zip(plain, compiled, strict=True))


def test_a_loss_that_is_not_finite_stops_the_run():
    data, model = made(16), line()
    with torch.no_grad():
        model[1].weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="nan in epoch 1, at step 2"):
        fit(model, data, data, Fit(1, 8))


def test_bfloat16_trains_and_leaves_a_plain_model():
    import accelerate

    data, model = made(64, 6), small_net()
    accelerate.state.AcceleratorState._reset_state(True)  # precision is a setting of the whole process
    try:
        rows = fit(model, data, data, Fit(2, 16, precision="bf16", channels_last=True))
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    assert all(r.loss < 2 for r in rows) and all(p.dtype == torch.float32 for p in model.parameters())
    assert "forward" not in vars(model) and predictions(model, data).dtype == torch.float32
    assert model[0].weight.is_contiguous()


def test_unreadable_files_are_reported_and_do_not_end_an_epoch(tmp_path, capfd):
    for n in range(8):
        path = tmp_path / "train" / f"c{n % 2}" / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 10), (30 * n, 0, 0)).save(path)
    path.write_bytes(b"broken")

    def run(strict):
        data = image_files(tmp_path, "train", size=8, resize=8, strict=strict)
        torch.manual_seed(0)
        return fit(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), data, data, Fit(2, 4))

    assert [r.images for r in run(False)] == [8, 8]
    said = capfd.readouterr().out
    assert said.count("unreadable, left out") >= 1 and str(path) in said.replace("\n", "")
    with pytest.raises(DataError, match="7.png"):
        run(True)


# Kills. The runs live in forked children, so that each costs no imports; the parent keeps its hands off accelerate before it forks.

SETTINGS = Fit(epochs=3, batch=8, lr=0.02, weight_decay=1e-4, shift=1, flip=True, gate_target=1.0, channels_last=True, save_every=2)


def child(out, before=lambda: None) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        before()
        fit(small_net(), made(50, 6), made(20, 6), SETTINGS, out=out, resume=True)
        code = 0
    finally:
        os._exit(code)


def finish(out) -> None:
    assert os.waitpid(child(out), 0)[1] == 0


def same(a, b) -> None:
    """Weights, optimizer state, sums, rows and logs, bit by bit; only what a clock says differs."""
    (one, facts_one), (two, facts_two) = (load_checkpoint(folder / "last.safetensors") for folder in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    for facts in (facts_one, facts_two):
        facts.pop("seconds")
        for row in facts["rows"]:
            row.pop("seconds")
    assert facts_one == facts_two
    for name in ("log.csv", "best.safetensors", "best.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    finish(out)
    return out, time.monotonic() - start


def test_killed_at_random_moments(uninterrupted, tmp_path):
    whole, seconds = uninterrupted
    chance, kills, done = random.Random(3), 0, False
    for _ in range(25):
        pid = child(tmp_path)
        time.sleep(chance.uniform(0, 0.4 * seconds))
        os.kill(pid, signal.SIGKILL)
        done = os.waitpid(pid, 0)[1] == 0
        kills += not done
        if done:
            break
    if not done:
        finish(tmp_path)
    assert kills >= 3
    same(whole, tmp_path)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("write", range(1, 12, 2))
def test_killed_around_a_write(uninterrupted, tmp_path, write, after):
    """The process dies immediately before or after the n-th rename: between checkpoint, logs and best weights."""
    count, replace = 0, os.replace

    def dies(source, target):
        nonlocal count
        count += 1
        if count == write and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if count == write:
            os.kill(os.getpid(), signal.SIGKILL)

    def before():
        checkpoint.os = type("os", (), {**vars(os), "replace": staticmethod(dies)})

    assert os.waitpid(child(tmp_path, before), 0)[1] == signal.SIGKILL
    finish(tmp_path)
    same(uninterrupted[0], tmp_path)


def test_metrics():
    y, labels = torch.tensor([[1.0, 0], [0, 1], [1, 0]]), torch.tensor([0, 1, 1])
    assert accuracy(y, labels) == 2 / 3 and confusion(y, labels, 2).tolist() == [[1, 0], [1, 1]]


def test_a_report_is_replaced_whole(tmp_path):
    write(tmp_path / "a" / "r.html", "one")
    write(tmp_path / "a" / "r.html", "two")
    assert [(p.name, p.read_text()) for p in (tmp_path / "a").iterdir()] == [("r.html", "two")]
