"""What the export command refuses, in one line: broken checkpoints and bad arguments."""

import math

import pytest
import torch

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.checkpoint import load_module
from lightning_dataflow.targets.tiny import write_tiny_target
from tests.unit.export.checkpoints import export


def without(name):
    def change(saved):
        del saved[name]

    return change


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
        "draft.fc.weight holds NaN or infinity, so the draft cannot be used: name another checkpoint",
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


def test_weights_that_a_dtype_cannot_hold_are_not_exported(checkpoint, tmp_path):
    saved = torch.load(checkpoint(), weights_only=True)
    saved["state_dict"]["draft.fc.weight"][0, 0] = 1e6
    torch.save(saved, tmp_path / "large.ckpt")
    with pytest.raises(UserError, match=r"large.ckpt: fc.weight holds NaN or infinity.*dtype=float16 is too narrow for it"):
        export(tmp_path / "large.ckpt", tmp_path / "draft", dtype="float16")
    assert not (tmp_path / "draft").exists()
    export(tmp_path / "large.ckpt", tmp_path / "draft", dtype="bfloat16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["EAGLE3", "--engine", "sglang", "--out", "TAKEN"],
            "taken exists: choose another folder to export to, or remove it",
        ),
        (["nowhere.ckpt", "--engine", "sglang"], "no checkpoint nowhere.ckpt"),
        (["TAKEN", "--engine", "sglang"], "holds no checkpoint"),
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
