"""The README's example runs as written, and its commands exist."""

import re
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def test_the_example_is_short_and_runs(readme, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "tensor(True)" and "True" in lines
    (percent,) = re.findall(r"([\d.]+) % in integers", done.stdout)
    assert float(percent) > 90


def test_make_targets_exist(readme, root):
    makefile = (root / "Makefile").read_text()
    commands = set(re.findall(r"^    make (\w+)", readme, re.MULTILINE))
    assert commands == {"quickstart", "test"}
    assert all(re.search(rf"^{c}:", makefile, re.MULTILINE) for c in commands)


def test_every_registered_network_is_in_the_table(readme):
    """By name or by a pattern with a star, once."""
    import zoo

    rows = re.findall(r"^\| (`[^|]+`) \|", readme, re.MULTILINE)
    patterns = [pattern for row in rows for pattern in re.findall(r"`([\w*]+)`", row)]
    assert sorted(name for pattern in patterns for name in zoo.names(pattern)) == zoo.names()
    assert all(zoo.names(pattern) for pattern in patterns)


def test_every_recipe_is_named_and_exists(readme, root):
    named = set(re.findall(r"recipes/(\w+\.py)", readme))
    assert named | {"quickstart.py"} == {path.name for path in (root / "recipes").glob("[!_]*.py")}


def test_every_page_is_in_the_index(root):
    index = (root / "docs" / "README.md").read_text()
    linked = set(re.findall(r"\]\(([^)]+)\)", index))
    assert linked == {str(p.relative_to(root / "docs")) for p in (root / "docs").rglob("*.md")} - {"README.md"}
