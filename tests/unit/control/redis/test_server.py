"""Commands and replies belong together, whatever happens in between."""

import multiprocessing
import threading

import pytest

from lightning_dataflow.contracts import PeerFailedError, UserError
from lightning_dataflow.control.redis.server import RedisServer


def test_a_command_that_was_interrupted_leaves_its_reply_to_nobody(redis_run, monkeypatch):
    """Neither to this thread's next command nor to another thread's."""
    redis_run.ask("PING")
    connection = redis_run._pool.get_connection()
    redis_run._pool.release(connection)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(connection, "read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            redis_run.ask("ECHO", "before")
    assert redis_run.ask("ECHO", "after") == b"after"


def test_an_error_leaves_the_next_command_its_reply(redis_run):
    with pytest.raises(PeerFailedError, match="wrong number of arguments"):
        redis_run.ask("ECHO")
    assert redis_run.ask("ECHO", "four") == b"four"


def test_threads_have_connections_of_their_own(redis_run):
    wrong: list[bytes] = []

    def echo(name: str) -> None:
        for index in range(200):
            text = f"{name}{index}".encode()
            if (reply := redis_run.ask("ECHO", text)) != text:
                wrong.append(reply)

    threads = [threading.Thread(target=echo, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_a_fork_does_not_talk_on_its_parents_connection(redis_run):
    mine = redis_run.ask("CLIENT", "ID")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def ask() -> None:
        answers.put([redis_run.ask("CLIENT", "ID"), redis_run.ask("ECHO", "child")])

    child = context.Process(target=ask)
    child.start()
    there, echo = answers.get(timeout=30)
    child.join(30)
    assert echo == b"child"
    assert redis_run.ask("CLIENT", "ID") == mine != there


def test_a_run_of_release_0_1_is_refused_by_its_version(redis_run):
    redis_run.ask("SET", redis_run.key("card"), '{"run_id": "run", "seed": 0, "schema_version": 2}')
    with pytest.raises(UserError) as error:
        RedisServer(redis_run.where, redis_run.run_id)
    assert str(error.value) == (
        f"{redis_run.name}, run {redis_run.run_id}, has schema version 2 (of lightning_dataflow 0.1), this release reads "
        "3: use that release for it, or choose another run_name"
    )
