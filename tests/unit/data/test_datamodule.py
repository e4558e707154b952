import errno
import json
from pathlib import Path

import pytest
import torch

from lightning_dataflow.contracts import NotFiniteError, UserError
from lightning_dataflow.data import DataFlowDataModule, OfflineSource, PassOrder, SampleRows
from lightning_dataflow.producers import OnlineSource, capture_to_folder
from lightning_dataflow.targets import HFTargetEngine
from tests.prompts import data_set
from tests.streams import read_batches


def take(data: DataFlowDataModule, count: int) -> list[dict]:
    return read_batches(data, count, SampleRows.stack)


@pytest.fixture
def online(prompts, target) -> OnlineSource:
    return OnlineSource(prompts[0], target)


def make(source, **options) -> DataFlowDataModule:
    return DataFlowDataModule(source, **{"global_batch_size": 4, "micro_batch_size": 2} | options)


def test_batches_of_a_window(online):
    data = make(online)
    first, second, third = take(data, 3)
    lengths = [len(online.prompts[data.source.order.locate(seq)[0]].input_ids) for seq in range(8)]
    assert [one["window_num_tokens"] for one in (first, second, third)] == [sum(lengths[:4])] * 2 + [sum(lengths[4:])]
    assert [one["next_seq"] for one in (first, second, third)] == [4, 4, 8]
    assert first["input_ids"].shape == (2, max(lengths[:2]))
    assert first["num_tokens"] == sum(lengths[:2])
    assert first["aux_hidden_states"].shape == (2, max(lengths[:2]), 3 * 64)
    assert first["input_ids"][0, lengths[0] :].eq(0).all()


def test_nothing_happens_before_the_first_next(online):
    data = make(online)
    for _ in range(3):
        iter(data.train_dataloader())
    assert online.store.health()["num_samples"] == 0
    assert data.wait_seconds == 0


def test_a_stream_that_ends_inside_a_window_leaves_nothing(online):
    take(make(online, global_batch_size=8), 1)
    assert online.store.health()["num_samples"] == 0


def test_it_resumes_at_the_cursor(online):
    data = make(online)
    names = [one["sample_ids"] for one in take(data, 6)]
    data.mark_applied(4, 1)
    resumed = make(online)
    resumed.load_state_dict(data.state_dict())
    assert [one["sample_ids"] for one in take(resumed, 4)] == names[2:6]


def test_a_checkpoint_of_other_prompts_is_refused(online, prompts, target):
    others = data_set(prompts[0][::-1])
    with pytest.raises(UserError, match="resume with the same data"):
        make(OnlineSource(others, target)).load_state_dict(make(online).state_dict())


def test_a_sample_that_is_gone_is_named(prompts, target, tmp_path):
    few = data_set(prompts[0][:4])
    capture_to_folder(few, target, tmp_path)
    next(tmp_path.rglob("0-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"a sample is lost: features of offline:.* capture again"):
        take(make(OfflineSource(tmp_path)), 2)


@pytest.mark.parametrize("name", ["manifest.json", "refs.jsonl"])
def test_a_file_that_cannot_be_read_is_not_called_damaged(prompts, target, tmp_path, monkeypatch, name):
    """To capture again would be no remedy."""
    capture_to_folder(data_set(prompts[0][:4]), target, tmp_path)
    open_it = Path.open

    def fail(path, *mode):
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open_it(path, *mode)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match=f"Input/output error: .*{name}"):
        OfflineSource(tmp_path)


def test_a_folder_that_cannot_be_written_is_read(prompts, target, tmp_path, monkeypatch):
    few = data_set(prompts[0][:4])
    capture_to_folder(few, target, tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.setattr("pathlib.Path.write_text", lambda *arguments: pytest.fail("wrote to the folder"))
    assert take(make(OfflineSource(tmp_path)), 2)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("options", [{"seed": 1}, {"global_batch_size": 2, "micro_batch_size": 1}])
def test_a_checkpoint_of_another_order_is_refused(online, options):
    state = make(online).state_dict()
    with pytest.raises(UserError, match="resume with the same data, seed, global_batch_size and packing"):
        make(online, **options).load_state_dict(state)


@pytest.mark.integration
@pytest.mark.parametrize("packing", [{}, {"row_tokens": 400, "rows_per_step": 2}], ids=["rows", "packed"])
@pytest.mark.parametrize("skipped", [(), (1, 4)])
def test_online_and_offline_yield_the_same_bits(online, prompts, target, tmp_path, packing, skipped):
    size = capture_to_folder(prompts[0], target, tmp_path)
    offline = OfflineSource(tmp_path)
    assert size == offline.num_bytes > 0
    assert len(offline) == len(online)
    assert torch.equal(offline.token_counts(320), online.token_counts(320))
    num_batches = len(offline)
    order = PassOrder(len(offline), 0)
    skip_ids = [prompts[0][order.locate(seq)[0]].source_id for seq in skipped]
    options = {"skip_ids": skip_ids, "micro_batch_size": 1} | packing
    ours, theirs = make(online, **options), make(offline, **options)
    for one, other in zip(take(ours, num_batches), take(theirs, num_batches), strict=True):
        assert one["window_num_tokens"] == other["window_num_tokens"]
        for name in ("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_state"):
            assert torch.equal(one[name], other[name])
    assert set(skipped) <= ours.source.skipped().keys() == theirs.source.skipped().keys()
    assert offline.store.health()["num_samples"] == len(offline)  # kept for the next pass


def test_capturing_twice_into_one_folder(prompts, target, tmp_path):
    few = data_set(prompts[0][:3])
    capture_to_folder(few, target, tmp_path)
    with pytest.raises(UserError, match="already holds a finished capture"):
        capture_to_folder(few, target, tmp_path)


def test_a_capture_that_is_not_finite_leaves_no_manifest(target_path, prompts, tmp_path):
    few = data_set(prompts[0][:3])
    broken = HFTargetEngine(target_path, layer_ids=(1, 3, 4), dtype="float32", device="cpu")
    with torch.no_grad():
        broken.model.model.norm.weight[5] = float("nan")
    with pytest.raises(NotFiniteError, match=r"sample \d+ holds NaN or infinity, and so do all of the first 3"):
        capture_to_folder(few, broken, tmp_path)
    with pytest.raises(UserError, match="no finished capture in"):
        OfflineSource(tmp_path)


def test_an_unfinished_capture(prompts, target, tmp_path):
    few = data_set(prompts[0][:3])

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_to_folder(few, target, tmp_path, progress=interrupt)
    with pytest.raises(UserError, match=r"no finished capture in .*lightning-dataflow capture store.root"):
        OfflineSource(tmp_path)
    capture_to_folder(few, target, tmp_path)
    assert OfflineSource(tmp_path).store.health()["num_samples"] == 3


def test_damaged_captures(prompts, target, tmp_path):
    few = data_set(prompts[0][:2])
    capture_to_folder(few, target, tmp_path)
    refs, manifest = (tmp_path / "refs.jsonl").read_text(), (tmp_path / "manifest.json").read_text()
    (tmp_path / "refs.jsonl").write_text(refs.splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"lists 1 samples, manifest\.json says 2"):
        OfflineSource(tmp_path)
    (tmp_path / "refs.jsonl").write_text(refs.replace("offline:", "../", 1))
    with pytest.raises(UserError, match=r"refs\.jsonl, line 1: .*not a valid id"):
        OfflineSource(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(manifest) | {"schema_version": 0}))
    with pytest.raises(UserError, match=r"schema version 0 .* this release reads 3: capture again"):
        OfflineSource(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(json.loads(manifest) | {"card": {}}))
    with pytest.raises(UserError, match="is damaged"):
        OfflineSource(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        OfflineSource(tmp_path)


def test_a_capture_of_release_0_1_is_read(prompts, target, tmp_path):
    few = data_set(prompts[0][:3])
    capture_to_folder(few, target, tmp_path)
    refs, manifest = OfflineSource(tmp_path).refs, json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 2}))
    lines = [json.loads(line) for line in (tmp_path / "refs.jsonl").read_text().splitlines()]
    for line in lines:
        capture, specs = line["origin"]["capture"], line["features"].values()
        layer_ids = "-".join(map(str, capture["layer_ids"]))
        line["origin"]["capture"] = f"{layer_ids}/{capture['norm']}/{capture['hidden_size']}"
        del line["origin"]["attempt"], line["origin"]["draft_weight_version"]
        words = [f"{spec['name']}/{spec['dtype']}/{'x'.join(map(str, spec['shape'][1:]))}" for spec in specs]
        representations = [f"={spec['target_repr']}" if spec["target_repr"] else "" for spec in specs]
        line["features"] = " ".join(map("".join, zip(words, representations, strict=True)))
        line["schema_version"] = 2
    (tmp_path / "refs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = OfflineSource(tmp_path)
    assert old.refs == refs
    assert set(old.store.get(old.refs[0])[0]) == {"input_ids", "loss_mask", "aux_hidden_states", "last_hidden_state"}


def test_captures_for_another_vocabulary(prompts, target, tmp_path):
    few = data_set(prompts[0][:2])
    capture_to_folder(few, target, tmp_path)
    with pytest.raises(UserError, match="a vocabulary of 320 tokens, the target has 500"):
        OfflineSource(tmp_path).token_counts(500)


def test_a_capture_of_another_shape_never_reaches_the_store(prompts, target, online, monkeypatch):
    monkeypatch.setattr(target, "capture", lambda batch: [{"aux_hidden_states": torch.zeros(3, 192)}] * len(batch))
    with pytest.raises(ValueError, match=r"captured .* expected"):
        make(online).source.window(range(1), range(1))
    assert online.store.health()["num_samples"] == 0
