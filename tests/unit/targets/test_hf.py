import pytest
import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.producers import PromptFeed
from lightning_dataflow.stores import MemoryFeatureStore
from lightning_dataflow.strategies.registry import resolve_strategy
from lightning_dataflow.targets import HFTargetEngine, load_tokenizer, read_target_info
from lightning_dataflow.targets.base import HIDDEN_STATES
from lightning_dataflow.targets.hf import TargetSession


def test_layer_ids_and_norm_are_hugging_faces(target, prompts):
    ids = prompts[0][0].input_ids
    features = target.capture([ids])[0]
    output = target.model(torch.tensor([ids]), output_hidden_states=True)
    expected = torch.cat([output.hidden_states[layer + 1][0] for layer in target.layer_ids], dim=-1)
    assert torch.equal(features["aux_hidden_states"], expected)
    assert torch.equal(features["last_hidden_state"], output.hidden_states[-1][0])  # after the final norm
    head = target.model.get_output_embeddings().weight
    assert torch.allclose(features["last_hidden_state"] @ head.T, output.logits[0], atol=1e-5)


def test_the_last_layer_can_be_captured_before_the_norm(target_path, prompts):
    target = HFTargetEngine(target_path, layer_ids=[7], dtype="float32", device="cpu")
    features = target.capture([prompts[0][0].input_ids])[0]
    normed = target.model.model.norm(features["aux_hidden_states"])
    assert torch.allclose(normed, features["last_hidden_state"], atol=1e-6)


def test_what_is_in_the_batch_does_not_matter(target, prompts):
    batch = [prompt.input_ids[: 20 + 30 * index] for index, prompt in enumerate(prompts[0][:4])]
    assert len({len(ids) for ids in batch}) > 2
    together = target.capture(batch)
    for ids, features in zip(batch, together, strict=True):
        alone = target.capture([ids])[0]
        for name, tensor in features.items():
            assert tensor.shape[0] == len(ids)
            assert (tensor - alone[name]).abs().max() < 1e-5 * tensor.abs().max(), name


def test_features_that_no_draft_reads_are_not_captured(target_path, prompts):
    """Nor do they stand on the card or count as bytes of a sample."""
    names = ("aux_hidden_states",)
    target = HFTargetEngine(target_path, layer_ids=[1, 3], features=names, dtype="float32", device="cpu")
    assert target.capture([prompts[0][0].input_ids])[0].keys() == set(names)
    feed, store = PromptFeed(prompts[0], target, seed=0, run_id="run"), MemoryFeatureStore()
    assert feed.card.features == ("input_ids", "loss_mask", *names)
    (sample,) = feed.capture([5], 0, [5])
    ref = sample.put(store)
    assert ref.features.keys() == set(feed.card.features)
    assert ref.num_bytes == feed.num_bytes(5)


@pytest.mark.parametrize(("strategy", "reads"), [("eagle3", True), ("dflash", False), ("domino", False)])
def test_a_strategy_names_the_states_that_it_reads(strategy, reads):
    features = resolve_strategy(strategy).features({})
    assert [name in features for name in HIDDEN_STATES] == [True, reads]


def test_an_autocast_around_it_changes_nothing(target, prompts):
    ids = prompts[0][0].input_ids
    plain = target.capture([ids])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = target.capture([ids])[0]
    assert torch.equal(plain["last_hidden_state"], inside["last_hidden_state"])


def test_bfloat16(target_path, prompts):
    target = HFTargetEngine(target_path, layer_ids=[1], dtype="bfloat16", device="cpu")
    assert {tensor.dtype for tensor in target.capture([prompts[0][0].input_ids])[0].values()} == {torch.bfloat16}


def test_a_session_continues_and_forgets(target, prompts):
    ids = list(prompts[0][0].input_ids)
    whole = TargetSession(target).extend(ids)
    session = TargetSession(target)
    session.extend(ids[:10])
    session.extend([1, 2, 3])
    session.crop(10)
    logits, aux = session.extend(ids[10:])
    assert torch.allclose(logits, whole[0][10:], atol=1e-4)
    assert torch.allclose(aux, whole[1][10:], atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [([8], "ids go from 0 to 7"), ([-1], "ids go from 0 to 7"), ([], "are empty"), ([1, 1], "repeat an id")],
)
def test_bad_layers(target_path, layers, message):
    with pytest.raises(UserError, match=message):
        HFTargetEngine(target_path, layer_ids=layers)


def test_bad_folders(tmp_path, target_path):
    with pytest.raises(UserError, match="no target model in"):
        read_target_info(tmp_path)
    with pytest.raises(UserError, match="no target model in"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        read_target_info(tmp_path)
    with pytest.raises(UserError, match=r"target\.dtype=int8 is unknown"):
        HFTargetEngine(target_path, dtype="int8")


def test_fingerprints_tell_weights_and_tokenizers_apart(target_path, tmp_path):
    from lightning_dataflow.targets.tiny import write_tiny_target

    same, other = read_target_info(target_path), read_target_info(write_tiny_target(tmp_path / "other", seed=1))
    assert same == read_target_info(target_path)
    assert same.model_version != other.model_version
    assert same.tokenizer_version == other.tokenizer_version


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_avoids_emulated_bfloat16(tmp_path, target, monkeypatch, native, expected):
    from copy import deepcopy

    from lightning_dataflow.targets import hf

    deepcopy(target.model).bfloat16().save_pretrained(tmp_path)
    monkeypatch.setattr(hf, "multiplies_bfloat16", lambda device: native)
    assert HFTargetEngine(tmp_path, device="cpu").model.dtype == expected
