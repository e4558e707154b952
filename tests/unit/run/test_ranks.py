import pytest

from lightning_dataflow.contracts import UserError
from lightning_dataflow.run.ranks import first_rank_does, rank_from_environment


@pytest.mark.parametrize(("name", "value", "rank"), [("RANK", "3", 3), ("LOCAL_RANK", "1", 1), ("SLURM_PROCID", "2", 2)])
def test_the_rank_of_every_launcher(monkeypatch, name, value, rank):
    monkeypatch.setenv(name, value)
    assert rank_from_environment() == rank


def test_rank_0_works_and_others_wait(monkeypatch):
    done = []
    first_rank_does(lambda: done.append(1), lambda: bool(done), "the work")
    first_rank_does(lambda: done.append(1), lambda: bool(done), "the work")
    assert done == [1]
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"waited 0 s for rank 0 to finish the work"):
        first_rank_does(lambda: None, lambda: False, "the work", timeout_s=0.01)
