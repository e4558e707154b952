"""CONTRIBUTING.md names what exists."""

import re

import pytest

from tests.processes import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
STRATEGIES = [path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml")]
PATHS = sorted(set(re.findall(r"(?:\.ci|conf|docs|lightning_dataflow|recipes|scripts|tests)/[\w./]*\w", TEXT)))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_exists(path):
    for name in STRATEGIES if "NAME" in path else ("",):
        assert (ROOT / path.replace("NAME", name)).exists(), f"CONTRIBUTING.md names {path}"


def test_every_folder_of_the_package_is_explained():
    folders = {path.parent.name for path in (ROOT / "lightning_dataflow").glob("*/__init__.py")}
    table = TEXT.partition("## Where things are")[2].partition("| where is")[0]
    assert folders == set(re.findall(r"^\| `(\w+)/` \|", table, re.MULTILINE))
