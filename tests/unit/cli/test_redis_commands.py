"""What `status` and `clean` say of runs in a Redis."""

import json

import pytest

from lightning_dataflow.cli import clean, status
from lightning_dataflow.control import RedisMetadataStore, RunPlan
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.server import RedisServer


@pytest.fixture
def there(redis_server):
    """Arguments that say where the Redis is."""
    return ["--redis", redis_server.where.address, "--redis-secret-file", str(redis_server.secret_file)]


@pytest.fixture
def ledger(redis_run: RedisServer):
    RedisChannel(redis_run).announce({"run_id": redis_run.run_id})
    made = RedisMetadataStore(redis_run)
    made.begin(RunPlan(start=0, stop=8, window=4), {}, frontier=0)
    return made


def fails(command, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    return f"{error.value}\n{capsys.readouterr().err}"  # Python prints a message and exits with status 1


def test_runs_are_listed_shown_and_removed(redis_run, ledger, there, capsys):
    name = redis_run.run_id
    status.main(there)
    assert name in capsys.readouterr().out.split()
    ledger.report("trainer-0", "training")
    status.main([name, *there, "--json", "--interval=0"])
    assert json.loads(capsys.readouterr().out)["parts"][0]["state"] == "training"
    status.main([name, *there, "--interval=0"])
    assert "prompts     8 from seq 0, 4 a step" in capsys.readouterr().out
    assert f"run {name} is alive: trainer-0 on" in fails(clean, capsys, name, *there)
    ledger.finish("interrupted")
    clean.main([name, *there])
    assert capsys.readouterr().out.startswith(f"removed run {name}: 4 keys, 0.0 MB")
    assert f"no run {name} in Redis at" in fails(clean, capsys, name, *there)
    assert f"no run {name} in Redis at" in fails(status, capsys, name, *there)


def test_what_is_missing_is_said(redis_server, tmp_path, there, capsys):
    address = redis_server.where.address
    assert "say which run" in fails(status, capsys)
    assert "--redis HOST:PORT is missing" in fails(clean, capsys, "a")
    assert f"error: Redis at {address} refuses this user" in fails(status, capsys, "a", "--redis", address)
    assert "error: cannot read --redis-secret-file=nowhere" in fails(
        status, capsys, "a", "--redis", address, "--redis-secret-file", "nowhere"
    )
    assert "error: no Redis answers at 127.0.0.1:1 " in fails(clean, capsys, "a", "--redis", "127.0.0.1:1")


def test_errors_name_the_arguments_and_not_the_settings(redis_server, tmp_path, capsys):
    address = redis_server.where.address
    refused = fails(status, capsys, "a", "--redis", address)
    assert "check --redis-username and the password in --redis-secret-file" in refused
    nobody = fails(clean, capsys, "a", "--redis", "127.0.0.1:1")
    assert "correct --redis or --redis-tls" in nobody
    assert "channel." not in refused + nobody + fails(status, capsys, "a", "--redis", "nowhere")


def test_a_secret_that_everybody_can_read_is_told(redis_server, tmp_path, caplog):
    file = tmp_path / "secret"
    file.write_bytes(redis_server.secret_file.read_bytes())
    for mode, told in ((0o600, False), (0o640, False), (0o644, True)):
        caplog.clear()
        file.chmod(mode)
        status.main(["--redis", redis_server.where.address, "--redis-secret-file", str(file)])
        assert (f"can be read by everybody on this machine: chmod 600 {file}" in caplog.text) == told
    assert file.read_text() not in caplog.text


def test_parts_that_were_killed_are_not_shown_as_at_work(redis_run, ledger, there, capsys):
    def shown() -> str:
        status.main([redis_run.run_id, *there, "--interval=0"])
        return capsys.readouterr().out

    ledger.report("trainer-0", "training")
    assert "state       running\n" in shown()
    assert "s ago): training" in shown()
    key = redis_run.key("parts")
    part = json.loads(redis_run.ask("HGET", key, "trainer-0"))
    redis_run.ask("HSET", key, "trainer-0", json.dumps(part | {"seen": part["seen"] - 60}))
    killed = shown()
    assert "state       not ended, but none of its parts is seen any more: resume it with ckpt_path=last" in killed
    assert "not seen for 60 s), at last: training" in killed
    ledger.report("producer-0", "capturing")
    assert "state       running\n" in shown()


def test_a_run_with_a_redis_of_its_own_is_shown_by_its_folder(redis_server, redis_run, ledger, tmp_path, capsys):
    folder = tmp_path / redis_run.run_id / "control"
    folder.mkdir(parents=True)
    for name in ("redis-address", "redis-secret"):
        (folder / name).write_bytes((redis_server.folder / name).read_bytes())
    for run in (folder, folder.parent):
        status.main([str(run), "--json", "--interval=0"])
        assert json.loads(capsys.readouterr().out)["plan"]["stop"] == 8
    (folder / "redis-address").write_text("127.0.0.1:1")
    assert "error: the Redis of this run, 127.0.0.1:1, is not running" in fails(status, capsys, str(folder.parent))


def test_a_run_that_ended_before_it_was_announced_is_shown_and_removed(redis_run, there, capsys):
    RedisMetadataStore(redis_run).report("supervisor", "starting")
    status.main(there)
    assert redis_run.run_id in capsys.readouterr().out.split()
    status.main([redis_run.run_id, *there, "--interval=0"])
    assert "not begun" in capsys.readouterr().out
    RedisMetadataStore(redis_run).finish("interrupted")
    clean.main([redis_run.run_id, *there])
    assert redis_run.ask("KEYS", redis_run.key("*").replace("{", "?").replace("}", "?")) == []
