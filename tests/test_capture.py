"""Recording one run: what is seen, what becomes a literal, what is the batch axis, and that the record replays bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import brevitas.nn as qnn
import pytest
import torch
from strategies import flat
from torch import Tensor, nn
from torch.nn import functional as F

from quantlib.capture import Batch, CaptureError, Record, Ref, capture, is_leaf, refs, values_of
from quantlib.layers import BinaryConv2d, FixedPoint, SharedHardTanh


def sample(*shape: int) -> Callable[[int, int], Tensor]:
    return lambda batch, seed: torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def record_of(model: nn.Module, *shape: int) -> Record:
    record = capture(model.eval(), shape, sample(*shape))
    for batch in (1, 4):
        x = sample(*shape)(batch, 11)
        with torch.no_grad():
            want, got = flat(record.model(x.clone())), flat(record.replay(x.clone()))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), f"the record replayed at batch {batch} differs"
    return record


class Function(nn.Module):
    def __init__(self, run: Callable[..., object], **layers: object):
        super().__init__()
        for k, v in layers.items():
            setattr(self, k, v)
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def names(record: Record) -> list[str]:
    return [c.name.rsplit(".", 1)[-1] for c in record.calls]


def test_layers_are_leaves_and_containers_are_not() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert [c.path for c in record_of(model, 2, 5, 5).calls] == ["0", "1.0", "1.1"]
    for layer in (nn.Conv2d(1, 1, 1), qnn.QuantReLU(), BinaryConv2d(1, 1, 1), FixedPoint(4, 1), SharedHardTanh(4), nn.MaxPool2d(2)):
        assert is_leaf(layer), layer
    for container in (nn.Sequential(), Function(lambda m, x: x)):
        assert not is_leaf(container)


def test_a_subclass_with_its_own_forward_is_no_leaf() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight / self.weight.abs().max(), self.bias)

    record = record_of(nn.Sequential(Standardised(2, 3, 3)), 2, 5, 5)
    assert names(record) == ["conv2d"]
    assert refs(record.calls[0].args) == [Ref(0)], "the weight is a constant"


def test_functions_of_parameters_fold_to_constants() -> None:
    model = Function(lambda m, x: x * (m.w.abs().mean() + 1).sqrt() - m.w.exp(), w=nn.Parameter(torch.randn(1, 2, 1, 1)))
    assert names(record_of(model, 2, 3, 3)) == ["mul", "sub"]


def test_shared_modules_are_recorded_per_call() -> None:
    q, c = qnn.QuantReLU(bit_width=3, return_quant_tensor=True), nn.Conv2d(2, 2, 3, padding=1)
    record = record_of(nn.Sequential(c, q, c, q), 2, 5, 5)
    assert [call.path for call in record.calls] == ["0", "1", "0", "1"]
    assert [refs(call.args)[0].index for call in record.calls] == [0, 1, 2, 3]


def test_a_shared_module_has_the_name_of_the_module_that_calls_it() -> None:
    q, conv = qnn.QuantReLU(bit_width=3), nn.Conv2d(2, 2, 3, padding=1)
    model = Function(
        lambda m, x: m.last(m.b(m.a(m.c(x)))), a=nn.Sequential(conv, q), b=nn.Sequential(nn.Conv2d(2, 2, 1), q), c=q, last=conv
    )
    calls = record_of(model, 2, 5, 5).calls
    assert [call.name for call in calls] == ["c", "a.0", "a.1", "b.0", "b.1", "last"]
    assert [call.first for call in calls] == ["a.1", "a.0", "a.1", "b.0", "a.1", "a.0"]


def test_quant_metadata_is_that_of_the_call() -> None:
    record = record_of(
        nn.Sequential(
            qnn.QuantIdentity(bit_width=4, return_quant_tensor=True), qnn.QuantReLU(bit_width=3, return_quant_tensor=True), nn.ReLU()
        ),
        2,
        3,
        3,
    )
    quant = [refs(call.args)[0].quant for call in record.calls]
    assert quant[0] is None and int(quant[1].bit_width) == 4 and int(quant[2].bit_width) == 3


def test_adding_quant_tensors_is_one_addition() -> None:
    q = qnn.QuantReLU(bit_width=3, return_quant_tensor=True)
    record = record_of(Function(lambda m, x: m.q(x) + m.q(x * 2), q=q), 2, 3, 3)
    assert names(record) == ["q", "mul", "q", "add"]


def test_the_batch_axis_is_found_in_literals() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n * c, h * w).reshape((n, 2, c // 2, h, w)).flatten(1).view(len(x), -1)

    record = record_of(Function(run), 4, 3, 3)
    assert record.calls[0].args[1:] == (Batch(4), 9)
    assert record.calls[1].args[1] == (Batch(1), 2, 2, 3, 3)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: x[..., 1:, ::2][:, None].squeeze(1),
        lambda m, x: x[: x.size(0), [0, 2]],
        lambda m, x: torch.stack(x.unbind(1)[::-1], dim=1),
        lambda m, x: torch.cat([*x.chunk(2, 1), *torch.split(x, [1, 3], dim=1)], dim=1),
        lambda m, x: sum(x.split(1, dim=1)),
        lambda m, x: torch.add(input=x, other=x, alpha=3),
        lambda m, x: F.max_pool2d(input=F.relu(x), kernel_size=2),
        lambda m, x: x.mT.permute(0, 1, 3, 2) if x.ndim == 4 else x,
        lambda m, x: x.to(x.dtype).float().double().type_as(x).contiguous().clone().detach(),
        lambda m, x: x.expand(x.shape[0], -1, -1, -1).repeat(1, 2, 1, 1),
        lambda m, x: torch.where(m.mask, x, 0.0),
        lambda m, x: x + torch.arange(4.0).view(1, -1, 1, 1),
        lambda m, x: {"a": [x, x + 1], "b": (x * 2,)},
        lambda m, x: x.mul_(2).add_(1).clamp_(0, 1),
        lambda m, x: F.relu_(x + 1),
        lambda m, x: torch.einsum("nchw->nhwc", x).permute(0, 3, 1, 2),
        lambda m, x: x.reshape(x.shape[0], *[2, 2], *x.shape[2:]).flatten(1, 2) if x.is_contiguous() else x,
        lambda m, x: f"{x.shape}{x.dtype}" and x + x.element_size() / 8,
        lambda m, x: x if not hasattr(x, "scale") and isinstance(x, Tensor) and x.numel() and not x.is_complex() else 0,
        lambda m, x: reversed_channels(x),
        lambda m, x: (x @ m.matrix) if x.device.type == "cpu" else x,
        lambda m, x: torch.tensor([2.0], device=x.device) * x - torch.ones_like(m.mask, dtype=x.dtype),
        lambda m, x: nn.functional.pad(x, (1, 1)).roll(1, 3).flip(2),
    ],
)  # fmt: skip
def test_python_between_layers_just_runs(run: Callable[..., object]) -> None:
    record_of(Function(run, mask=torch.tensor([True, False, True]), matrix=nn.Parameter(torch.randn(3, 3))), 4, 4, 3)


def reversed_channels(x: Tensor) -> Tensor:
    with torch.no_grad():
        index = torch.arange(x.size(1) - 1, -1, -1)
        return x.index_select(1, index)


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    record = capture(model, (2, 3, 3), sample(2, 3, 3))
    assert model.training and model[1].training and record.model is not model
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
    assert not record.model.training and all(v.dtype in (torch.float64, torch.int64) for v in record.model.state_dict().values())


def test_half_precision_models() -> None:
    record_of(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()).half(), 2, 3, 3)


def test_hooks_run_inside_their_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
    seen: list[float] = []
    model[0].register_forward_hook(lambda m, args, y: seen.append(float(y.mean())))
    record = record_of(model, 2, 3, 3)
    assert names(record) == ["0", "1"] and seen


def test_the_wrapped_call_is_restored_even_after_an_error() -> None:
    original = nn.Module.__call__
    with pytest.raises(CaptureError):
        capture(Function(lambda m, x: x.undefined), (2,), sample(2))
    assert nn.Module.__call__ is original
    with pytest.raises(CaptureError, match="AttributeError.*undefined"):
        capture(Function(lambda m, x: x.undefined), (2,), sample(2))


def test_an_output_that_ignores_the_input() -> None:
    with pytest.raises(CaptureError, match="does not depend on its input"):
        capture(Function(lambda m, x: torch.ones(2)), (2,), sample(2))


def test_values_are_numbered_as_in_the_record() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(inplace=True), nn.Flatten()).double().eval()
    record = record_of(model, 2, 3, 3)
    x = sample(2, 3, 3)(4, 1)
    values = values_of(model, x)
    assert len(values) == len(record.shapes) == 4
    with torch.no_grad():
        assert torch.equal(values[1], model[0](x)), "the value before an in-place step is the one from before"
        assert torch.equal(values[3], model(x))


def test_two_calls_of_one_random_seed_are_still_random() -> None:
    with pytest.raises(CaptureError, match="random"):
        capture(Function(lambda m, x: x + torch.randn(2)), (2,), sample(2))


def test_dropout_that_ignores_eval() -> None:
    with pytest.raises(CaptureError, match="replay|data"):
        capture(Function(lambda m, x: F.dropout(x, 0.5)), (50,), sample(50))


def test_a_branch_on_the_number_of_images_that_hides_from_two_and_three() -> None:
    """Batches of 2 and 3 take the same way, 5 takes another: the replay tells."""
    with pytest.raises(CaptureError, match="replaying"):
        capture(Function(lambda m, x: x + 1 if x.shape[0] > 4 else x + 2), (2,), sample(2))
