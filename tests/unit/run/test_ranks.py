import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.run import ranks
from lightning_dataflow.run.ranks import first_rank_does, rank_from_environment

LAUNCHERS = [
    ({}, 0),
    ({"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"}, 3),  # torchrun
    ({"SLURM_PROCID": "2"}, 2),
    ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, 1),  # Lightning's launcher within SLURM's interactive shell
    ({"LOCAL_RANK": "1"}, 1),  # Lightning's launcher
    ({"NODE_RANK": "0"}, 0),
    ({"NODE_RANK": "1"}, 2),  # the first process of the second node, which Lightning gives no rank
    ({"NODE_RANK": "1", "LOCAL_RANK": "1"}, 3),
    ({"GROUP_RANK": "1"}, 2),
]


@pytest.mark.parametrize(("variables", "rank"), LAUNCHERS)
def test_the_rank_of_every_launcher(monkeypatch, variables, rank):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank_from_environment(num_devices=2) == rank
    assert (rank_from_environment() == 0) == (rank == 0)


def test_rank_0_works_and_others_wait(monkeypatch):
    monkeypatch.setattr(ranks, "TIMEOUT_S", 0.01)
    done = []
    first_rank_does(lambda: done.append(1), lambda: bool(done), "the work")
    first_rank_does(lambda: done.append(1), lambda: bool(done), "the work")
    assert done == [1]
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"waited 0 s for rank 0 to finish the work"):
        first_rank_does(lambda: None, lambda: False, "the work")
