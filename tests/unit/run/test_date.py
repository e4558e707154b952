"""The date that chat templates write is one for all processes of a run, whenever and wherever they begin."""

from datetime import date

import pytest

from lightning_dataflow.config import files
from lightning_dataflow.config.parsing import parse_config
from lightning_dataflow.run.builder import Builder
from tests.unit.config.test_config import make


@pytest.fixture
def written(tmp_path, monkeypatch, target_path):
    """written(day, *overrides) → the date that a process which begins on that day of January writes."""

    def call(day: int, *overrides: str) -> date:
        class Today(date):
            @classmethod
            def today(cls) -> date:
                return date(2025, 1, day)

        monkeypatch.setattr(files, "date", Today)
        config = parse_config(make(*overrides, f"target.path={target_path}", "target.prepare=null", "data.prepare=null"))
        builder = Builder(config)
        with builder.resources:
            return builder.rendering["today"]

    return call


def test_producers_write_the_date_of_the_first(tmp_path, written):
    shared = ("topology=disagg_online", "store=shared_dir", f"channel.path={tmp_path / 'control'}", "run_name=mine")
    first = written(1, *shared, "role=producer", f"run_dir={tmp_path / 'first'}")
    later = written(2, *shared, "role=producer", f"run_dir={tmp_path / 'later'}")
    trainer = written(3, *shared, "role=trainer", f"run_dir={tmp_path / 'trainer'}")
    assert first == later == trainer == date(2025, 1, 1)
    assert written(4, *shared, "role=producer", "data.date=2024-07-26") == date(2024, 7, 26)


def test_other_commands_touch_no_log(tmp_path, written):
    assert written(2, "topology=disagg_online", f"channel.path={tmp_path / 'control'}") == date(2025, 1, 2)
    assert not (tmp_path / "control").exists()
