"""The accelerator's headers: exact round trips, an accelerator that runs on the packed words, and text that must be refused."""

import re
import runpy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zoo
from quantlib.io.c_arrays import parse
from quantlib.io.checkpoints import CheckpointError
from quantlib.io.fracbnn_header import FLOATS, PARAMETERS, SHAPES, WORDS, _c_array, arrays_of, image_words, read, unpack_words, write
from zoo.fracbnn import GRID


@pytest.fixture(scope="module")
def published(shared):
    with np.load(shared / "data/fracbnn_cifar10_authors.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def headers(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    assert [p.name for p in write(zoo.load(zoo.get("fracbnn_cifar10"), published), folder)] == [FLOATS, WORDS, PARAMETERS]
    return folder


def states_equal(a, b) -> bool:
    return all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())


def trained(seed: int = 3):
    """A network as training leaves it: real weights, statistics, negative slopes and scales."""
    torch.manual_seed(seed)
    model = zoo.get("fracbnn_cifar10").eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.add_(0.3 * torch.randn_like(value)).abs_() if "running_var" in key else value.add_(0.3 * torch.randn_like(value))
    return model


# ---------------------------------------------------------------- round trips


def test_float_header_of_the_published_weights(published, headers):
    arrays = read(headers / FLOATS)
    assert list(arrays) == list(SHAPES) and set(arrays) == set(published) and len(arrays) == 167
    for name, array in published.items():
        assert arrays[name].dtype == torch.float32 and np.array_equal(arrays[name].numpy(), array), name


@pytest.mark.parametrize("options", [{}, {"fixed_point": "authors"}, {"fixed_point": GRID}])
def test_model_to_header_to_model_to_header(published, headers, tmp_path, options):
    model = zoo.load(zoo.get("fracbnn_cifar10", **options), headers / FLOATS)
    assert states_equal(zoo.load(zoo.get("fracbnn_cifar10", **options), published), model)
    for path in write(model, tmp_path / "again"):
        assert path.read_bytes() == (headers / path.name).read_bytes()


def test_packed_headers_load_with_the_signs_of_the_first_convolution(headers, tmp_path):
    arrays = read(headers / WORDS, headers / PARAMETERS)
    assert set(arrays) == set(SHAPES)
    model = zoo.load(zoo.get("fracbnn_cifar10"), arrays)
    signed = zoo.load(zoo.get("fracbnn_cifar10"), headers / FLOATS)
    with torch.no_grad():
        signed.conv1.weight.sign_()
    assert states_equal(model, signed)
    for path in write(model, tmp_path)[1:]:
        assert path.read_bytes() == (headers / path.name).read_bytes()


def test_words_are_the_published_ones(headers):
    """Ends of the published file: first words of the first convolution and of the first gated one."""
    words = parse((headers / WORDS).read_text(), WORDS)["conv_weight_all"]
    assert words.shape == (45, 16, 3, 3) and words.dtype == np.uint64
    assert words[0, 0, 0].tolist() == [0xFB2D94DF00000000, 0xFFFFFFFF00000000, 0xFFEFFFFF00000000]
    assert words[1, 0, 0].tolist() == [0xF000000E00000000, 0xFA038EFF00000000, 0xFFEADEDF00000000]
    assert words[3, 15, 2].tolist() == [0xC3BE000000000000, 0xAADE000000000000, 0x6F8A000000000000]


def test_a_network_retrained_here_keeps_every_number_of_the_accelerator(tmp_path):
    """Batch normalisation with statistics and latent weights: what the datapath computes is the same after a trip through the headers."""
    state = trained().state_dict()
    before = zoo.load(zoo.get("fracbnn_cifar10", fixed_point="authors"), state).eval()
    write(before, tmp_path)
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        for source in (tmp_path / FLOATS, read(tmp_path / WORDS, tmp_path / PARAMETERS)):
            after = zoo.load(zoo.get("fracbnn_cifar10", fixed_point="authors"), source).eval()
            assert torch.equal(after(x), before(x))


# ---------------------------------------------------------------- the accelerator, on nothing but the packed text

COUNT = np.array([bin(n).count("1") for n in range(1 << 16)], dtype=np.int64)


class Accelerator:
    """Section by section the published design in numpy, from the text of conv_weights.h and weights_fracnet_64.h: popcounts of 64-bit
    words, 16 output channels per tile, 16-bit features with 7 fraction bits. Shares no code with the library.
    """

    def __init__(self, words: str, parameters: str) -> None:
        numbers = [int(n, 16) for n in re.findall(r"0x[0-9a-f]{16}", words)]
        self.words, self.next = np.array(numbers, dtype=np.uint64).reshape(45, 16, 3, 3), 0
        pattern = re.compile(r"const FIX_WT (\w+)_fix((?:\[\d+\])+) = ([^;]*);")
        self.fixed = {}
        for name, shape, body in pattern.findall(parameters):
            values = np.array(re.findall(r"[-\d.e]+", body), dtype=np.float64).reshape([int(n) for n in re.findall(r"\d+", shape)])
            self.fixed[name] = np.clip(np.floor(256 * values + 0.5), -2048, 2047).astype(np.int64)

    @staticmethod
    def r(v, s):
        return np.clip((v + (1 << (s - 1))) >> s, -32768, 32767)

    def p(self, name, channels):
        return self.fixed[name].reshape(-1)[:channels, None, None]

    def tile(self, planes, inputs):
        """Words (K, H, W) with the next K words of weights for each of 16 outputs -> (16, H, W)."""
        total = 0
        for plane in planes:
            weight, (height, width) = self.words[self.next], plane.shape
            self.next += 1
            padded, inside = np.pad(plane, 1), np.pad(np.ones_like(plane, dtype=np.int64), 1)
            for row in range(3):
                for col in range(3):
                    here = (slice(row, row + height), slice(col, col + width))
                    apart = padded[here] ^ weight[:, row, col, None, None]
                    count = COUNT[np.ascontiguousarray(apart).view(np.uint16).reshape(*apart.shape, 4)].sum(-1)
                    total = total + inside[here] * (inputs - 2 * count)
        return total

    @staticmethod
    def packed(bits):
        """(C, H, W) of 0 and 1 -> (H, W), channel c in bit 63 - c."""
        places = (63 - np.arange(len(bits), dtype=np.uint64))[:, None, None]
        return (bits.astype(np.uint64) << places).sum(0, dtype=np.uint64)

    def colours(self, image):
        """(32, 32, 3) pixels -> (3, 32, 32) words of thermometer bits."""
        level = np.rint(image.transpose(2, 0, 1) / 8).astype(np.int64)
        return np.stack([self.packed(np.arange(32)[:, None, None] < plane) for plane in level])

    def half_block(self, x, shortcut, prefix, k, channels, stride):
        code = np.clip(((x + 128) * 3 + 128) >> 8, 0, 3)
        planes, start, tiles = [self.packed(code >> 1), self.packed(code & 1)], self.next, []
        for plane in planes:
            self.next = start
            tiles.append(np.concatenate([self.tile([plane], len(x)) for _ in range(channels // 16)])[:, ::stride, ::stride])
        m, low = tiles
        low = np.where(171 * m > self.p(f"{prefix}conv{k}_threshold", channels), low, 0)
        t = self.r(171 * np.clip(128 * m, -32768, 32767), 8)
        t = self.r(256 * t + 85 * np.clip(128 * low, -32768, 32767), 8)
        t = self.r(self.p(f"{prefix}bn{k}_weight", channels) * t + 128 * self.p(f"{prefix}bn{k}_bias", channels), 8)
        t = self.r(2 * t + self.p(f"{prefix}rprelu{k}_shift_x_bias", channels), 1)
        t = np.where(t < 0, self.r(t * self.p(f"{prefix}rprelu{k}_prelu_weight", channels), 8), t)
        t = self.r(2 * t + self.p(f"{prefix}rprelu{k}_shift_y_bias", channels), 1)
        s = np.clip(shortcut + t, -32768, 32767)
        return self.r(self.p(f"{prefix}bn{k + 2}_weight", channels) * s + 128 * self.p(f"{prefix}bn{k + 2}_bias", channels), 8)

    def __call__(self, image):
        self.next = 0
        n = self.tile(self.colours(image), 32)
        x = self.r(self.p("bn1_weight", 16) * n + self.p("bn1_bias", 16), 1)
        for layer, channels in enumerate((16, 32, 64), 1):
            for block in range(3):
                stride, shortcut = 1, x
                if len(x) != channels:
                    stride, total = 2, sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
                    half = np.trunc(np.clip(total, -32768, 32767) / 4).astype(np.int64)
                    shortcut = np.concatenate([half, half])
                x = self.half_block(x, shortcut, f"layer{layer}_{block}_", 1, channels, stride)
                x = self.half_block(x, x, f"layer{layer}_{block}_", 2, channels, 1)
        assert self.next == 45
        mean = self.r(x.sum((1, 2)), 6)
        weight, acc = self.r(self.fixed["linear_weight"], 1), self.r(self.fixed["linear_bias"], 1)
        for c in range(64):
            acc = self.r(128 * acc + mean[c] * weight[:, c], 7)
        return acc / 128


def test_an_accelerator_on_the_packed_words_gives_the_recorded_logits(shared, headers):
    run = Accelerator((headers / WORDS).read_text(), (headers / PARAMETERS).read_text())
    with np.load(shared / "golden/fracbnn_cifar10_hls_logits.npz") as golden, np.load(shared / "data/cifar10_test_2000.npz") as data:
        for k in range(2):
            assert np.array_equal(run(data["images"][golden["order"][k]]), golden["hls_logits"][k])


def test_an_accelerator_on_a_retrained_network_gives_the_model_s_logits(tmp_path):
    model = zoo.load(zoo.get("fracbnn_cifar10", fixed_point="authors"), trained(5).state_dict()).eval()
    write(model, tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])[0].numpy()
    assert np.array_equal(Accelerator((tmp_path / WORDS).read_text(), (tmp_path / PARAMETERS).read_text())(image), expected)


def test_images_are_packed_as_the_accelerator_reads_them(headers):
    run = Accelerator((headers / WORDS).read_text(), (headers / PARAMETERS).read_text())
    pixels = np.arange(2 * 32 * 32 * 3, dtype=np.int64).reshape(2, 32, 32, 3).astype(np.uint8)  # every pixel value in every colour
    words = image_words(pixels)
    assert words.shape == (2, 3, 32, 32) and words.dtype == np.uint64
    assert np.array_equal(words, np.stack([run.colours(image) for image in pixels]))
    for wrong in (pixels.astype(np.float32), pixels[0], pixels.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"takes uint8 images \(N, 32, 32, 3\), got"):
            image_words(wrong)


# ---------------------------------------------------------------- what no accelerator holds


def test_another_network_is_refused(tmp_path):
    for model, part in [
        (zoo.get("fracbnn_digits"), "fracbnn_cifar10 with 10 classes and nothing else; this FracBNN differs"),
        (zoo.get("fracbnn_cifar10", num_classes=7), r"linear_bias: \(7,\), the accelerator has \(10,\)"),
        (torch.nn.Linear(2, 2), "this Linear differs in"),
    ]:
        with pytest.raises(ValueError, match=part):
            write(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_without_a_sign_and_broken_values_are_refused(tmp_path):
    model = trained()
    with torch.no_grad():
        model.layer2[0].conv1.weight[3, 2, 1, 0] = 0
    with pytest.raises(ValueError, match="layer2_0_conv1_weight has 1 weights that are exactly 0"):
        write(model, tmp_path)
    with torch.no_grad():
        model.layer2[0].conv1.weight[3, 2, 1, 0] = 1
        model.linear.bias[0] = float("nan")
    with pytest.raises(ValueError, match="linear_bias holds values that are NaN"):
        arrays_of(model)


def test_packed_text_that_does_not_fit_is_refused(headers, tmp_path):
    words = parse((headers / WORDS).read_text(), WORDS)["conv_weight_all"]
    with pytest.raises(CheckpointError, match=r"shape \(44, 16, 3, 3\), the accelerator's is \(45, 16, 3, 3\)"):
        unpack_words(words[:44])
    words[5, 0, 0, 0] |= np.uint64(1)
    with pytest.raises(CheckpointError, match="words of layer1_1_conv1_weight have bits set behind their 16 channels"):
        unpack_words(words)
    path = tmp_path / "p.h"
    for text, part in [
        ("const FIX_WT bn1_bias_fix[4][16] = {" + ",".join(["1"] * 64) + "};", "bn1_bias_fix has values behind its 16 channels"),
        ("const FIX_WT bn1_bias_fix[2] = {1, 2};", r"bn1_bias_fix has the shape \(2,\), the accelerator's is \(4, 16\)"),
    ]:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=part):
            read(path)
    with pytest.raises(CheckpointError, match="weights_tb.h declares .* a second time"):
        read(headers / FLOATS, headers / FLOATS)


# ---------------------------------------------------------------- text


def test_what_c_allows():
    text = """
    #ifndef W   /* guard */
    #define W \\
        nothing
    static const float a[2][3] = {{1, -2.5e-1f, 3.}, {4, .5, /* six */ +6,},};  // trailing commas
    float flat[2][2] = {1, 2, 3, 4}; int count = 3; extern float later[2];
    const uint64 w[2] = {0xFFFFFFFFFFFFFFFFuLL, 18446744073709551615};
    float none[1] = {};
    unsigned char bytes[3]={0,0x10,255};
    #endif
    """
    arrays = parse(text, "w.h")
    assert list(arrays) == ["a", "flat", "w", "bytes"]
    assert arrays["a"].tolist() == [[1, -0.25, 3], [4, 0.5, 6]] and arrays["a"].dtype == np.float32
    assert arrays["flat"].tolist() == [[1, 2], [3, 4]] and arrays["bytes"].tolist() == [0, 16, 255]
    assert arrays["w"].tolist() == [2**64 - 1] * 2 and arrays["w"].dtype == np.uint64


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_every_float32_survives_the_text(bits):
    array = np.array(bits, dtype=np.uint32).view(np.float32).reshape(2, 3)
    array = np.where(np.isfinite(array), array, np.float32(1))
    text = _c_array("const float", "x", array)
    assert np.array_equal(parse(text, "x.h")["x"], array)
    assert _c_array("const float", "x", parse(text, "x.h")["x"]) == text


@pytest.mark.parametrize(
    "text,part",
    [
        ("float a[2] = {1, 2}", r"line 1: expected an array such as `float name\[2\] = \{1, 2\};`, found `float a\[2\] = \{1, 2\}`"),
        ("\n\nvoid f() { system(1); }", "line 3: expected an array .*found `void f"),
        ("float a[2] = {1, 2};\nfloat b[2] = {1, 2, 3};", r"line 2: b\[2\] lists 3 values, its shape needs 2"),
        ("float b[2][2] = {{1, 2},\n {3}};", r"b\[2\]\[2\] lists 1 values in the list that ends on line 2, its shape needs 2"),
        ("float b[2] = {1, two};", r"line 1: b\[2\]: `two` on line 1 is no number"),
        ("float b[2] = {1, f(2)};", "no number"),
        ("float b[2] = {1 2};", "`1 2` on line 1 is no number"),
        ("float b[2] = {1,, 2};", "no number"),
        ("float b[1] = {010};", "`010` on line 1 is no number"),
        ("float b[1] = {0x1fffffffffffffffff};", "no number"),
        ("float b[1] = {nan};", "no number"),
        ("float b[2] = 1, 2;", r"expected one list in braces, found `1, 2`"),
        ("float b[1] = {1} 2;", "expected one list in braces"),
        ("float b[2] = {{1}, {2}};", "the brace on line 1 is out of place"),
        ("float b[2][1] = {{1} {2}};", "the brace on line 1 is out of place"),
        ("float b[2][1] = {{1}, 2};", "`, 2` on line 1 stands between lists"),
        ("float b[2][1] = {1, {2}};", "the brace on line 1 is out of place"),
        ("float b[2] = {1, 2;", "its list is not closed"),
        ("float b[] = {1, 2};", "sizes are plain numbers"),
        ("float b[N] = {1, 2};", "sizes are plain numbers"),
        ("float b[0] = {};", "sizes are plain numbers"),
        ("float b[99999999999] = {1};", "sizes are plain numbers"),
        ("float b[1] = {1}; float b[1] = {2};", "is declared a second time"),
        ("uint64 b[1] = {1.5};", "words are integers"),
        ("uint64 b[1] = {-1};", "words are integers"),
        ("/* float b[1] = {1};", "expected an array"),
    ],
)
def test_malformed_text_is_refused_with_its_line(text, part):
    with pytest.raises(CheckpointError, match=part):
        parse(text, "w.h")


def test_placeholders_of_the_published_files_are_dropped(tmp_path):
    text = "float encoder_placeholder[1] = {};\nconst FIX_WT encoder_placeholder_fix[2][1] = {{0}, {0}};\nfloat linear_bias[2] = {1, 2};"
    (tmp_path / "w.h").write_text(text)
    assert set(read(tmp_path / "w.h")) == {"linear_bias"}


def test_files_without_arrays_and_without_text(tmp_path):
    path = tmp_path / "w.h"
    for content, part in [(b"// nothing\n", "holds no array of numbers"), (b"\xff\xfe\x00", "is no text file")]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=part):
            read(path)


# ---------------------------------------------------------------- the tutorial


def test_the_tutorial_runs_as_it_is_written(published, root, tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    page = (root / "docs" / "tutorials" / "fracbnn_accelerator.md").read_text(encoding="utf-8")
    save_file(zoo.load(zoo.get("fracbnn_cifar10"), published).state_dict(), tmp_path / "weights.safetensors")
    np.save(tmp_path / "images.npy", np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tutorial.py").write_text("".join(re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)), encoding="utf-8")
    runpy.run_path(str(tmp_path / "tutorial.py"))
    assert sorted(p.name for p in (tmp_path / "xcel-cifar10" / "source").iterdir()) == sorted([FLOATS, WORDS, PARAMETERS])
    (shown,) = re.findall(r"^```text\n(.*?)^```", page, re.S | re.M)
    printed = capsys.readouterr().out
    tables = [[line for line in text.splitlines() if "frames/s" in line] for text in (shown, printed)]
    assert len(tables[0]) == 4 and tables[0] == tables[1], "the page shows another table than its code prints"
