"""The detection head, its loss and its metric, against the published code's recorded values and against arithmetic written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.training.detection import BoxOverlap, DetectionLoss, best_boxes, corners, decode, overlap

CASES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden/mixq_detection.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)  # float32 of another build of torch; the stated tolerance is 1e-4


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_overlaps_are_the_published_ones(golden, kind):
    ours, theirs = overlap(golden["iou.box1"], golden["iou.box2"], kind), golden[f"iou.{kind}"]
    equal_boxes = theirs.isnan()  # published CIoU is 0 / 0 there
    close(ours[~equal_boxes], theirs[~equal_boxes])
    assert int(equal_boxes.sum()) == (1 if kind == "ciou" else 0)
    close(ours[equal_boxes], torch.ones_like(ours[equal_boxes]))


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_answers_are_the_published_ones(golden, case):
    head = golden[f"loss.{case}.head"].requires_grad_()
    targets, size = golden[f"loss.{case}.targets"], tuple(golden[f"loss.{case}.img_hw"].tolist())
    images, loss = torch.zeros(len(head), 3, *size), DetectionLoss()
    total = loss(head, targets, images)
    close(torch.stack([*loss.parts(head, targets, images), total]).detach(), golden[f"loss.{case}.items"])
    total.backward()
    theirs = golden[f"loss.{case}.grad_head"]
    torch.testing.assert_close(head.grad, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))  # relative to the largest
    close(decode(head.detach(), size), golden[f"loss.{case}.decoded"])
    close(best_boxes(head.detach(), size)[:, :4], golden[f"loss.{case}.prebox"])
    if f"loss.{case}.iou" in golden:
        close(BoxOverlap(size)(head.detach(), targets), golden[f"loss.{case}.iou"])
    halved = golden[f"loss.{case}.head"].detach().clone().requires_grad_()
    DetectionLoss(0.5)(halved, targets, images).backward()
    torch.testing.assert_close(halved.grad, head.grad / 2, rtol=0, atol=1e-9)  # products rounded in another order


BOX = st.tuples(*[st.integers(-20, 20)] * 2, *[st.integers(1, 20)] * 2)


@given(BOX, BOX)
def test_overlap_counts_cells(a, b):
    """Boxes with corners on a half-unit grid: the shared cells are counted one by one."""
    a, b = ((2 * x, 2 * y, 2 * w, 2 * h) for x, y, w, h in (a, b))

    def filled(box):
        x, y, w, h = box
        return {(i, j) for i in range(x - w // 2, x + w // 2) for j in range(y - h // 2, y + h // 2)}

    one, other = filled(a), filled(b)
    expected = len(one & other) / len(one | other)
    ours = overlap(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert float(ours) == expected
    assert torch.equal(overlap(torch.tensor(b, dtype=torch.float64), torch.tensor(a, dtype=torch.float64)), ours)


def test_equal_boxes_have_a_finite_gradient():
    box = torch.tensor([[3.0, 4.0, 5.0, 6.0]], requires_grad=True)
    overlap(box, box.detach().clone(), "ciou").sum().backward()
    assert box.grad.isfinite().all()


def test_corners():
    assert corners(torch.tensor([10.0, 20.0, 4.0, 6.0])).tolist() == [8, 17, 12, 23]


def test_decode_by_hand():
    """One cell of a 2 x 3 grid of an image of 32 x 48 pixels: a stride of 16."""
    head = torch.full((1, 36, 2, 3), -20.0)
    head[0, [6 * a + f for a in range(6) for f in (0, 1)], 1, 2] = 0.0  # the middle of the cell in row 1, column 2
    head[0, [6 * a + 2 for a in range(6)], 1, 2] = math.log(2.0)
    head[0, [6 * a + 3 for a in range(6)], 1, 2] = 0.0
    head[0, [6 * a + 4 for a in range(6)], 1, 2] = 0.0
    torch.testing.assert_close(
        best_boxes(head, (32, 48)), torch.tensor([[40.0, 24.0, 40.0, 20.0, 0.5]]), rtol=1e-6, atol=0
    )  # exp in float32
    row = decode(head, (32, 48)).reshape(6, 2, 3, 6)[3, 1, 2]
    torch.testing.assert_close(row[:4], torch.tensor([40.0, 24.0, 40.0, 20.0]), rtol=1e-6, atol=0)  # likewise
    with pytest.raises(ValueError, match=r"\(N, 36, rows, columns\), got \(1, 35, 2, 3\)"):
        decode(head[:, :35], (32, 48))


def test_the_first_of_equal_cells_answers():
    assert best_boxes(torch.zeros(1, 36, 2, 3), (32, 48))[0, :2].tolist() == [8.0, 8.0]


def test_a_target_on_the_edge_belongs_to_the_last_cell():
    head = torch.zeros(1, 36, 2, 3, requires_grad=True)
    target = torch.tensor([[0, 0, 1.0, 1.0, 0.2, 0.2, 1.0]])
    DetectionLoss()(head, target, torch.zeros(1, 3, 32, 48)).backward()
    assert head.grad[0, 0, 1, 2] != 0 and head.grad[0, 0, :, :2].abs().sum() == 0


def test_scores_of_images_without_and_with_two_targets():
    head = torch.zeros(3, 36, 2, 3)
    found = best_boxes(head, (32, 48))[0, :4] / torch.tensor([48, 32, 48, 32])
    far = torch.tensor([0.9, 0.9, 0.1, 0.1])
    rows = torch.stack([torch.tensor([n, 0, *box.tolist(), 1.0]) for n, box in ((0, found), (2, far), (2, found))])
    scores = BoxOverlap((32, 48))(head, rows)
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.0, 1.0]), rtol=0, atol=1e-6)  # shares of the picture are rounded
    assert BoxOverlap((32, 48))(head, torch.zeros(0, 7)).tolist() == [0, 0, 0]


def test_label_weights_hold_for_the_whole_image():
    """With logits 0 every cell costs log 2 times its weight."""
    head, images = torch.zeros(2, 36, 2, 3), torch.zeros(2, 3, 32, 48)
    targets = torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2, 0.6], [0, 0, 0.1, 0.1, 0.2, 0.2, 0.8]])
    _, obj, _ = DetectionLoss().parts(head, targets, images)
    assert float(obj) == pytest.approx(64.3 * math.log(2) * (0.8 + 1.0) / 2, rel=1e-6)  # float32
