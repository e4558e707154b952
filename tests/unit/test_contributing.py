"""CONTRIBUTING.md, README.md and docs/ name what exists, and so does the list of packages."""

import re
import tomllib

import pytest

from tests.processes import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
STRATEGIES = [path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml")]
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
PATH = re.compile(r"(?<![\w/.-])(?:\.ci|conf|docs|lightning_dataflow|recipes|scripts|tests)/[\w./]*\w")
PATHS = sorted({path for page in PAGES for path in PATH.findall(page.read_text())})


@pytest.mark.parametrize("path", PATHS)
def test_a_path_exists(path):
    for name in STRATEGIES if "NAME" in path else ("",):
        assert (ROOT / path.replace("NAME", name)).exists(), f"a page names {path}"


def test_every_folder_of_the_package_is_explained():
    folders = {path.parent.name for path in (ROOT / "lightning_dataflow").glob("*/__init__.py")}
    table = TEXT.partition("## Where things are")[2].partition("| where is")[0]
    assert folders == set(re.findall(r"^\| `(\w+)/` \|", table, re.MULTILINE))


def test_every_package_is_installed():
    """An editable installation, which all tests use, has every folder, whatever the list says."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "lightning_dataflow").rglob("__init__.py")}
    assert folders | {"lightning_dataflow.conf"} == set(listed)
