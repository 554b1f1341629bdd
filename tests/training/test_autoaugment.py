"""AutoAugment: every operation at every magnitude against formulas on arrays, the table against the published list, all outcomes."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from quantlib.training.autoaugment import MAGNITUDES, POLICY, SIGNED, augmented, autoaugment

PUBLISHED = """
.4 posterize 8 .6 rotate 9      | .6 solarize 5 .6 autocontrast 5 | .8 equalize 8 .6 equalize 3  | .6 posterize 7 .6 posterize 6
.4 equalize 7 .2 solarize 4     | .4 equalize 4 .8 rotate 8       | .6 solarize 3 .6 equalize 7  | .8 posterize 5 1 equalize 2
.2 rotate 3 .6 solarize 8       | .6 equalize 8 .4 posterize 6    | .8 rotate 8 .4 color 0       | .4 rotate 9 .6 equalize 2
0 equalize 7 .8 equalize 8      | .6 invert 4 1 equalize 8        | .6 color 4 1 contrast 8      | .8 rotate 8 1 color 2
.8 color 8 .8 solarize 7        | .4 sharpness 7 .6 invert 8      | .6 shearX 5 1 equalize 9     | .4 color 0 .6 equalize 3
"""
REPEATED = (5, 2, 14, 15, 3)  # rows 21 to 25, by the number of the row they repeat


def published():
    words = [cell.split() for line in PUBLISHED.strip().splitlines() for cell in line.split("|")]
    rows = [(float(p), a, int(i), float(q), b, int(j)) for p, a, i, q, b, j in words]
    return rows + [rows[number - 1] for number in REPEATED]


def test_the_table_is_the_published_one():
    assert len(POLICY) == 25 and list(POLICY) == published()
    assert MAGNITUDES["posterize"] == (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
    for name, (first, last) in {"shearX": (0, 0.3), "rotate": (0, 30), "color": (0, 0.9), "solarize": (256, 0)}.items():
        # linspace multiplies by a rounded ninth: up to an ulp of 256 apart
        np.testing.assert_allclose(MAGNITUDES[name], np.linspace(first, last, 10), rtol=0, atol=6e-14)
    assert all(len(row) == 10 for row in MAGNITUDES.values()) and set(MAGNITUDES) >= SIGNED | {row[k] for row in POLICY for k in (1, 4)}
    assert "rotate" not in SIGNED


# ---------------------------------------------------------------- the operations


def pictures():
    generator = np.random.default_rng(5)
    smooth = np.add.outer(np.arange(29) * 4, np.arange(23) * 5)[..., None] + np.array([0, 20, 40])
    low = generator.integers(60, 160, (29, 23, 3))
    low[..., 2] = 77  # a channel of one value
    return [np.asarray(p, np.uint8) for p in (generator.integers(0, 256, (29, 23, 3)), smooth % 256, low)]


def grey(x):
    """ITU-R 601 luma in 16-bit fixed point, half up."""
    r, g, b = (x[..., k].astype(np.int64) for k in range(3))
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).astype(np.uint8)


def mixed(dull, x, factor):
    """dull + factor (x - dull) in float32, clipped; towards zero."""
    dull, x = dull.astype(np.float32), x.astype(np.float32)
    return np.clip(dull + np.float32(factor) * (x - dull), 0, 255).astype(np.uint8)


def smoothed(x):
    """3x3 mean with the middle counted five times; the border stays."""
    wide = x.astype(np.float64)
    rows, columns = x.shape[:2]
    total = 4 * wide[1:-1, 1:-1] + sum(wide[1 + u : rows - 1 + u, 1 + v : columns - 1 + v] for u, v in product((-1, 0, 1), repeat=2))
    out = x.copy()
    out[1:-1, 1:-1] = np.floor(total / 13 + 0.5)
    return out


def by_channel(table_of):
    def run(x, *_):
        return np.stack([table_of(x[..., c])[x[..., c]] for c in range(3)], -1).astype(np.uint8)

    return run


def stretched(channel):
    lo, hi = int(channel.min()), int(channel.max())
    codes = np.arange(256)
    return codes if lo == hi else np.clip((codes * (255 / (hi - lo)) - lo * (255 / (hi - lo))).astype(int), 0, 255)


def levelled(channel):
    counts = np.bincount(channel.reshape(-1), minlength=256)
    step = (counts.sum() - counts[counts > 0][-1]) // 255
    before = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.clip((step // 2 + before) // step, 0, 255) if step and (counts > 0).sum() > 1 else np.arange(256)


def sheared(x, slope):
    """Row y reads column x + slope (y + 1/2) by cubic interpolation with parameter -1; 128 where that lies outside."""
    out = np.full_like(x, 128)
    rows, columns = x.shape[:2]
    for y, column in product(range(rows), range(columns)):
        place = column + 0.5 + slope * (y + 0.5)
        if not 0 <= place < columns:
            continue
        left = int(np.floor(place - 0.5))
        t = place - 0.5 - left
        a, b, c, d = (x[y, np.clip(left + k, 0, columns - 1)].astype(float) for k in (-1, 0, 1, 2))
        value = b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * (-a + b - c + d)))
        out[y, column] = np.clip(value, 0, 255).astype(np.uint8)
    return out


def turned(x, degrees):
    """Anticlockwise about the middle, the nearest pixel; 128 where that lies outside."""
    out = np.full_like(x, 128)
    rows, columns = x.shape[:2]
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    for y, column in product(range(rows), range(columns)):
        u, v = column + 0.5 - columns / 2, y + 0.5 - rows / 2
        source, row = int(np.floor(cos * u - sin * v + columns / 2)), int(np.floor(sin * u + cos * v + rows / 2))
        if 0 <= source < columns and 0 <= row < rows:
            out[y, column] = x[row, source]
    return out


FORMULAS = {  # of array, magnitude, sign
    "shearX": lambda x, m, s: sheared(x, s * m),
    "shearY": lambda x, m, s: sheared(x.transpose(1, 0, 2), s * m).transpose(1, 0, 2),
    "rotate": lambda x, m, s: turned(x, m),
    "color": lambda x, m, s: mixed(np.repeat(grey(x)[..., None], 3, -1), x, 1 + s * m),
    "contrast": lambda x, m, s: mixed(np.full_like(x, int(grey(x).mean() + 0.5)), x, 1 + s * m),
    "brightness": lambda x, m, s: mixed(np.zeros_like(x), x, 1 + s * m),
    "sharpness": lambda x, m, s: mixed(smoothed(x), x, 1 + s * m),
    "posterize": lambda x, m, s: x // 2 ** int(8 - m) * 2 ** int(8 - m),
    "solarize": lambda x, m, s: np.where(x < m, x, 255 - x),
    "autocontrast": by_channel(stretched),
    "equalize": by_channel(levelled),
    "invert": lambda x, m, s: 255 - x,
}


@pytest.mark.parametrize("name", MAGNITUDES)
def test_operation_against_its_formula(name):
    for x, index, sign in product(pictures(), range(10), (1, -1) if name in SIGNED else (1,)):
        got = np.asarray(augmented(Image.fromarray(x), name, index, sign))
        wanted = FORMULAS[name](x, MAGNITUDES[name][index], sign)
        assert np.array_equal(got, wanted), (index, sign, int((got != wanted).sum()))


def test_what_a_rotation_uncovers_is_grey():
    white = Image.new("RGB", (41, 31), (255, 255, 255))
    got = np.asarray(augmented(white, "rotate", 9))
    assert set(np.unique(got)) == {128, 255} and all((got[y, x] == 128).all() for y in (0, -1) for x in (0, -1))


def test_unknown_operations_are_refused():
    picture = Image.new("RGB", (4, 4))
    with pytest.raises(KeyError, match="translate"):
        augmented(picture, "translate", 1)
    with pytest.raises(IndexError):
        augmented(picture, "rotate", 10)


# ---------------------------------------------------------------- the chances


class Script:
    """A random source that says what it is told, and remembers what it was asked for."""

    def __init__(self, row, first, second, sign):
        self.row, self.randoms, self.sign, self.asked = row, [first, second], sign, []

    def random(self):
        return self.randoms.pop(0)

    def integers(self, high):
        self.asked.append(high)
        return self.row if high == 25 else self.sign


def test_every_row_with_every_outcome():
    """All 25 rows, each operation drawn just below its probability or at it, both signs: only what is below is applied, in order."""
    x = Image.fromarray(pictures()[0])
    for (n, (p, a, i, q, b, j)), first, second, sign in product(enumerate(published()), (0, 1), (0, 1), (0, 1)):
        script = Script(n, p if first == 0 else np.nextafter(p, -1), q if second == 0 else np.nextafter(q, -1), sign)
        wanted = x
        for applied, name, index in ((first, a, i), (second, b, j)):
            wanted = augmented(wanted, name, index, 2 * sign - 1 if name in SIGNED else 1) if applied else wanted
        assert np.array_equal(np.asarray(autoaugment(x, script)), np.asarray(wanted))
        assert script.asked == [25] + [2] * (first * (a in SIGNED) + second * (b in SIGNED)) and not script.randoms


def test_a_seed_decides():
    x = Image.fromarray(pictures()[1])
    one, two = ([np.asarray(autoaugment(x, g)) for _ in range(40)] for g in map(np.random.default_rng, (7, 7)))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True)) and len({a.tobytes() for a in one}) > 10
