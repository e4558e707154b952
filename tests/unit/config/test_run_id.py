import itertools

import pytest

from lightning_dataflow.config.run_id import run_id
from lightning_dataflow.contracts.validation import check_id


@pytest.mark.parametrize("name", ["exp-1", "eagle3-online-20261130-170811", "a", "v1.2_b"])
def test_a_plain_name_is_its_own_id_so_runs_of_earlier_releases_resume(name):
    assert run_id(name) == name


NAMES = [
    "exp/1",
    "exp-1",
    "exp 1",
    "über",
    "ber",
    "-ber",
    "ber.",
    "_x",
    "x",
    "a..b",
    "a.b",
    "/",
    "run",
    "a" * 300,
    "a" * 301,
]


def test_two_names_never_share_an_id():
    """Two runs with one id shared their keys in one store."""
    for first, second in itertools.combinations(NAMES, 2):
        assert run_id(first) != run_id(second), (first, second)


@pytest.mark.parametrize("name", NAMES)
def test_an_id_is_readable_valid_and_its_own_id(name):
    name_id = run_id(name)
    assert check_id(name_id, "run_id") == name_id == run_id(name_id)
    assert len(name_id) <= 200
    assert run_id("exp/1").startswith("exp-1-")
