"""docs/search.md: its example runs, finds something and stays exact."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantlib.search import History


def test_the_worked_example(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    example, own_cost = re.findall(r"^```python\n(.*?)^```", (root / "docs" / "search.md").read_text(encoding="utf-8"), re.S | re.M)
    paths = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", example + own_cost], cwd=tmp_path, capture_output=True, text=True, timeout=600, env=paths)
    assert done.returncode == 0, done.stderr
    bits, right, exact, cost = done.stdout.splitlines()
    assert re.fullmatch(r"bits of weights and of inputs: [248]{2} [248]{2}", bits)
    assert float(right.split()[-2]) > 80
    assert exact == "exact in integers: True"
    assert re.fullmatch(r"\d+ bytes with the bits found, \d+ expected", cost)
    history = History.load(tmp_path / "search.json")
    assert len(history.entries) == 3 and history.names == ("1", "4")
    assert bits.split()[-2:] == ["".join(map(str, b)) for b in (history.entries[-1].weight_bits, history.entries[-1].act_bits)]
    assert (tmp_path / "search.png").stat().st_size > 10_000
