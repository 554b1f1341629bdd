"""Data sets, the loop and the report page."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from quantlib.training import DataError, Fit, Images, accuracy, confusion, digits, fit, read_images
from quantlib.training.loop import gate_pull, shifted
from quantlib.training.report import write


def test_digits_are_a_fixed_stratified_split():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360) and test.codes.shape[1:] == (1, 8, 8) and test.classes == 10
    assert torch.equal(digits("test").codes, test.codes)
    assert np.bincount(test.labels).min() >= 34 and int(train.codes.max()) == 255
    rows = {t.numpy().tobytes() for t in train.codes}
    assert sum(t.numpy().tobytes() in rows for t in test.codes) == 0
    with pytest.raises(DataError, match="train and test"):
        digits("validation")


def image(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_zip_and_folder_of_class_folders(tmp_path):
    files = {"test/dog/0.png": 3, "test/cat/0.png": 1, "test/cat/1.png": 2, "train/cat/0.png": 9, "test/readme.txt": 0}
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for name, value in files.items():
            archive.writestr(name, image(value))
            (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "folder" / name).write_bytes(image(value))
    for source in (tmp_path / "d.zip", tmp_path / "folder"):
        data = read_images(source, "test")
        assert data.codes[:, 0, 0, 0].tolist() == [1, 2, 3] and data.labels.tolist() == [0, 0, 1]
        assert data.codes[:, 1, 0, 0].tolist() == [2, 4, 6]
    assert len(read_images(tmp_path / "folder" / "test")) == 3
    with pytest.raises(DataError, match="no <class>/<image>"):
        read_images(tmp_path / "d.zip", "val")
    (tmp_path / "folder/test/cat/big.png").write_bytes(image(1, (5, 5)))
    with pytest.raises(DataError, match="mixes image sizes"):
        read_images(tmp_path / "folder")


def test_npz_and_what_is_wrong_with_files(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((5, 4, 4, 3), np.uint8), labels=np.arange(5))
    assert read_images(tmp_path / "a.npz").codes.shape == (5, 3, 4, 4)
    np.savez(tmp_path / "b.npz", pictures=np.zeros(3))
    np.savez(tmp_path / "c.npz", images=np.zeros((5, 4, 4, 3)), labels=np.arange(5))
    (tmp_path / "d.tar").write_bytes(b"")
    for name, text in [("b.npz", "holds pictures"), ("c.npz", "must be uint8"), ("d.tar", "unknown kind"), ("none.npz", "no data set")]:
        with pytest.raises(DataError, match=text):
            read_images(tmp_path / name)


def test_shared_images(shared):
    data = read_images(shared / "data/cifar10_test_lossless_846.npz")
    assert data.codes.shape == (846, 3, 32, 32) and data.classes == 10


@pytest.mark.slow
def test_the_zip_of_jpegs_holds_the_decoded_images(shared):
    data = read_images(shared / "data/cifar10_test.zip")
    with np.load(shared / "data/cifar10_test_2000.npz") as first:
        chosen = torch.cat([torch.nonzero(data.labels == c)[:200, 0] for c in range(10)])
        assert np.array_equal(data.codes[chosen].numpy().transpose(0, 2, 3, 1), first["images"])


def test_shift_moves_every_image_by_its_own_offset():
    x = torch.arange(1, 1 + 6 * 16, dtype=torch.float32).reshape(6, 1, 4, 4)
    y = shifted(x, 1, torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for before, after in zip(padded, y, strict=True):
        assert any(torch.equal(after, before[:, r : r + 4, c : c + 4]) for r in range(3) for c in range(3))


def test_gate_pull():
    model = nn.Module()
    model.threshold = nn.Parameter(torch.tensor([1.0, 4.0]))
    outer = nn.ModuleList([model, nn.Linear(1, 1)])
    assert gate_pull(outer, 3.0, 0.5).item() == 0.25 * (4 + 1)
    assert gate_pull(nn.Linear(1, 1), 3.0, 0.5).item() == 0


def test_fit_learns_and_repeats():
    data = Images(torch.randint(0, 256, (200, 1, 2, 2), dtype=torch.uint8), torch.zeros(200, dtype=torch.int64), "made")
    data = Images(data.codes, (data.codes[:, 0, 0, 0] > 127).long(), "made")

    def run():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        return fit(model, data, data, Fit(epochs=5, lr=0.1))

    first, second = run(), run()
    assert first[-1].test_accuracy > 0.9 and [r.loss for r in first] == [r.loss for r in second]
    assert [round(r.lr, 6) for r in first] == [0.1, 0.08, 0.06, 0.04, 0.02]


def test_metrics():
    y, labels = torch.tensor([[1.0, 0], [0, 1], [1, 0]]), torch.tensor([0, 1, 1])
    assert accuracy(y, labels) == 2 / 3 and confusion(y, labels, 2).tolist() == [[1, 0], [1, 1]]


def test_a_report_is_replaced_whole(tmp_path):
    write(tmp_path / "a" / "r.html", "one")
    write(tmp_path / "a" / "r.html", "two")
    assert [(p.name, p.read_text()) for p in (tmp_path / "a").iterdir()] == [("r.html", "two")]
