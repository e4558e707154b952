"""Prompts are tokenised once, by as many processes as help, and lie in files that the processes of a machine share."""

import multiprocessing
import os
import time
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from lightning_dataflow.contracts import PeerTimeoutError, UserError
from lightning_dataflow.contracts.waiting import wait_until
from lightning_dataflow.prompts import cache as cache_module, parallel
from tests.unit.prompts.tiny import ICE, IDS, PLAIN, THINK, byte_tokenizer, chat, load


@pytest.fixture
def tokenised(monkeypatch) -> list[int]:
    """The numbers of the records that this process has tokenised."""
    numbers: list[int] = []
    encode = parallel.encode_record
    monkeypatch.setattr(parallel, "encode_record", lambda *args: numbers.append(args[1]) or encode(*args))
    return numbers


def test_a_second_load_reads_the_same_files(im, write, tmp_path, tokenised):
    path, cache = write(ICE, chat("q", ""), IDS), tmp_path / "cache"
    first, second = (load(path, im, cache=cache, num_eval_samples=1) for _ in range(2))
    assert tokenised == [1, 2, 3]
    for once, again in zip(first, second, strict=True):
        assert (list(once), once.skipped, once.version) == (list(again), again.skipped, again.version)
    assert first[0].version == load(path, im, num_eval_samples=1)[0].version
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    tokens = sum(int(part.lengths.sum()) for part in first)
    assert sum((folder / name).stat().st_size for name in (cache_module.IDS, cache_module.MASK)) == 5 * tokens
    assert isinstance(second[0].arrays.input_ids, np.memmap)
    assert (cache.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o700, 0o700)


def test_whatever_changes_the_prompts_makes_another_folder(im, write, tmp_path, tokenised):
    path, cache = write(ICE), tmp_path / "cache"
    dated = PLAIN + "{{ strftime_now('%d') }}"
    different = [
        {},
        {"chat_template": THINK},
        {"chat_template": THINK + "{{ tone }}"},
        {"chat_template": THINK + "{{ tone }}", "template_args": {"tone": 1}},
        {"chat_template": dated, "today": date(2025, 1, 1)},
        {"chat_template": dated, "today": date(2025, 1, 2)},
        {"max_length": 100},
        {"turns": "last"},
        {"end_ids": [5]},
        {"num_samples": 1},
        {"max_broken": 1},
        {"format": "messages"},
    ]
    for options in different * 2:
        load(path, im, cache=cache, **options)
    load(path, im, cache=cache, today=date(2025, 1, 1))  # no template writes it
    assert len(tokenised) == len(different)
    tools = byte_tokenizer({"default": PLAIN, "tool_use": PLAIN}), byte_tokenizer({"default": PLAIN, "tool_use": THINK})
    for tokenizer in (byte_tokenizer(merges=[("a", "n")]), *tools):
        load(path, tokenizer, cache=cache)
    os.utime(path, ns=(0, 0))
    load(path, im, cache=cache)
    assert len(tokenised) == len(different) + 4


def test_a_saved_data_set_that_was_saved_again_is_read_again(im, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for answer in ("a", "b"):
        datasets.Dataset.from_list([chat("q", answer)]).save_to_disk(tmp_path / "set")
        (prompt,), _ = load(str(tmp_path / "set"), im, cache=tmp_path / "cache")
        assert im.decode(prompt.input_ids).count(answer) > "user assistant".count(answer)


def test_an_interrupted_build_is_never_read(im, write, tmp_path, monkeypatch):
    path, cache = write(ICE, IDS), tmp_path / "cache"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.PromptWriter, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            load(path, im, cache=cache)
    assert not [place for place in cache.iterdir() if place.is_dir()]
    load(path, im, cache=cache)
    (folder,) = (place for place in cache.iterdir() if place.is_dir())
    (folder / cache_module.FACTS).unlink()  # as a killed process leaves it on a system that renames late
    (folder / cache_module.IDS).write_bytes(b"")
    assert [len(prompt.input_ids) for prompt in load(path, im, cache=cache)[0]] == [87, 4]


def test_folders_that_nobody_has_opened_for_long_are_deleted(im, write, tmp_path):
    path, cache = write(ICE), tmp_path / "cache"
    load(path, im, cache=cache)
    (used,) = (place for place in cache.iterdir() if place.is_dir())
    os.utime(used / cache_module.FACTS, (0, 0))
    names = {"killed long ago": (0, 0), "being built": None}
    for name, times in names.items():
        (cache / name).mkdir()
        (cache / name / cache_module.IDS).touch()
        os.utime(cache / name / cache_module.IDS, times)
    load(path, im, cache=cache, max_length=100)
    left = [place for place in cache.iterdir() if place.is_dir()]
    assert len(left) == 2
    assert cache / "being built" in left and used not in left


def _build(folder: Path, built) -> None:
    def build(unfinished: Path) -> None:
        with built.get_lock():
            built.value += 1
        time.sleep(0.1)
        cache_module.PromptWriter(unfinished).finish({"by": os.getpid()})

    cache_module.cached(folder, build, timeout_s=10)


def test_two_processes_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    built = context.Value("i", 0)
    processes = [context.Process(target=_build, args=(tmp_path / "cache" / "key", built)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert ([process.exitcode for process in processes], built.value) == ([0, 0], 1)


def test_another_process_that_does_not_end(tmp_path):
    with (
        cache_module._locked(tmp_path / "key.lock", 1),
        pytest.raises(PeerTimeoutError, match=r"the process that tokenises the prompts \(lock .*\) did not end in 0 s"),
    ):
        cache_module.cached(tmp_path / "key", lambda _: None, timeout_s=0)


@pytest.mark.integration
def test_a_pool_of_processes_gives_the_arrays_of_one(im, write, monkeypatch):
    lines = [chat(f"question {index}", f"answer {index}") for index in range(5 * parallel.CHUNK)]
    path = write(*lines, "{broken", chat("q"), ICE)
    alone, _ = load(path, im, max_broken=1)
    monkeypatch.setattr(parallel, "ALONE_S", 0)
    together, _ = load(path, im, max_broken=1)
    for name in ("input_ids", "loss_mask", "samples"):
        assert np.array_equal(getattr(alone.arrays, name), getattr(together.arrays, name))
    assert (alone.skipped, alone.version) == (together.skipped, together.version)
    with pytest.raises(UserError, match=r"line 321: not JSON"):
        load(path, im)


def test_faults_in_a_process_of_the_pool_reach_the_user(im, write, monkeypatch):
    monkeypatch.setattr(parallel, "ALONE_S", 0)
    path = write(*[IDS] * parallel.CHUNK, ICE)
    with pytest.raises(UserError, match="the chat template is not valid Jinja"):
        load(path, im, chat_template="{% for %}")


def test_a_process_of_the_pool_that_is_killed(im, write, monkeypatch):
    parent, encode = os.getpid(), parallel.encode_record
    monkeypatch.setattr(parallel, "ALONE_S", 0)
    monkeypatch.setattr(parallel, "encode_record", lambda *args: os._exit(9) if os.getpid() != parent else encode(*args))
    with pytest.raises(
        UserError, match="a process that tokenises prompts was killed, perhaps for lack of memory: run again"
    ):
        load(write(*[IDS] * (parallel.CHUNK + 1)), im)


def test_the_pool_ends_when_there_are_enough_samples(im, write, monkeypatch):
    monkeypatch.setattr(parallel, "ALONE_S", 0)
    before = multiprocessing.active_children()  # of a pool that broke
    prompts, _ = load(write(*[IDS] * 30 * parallel.CHUNK), im, num_samples=2 * parallel.CHUNK)
    assert len(prompts) == 2 * parallel.CHUNK
    processes = [process for process in multiprocessing.active_children() if process not in before]
    wait_until(lambda: all(process.exitcode is not None for process in processes), 10, 0.01, "the pool")
    assert {process.exitcode for process in processes} <= {0}
