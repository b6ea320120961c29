"""The versions that `make test-oldest` runs with are the lower bounds the package states."""

import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brought it")
ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def bounds(requirements, operator):
    found = {}
    for requirement in requirements:
        if isinstance(requirement, str):
            name, version = re.match(rf"([\w-]+)(?:\[.*\])?{operator}([\d.]+)", requirement).groups()
            assert found.setdefault(name, version) == version, f"{name} is bounded twice, differently"
    return found


def release(version):
    return re.sub(r"(\.0)+$", "", version)


def stated():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    return bounds(project["dependencies"] + [one for extra in extras for one in extra], ">=")


def test_the_oldest_versions_are_the_stated_bounds():
    pinned = bounds(PYPROJECT["dependency-groups"]["oldest"], "==")
    assert {name: release(version) for name, version in pinned.items()} == {
        name: release(version) for name, version in stated().items()
    }


def test_the_test_group_asks_for_no_newer_versions_than_the_package():
    groups = PYPROJECT["dependency-groups"]
    tested = bounds(groups["demo"] + groups["test"], ">=")
    assert {name: tested.get(name, version) for name, version in stated().items()} == stated()


def test_the_table_of_versions_names_the_bounds():
    (row,) = re.findall(r"^\| oldest \|.*$", CONTRIBUTING, re.MULTILINE)
    (header,) = re.findall(r"^\| tested \|.*$", CONTRIBUTING, re.MULTILINE)
    names = [cell.strip().lower() for cell in header.split("|")[2:-1]]
    versions = [cell.strip() for cell in row.split("|")[2:-1]]
    oldest = dict(zip(names, versions, strict=True))
    assert oldest.pop("python") == PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert oldest == stated()
