"""Commands and replies belong together, whatever happens in between."""

import multiprocessing
import threading

import pytest

from lightning_dataflow.control.redis.connections import RedisConnections


@pytest.fixture
def connections(redis_server):
    made = RedisConnections(redis_server.where, "test", lambda: None)
    yield made
    made.close()


def test_a_command_that_was_interrupted_leaves_its_reply_to_nobody(connections, monkeypatch):
    connections.send("PING")
    (connection,) = connections._idle

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(connection, "read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            connections.send("ECHO", "before")
    assert connections.send("ECHO", "after") == b"after"


def test_an_error_of_one_command_leaves_the_others_their_replies(connections):
    with pytest.raises(connections.errors.ResponseError, match="wrong number of arguments"):
        connections.send_all([("ECHO", "one"), ("ECHO",), ("ECHO", "three")])
    assert connections.send("ECHO", "four") == b"four"
    assert len(connections._idle) == 1


def test_threads_have_connections_of_their_own(connections):
    wrong: list[bytes] = []

    def echo(name: str) -> None:
        for index in range(200):
            text = f"{name}{index}".encode()
            if (reply := connections.send("ECHO", text)) != text:
                wrong.append(reply)

    threads = [threading.Thread(target=echo, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert len(connections._idle) <= 4


def test_a_fork_does_not_talk_on_its_parents_connection(connections):
    connections.send("PING")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def ask() -> None:
        answers.put([connections.send("CLIENT", "ID"), connections.send("ECHO", "child")])

    child = context.Process(target=ask)
    child.start()
    there, echo = answers.get(timeout=30)
    child.join(30)
    assert echo == b"child"
    assert connections.send("CLIENT", "ID") != there
