import importlib.metadata
import re
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


def test_the_installation_without_ray_names_every_other_dependency():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *importlib.metadata.requires("recbole")]
    needed = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    (line,) = (
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("pip install --no-deps recbole")
    )
    named = {re.match(r"[\w.-]+", word)[0] for word in line.split("&& pip install ")[1].split()}
    assert named == needed - {"recbole", "ray"}
