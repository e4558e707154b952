"""Bad input ends a command in one line and with status 1."""

import json
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from lightning_dataflow.cli import capture, evaluate, show_mask, train
from lightning_dataflow.cli.hydra_command import ClaimRun
from lightning_dataflow.contracts.errors import RETRYABLE
from tests.unit.cli.conftest import one_line

pytestmark = pytest.mark.integration

BY_HAND = ("topology=disagg_online", "store=shared_dir", "role=producer", "run_name=test")
SERVED = ("target.engine=sglang_server", "target.urls=[http://127.0.0.1:9]")


def broken_file(folder: Path) -> str:
    path = folder / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=nowhere.jsonl"], "nowhere.jsonl does not exist: data.path takes a file"),
        (["data.path=BROKEN"], "line 2: not JSON"),
        (["data.path=MASKED"], "masked.jsonl, line 2: 6 input_ids, 0 loss_mask entries: give 0 or 1 for each"),
        (["data.max_length=4"], "nothing supervised within max_length"),
        (["target.path=nowhere"], "no target model in nowhere"),
        (["strategy.draft_vocab_size=1000"], "the target's vocabulary has 320 tokens"),
        (["strategy.layer_ids=[0,8]"], "ids go from 0 to 7"),
        (["+strategy.colour=red"], "unexpected keyword argument 'colour'"),
        (["+strategy.lr=1"], "strategy=eagle3: got multiple values for keyword argument 'lr'; see conf/strategy"),
        (["+trainer.colour=red"], "trainer.colour: Lightning's Trainer has no such argument, see Lightning's"),
        (["+trainer.devises=2"], "trainer.devises: Lightning's Trainer has no such argument, did you mean trainer.devices"),
        (["trainer=fsdp2", "+trainer.strategy.colour=red"], "unexpected keyword argument 'colour'; correct the keys"),
        (["logger=csv", "+logger.colour=red"], "logger: CSVLogger.__init__() got an unexpected keyword argument 'colour'"),
        (["+logger.mine._target_=nowhere.Logger"], "logger.mine._target_=nowhere.Logger cannot be imported"),
        (
            ["+callbacks.checkpoint.colour=red"],
            "callbacks.checkpoint: ModelCheckpoint.__init__() got an unexpected keyword argument 'colour'; correct",
        ),
        (
            ["+callbacks.swa._target_=lightning.pytorch.callbacks.StochasticWeightAveraging"],
            "callbacks.swa: StochasticWeightAveraging.__init__() missing 1 required positional argument: 'swa_lrs'",
        ),
        (
            ["callbacks=default", "+callbacks.acceptance.colour=red"],
            "callbacks.acceptance: AcceptanceEvaluation.__init__()",
        ),
        (["strategy.name=eagle9"], "unknown strategy 'eagle9': available are dflash, domino, eagle3"),
        (["topology=offline", "store.root=nowhere"], "no finished capture in nowhere"),
        (["store=shared_dir"], "use store=memory"),
        (["topology=disagg_online", "store.capacity_bytes=1000"], "1000"),
        (
            [*BY_HAND, "channel=redis", "control=redis", "channel.address=127.0.0.1:1"],
            "no Redis answers at 127.0.0.1:1 (",
        ),
        (
            [*BY_HAND, "channel=redis", "control=redis", "channel.address=127.0.0.1:1", "channel.secret_file=nowhere"],
            "cannot read channel.secret_file=nowhere: No such file",
        ),
        ([*BY_HAND, "channel.path=/proc/nowhere"], "cannot write to /proc/nowhere"),
        ([*BY_HAND, "store.root=/proc/nowhere"], "cannot use /proc/nowhere as a store"),
        ([*BY_HAND, "role=trainer", "store=mooncake", "store.address=127.0.0.1:9"], "127.0.0.1:9"),
        (["strategy=dflash", "data.path=ALTERNATING"], "has two supervised tokens in a row, so there is no block to train"),
        (["strategy=domino", "data.path=ALTERNATING"], "train domino on: look at the masks with"),
        (
            ["strategy=dflash", "strategy.block_size=257"],
            "block_size=257 is more than the 256 tokens of the longest sample: set strategy.block_size to at most 256",
        ),
        (["strategy=domino", "strategy.block_size=1"], "the anchor and a drafted token make 2, choose 2 or more"),
        (["strategy=dflash", "strategy.mask_token_id=68"], "mask_token_id=68 occurs 887 times among the supervised tokens"),
        (["strategy=domino", "strategy.mask_token_id=320"], "the target's embedding has 320 rows, choose 0 to 319"),
        (["strategy=dflash", "strategy.num_anchors=513"], "choose 1 to 512 blocks a sample"),
        (["strategy=dflash", "strategy.loss=mean"], "use decay or dpace"),
        (["strategy=dflash", "strategy.layer_ids=[1,8]"], "ids go from 0 to 7"),
        (["target.engine=sglang"], "target.engine=sglang needs SGLang here"),
        ([*BY_HAND, *SERVED, "target.urls=[http://127.0.0.1:9]"], "the server at http://127.0.0.1:9 does not answer"),
        ([*BY_HAND, *SERVED, "target.urls=[127.0.0.1]"], "'127.0.0.1' is no address of a server"),
        ([*BY_HAND, *SERVED, "target.api_key_file=nowhere"], "cannot read target.api_key_file=nowhere"),
        (
            [*BY_HAND, *SERVED, "target.urls=[]", "target.server_python=nowhere"],
            "target.server_python=nowhere is no program",
        ),
        (["data.micro_batch_size=3"], "global_batch_size=8 is not a multiple"),
        (["data.row_tokens=512"], "row_tokens=512 and rows_per_step=None: packing needs both"),
        (["trainer.max_steps=null", "data.num_passes=1", "data.num_samples=5"], "fill no step"),
        (["trainer=fsdp"], "trainer=fsdp needs a GPU"),
        (["ckpt_path=last"], "no complete checkpoint in"),
        (["ckpt_path=nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (["callbacks=default", "data.num_eval_samples=0"], "no held-out prompts"),
        (["data.max_length=2000", "data.path=LONG"], "set data.max_length to at most 1024"),
        (["topology=offline", "store.secret_file=nowhere"], "cannot read store.secret_file=nowhere"),
        (["data.chat_template=nowhere.jinja"], "cannot read data.chat_template=nowhere.jinja"),
        (["store.capacity_bytes=1000"], "raise the store's capacity_bytes"),
        (["trainer.precision=12-true"], "12-true"),
        (
            ["++data.max_lenght=9"],
            "there is no setting data.max_lenght: did you mean data.max_length",
        ),
        (["+trainer.max_epochs=3"], "trainer.max_epochs=3: this follows from other settings, use trainer.max_steps"),
    ],
)
def test_bad_input_is_one_line_and_status_1(run, tmp_path, capsys, overrides, message):
    long_file = tmp_path / "long.jsonl"
    long_file.write_text(json.dumps({"text": "x" * 1500}) + "\n")
    alternating = tmp_path / "alternating.jsonl"
    alternating.write_text((json.dumps({"input_ids": [5] * 20, "loss_mask": [0, 1] * 10}) + "\n") * 16)
    masked = tmp_path / "masked.jsonl"
    masked.write_text("".join(json.dumps({"input_ids": [5] * 6, "loss_mask": mask}) + "\n" for mask in ([1] * 6, [])))
    files = {"LONG": long_file, "ALTERNATING": alternating, "MASKED": masked}
    names = {"BROKEN": broken_file(tmp_path), **{name: str(file) for name, file in files.items()}}
    for placeholder, path in names.items():
        overrides = [override.replace(placeholder, path) for override in overrides]
    if "data.path=" in " ".join(overrides):
        overrides.append("data.num_eval_samples=0")
    assert run(train.main, *overrides) == 1
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("trainer", "waited 0 s for a producer to announce the run in"),
        ("producer", "waited 0 s for a trainer to begin in"),
    ],
)
def test_a_part_that_might_do_better_later_says_so_by_its_status(run, capsys, role, message):
    parts = [*(one for one in BY_HAND if not one.startswith("role=")), f"role={role}"]
    assert run(train.main, *parts, "topology.start_timeout_s=0") == RETRYABLE
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("override", "listed"), [("strategy=eagle9", "eagle3"), ("topology=sideways", "online"), ("trainer=tpu", "fsdp2")]
)
def test_an_unknown_choice_lists_what_there_is(run, capsys, override, listed):
    assert run(train.main, override) == 1
    assert f"{override.split('=')[0]}={override.split('=')[1]} is unknown: available are" in (line := one_line(capsys))
    assert listed in line


@pytest.mark.parametrize(
    ("override", "why"), [("data.micro_bach_size=1", "Key 'micro_bach_size'"), ("data.max_length=long", "Value 'long'")]
)
def test_what_hydra_refuses_is_one_line_too(run, capsys, override, why):
    assert run(train.main, override) == 1
    assert override in (line := one_line(capsys)) and why in line


@pytest.mark.parametrize("main", [train.main, capture.main, evaluate.main, show_mask.main])
def test_an_unknown_key_is_refused_also_where_it_is_added(run, capsys, main):
    """As Hydra's own message advises."""
    assert run(main, "+data.micro_bach_size=1") == 1
    assert "there is no setting data.micro_bach_size: did you mean data.micro_batch_size" in (one_line(capsys))


def test_ranks_of_torchrun_need_a_run_name(run, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert run(train.main, "run_name=x", "data.max_length=4") == 1
    assert "no prompts left" in one_line(capsys)
    monkeypatch.setattr(sys, "argv", [argument for argument in sys.argv if not argument.startswith("run_name=")])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit):
        train.main()
    assert "add run_name=" in one_line(capsys)


@pytest.mark.parametrize("role", ["producer", "trainer"])
def test_a_folder_where_the_card_of_the_log_should_be(run, tmp_path, capsys, role):
    """It would fail again, so the supervisor must not start the process again."""
    (tmp_path / "log" / "run.json").mkdir(parents=True)
    parts = (one for one in BY_HAND if not one.startswith("role="))
    assert run(train.main, *parts, f"role={role}", "channel.path=log", "topology.start_timeout_s=0") == 1
    assert "Is a directory: 'log/run.json'" in one_line(capsys)


@pytest.mark.parametrize("main", [train.main, capture.main, evaluate.main])
@pytest.mark.parametrize("role", ["auto", "producer"])
def test_a_folder_where_the_log_of_a_command_should_be(run, tmp_path, capsys, monkeypatch, main, role):
    """Hydra opens the log before the command begins."""
    monkeypatch.setattr(ClaimRun, "wanted", False)
    (tmp_path / "own" / "job.log").mkdir(parents=True)
    assert run(main, "hydra.run.dir=own", "hydra.job.name=job", f"role={role}") == 1
    assert one_line(capsys).endswith("own/job.log is a folder: move it away, or choose another run_name")
