"""Checkpoints of real fits become folders, and folders become drafts again."""

import json
import math
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_dataflow as ldf
from lightning_dataflow import DataFlowTrainer, DFlashModule, DominoModule, Eagle3Module, export_draft
from lightning_dataflow.cli import export as command
from lightning_dataflow.contracts import UserError
from lightning_dataflow.data import DataFlowDataModule
from lightning_dataflow.producers import OnlineSource
from lightning_dataflow.strategies.checkpoint import load_module
from lightning_dataflow.targets import HFTargetEngine
from lightning_dataflow.targets.tiny import write_tiny_target

SMALL = {"num_layers": 1, "block_size": 6, "num_anchors": 12}
SLIDING = {"layer_types": ["sliding_attention"], "sliding_window": 5}
PREFIX = {"gru_hidden_dim": 8, "emb_dim": 8, "pure_draft_prefix_len": 1}
KINDS = {
    "eagle3": (Eagle3Module, {"draft_vocab_size": 64, "num_steps": 2}),
    "whole": (Eagle3Module, {"num_steps": 2, "intermediate_size": 96}),
    "embedding": (Eagle3Module, {"draft_vocab_size": 64, "num_steps": 2, "train_embeddings": True}),
    "dflash": (DFlashModule, SMALL),
    "sliding": (DFlashModule, SMALL | SLIDING),
    "domino": (DominoModule, SMALL | PREFIX),
    "shifted": (DominoModule, SMALL | PREFIX | {"shift_label": True}),
}
DEEPER = {"block_size": 6, "num_target_layers": 30, "target_layer_ids": [1, 2, 3, 4, 5], "mask_token_id": 259}
ENGINES = {"embedding": ("vllm", "plain"), "whole": ("vllm", "speculators"), "sliding": ("vllm", "speculators")}


@pytest.fixture(scope="module")
def engines(target_path) -> dict[tuple[int, ...], HFTargetEngine]:
    layers = ((1, 3, 4), (1, 2, 3, 4, 5))
    return {ids: HFTargetEngine(target_path, layer_ids=ids, dtype="float32", device="cpu") for ids in layers}


@pytest.fixture(scope="module")
def fit(prompts, engines, tmp_path_factory):
    """fit(module, steps) → the trainer, from the beginning of the data."""

    def call(module, max_steps=2, **options):
        data = DataFlowDataModule(
            OnlineSource(prompts[0], engines[module.layer_ids]), global_batch_size=2, micro_batch_size=2
        )
        trainer = DataFlowTrainer(
            accelerator="cpu",
            default_root_dir=tmp_path_factory.mktemp("fit"),
            max_steps=max_steps,
            max_epochs=1,
            limit_train_batches=max_steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, data)
        return trainer

    return call


@pytest.fixture(scope="module")
def checkpoint(target_path, fit, tmp_path_factory):
    """checkpoint(kind) → the last one of a run of two steps, made once."""
    made: dict[str, Path] = {}

    def call(kind="eagle3") -> Path:
        if kind not in made:
            cls, options = KINDS[kind]
            checkpoints = tmp_path_factory.mktemp(kind) / "run" / "checkpoints"
            trainer = fit(cls(str(target_path), lr=1e-2, **options), callbacks=[saver(checkpoints)])
            assert trainer.global_step == 2
            made[kind] = checkpoints / "step=2.ckpt"
        return made[kind]

    return call


def saver(folder):
    return L.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def export(source, folder, kind="eagle3", **options) -> Path:
    engine, form = ENGINES.get(kind, ("sglang", "plain"))
    return export_draft(source, folder, **{"engine": engine, "format": form, "dtype": "float32"} | options)


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_to_the_bit_and_one_step_on(kind, checkpoint, fit, target_path, tmp_path):
    folder = export(checkpoint(kind), tmp_path / "draft", kind)
    original = load_module(checkpoint(kind))
    cls, options = KINDS[kind]
    settings = {name: options[name] for name in ("num_steps", "num_anchors", "train_embeddings") if name in options}
    imported = cls(str(target_path), init_from=str(folder), lr=1e-2, **settings)
    imported.load_frozen_target(torch.device("cpu"))
    imported.load_start()
    assert imported.draft.config == original.draft.config
    state = original.draft.state_dict()
    assert imported.draft.state_dict().keys() == state.keys()
    for name, tensor in imported.draft.state_dict().items():
        assert torch.equal(tensor, state[name]), name

    fit(original.train(), 1)
    again = cls(str(target_path), init_from=str(folder), lr=1e-2, **settings)
    fit(again, 1)
    assert float(again.step_losses[0]) == pytest.approx(float(original.step_losses[-1]), rel=1e-6, abs=0)
    assert float(again.step_losses[0]) > 0


def without(name):
    def change(saved):
        del saved[name]

    return change


@pytest.fixture
def run_command(capsys):
    """run_command(arguments) → status and error lines, which Python prints for an exit with a message."""

    def call(*arguments):
        try:
            command.main([str(one) for one in arguments])
        except SystemExit as error:
            message = [error.code] if isinstance(error.code, str) else []
            lines = [*capsys.readouterr().err.splitlines(), *message]
            return 1 if message else error.code, lines
        return 0, capsys.readouterr().err.splitlines()

    return call


BROKEN = {
    "state_dict": (without("state_dict"), "lacks state_dict: it is not a whole draft, name another checkpoint"),
    "version": (without("target_model_version"), "lacks the name of its target"),
    "vocab": (without("draft_vocab"), "lacks draft_vocab"),
    "weight": (
        lambda saved: saved["state_dict"].pop("draft.fc.weight"),
        "lacks draft.fc.weight: it is not a whole eagle3 draft",
    ),
    "more": (
        lambda saved: saved["state_dict"].update(other=torch.ones(2)),
        "has other, for which no eagle3 draft with its settings has a place",
    ),
    "shape": (
        lambda saved: saved["state_dict"].update({"draft.norm.weight": torch.ones(2)}),
        "draft.norm.weight is [2], any eagle3 draft with its settings has [64]",
    ),
    "setting": (
        lambda saved: saved["hyper_parameters"].update(colour="red"),
        "has settings of another eagle3 (got an unexpected keyword argument 'colour'): read it with the version",
    ),
    "infinite": (
        lambda saved: saved["state_dict"]["draft.fc.weight"].view(-1)[3:4].fill_(math.inf),
        "draft.fc.weight holds NaN or infinity, so it is no draft to use: name another checkpoint",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("sharded", [False, True])
def test_what_a_checkpoint_lacks_is_one_line(kind, sharded, checkpoint, tmp_path, run_command):
    from torch.distributed import checkpoint as dcp

    change, message = BROKEN[kind]
    saved = torch.load(checkpoint(), weights_only=True)
    change(saved)
    path = tmp_path / "broken.ckpt"
    if sharded:
        dcp.save({"state_dict": saved.pop("state_dict", {"x": torch.ones(1)})}, checkpoint_id=path, no_dist=True)
        torch.save(saved, path / "meta.pt")
        message = message.replace("state_dict", "draft.")
    else:
        torch.save(saved, path)
    status, shown = run_command(path, "--engine", "vllm", "--out", tmp_path / "out")
    assert (status, len(shown)) == (1, 1)
    assert shown[0].startswith(f"error: {path}") and message.split(": it")[0] in shown[0]


def test_shards_that_torch_cannot_read_are_one_line(checkpoint, tmp_path):
    from torch.distributed import checkpoint as dcp

    saved = torch.load(checkpoint(), weights_only=True)
    path = tmp_path / "damaged.ckpt"
    dcp.save({"state_dict": saved.pop("state_dict")}, checkpoint_id=path, no_dist=True)
    torch.save(saved, path / "meta.pt")
    whole = load_module(path)
    assert all(torch.equal(one, whole.state_dict()[name]) for name, one in load_module(checkpoint()).state_dict().items())
    for shard in path.glob("*.distcp"):
        shard.write_bytes(b"\1" * shard.stat().st_size)
    with pytest.raises(UserError, match=r"damaged.ckpt cannot be read \(.+\): name another checkpoint") as error:
        load_module(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["eagle3", "domino"])
def test_bfloat16_is_rounded_once(kind, checkpoint, target_path, tmp_path):
    """An export of what was imported is the same file."""
    first = export(checkpoint(kind), tmp_path / "first", dtype="bfloat16")
    second = export(first, tmp_path / "second", dtype="bfloat16", target=str(target_path))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    assert "which does not say" in (second / "README.md").read_text()


def test_weights_that_a_dtype_cannot_hold_are_not_exported(checkpoint, tmp_path):
    saved = torch.load(checkpoint(), weights_only=True)
    saved["state_dict"]["draft.fc.weight"][0, 0] = 1e6
    torch.save(saved, tmp_path / "large.ckpt")
    with pytest.raises(UserError, match=r"large.ckpt: fc.weight holds NaN or infinity.*dtype=float16 is too narrow for it"):
        export(tmp_path / "large.ckpt", tmp_path / "draft", dtype="float16")
    assert not (tmp_path / "draft").exists()
    export(tmp_path / "large.ckpt", tmp_path / "draft", dtype="bfloat16")


def test_one_engine_s_folder_becomes_another_s(checkpoint, target_path, tmp_path):
    sglang = export(checkpoint(), tmp_path / "sglang")
    direct = export(checkpoint(), tmp_path / "direct", engine="vllm", format="speculators")
    through = export(sglang, tmp_path / "through", engine="vllm", format="speculators", target=str(target_path))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (direct, through)]
    for config in configs:  # how far it was unrolled is no part of SGLang's folder
        del config["speculators_config"]["proposal_methods"]
    assert configs[0] == configs[1]
    tensors = [load_file(folder / "model.safetensors") for folder in (direct, through)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] | tensors[1])


def test_a_resumed_warm_start_does_not_need_the_folder(checkpoint, fit, target_path, tmp_path):
    folder = export(checkpoint("dflash"), tmp_path / "draft")
    warm = DFlashModule(str(target_path), init_from=str(folder), num_anchors=12)
    fit(warm, callbacks=[saver(tmp_path / "warm")])
    shutil.rmtree(folder)
    loaded = load_module(tmp_path / "warm" / "step=2.ckpt")
    assert loaded.draft.config == warm.draft.config
    assert torch.equal(loaded.draft.fc.weight, warm.draft.fc.weight)


def test_a_run_gives_its_newest_complete_checkpoint(checkpoint, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(checkpoint().parent.parent, run)
    newest = run / "checkpoints" / "step=2.ckpt"
    torch.save({}, run / "checkpoints" / "step=3.ckpt")
    acceptance = [
        {"step": step, "acceptance_length": 1.5, "acceptance_per_position": [0.4, 0.1], "num_prompts": 7} for step in (2, 4)
    ]
    result = {"acceptance": acceptance, "precision": "bf16-mixed", "settings": {"data": {"path": "chat.jsonl"}}}
    (run / "result.json").write_text(json.dumps(result | {"versions": {"torch": "9.9"}}))
    card = (export(run, tmp_path / "draft") / "README.md").read_text()
    assert "step=3.ckpt is skipped, it is not a complete checkpoint" in caplog.text
    for told in (
        'base_model: "target"',
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {tmp_path / 'draft'}",
        "| optimizer steps | 2 |",
        "| samples | 4 |",
        "| data | chat.jsonl |",
        "| precision | bf16-mixed |",
        "| draft vocabulary | 64 of 320 |",
        "| lr | 0.01 |",
        "Trained with torch 9.9.",
        "| 2 | 7 | not recorded | not recorded | 2 | 1.500 | 0.400, 0.100 |",
    ):
        assert told in card, told
    assert "| 4 | 7 |" not in card, "measured after this checkpoint"
    assert "## Acceptance\n\nNot measured." in (export(checkpoint(), tmp_path / "other") / "README.md").read_text()
    for path in (newest, newest.with_name("step=1.ckpt")):
        path.with_name(path.name + ".complete").unlink()
    with pytest.raises(UserError, match=r"no complete checkpoint in .*: name the one to export"):
        export(run, tmp_path / "third")
    export(newest, tmp_path / "third")


def test_the_card_says_how_it_was_measured(checkpoint, tmp_path):
    """By each measurement's own word, or by the settings of the run."""
    run = tmp_path / "run"
    shutil.copytree(checkpoint().parent.parent, run)
    measured = {"acceptance_length": 1.5, "acceptance_per_position": [0.4, 0.1], "num_prompts": 7}
    history = [{"step": 0, "temperature": 0.0, "max_new_tokens": 64, **measured}, {"step": 2, **measured}]
    settings = {"evaluate": {"temperature": 0.7, "max_new_tokens": 32}}
    (run / "result.json").write_text(json.dumps({"acceptance": history, "settings": settings}))
    card = (export(run, tmp_path / "draft") / "README.md").read_text()
    assert "| step | prompts | temperature | new tokens, at most | drafted at a time |" in card
    assert "| 0 | 7 | 0.0 | 64 | 2 | 1.500 | 0.400, 0.100 |\n| 2 | 7 | 0.7 | 32 | 2 | 1.500 |" in card


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_a_speculators_folder_keeps_how_many_tokens_it_drafts(kind, checkpoint, target_path, tmp_path):
    """Also where that is neither the default of a training here, nor a block."""
    published = export(checkpoint(kind), tmp_path / "published", engine="vllm", format="speculators")
    config = json.loads((published / "config.json").read_text())
    config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 3
    (published / "config.json").write_text(json.dumps(config))
    again = export(published, tmp_path / "again", engine="vllm", format="speculators", target=str(target_path))
    assert json.loads((again / "config.json").read_text())["speculators_config"] == config["speculators_config"]
    card = (export(published, tmp_path / "sglang", target=str(target_path)) / "README.md").read_text()
    assert "It drafts up to 3 tokens at a time" in card and "--speculative-num-draft-tokens 4\n" in card
    assert "nor how many tokens" not in card


def test_tokenizer_files_on_request(checkpoint, target_path, tmp_path):
    folder = export(checkpoint(), tmp_path / "draft", tokenizer=True)
    assert (folder / "tokenizer.json").read_bytes() == (target_path / "tokenizer.json").read_bytes()
    assert not (export(checkpoint(), tmp_path / "without") / "tokenizer.json").exists()


def test_it_is_public(checkpoint, tmp_path):
    assert ldf.export_draft is export_draft
    assert export_draft(checkpoint(), tmp_path / "draft", engine="sglang") == tmp_path / "draft"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["EAGLE3", "--engine", "sglang", "--out", "TAKEN"],
            "taken exists: choose another folder to export to, or remove it",
        ),
        (["nowhere.ckpt", "--engine", "sglang"], "no checkpoint nowhere.ckpt"),
        (["TAKEN", "--engine", "sglang"], "is not a draft's checkpoint"),
        (["DOMINO", "--engine", "vllm"], "vLLM does not serve domino drafts, only dflash, eagle3"),
        (["EAGLE3", "--engine", "sglang", "--format", "speculators"], "no format 'speculators' for engine 'sglang'"),
        (["EMBEDDING", "--engine", "sglang"], "SGLang gives every EAGLE3 draft the target's token embedding"),
        (["EAGLE3", "--engine", "sglang", "--target", "nowhere"], "no target model in nowhere"),
        (["EAGLE3", "--engine", "sglang", "--target", "OTHER"], "was trained for another target than"),
    ],
)
def test_bad_input_is_one_line(run_command, checkpoint, tmp_path, capsys, arguments, message):
    (tmp_path / "taken").mkdir()
    names = {name.upper(): name for name in ("eagle3", "domino", "embedding")}
    paths = {"TAKEN": tmp_path / "taken", "OTHER": tmp_path / "other"}
    if "OTHER" in arguments:
        write_tiny_target(paths["OTHER"], seed=1)
        capsys.readouterr()
    filled = [checkpoint(names[one]) if one in names else paths.get(one, one) for one in arguments]
    if "--out" not in filled:
        filled += ["--out", tmp_path / "draft"]
    status, errors = run_command(*filled)
    assert (status, len(errors)) == (1, 1)
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "draft").exists()


def change(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "fields", "options", "message"),
    [
        ("eagle3", {"hidden_size": 32, "target_hidden_size": 32}, {}, "another target (hidden size 32, "),
        ("eagle3", {"target_hidden_size": 64, "hidden_size": 32}, {}, "another target (hidden size of the draft 32, "),
        ("eagle3", {"vocab_size": 400}, {}, "another target (vocabulary 400, "),
        ("dflash", {"dflash_config": DEEPER}, {}, "another target (number of layers 30, "),
        (
            "eagle3",
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 8]}},
            {},
            "another target (highest layer 8, ",
        ),
        ("dflash", {}, {"cls": Eagle3Module}, "holds a draft of dflash, not one of eagle3: set strategy=dflash"),
        ("eagle3", {}, {"layer_ids": [1, 2, 4]}, "these settings say [1, 2, 4]: set 'strategy.layer_ids=[1, 3, 4]'"),
        ("eagle3", {}, {"draft_vocab_size": 32}, "(draft_vocab_size=32): set strategy.draft_vocab_size=64"),
        ("dflash", {}, {"num_layers": 5, "block_size": 16}, "set strategy.num_layers=1 strategy.block_size=6"),
        ("dflash", {}, {"cls": DominoModule}, "holds a draft of dflash, not one of domino"),
        ("dflash", {}, {"layer_types": ["full_attention"] * 2}, "set strategy.layer_types=[]"),
        ("sliding", {}, {"layer_types": ["full_attention"]}, "set strategy.layer_types=['sliding_attention']"),
    ],
)
def test_a_draft_of_another_training_is_refused_before_it_is_read(
    kind, fields, options, message, checkpoint, target_path, tmp_path
):
    folder = export(checkpoint(kind), tmp_path / "draft", engine="sglang", format="plain")
    change(folder, **fields)
    cls = options.pop("cls", KINDS[kind][0])
    with pytest.raises(UserError) as raised:
        cls(str(target_path), init_from=str(folder), **options)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("layer_types", [None, [], ["full_attention"], ("full_attention",)])
def test_full_attention_may_be_spelt_out(layer_types, checkpoint, target_path, tmp_path):
    folder = export(checkpoint("dflash"), tmp_path / "draft")
    module = DFlashModule(str(target_path), init_from=str(folder), layer_types=layer_types)
    assert module.draft.config == load_module(checkpoint("dflash")).draft.config


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("fc.weight"), "lacks fc.weight: it is not a whole eagle3 draft"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors)[:7]], " and 3 more: it is not a whole"),
        (lambda tensors: tensors.pop("d2t"), "lacks d2t"),
        (
            lambda tensors: tensors["norm.weight"][3:4].fill_(math.nan),
            "norm.weight holds NaN or infinity, so it is no draft to use: name another",
        ),
        (
            lambda tensors: tensors.update({"midlayer.self_attn.q_norm.weight": torch.ones(8)}),
            "has a place: it is another",
        ),
        (
            lambda tensors: tensors.update({"fc.weight": torch.ones(64, 64)}),
            "fc.weight is [64, 64], any eagle3 draft with its config.json has",
        ),
        (lambda tensors: tensors["d2t"].fill_(400), "d2t does not map 64 draft ids to as many of 320 target ids"),
        (lambda tensors: tensors["t2d"].fill_(True), "t2d names other tokens than d2t maps to"),
        (
            lambda tensors: tensors.update({"embed_tokens.weight": torch.ones(320, 64)}),
            "set strategy.train_embeddings=true",
        ),
    ],
)
def test_tensors_that_do_not_make_a_draft(edit, message, checkpoint, target_path, fit, tmp_path):
    folder = export(checkpoint(), tmp_path / "draft")
    change_tensors(folder, edit)
    with pytest.raises(UserError) as raised:
        fit(Eagle3Module(str(target_path), init_from=str(folder)), 1)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_folder_may_leave_to_the_target(checkpoint, target_path, target, tmp_path):
    """The embedding that everybody has, or a whole vocabulary's head and maps."""
    folder = export(checkpoint(), tmp_path / "draft")
    embedding = target.model.get_input_embeddings().weight.detach()
    change_tensors(folder, lambda tensors: tensors.update({"embed_tokens.weight": embedding.bfloat16()}))
    module = load_module(folder, target=str(target_path))
    assert not module.draft.config.train_embeddings
    change_tensors(folder, lambda tensors: tensors.update({"embed_tokens.weight": embedding + 1}))
    module = load_module(folder, target=str(target_path))
    assert torch.equal(module.draft.embed_tokens.weight, embedding + 1)

    whole = export(checkpoint("whole"), tmp_path / "whole", "whole")
    change_tensors(whole, lambda tensors: tensors.pop("lm_head.weight"))
    module = load_module(whole, target=str(target_path))
    assert torch.equal(module.draft.lm_head.weight, target.model.lm_head.weight)
    with pytest.raises(UserError, match="does not hold its target: name it"):
        load_module(whole)
