"""The official layout, label weights, resizing, random changes, the made set and the drawings."""

import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from quantlib.training import SGD, Augment, Cosine, DataError, Fit, Group, Images, Ramp, fit
from quantlib.training.detection import (
    SIZE,
    BoxImages,
    BoxOverlap,
    DetectionLoss,
    Label,
    Ranges,
    box_images,
    draw_boxes,
    frame_weights,
    make_box_images,
    read_xml,
)
from quantlib.training.detection import augment as changes
from quantlib.training.detection.drawing import FOUND, TRUE, in_pixels, save_pictures, sheet

XML = """<annotation><filename>{file}</filename><size><width>640</width><height>360</height></size>
<object><name>{name}</name><bndbox><xmin>64</xmin><ymin>36</ymin><xmax>192</xmax><ymax>108</ymax></bndbox></object></annotation>"""


def write(folder, stem, name="boat1", file=None, xml=None, level=200):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (640, 360), (level, 10, 20)).save(folder / f"{stem}.jpg")
    (folder / f"{stem}.xml").write_text(xml or XML.format(file=file or f"{stem}.jpg", name=name))
    return folder / f"{stem}.xml"


def test_official_layout(tmp_path):
    for stem in ("000010", "000020", "000014"):
        write(tmp_path / "boat1", stem)
    write(tmp_path / "car2", "5", name="car2")
    data = box_images(tmp_path)
    assert [p.split("/")[-2:] for p in data.paths] == [
        ["boat1", "000010.jpg"], ["boat1", "000014.jpg"], ["boat1", "000020.jpg"], ["car2", "5.jpg"],
    ]  # fmt: skip
    assert data.weights.tolist() == pytest.approx([0.5, 0.9, 1.5, 1.0], abs=1e-7)  # float32
    assert torch.allclose(data.boxes, torch.tensor([128 / 640, 72 / 360, 128 / 640, 72 / 360]), rtol=0, atol=1e-7)  # float32
    ((x, rows),) = data.read([torch.tensor([3, 0])], None, (0, 0))
    assert x.shape == (2, 3, *SIZE) and x.dtype == torch.float32
    assert rows[:, 0].tolist() == [0, 1] and rows[:, 1].tolist() == [0, 0] and torch.equal(rows[:, 6], data.weights[[3, 0]])
    assert torch.equal(rows[:, 2:6], data.boxes[[3, 0]])
    blue, _, red = (x[0] * 256).amax((1, 2)).tolist()
    assert red == int(red) and abs(red - 200) < 6 and blue < 30  # JPEG moves levels a little
    kept = data.in_memory()
    ((y, _),) = kept.read([torch.tensor([3, 0])], None, (0, 0))
    assert torch.equal(x, y) and len(kept[:2]) == 2 and kept[:2].cached.shape == (2, *SIZE, 3)


def test_test_data_has_weight_one():
    box = (0, 0, 1, 1)
    assert frame_weights([Label(2, 2, "0", box, 0)] * 2 + [Label(2, 2, "a", box, n) for n in (3, 7)]) == [1, 1, 0.5, 1.5]


BROKEN = {
    "not XML": ("<annotation><object>", "no element found|mismatched|unclosed"),
    "a document type": ('<!DOCTYPE a [<!ENTITY b "c">]>' + XML.format(file="1.jpg", name="&b;"), "document type"),
    "an unknown entity": (XML.format(file="1.jpg", name="&b;"), "undefined entity"),
    "no object": ("<annotation><filename>1.jpg</filename></annotation>", "0 objects"),
    "no frame": (XML.format(file="boat.jpg", name="boat1"), "ends in no frame number"),
    "a word": (XML.format(file="1.jpg", name="b").replace("<xmin>64", "<xmin>left"), "<bndbox/xmin> is 'left', not an integer"),
    "an empty box": (XML.format(file="1.jpg", name="b").replace("<xmax>192", "<xmax>64"), "empty or outside"),
    "a box outside": (
        XML.format(file="1.jpg", name="b").replace("<xmin>64", "<xmin>640").replace("<xmax>192", "<xmax>700"),
        "empty or outside",
    ),
    "no name": (XML.format(file="1.jpg", name=" "), "no <name> in <object>"),
    "no size": (XML.format(file="1.jpg", name="b").replace("width", "breadth"), "no <size/width>"),
    "no area": (XML.format(file="1.jpg", name="b").replace("<width>640", "<width>0"), "size is 0 x 360"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_labels_are_named(tmp_path, what):
    xml, message = BROKEN[what]
    file = write(tmp_path / "boat1", "1", xml=xml)
    with pytest.raises(DataError, match=message) as error:
        read_xml(file)
    assert str(file) in str(error.value)
    write(tmp_path / "boat1", "2")
    data = box_images(tmp_path)
    assert len(data) == 1 and list(data.unreadable) == [str(file)]
    with pytest.raises(DataError, match="1.xml"):
        box_images(tmp_path, strict=True)


def test_a_label_may_be_utf_16_and_two_objects_are_refused(tmp_path):
    file = write(tmp_path / "boat1", "1")
    file.write_bytes(('<?xml version="1.0" encoding="UTF-16"?>' + XML.format(file="é7.jpg", name="bé")).encode("utf-16"))
    assert read_xml(file).name == "bé" and read_xml(file).frame == 7
    file.write_bytes(('<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a>' + XML.format(file="7.jpg", name="b")).encode("utf-16"))
    with pytest.raises(DataError, match="document type"):
        read_xml(file)
    one = XML.format(file="1.jpg", name="b")
    inner = one[one.index("<object>") : one.index("</annotation>")]
    file.write_text(one.replace("</annotation>", f"{inner}</annotation>"))
    with pytest.raises(DataError, match="2 objects"):
        read_xml(file)
    file.write_text(one + " " * (1 << 20))
    with pytest.raises(DataError, match="larger than 1,048,576 bytes"):
        read_xml(file)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(DataError, match="holds no <class folder>/<name>.jpg"):
        box_images(tmp_path / "nothing")
    write(tmp_path / "a", "1").unlink()
    with pytest.raises(DataError, match="first of 1 problems: .*1.xml"):
        box_images(tmp_path)
    write(tmp_path / "a", "1"), write(tmp_path / "a", "2"), write(tmp_path / "a", "3")
    (tmp_path / "a" / "2.jpg").write_bytes(b"no picture")
    data = box_images(tmp_path)
    ((x, rows),) = data.read([torch.tensor([0, 1, 2])], None, (0, 0))
    assert len(x) == 2 and rows[:, 0].tolist() == [0, 1] and list(data.unreadable) == [str(tmp_path / "a" / "2.jpg")]
    ((x, rows),) = data.read([torch.tensor([0, 1, 2])], Augment(), (0, 0))
    assert len(x) == 3  # the third picture stands in for the second
    assert len(data.in_memory()) == 2
    with pytest.raises(DataError, match="2.jpg"):
        box_images(tmp_path, strict=True).in_memory()
    with pytest.raises(DataError, match="take no shift"):
        next(data.read([torch.tensor([0])], Augment(shift=1), (0, 0)))
    (tmp_path / "a" / "1.jpg").write_bytes(b""), (tmp_path / "a" / "3.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="none of its 3 pictures"):
        next(data.read([torch.tensor([0])], Augment(), (0, 0)))
    with pytest.raises(DataError, match="none of its 3 pictures"):
        data.in_memory()


def test_official_pictures_are_resized_with_sixteenths():
    """640 x 360 to 320 x 160: each weight is a multiple of 1/16, halves up, written out per pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (360, 640, 3), dtype=np.uint8)
    ours = changes.resized(pixels, (160, 320))
    for row, column in ((0, 0), (3, 7), (80, 160), (159, 319)):
        y, x = 2.25 * row + 0.625, 2 * column + 0.5
        top, share = math.floor(y), round(8 * (y % 1))
        pair = pixels[:, 2 * column : 2 * column + 2].astype(int).sum(1)
        sums = (8 - share) * pair[top] + share * pair[min(top + 1, 359)]
        assert ours[row, column].tolist() == ((sums + 8) // 16).tolist() and x % 1 == 0.5
    assert changes.resized(ours, (160, 320)) is ours


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=30))
def test_colours_there_and_back(colours):
    pixels = np.array([colours], np.uint8)
    hsv = changes.to_hsv(pixels)
    assert hsv[..., 0].max() < 180
    for (r, g, b), (h, s, v) in zip(colours, hsv[0].tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        assert (
            v == round(value * 255)
            and abs(s - saturation * 255) <= 0.5 + 1e-4
            and min(abs(h - hue * 180), 180 - abs(h - hue * 180)) <= 0.5 + 1e-4
        )
    back = changes.from_hsv(hsv)
    assert np.abs(back.astype(int) - pixels).max() <= 5  # half a step of hue is 2.1 levels at most, of saturation 0.5; then rounded


def test_warping_moves_pixels_and_boxes_alike():
    """Without rotation, scale and shear a warp by whole pixels copies them; border enters."""
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    matrix = np.array([[1, 0, 4], [0, 1, -3], [0, 0, 1]], float)
    moved = changes.warped(pixels, matrix, 128)
    assert np.array_equal(moved[:17, 4:], pixels[3:, :26]) and (moved[:, :4] == 128).all() and (moved[17:] == 128).all()
    assert changes.warped_box(np.array([2, 5, 12, 15]), matrix, (20, 30)).tolist() == [6, 2, 16, 12]


def test_boxes_follow_the_corners_and_small_rests_are_dropped():
    size, still = (160, 320), np.eye(3)
    quarter = np.array([[0, -1, 100], [1, 0, 20], [0, 0, 1]], float)  # (x, y) -> (100 - y, x + 20)
    assert changes.warped_box(np.array([10, 20, 40, 60]), quarter, size).tolist() == [40, 30, 80, 60]

    def left(shift, box=(0, 0, 40, 40)):
        return changes.warped_box(np.array(box), np.array([[1, 0, shift], [0, 1, 0], [0, 0, 1]]), size)

    assert left(-20).tolist() == [0, 0, 20, 40] and left(-32.5) is None  # 0.1875 of the area
    assert changes.warped_box(np.array([0, 0, 3, 3]), still, size) is None  # not wider than 3 pixels
    assert (
        changes.warped_box(np.array([0, 0, 40, 4]), still, size) is None
        and changes.warped_box(np.array([0, 0, 39, 4]), still, size) is not None
    )


def test_affine_ranges_and_their_published_swap():
    """With one range at a time open the matrix is what that range says; x moves by shares of the height, y by shares of the width."""
    closed = {"degrees": 0.0, "scale": 0.0, "shift": 0.0, "shear": 0.0}

    def drawn(**ranges):
        return [changes.affine((160, 320), Ranges(**(closed | ranges)), np.random.default_rng(n)) for n in range(200)]

    assert all(np.array_equal(m, np.eye(3)) for m in drawn())
    shifts = np.array([m[:2, 2] for m in drawn(shift=0.05)])
    assert 7 < np.abs(shifts[:, 0]).max() <= 8 and 14 < np.abs(shifts[:, 1]).max() <= 16
    for m in drawn(degrees=1.98):
        angle = math.degrees(math.atan2(m[0, 1], m[0, 0]))
        assert abs(angle) <= 1.98 and np.allclose(m @ [160, 80, 1], [160, 80, 1], rtol=0, atol=1e-9)  # the centre stays
    scales = [m[0, 0] for m in drawn(scale=0.05)]
    assert 0.95 <= min(scales) < 0.96 and 1.04 < max(scales) <= 1.05
    assert 0.6 < max(math.degrees(math.atan(abs(m[0, 1]))) for m in drawn(shear=0.641)) <= 0.641


def test_flips_mirror_picture_and_box():
    still = Ranges(0, 0, 0, 0, 0, 0, 0)
    pixels = np.random.default_rng(2).integers(0, 256, (160, 320, 3), dtype=np.uint8)
    pixels = changes.from_hsv(changes.to_hsv(pixels))
    seen = set()
    for n in range(8):
        new, box = changes.augmented(pixels, np.array([10, 20, 50, 60]), True, still, np.random.default_rng(n))
        flipped = box.tolist() == [270, 20, 310, 60]
        assert flipped or box.tolist() == [10, 20, 50, 60]
        plain = new[:, ::-1] if flipped else new
        assert np.abs(plain.astype(int) - pixels).max() <= 5  # through hue and back
        seen.add(flipped)
    assert seen == {True, False}


def test_changes_follow_from_seed_epoch_and_picture(tmp_path):
    make_box_images(tmp_path, 6, size=(90, 160))
    data = box_images(tmp_path).in_memory()

    def read(order, key):
        batches = list(data.read([torch.tensor(order)], Augment(flip=True), key))
        return batches[0]

    x, rows = read([0, 1, 2, 3], (5, 1))
    y, again = read([3, 2], (5, 1))
    assert torch.equal(x[[3, 2]], y) and torch.equal(again[:, 1:], rows[[3, 2], 1:])
    assert not torch.equal(read([0, 1, 2, 3], (5, 2))[0], x)


def test_made_sets(tmp_path):
    codes = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    images = Images(codes, torch.arange(20) % 10, "made")
    make_box_images(tmp_path / "pasted", 12, images, size=(90, 160), seed=3)
    data = box_images(tmp_path / "pasted", strict=True)
    assert len(data) == 12 and {p.split("/")[-2] for p in data.paths} >= {"airplane1", "truck1", "automobile1"}
    assert data.weights.tolist().count(0.5) == 2 and data.weights.tolist().count(1.0) == 8
    label = read_xml(tmp_path / "pasted" / "airplane1" / "000001.xml")
    assert (label.width, label.height, label.name, label.frame) == (160, 90, "airplane", 1)
    make_box_images(tmp_path / "again", 12, images, size=(90, 160), seed=3)
    for file in (tmp_path / "pasted").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "pasted")).read_bytes()
    shapes = box_images(make_box_images(tmp_path / "shapes", 3, size=(90, 160)), strict=True)
    assert sorted(p.split("/")[-2] for p in shapes.paths) == ["cross1", "ellipse1", "triangle1"]
    corners = shapes.boxes[:, :2] - shapes.boxes[:, 2:] / 2
    assert (corners > -1e-6).all() and (corners + shapes.boxes[:, 2:] < 1 + 1e-6).all()


def test_drawings(tmp_path):
    paper = np.zeros((40, 60, 3), np.uint8)
    drawn = draw_boxes(paper, torch.tensor([20.0, 20.0, 20.0, 20.0]), torch.tensor([40.0, 20.0, 10.0, 30.0]))
    assert tuple(drawn[10, 20]) == TRUE and tuple(drawn[20, 35]) == FOUND and not paper.any()
    assert draw_boxes(paper, None, torch.tensor([math.nan, 1e30, -5.0, math.inf]), "IoU 0.00").shape == paper.shape
    true = in_pixels(torch.tensor([[0.5, 0.5, 0.2, 0.2]]), (40, 60))
    assert true.tolist() == [[30, 20, 12, 8]]
    (file,) = save_pictures(tmp_path, [paper], true, true, ["set/boat1/0007.jpg"])
    assert file.name == "boat1_0007.png" and Image.open(file).size == (60, 40)
    assert sheet([drawn] * 5, columns=2).shape == (3 * 44, 2 * 64, 3)


def test_sample_is_blue_green_red(tmp_path):
    write(tmp_path / "a", "1"), write(tmp_path / "a", "2")
    images, boxes = box_images(tmp_path).sample(5)
    assert images.codes.shape == (2, 3, *SIZE) and images.levels == 256 and len(boxes) == 2
    assert int(images.codes[0, 0].max()) < 30 and int(images.codes[0, 2].min()) > 190
    ((x, _),) = box_images(tmp_path).read([torch.arange(2)], None, (0, 0))
    assert torch.equal(x, images.codes / 256) and isinstance(box_images(tmp_path), BoxImages)


class Stop(Exception):
    pass


class Tiny(nn.Module):
    """Stops in its `steps`-th training step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 36, 1))
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps -= self.training
        if self.steps == 0:
            raise Stop
        return self.body(x)


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    """With published groups and warm-up, in the middle of the second epoch."""
    data = box_images(make_box_images(tmp_path / "set", 20, size=(40, 80)), size=(32, 64)).in_memory()
    bias = Group(r"\.bias$", lr=0.02, schedule=Ramp(3, 5.0, Cosine(0.001)), momentum_schedule=Ramp(3, 0.9 / 0.937))
    settings = Fit(3, 4, lr=0.01, flip=True, optimizer=SGD(0.937, nesterov=True), schedule=Cosine(0.001), groups=(bias,), save_every=1)

    def run(folder, steps=0, resume=False):
        model = Tiny(steps)
        rows = fit(model, data, data[:6], settings, DetectionLoss(4 / 64), out=tmp_path / folder, resume=resume, score=BoxOverlap((32, 64)))
        return rows, model

    with pytest.raises(Stop):
        run("killed", steps=8)
    rows, whole = run("whole")
    again, resumed = run("killed", resume=True)
    assert [(r.loss, r.train_accuracy, r.test_accuracy) for r in rows] == [(r.loss, r.train_accuracy, r.test_accuracy) for r in again]
    assert rows[-1].loss < rows[0].loss
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])
    assert (tmp_path / "killed/log.csv").read_bytes() == (tmp_path / "whole/log.csv").read_bytes()
