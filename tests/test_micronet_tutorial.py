"""docs/tutorials/micronet.md: its code runs as it is written and prints what the page shows."""

import re
import runpy

import pytest

import quantlib as ql


def test_the_page_prints_what_it_shows(root, tmp_path, monkeypatch, capsys):
    page = (root / "docs" / "tutorials" / "micronet.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    (tmp_path / "page.py").write_text("".join(code), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="has no learned scales, so 81"):
        left = runpy.run_path("page.py")
    shown = "".join(re.findall(r"^```text\n(.*?)^```", page, re.S | re.M))
    assert capsys.readouterr().out == shown
    assert left["check"].ok and left["cost"].printed == 0.5558137893676758
    again = ql.load("proxylessnas.safetensors")
    assert [n.name for n in again] == [n.name for n in left["graph"]]
    quoted = re.findall(r"^    (.+?)  +#", page, re.M)  # the story in four lines is that of the code
    assert len(quoted) == 4 and all(line in "".join(code) for line in quoted)
