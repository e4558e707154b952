"""Waits end, say whom they are for, and do not count the time in which this process stood still."""

import logging
import time

import pytest

from lightning_dataflow.contracts import waiting
from lightning_dataflow.contracts.waiting import Wait, said_if_long, wait_until


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def said(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_a_long_wait_says_whom_it_is_for(clock, caplog):
    caplog.set_level(logging.WARNING)
    assert not wait_until(lambda: False, 300.0, 0.5, "the trainer to begin")
    assert said(caplog) == [f"waiting for the trainer to begin, for {seconds} s so far" for seconds in (10, 30, 90, 270)]
    assert not wait_until(lambda: False, 9.0, 0.5, "the trainer to begin")
    assert said(caplog) == []


def test_news_begin_it_anew(clock, caplog):
    wait, who = Wait(lambda: who[0]), ["producer-0"]
    for _ in range(8):
        clock[0] += 2
        wait.seconds()
    who[0] = "producer-1"
    wait.restart()
    assert wait.seconds() == 0.0
    for _ in range(5):
        clock[0] += 2
        wait.seconds()
    assert [line.split(",")[0] for line in said(caplog)] == ["waiting for producer-0", "waiting for producer-1"]


def test_a_minute_in_a_debugger_is_no_minute_of_waiting(clock):
    wait = Wait("x")
    clock[0] += 60
    assert wait.seconds() == 5.0
    clock[0] += 1
    assert wait.seconds() == 6.0


def test_one_long_call_is_said_once(clock, caplog):
    wait = Wait("x", longest_call_s=35.0)
    for seconds in (35.0, 0.1):
        clock[0] += seconds
        wait.seconds()
    assert said(caplog) == ["waiting for x, for 35 s so far"]


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, []), (0.2, ["waiting for x, for 0 s so far"])])
def test_a_call_that_blocks_says_whom_it_waits_for(monkeypatch, caplog, seconds, lines):
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.05)
    with said_if_long("x"):
        time.sleep(seconds)
    time.sleep(0.1)  # after the call nothing is said
    assert said(caplog) == lines
