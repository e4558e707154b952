import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.run import ranks
from lightning_dataflow.run.ranks import rank_from_environment, wait_for_first_rank

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


def test_others_wait_for_rank_0(monkeypatch):
    monkeypatch.setattr(ranks, "POLL_S", 0.001)
    monkeypatch.setattr(ranks, "TIMEOUT_S", 0.2)
    done = iter([False, False, True])
    wait_for_first_rank(lambda: next(done), "the work")
    with pytest.raises(UserError, match=r"waited 0 s for rank 0 to finish the work"):
        wait_for_first_rank(lambda: False, "the work")
