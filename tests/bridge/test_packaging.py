from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_subpackage_is_shipped():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "recbole_uip").rglob("__init__.py")
    }
    properties = {
        ".".join(("recbole_uip", *folder.parent.relative_to(ROOT).parts))
        for folder in (ROOT / "properties").rglob("*.yaml")
    }
    assert set(listed) == there | properties
