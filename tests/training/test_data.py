"""Data sets: what is read, what is refused, and what is random about it."""

import io
import pickle
import zipfile
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image

from quantlib.training import Augment, DataError, Images, cifar, digits, image_files, read_images
from quantlib.training.data import lit, random_area, shifted


def image(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder, files):
    for name, content in files.items():
        path = folder / PurePosixPath(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_digits_are_a_fixed_stratified_split():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360) and test.codes.shape[1:] == (1, 8, 8) and test.classes == 10
    assert torch.equal(digits("test").codes, test.codes)
    assert np.bincount(test.labels).min() >= 34 and int(train.codes.max()) == 255
    rows = {t.numpy().tobytes() for t in train.codes}
    assert sum(t.numpy().tobytes() in rows for t in test.codes) == 0
    with pytest.raises(DataError, match="train and test"):
        digits("validation")


def test_zip_and_folder_of_class_folders(tmp_path):
    values = {"test/dog/0.png": 3, "test/cat/0.png": 1, "test/cat/1.png": 2, "train/cat/0.png": 9, "test/readme.txt": 0}
    files = {name: image(value) for name, value in values.items()}
    put(tmp_path / "folder", files)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
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


def test_unreadable_images_are_named_and_left_out_or_refused(tmp_path):
    put(tmp_path, {"a/0.png": b"", "b/0.png": image(1), "b/1.png": image(2)[:40], "c/0.png": image(3)})
    data = read_images(tmp_path)
    assert data.labels.tolist() == [1, 2] and data.codes[:, 0, 0, 0].tolist() == [1, 3]  # class a keeps its label
    assert set(data.unreadable) == {"a/0.png", "b/1.png"}
    with pytest.raises(DataError, match="a/0.png"):
        read_images(tmp_path, strict=True)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("a/0.png", image(5))
        archive.writestr("b/0.png", image(6))
    content = bytearray((tmp_path / "d.zip").read_bytes())
    content[60] ^= 1  # within the first picture: its checksum no longer holds
    (tmp_path / "d.zip").write_bytes(content)
    data = read_images(tmp_path / "d.zip")
    assert data.labels.tolist() == [1] and "BadZipFile" in data.unreadable["a/0.png"]


def test_npz_and_what_is_wrong_with_files(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((5, 4, 4, 3), np.uint8), labels=np.arange(5))
    assert read_images(tmp_path / "a.npz").codes.shape == (5, 3, 4, 4)
    np.savez(tmp_path / "b.npz", pictures=np.zeros(3))
    np.savez(tmp_path / "c.npz", images=np.zeros((5, 4, 4, 3)), labels=np.arange(5))
    (tmp_path / "d.tar").write_bytes(b"")
    for name, text in [("b.npz", "holds pictures"), ("c.npz", "must be uint8"), ("d.tar", "unknown kind"), ("none.npz", "no data set")]:
        with pytest.raises(DataError, match=text):
            read_images(tmp_path / name)


def test_cifar_as_torchvision_unpacks_it(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (12, 3072), dtype=np.uint8)
    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    ten.mkdir(), hundred.mkdir()
    for n in range(5):
        (ten / f"data_batch_{n + 1}").write_bytes(pickle.dumps({"data": pixels[2 * n : 2 * n + 2], "labels": [n, n + 1]}, 2))
    (ten / "test_batch").write_bytes(pickle.dumps({"data": pixels[10:], "labels": [7, 8]}, 2))
    for split, rows in (("train", pixels[:10]), ("test", pixels[10:])):
        labels = list(range(90, 90 + len(rows)))
        (hundred / split).write_bytes(pickle.dumps({"data": rows, "fine_labels": labels, "coarse_labels": [0] * len(rows)}, 2))
    train, test = read_images(tmp_path, "train"), cifar(ten, "test")
    assert train.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5] and test.labels.tolist() == [7, 8]
    assert torch.equal(torch.cat([train.codes, test.codes]).flatten(1), torch.from_numpy(pixels))
    assert read_images(hundred, "test").labels.tolist() == [90, 91]
    reader = object.__new__(torchvision.datasets.CIFAR10)  # its own reading of the same file, without its check of the md5
    theirs = pickle.loads((ten / "test_batch").read_bytes(), encoding="latin1")["data"].reshape(-1, 3, 32, 32)
    assert np.array_equal(theirs, test.codes) and reader.base_folder == ten.name

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (ten / "test_batch").write_bytes(pickle.dumps({"data": Evil()}, 2))
    with pytest.raises(DataError, match="print"):
        cifar(ten, "test")


def test_shared_images(shared):
    data = read_images(shared / "data/cifar10_test_lossless_846.npz")
    assert data.codes.shape == (846, 3, 32, 32) and data.classes == 10


@pytest.mark.slow
def test_the_zip_of_jpegs_holds_the_decoded_images(shared):
    data = read_images(shared / "data/cifar10_test.zip")
    with np.load(shared / "data/cifar10_test_2000.npz") as first:
        chosen = torch.cat([torch.nonzero(data.labels == c)[:200, 0] for c in range(10)])
        assert np.array_equal(data.codes[chosen].numpy().transpose(0, 2, 3, 1), first["images"])


def test_shift_and_flip_against_a_loop():
    codes = torch.randint(0, 256, (40, 2, 5, 4), dtype=torch.uint8)
    data = Images(codes, torch.arange(40), "made")
    rows = [torch.arange(0, 25), torch.arange(25, 40)]
    got, labels = (torch.cat(parts) for parts in zip(*data.read(rows, Augment(2, True), (3, 4)), strict=True))
    offsets = np.random.default_rng([3, 4, 1]).integers(0, (5, 5, 2), (40, 3))
    for n, (top, left, flip) in enumerate(offsets):
        whole = np.zeros((2, 9, 8), np.float32)
        whole[:, 2:7, 2:6] = codes[n].numpy()[:, :, ::-1] if flip else codes[n].numpy()
        assert np.array_equal(whole[:, top : top + 5, left : left + 4] / np.float32(255), got[n])
    assert labels.tolist() == list(range(40))
    assert {tuple(row) for row in offsets[:, :2]} >= {(0, 4), (4, 0)} or len({tuple(row) for row in offsets[:, :2]}) > 12


def test_an_image_is_the_same_in_whatever_batch_it_comes():
    data = digits("train")[:64]
    rows = torch.randperm(64)
    one = torch.cat([x for x, _ in data.read(rows.split(64), Augment(1, True), (0, 5))])
    many = torch.cat([x for x, _ in data.read(rows.split(7), Augment(1, True), (0, 5))])
    other = torch.cat([x for x, _ in data.read(rows.split(64), Augment(1, True), (0, 6))])
    assert torch.equal(one, many) and not torch.equal(one, other)


def test_shifted_by_nothing_is_the_image():
    x = torch.rand(3, 2, 4, 5)
    assert torch.equal(shifted(x, 2, torch.full((3, 2), 2)), x)


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(1)
    for split, count in (("train", 6), ("val", 5)):
        for n in range(count):
            path = tmp_path / split / f"class{n % 2}" / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (30 + n, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path


def test_splits_number_classes_alike(tmp_path):
    """A test folder that lacks a class does not shift the labels of the others; images outside class folders are no class."""
    put(
        tmp_path,
        {f"train/{name}/0.png": image(1) for name in ("cat", "dog", "wolf")} | {"val/wolf/1.png": image(1), "test/2.png": image(1)},
    )
    train, test = (image_files(tmp_path, split) for split in ("train", "val"))
    assert [(p.split("/")[-2], int(label)) for p, label in zip(test.paths, test.labels)] == [("wolf", 2)]
    assert dict(zip((p.split("/")[-2] for p in train.paths), train.labels.tolist()))["wolf"] == 2


def test_image_files_do_not_depend_on_batches_or_workers(files):
    data = image_files(files, "train", size=16, resize=18)
    assert len(data) == 6 and data.classes == 2 and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    rows = torch.tensor([5, 0, 3, 1])
    whole, labels = next(iter(data.read([rows], Augment(flip=True), (0, 1))))
    assert whole.shape == (4, 3, 16, 16) and labels.tolist() == data.labels[rows].tolist()
    assert torch.equal(torch.cat([x for x, _ in data.read(rows.split(3), Augment(flip=True), (0, 1), workers=1)]), whole)
    assert not torch.equal(next(iter(data.read([rows], Augment(flip=True), (0, 2))))[0], whole)
    with pytest.raises(DataError, match="shift=0"):
        next(iter(data.read([rows], Augment(shift=4), (0, 1))))
    with pytest.raises(DataError, match="no test/<class>/<image>"):
        image_files(files, "test")


def test_testing_images_against_torchvision(files):
    transforms = pytest.importorskip("torchvision.transforms")
    data = image_files(files, "val", size=16, resize=18)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = transforms.Compose([transforms.Resize(18), transforms.CenterCrop(16), transforms.ToTensor(), transforms.Normalize(mean, std)])
    ours = torch.cat([x for x, _ in data.read(torch.arange(5).split(2), None, (0, 0))])
    assert torch.equal(ours, torch.stack([theirs(data.decode(n)) for n in range(5)]))
    few = data.sample(3)
    assert few.codes.shape == (3, 3, 16, 16)
    x = (few.codes.float() / 255 - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)
    assert all(any(torch.equal(a, b) for b in ours) for a in x)


def test_sides_after_resizing_against_torchvision(files):
    """Sizes whose ratio times 256 is a whole number that a product of floats would miss are among these."""
    transforms = pytest.importorskip("torchvision.transforms")
    data, generator = image_files(files, "val", size=24, resize=256), np.random.default_rng(2)
    for height, width in [(49, 98), (147, 49), (49, 343), (30, 30), (31, 97)]:
        picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        theirs = transforms.CenterCrop(24)(transforms.Resize(256)(picture))
        assert np.array_equal(data.test_pixels(picture), np.asarray(theirs))


def test_training_images_are_cut_out_then_resized_then_changed(files):
    functional = pytest.importorskip("torchvision.transforms.functional")

    def policy(picture, generator):
        return picture.point([(v + int(generator.integers(1, 9))) % 256 for v in range(256)] * 3)

    data = image_files(files, "train", size=16, resize=18, lighting=0.0, policy=policy, levels=128, mean=(1.0,) * 3, std=(1.0,) * 3)
    for n in range(6):
        draw, picture = np.random.default_rng([0, 1, 2, n]), data.decode(n)
        left, top, width, height = random_area(picture.width, picture.height, draw)
        cut = policy(functional.resized_crop(picture, top, left, height, width, [16, 16]), draw)
        (x, _) = next(iter(data.read([torch.tensor([n])], Augment(), (0, 1))))
        assert torch.equal(128 * x[0] + 128, torch.from_numpy(np.asarray(cut).astype(np.float32).transpose(2, 0, 1)))


def test_unreadable_files_do_not_end_an_epoch(files):
    broken = files / "train" / "class0" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    data = image_files(files, "train", size=16, resize=18)
    x, labels = next(iter(data.read([torch.arange(6)], Augment(), (0, 0))))
    assert len(x) == 6 and labels.tolist() == [0, 0, 0, 1, 1, 1] and list(data.unreadable) == [str(broken)]  # 4.png stands in
    x, labels = next(iter(data.read([torch.arange(6)], None, (0, 0))))
    assert len(x) == 5 and labels.tolist() == [0, 0, 1, 1, 1]
    strict = image_files(files, "train", size=16, resize=18, strict=True)
    with pytest.raises(DataError, match="2.png"):
        next(iter(strict.read([torch.arange(6)], Augment(), (0, 0))))


def test_random_area_lies_inside_and_has_the_stated_shape():
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        left, top, w, h = random_area(60, 40, generator)
        assert 0 <= left <= 60 - w and 0 <= top <= 40 - h and w > 0 and h > 0
        assert 0.7 < w / h < 1.42  # 3/4 and 4/3, and the rounding of sides to whole pixels
        shares.append(w * h / 2400)
    assert min(shares) < 0.12 and max(shares) > 0.8
    assert random_area(1000, 10, np.random.default_rng(0))[1:] == (0, 13, 10)


def test_lighting_against_its_formula():
    pixels = np.array([[[0, 100, 255]]], np.uint8)
    alpha = np.array([0.1, -0.2, 0.3])
    vectors = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    values = [0.2175, 0.0188, 0.0045]
    shift = [sum(row[k] * alpha[k] * values[k] for k in range(3)) * 255 for row in vectors]
    assert lit(pixels, alpha)[0, 0].tolist() == [int(min(255, max(0, p + s))) for p, s in zip((0, 100, 255), shift, strict=True)]
