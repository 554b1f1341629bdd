"""Schedules, optimizer state, losses and the switches between steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from quantlib.layers import BinaryConv2d, FractionalConv2d, QuantSign
from quantlib.training import (
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    CrossEntropy,
    Distillation,
    EachStep,
    Group,
    Linear,
    Ramp,
    Steps,
    Warmup,
    load_teacher,
)
from quantlib.training.losses import gate_pull
from quantlib.training.optim import optimizer_state, restore_optimizer, split_parameters, torch_groups
from quantlib.training.steps import OPEN, density, use_gating, use_real_weights


def test_schedules():
    def factors(schedule, epochs=5):
        return [schedule.factor(e, epochs) for e in range(epochs)]

    assert factors(Constant()) == [1] * 5
    assert factors(Linear()) == [1 - e / 5 for e in range(5)]
    assert factors(Linear(over=250))[-1] == 1 - 4 / 250
    assert factors(Steps((0.4, 3), 0.5)) == [1, 1, 0.5, 0.25, 0.25]
    published = [0.1 ** sum(e >= k for k in (100, 150, 200)) for e in range(250)]
    assert factors(Steps((0.4, 0.6, 0.8)), 250) == published == factors(Steps((100, 150, 200)), 250)
    assert factors(Cosine())[0] == 1 and np.allclose(factors(Cosine(0.2), 2), [1, 0.6], rtol=0, atol=1e-15)  # cos is not exact
    assert factors(Warmup(2, Linear())) == [0.5, 0.8, 0.6, 1 - 3 / 5, 1 - 4 / 5]
    published = [*np.interp([0, 1, 2, 3], [0, 3], [5, 1]), 0.25]
    assert np.allclose([Ramp(3, 5.0, Cosine()).factor(e, 6) for e in range(5)], published, rtol=0, atol=1e-15)  # cos is not exact


def test_groups_take_parameters_once_and_in_order():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    groups = (Group(r"\.bias$", lr=0.5, momentum=0.2), Group(r"^2\.", weight_decay=0.25, nesterov=True))
    parts = split_parameters(model.named_parameters(), groups)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [[names[id(p)] for p in members] for _, members in parts]
    assert found == [["0.bias", "1.bias", "2.bias"], ["2.weight"], ["0.weight", "1.weight"]]
    built = SGD(0.9).build(torch_groups(parts), 0.1, 0.01).param_groups
    settings = [tuple(g[k] for k in ("lr", "weight_decay", "momentum", "nesterov")) for g in built]
    assert settings == [(0.5, 0.01, 0.2, False), (0.1, 0.25, 0.9, True), (0.1, 0.01, 0.9, False)]
    assert len(split_parameters(model.named_parameters(), (Group(""),))) == 1
    with pytest.raises(ValueError, match="no parameter is left for the group 'gamma'; there are 0.weight, 0.bias"):
        split_parameters(model.named_parameters(), (Group("gamma"),))


def test_published_schedules_of_proxylessnas_with_their_warmup():
    """Step, linear and cosine with w epochs of warm-up, against the closed forms, number by number."""
    epochs, milestones = 60, (15, 30, 45)
    for w in (0, 5, 20):
        warm = [(e + 1) / w for e in range(w)]
        rest = range(w, epochs)
        closed = {
            "step": [0.1 ** sum(m <= e for m in milestones) for e in rest],
            "linear": [1 - (e - w) / (epochs - w) for e in rest],
            "cosine": [(1 + math.cos(math.pi * (e - w) / (epochs - w))) / 2 for e in rest],
        }
        ours = {"step": Steps(tuple(m - w for m in milestones)), "linear": Linear(), "cosine": Cosine()}
        for name, then in ours.items():
            schedule = Warmup(w, then, first=True)
            assert [schedule.factor(e, epochs) for e in range(epochs)] == warm + closed[name], (name, w)


def test_label_smoothing_against_its_formula():
    """Mean over the batch of (1 - s) (-log p_target) + s mean_j (-log p_j), the target among the j."""
    torch.manual_seed(4)
    out, labels = torch.randn(9, 7, dtype=torch.float64), torch.randint(0, 7, (9,))
    for s in (0.0, 0.1, 0.5):
        p = out.exp() / out.exp().sum(1, keepdim=True)
        rows = [(1 - s) * -p[n, labels[n]].log() + s * -p[n].log().mean() for n in range(9)]
        # logarithms of quotients against differences of logarithms, in float64
        torch.testing.assert_close(CrossEntropy(s)(out, labels, out), sum(rows) / 9, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [Adam(), AdamW(), SGD(), SGD(0.0)])
def test_optimizer_state_goes_through_tensors_and_json(kind):
    """A twin restored from the state takes the same next step, bit by bit, in both memory layouts."""
    for layout in (torch.contiguous_format, torch.channels_last):

        def net(layout=layout):
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=layout)

        def step(model, optimizer, x):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        x = torch.randn(5, 3, 4, 4).to(memory_format=layout)
        model, twin = net(), net()
        optimizer, restored = (kind.build(m.parameters(), 0.01, 1e-3) for m in (model, twin))
        for _ in range(3):
            step(model, optimizer, x)
        twin.load_state_dict(model.state_dict())
        tensors, plain = optimizer_state(optimizer)
        restore_optimizer(restored, {k: v.clone().contiguous() for k, v in tensors.items()}, plain)
        step(model, optimizer, x), step(twin, restored, x)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_distillation():
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten())
    x, labels, out = torch.randn(6, 1, 2, 2), torch.randint(0, 3, (6,)), torch.randn(6, 3, requires_grad=True)
    frozen = Distillation(teacher, mode="eval")
    p, q = frozen.teacher(x).softmax(1), out.softmax(1)
    by_hand = (p * (p / q).log()).sum() / 6
    torch.testing.assert_close(frozen(out, labels, x), by_hand, rtol=0, atol=1e-6)  # log(p / q) against log p - log q in float32
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    frozen(out, labels, x).backward()
    assert out.grad is not None and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    mixed = Distillation(teacher, temperature=2.0, label_weight=0.25, mode="train")
    soft = F.kl_div(F.log_softmax(out / 2, 1), F.softmax(teacher(x) / 2, 1), reduction="batchmean") * 4
    assert torch.equal(mixed(out, labels, x), 0.75 * soft + 0.25 * F.cross_entropy(out, labels))
    assert not torch.equal(mixed.teacher(x), Distillation(teacher, mode="eval").teacher(x))
    assert torch.equal(CrossEntropy(0.1)(out, labels, x), F.cross_entropy(out, labels, label_smoothing=0.1))


@pytest.fixture(scope="module")
def refinery(shared):
    with np.load(shared / "golden" / "diracdeltanet_refinery.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.mark.parametrize("case", ["small", "imagenet"])
def test_label_refinery_golden(refinery, case):
    """DiracDeltaNet's training loss, its gradient, and the loss that stands beside it while testing."""
    student, logits, labels = (torch.from_numpy(refinery[f"{case}/{name}"]) for name in ("student", "teacher", "target"))
    teacher = nn.Linear(1, 1)
    teacher.forward = lambda images: logits
    out = student.clone().requires_grad_()
    loss = Distillation(teacher, form="cross entropy")(out, labels, student)
    # the reference adds up the products of a row in an order of its own
    np.testing.assert_allclose(loss.item(), refinery[f"{case}/loss_train"], rtol=1e-6, atol=0)
    np.testing.assert_allclose(loss.item() * len(labels), refinery[f"{case}/loss_train_sum"], rtol=1e-6, atol=0)
    loss.backward()
    assert np.array_equal(out.grad.numpy(), refinery[f"{case}/grad_student"])
    assert CrossEntropy()(student, labels, student).item() == refinery[f"{case}/loss_eval"]

    p, log_q = logits.double().softmax(1), student.double().log_softmax(1)
    double = Distillation(teacher, form="cross entropy")(student.double(), labels, student)
    torch.testing.assert_close(double.double(), -(p * log_q).sum(1).mean(), rtol=1e-6, atol=0)  # the loss is computed in float32
    entropy = -(p * p.log()).sum(1).mean()
    divergence = Distillation(teacher)(student, labels, student)
    # likewise in float32, and a difference of two numbers of one size
    torch.testing.assert_close(divergence.double(), double.double() - entropy, rtol=1e-5, atol=0)


def test_learning_rates_golden(refinery):
    """DiracDeltaNet's policies at their defaults, bit by bit."""
    steps, linear = int(refinery["lr_linear/total_iterations"]), EachStep(Linear(over=-1))
    assert [0.5 * linear.factor(int(t), steps) for t in refinery["lr_linear/iteration"]] == refinery["lr_linear/lr"].tolist()
    step = Steps((20, 30, 40), (1 / 5, 1 / 25, 1 / 125))
    assert [0.5 * step.factor(int(e), 90) for e in refinery["lr_step/epoch"]] == refinery["lr_step/lr"].tolist()


def test_teacher_from_a_file(tmp_path):
    from torchvision.models import get_model

    torch.manual_seed(0)
    teacher = get_model("squeezenet1_1", weights=None, num_classes=3).eval()
    torch.save({"module." + k: v for k, v in teacher.state_dict().items()}, tmp_path / "t.pth")
    save_file(teacher.state_dict(), tmp_path / "t.safetensors")
    x = torch.randn(1, 3, 32, 32)
    for name in ("t.pth", "t.safetensors"):
        assert torch.equal(load_teacher("squeezenet1_1", tmp_path / name, 3).eval()(x), teacher(x))
    with pytest.raises(ValueError, match="t.pth does not fit AlexNet"):
        load_teacher("alexnet", tmp_path / "t.pth", 3)


def test_gate_pull_reaches_trained_gates_only():
    model = nn.Module()
    model.threshold = nn.Parameter(torch.tensor([1.0, 4.0]))
    outer = nn.ModuleList([model, nn.Linear(1, 1)])
    assert gate_pull(outer, 3.0, 0.5).item() == gate_pull(model, 3.0, 0.5).item() == 0.25 * (4 + 1)
    assert gate_pull(nn.Linear(1, 1), 3.0, 0.5).item() == 0
    model.threshold.requires_grad_(False)
    assert gate_pull(outer, 3.0, 0.5).item() == 0


def test_steps_are_switches_on_one_model():
    torch.manual_seed(0)
    gated, binary = FractionalConv2d(4, 5, 3), BinaryConv2d(4, 5, 3)
    model = nn.ModuleList([gated, binary])
    q = QuantSign(2)(torch.randn(2, 4, 6, 6))
    use_real_weights(model, True)
    assert gated.real_weights and binary.real_weights and torch.equal(binary(q), F.conv2d(q, binary.weight))
    use_real_weights(model, False)
    assert torch.equal(binary(q), F.conv2d(q, binary.weight.sign()))

    use_gating(model, False)
    y = gated(q)
    exact = F.conv2d((3 * q).round(), gated.weight.sign()) / 3  # sums of integers, one division
    assert torch.equal(y, exact) and density(model) == 1.0
    y.sum().backward()
    assert not gated.threshold.requires_grad and gated.threshold.grad is None
    with torch.no_grad():
        planes = torch.stack([q.sign(), (3 * q).round() - 2 * q.sign()])
    wanted = [torch.ops.aten.convolution_backward(torch.ones_like(y), p, gated.weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1,
                                                  (False, True, False))[1] for p in planes]  # fmt: skip
    # gradient of an ungated convolution of q = (2m + l) / 3, by its planes; thirds are rounded in a different order
    torch.testing.assert_close(gated.weight.grad, (2 * wanted[0] + wanted[1]) / 3, rtol=1e-5, atol=1e-5)

    use_gating(model, True)
    assert gated.threshold.requires_grad and gated.threshold.unique().tolist() == [-1.0]
    with torch.no_grad():
        gated.threshold.fill_(2.5)
    use_gating(model, True)
    assert gated.threshold.unique().tolist() == [2.5] and OPEN < -1e5
