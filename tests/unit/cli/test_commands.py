"""The commands in this process: bad input ends in one line and status 1."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from lightning_dataflow.cli import capture, evaluate, main as commands, show_mask, train
from lightning_dataflow.cli.hydra_command import command
from lightning_dataflow.contracts.errors import RETRYABLE
from lightning_dataflow.run.signals import Terminated, on_sigterm, raise_again
from tests.unit.cli.conftest import status_of
from tests.unit.run.test_claim import start_owner

pytestmark = pytest.mark.integration

BY_HAND = ("topology=disagg_online", "store=shared_dir", "role=producer", "run_name=test")
SERVED = ("target.engine=sglang_server", "target.urls=[http://127.0.0.1:9]")
TINY = ("experiment=tiny", "callbacks=no_evaluation", "logger=none", "trainer.max_steps=2")


@pytest.fixture
def run(tmp_path, monkeypatch, target_path, conversations):
    """run(command, *overrides) → exit status, in an empty folder, on the session's tiny target."""
    monkeypatch.chdir(tmp_path)
    parts = (f"target.path={target_path}", f"data.path={conversations}")

    def call(main, *overrides: str) -> int:
        GlobalHydra.instance().clear()
        chosen = {override.split("=")[0] for override in overrides}
        defaults = [one for one in (*TINY, *parts, "run_name=test") if one.split("=")[0] not in chosen]
        flags = [override for override in overrides if override.startswith("--")]
        settings = [override for override in overrides if not override.startswith("--")]
        monkeypatch.setattr(sys, "argv", ["lightning-dataflow", *flags, *defaults, *settings])
        return status_of(main)

    return call


def one_line(capsys: pytest.CaptureFixture) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def broken_file(folder: Path) -> str:
    path = folder / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=nowhere.jsonl"], "no prompt file nowhere.jsonl"),
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


def test_an_unknown_key_is_refused(run, capsys):
    assert run(train.main, "data.micro_bach_size=1") == 1
    assert "micro_bach_size" in capsys.readouterr().err


@pytest.mark.parametrize("main", [train.main, capture.main, evaluate.main, show_mask.main])
def test_an_unknown_key_is_refused_also_where_it_is_added(run, capsys, main):
    """As Hydra's own message advises."""
    assert run(main, "+data.micro_bach_size=1") == 1
    assert "there is no setting data.micro_bach_size: did you mean data.micro_batch_size" in (one_line(capsys))


def test_train_then_resume_then_evaluate(run, tmp_path, capsys):
    assert run(train.main, "callbacks.checkpoint.every_n_train_steps=1") == 0
    folder = tmp_path / "runs" / "test"
    first = json.loads((folder / "result.json").read_text())
    assert first["status"] == "completed"
    assert (folder / "figure.png").stat().st_size > 1000
    assert run(train.main, "trainer.max_steps=4", "ckpt_path=last") == 0
    second = json.loads((folder / "result.json").read_text())
    assert second["losses"][:2] == first["losses"]
    assert second["samples_trained"] == 32
    checkpoint = folder / "checkpoints" / "step-000004.ckpt"
    options = (f"evaluate.checkpoint='{checkpoint}'", "evaluate.output=report.json")
    assert run(evaluate.main, *options) == 0
    (report,) = json.loads(Path("report.json").read_text())["measurements"]
    assert report["num_identical"] == report["num_prompts"] == 8
    assert "acceptance_length" in capsys.readouterr().out
    assert run(train.main, "trainer.max_steps=4", "ckpt_path=last") == 1
    assert "leaves nothing to train: raise it" in one_line(capsys)
    # A run that was killed behind its last checkpoint.
    path = Path("runs/test/result.json")
    whole = json.loads(path.read_text())
    path.unlink()
    assert run(train.main, "trainer.max_steps=4", "ckpt_path=auto") == 0
    ended = json.loads(path.read_text())
    for name in ("status", "losses", "optimizer_steps", "samples_trained", "samples_skipped"):
        assert ended[name] == whole[name], name
    assert run(train.main, "trainer.max_steps=5", "run_name=other", f"ckpt_path='{checkpoint}'") == 1
    assert "the checkpoint belongs to the run test, this is other" in one_line(capsys)
    assert run(evaluate.main, "evaluate.checkpoint=null", "run_name=unused") == 1
    assert run(evaluate.main, *options, "run_name=unused") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["other", "test"]  # a measurement leaves no folder
    assert run(train.main) == 1  # would mix its checkpoints with these
    assert "resume it with ckpt_path=last, or choose another run_name" in capsys.readouterr().err


def test_capture_then_train_is_online_to_the_bit(run, tmp_path, capsys):
    assert run(train.main, "run_name=online") == 0
    assert run(capture.main, "store=shared_dir", "store.root=features") == 0
    printed = capsys.readouterr().out
    assert "88 samples in features" in printed
    assert "train on them: python train.py topology=offline store.root=features experiment=tiny" in printed
    assert run(train.main, "topology=offline", "store.root=features", "run_name=offline") == 0
    assert run(train.main, "topology=offline", "run_name=captures-itself") == 0
    online, *others = (
        json.loads((tmp_path / "runs" / name / "result.json").read_text())["losses"]
        for name in ("online", "offline", "captures-itself")
    )
    assert others == [online, online]
    assert run(capture.main, "store=shared_dir", "store.root=features") == 1
    assert run(capture.main, "store=shared_dir") == 1


def test_features_of_another_target_are_refused(run, tmp_path, capsys):
    from lightning_dataflow.targets.tiny import write_tiny_target

    assert run(capture.main, "store=shared_dir", "store.root=features") == 0
    other = write_tiny_target(tmp_path / "other", seed=1)
    assert run(train.main, "topology=offline", "store.root=features", f"target.path={other}") == 1
    assert "captured with another target weights" in one_line(capsys)
    assert run(train.main, "run_name=mine") == 0
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "step-000002.ckpt"
    assert run(evaluate.main, f"evaluate.checkpoint='{checkpoint}'", f"target.path={other}") == 1
    assert "was trained for another target" in one_line(capsys)


def test_two_captures_do_not_mix_in_one_folder(run, tmp_path, capsys):
    owner = start_owner(tmp_path / "features")
    assert owner.stdout.readline() == "mine\n"
    assert run(capture.main, "store=shared_dir", "store.root=features") == 1
    assert f"error: features is in use by process {owner.pid} on " in (error := one_line(capsys))
    assert error.endswith("wait for it, or choose another store.root")
    owner.kill()
    owner.communicate()
    assert run(capture.main, "store=shared_dir", "store.root=features") == 0


def test_features_captured_for_another_strategy_are_refused(run, capsys):
    """Three layers for eagle3, five for dflash."""
    assert run(capture.main, "store=shared_dir", "store.root=features") == 0
    offline = ("topology=offline", "store.root=features")
    assert run(train.main, *offline, "strategy=dflash") == 1
    message = (
        "layers [1, 3, 4], this dflash draft reads [1, 2, 3, 4, 5]: capture again with strategy=dflash, or set 'strate"
    )
    assert message in one_line(capsys)
    assert run(train.main, *offline, "strategy=dflash", "strategy.layer_ids=[1, 3, 4]") == 0


def test_the_secret_of_a_store_is_in_no_file_of_the_run(run, tmp_path, capsys):
    (tmp_path / "secret").write_text("hunter2\n")
    settings = ("store=shared_dir", "store.root=features", "store.secret_file=secret")
    assert run(capture.main, *settings) == 0
    assert run(train.main, "topology=offline", *settings[1:]) == 0
    assert run(train.main, "topology=offline", "store.root=features", "run_name=without") == 1
    assert "the secret does not match" in one_line(capsys)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "secret":
            assert b"hunter2" not in path.read_bytes(), path


def test_held_out_prompts_must_not_be_among_the_captured_ones(run, capsys):
    captured = ("store=shared_dir", "store.root=features", "data.num_eval_samples=0")
    assert run(capture.main, *captured) == 0
    assert run(train.main, "topology=offline", "store.root=features", "callbacks=default") == 1
    assert "captured from other prompts" in one_line(capsys)


def test_ranks_of_torchrun_need_a_run_name(run, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert run(train.main, "run_name=x", "data.max_length=4") == 1
    assert "no prompts left" in one_line(capsys)
    monkeypatch.setattr(sys, "argv", [argument for argument in sys.argv if not argument.startswith("run_name=")])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit):
        train.main()
    assert "add run_name=" in one_line(capsys)


def test_capture_in_groups_is_online_in_groups(run, tmp_path):
    groups = "target.capture_batch_size=4"
    assert run(train.main, "run_name=online", groups) == 0
    assert run(train.main, "run_name=offline", "topology=offline", groups) == 0
    online, offline = (json.loads((tmp_path / "runs" / n / "result.json").read_text()) for n in ("online", "offline"))
    assert online["losses"] == offline["losses"]


def test_passes_set_the_number_of_steps(run, tmp_path, capsys):
    assert run(train.main, "trainer.max_steps=null", "data.num_passes=2", "data.num_samples=16") == 0
    result = json.loads((tmp_path / "runs" / "test" / "result.json").read_text())
    assert result["optimizer_steps"] == 4
    assert "are not trained on" not in capsys.readouterr().out
    settings = ("trainer.max_steps=null", "data.num_passes=1", "data.num_samples=19", "run_name=uneven")
    assert run(train.main, *settings) == 0
    assert "3 samples at the end of 1 passes over 19 fill no step" in capsys.readouterr().out


@pytest.mark.parametrize("topology", ["online", "interleaved", "offline"])
def test_listed_samples_are_not_trained(run, tmp_path, capsys, topology):
    (tmp_path / "listed").write_text("".join(f"{index:08d}\n" for index in range(0, 96, 2)))
    assert run(train.main, f"topology={topology}", "data.skip_ids=listed") == 0
    result = json.loads((tmp_path / "runs" / "test" / "result.json").read_text())
    assert 0 < result["samples_trained"] < 16
    assert result["samples_trained"] + result["samples_skipped"] == 16
    assert "listed in skip_ids" in capsys.readouterr().out


def test_fast_dev_run_leaves_nothing(run, tmp_path):
    assert run(train.main, "+trainer.fast_dev_run=1") == 0
    assert not (tmp_path / "runs" / "test" / "checkpoints").exists()


def test_a_resumed_run_keeps_its_first_metrics(run, tmp_path):
    settings = ("logger=csv", "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_train_steps=1")
    assert run(train.main, *settings) == 0
    assert run(train.main, *settings, "trainer.max_steps=3", "ckpt_path=last") == 0
    rows = [len(path.read_text().splitlines()) for path in (tmp_path / "runs" / "test").rglob("metrics.csv")]
    assert sorted(rows) == [2, 3]


def test_a_choice_from_a_folder_of_the_users(run, tmp_path):
    (tmp_path / "mine" / "optimizer").mkdir(parents=True)
    (tmp_path / "mine" / "optimizer" / "slow.yaml").write_text("defaults: [schema, _self_]\nweight_decay: 0.3\n")
    assert run(train.main, "--config-dir=mine", "optimizer=slow") == 0
    result = json.loads((tmp_path / "runs" / "test" / "result.json").read_text())
    assert result["settings"]["optimizer"]["weight_decay"] == 0.3


def test_show_mask(run, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"instruction": "q", "output": answer}) + "\n" for answer in "abc") + "{broken")
    settings = ("data.prepare=null", f"data.path={prompts}", "data.num_eval_samples=1", "data.template_args={x: 1}")
    chosen = ("show_mask.start=1", "show_mask.count=3", "show_mask.colour=false", "show_mask.output=rows.json")
    assert run(show_mask.main, *settings, *chosen, "data.max_broken=1") == 0
    shown = capsys.readouterr().out
    assert [shown.count(f"⟦{answer}<|im_end|>⟧") for answer in "abc"] == [0, 1, 1]
    assert f"{prompts}, line 4: left out: not JSON" in shown
    assert "2 samples of 2 records to train on, 1 held out; left out: 1 broken" in shown
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["turn"], len(row["spans"])) for row in rows] == [(1, 1), (1, 1), (None, 0)]


def test_broken_records_end_a_command_in_one_line(run, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("{broken")
    assert run(train.main, "data.prepare=null", f"data.path={tmp_path / 'prompts.jsonl'}") == 1
    assert "prompts.jsonl, line 1: not JSON" in capsys.readouterr().err.splitlines()[-1]


def test_a_sigterm_after_ctrl_c_does_not_disturb_its_answer(run, monkeypatch):
    """The supervisor tells its parts by the one, and a scheduler all processes by the other."""
    answered = []

    def interrupted(config):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            answered.append(True)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        assert run(command(interrupted)) == 130
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert answered == [True]


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 0), (["fly"], 1)])
def test_the_command_list(monkeypatch, capsys, arguments, status):
    monkeypatch.setattr(sys, "argv", ["lightning-dataflow", *arguments])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == status
    assert "show-mask" in capsys.readouterr().out


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_automatic_precision(run, tmp_path, monkeypatch, native, precision):
    from lightning_dataflow.run import trainer as lightning_trainer

    monkeypatch.setattr(lightning_trainer, "multiplies_bfloat16", lambda device: native)
    assert run(train.main, "trainer.precision=auto") == 0
    result = json.loads((tmp_path / "runs" / "test" / "result.json").read_text())
    assert result["precision"] == precision


@pytest.fixture
def heeded(monkeypatch):
    """Signals, as a command heeds them."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: on_sigterm}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    monkeypatch.setattr(sys, "unraisablehook", raise_again)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interrupt_that_meets_a_finaliser_is_not_lost(heeded, number, kind, capfd):
    class Freed:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # the handler raises in here

    with pytest.raises(kind):
        Freed()
        for _ in range(100):  # one long sleep would not be interrupted
            time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_progress_where_there_is_no_terminal(run, tmp_path, capsys):
    """A line for each logged step, with the total; a bar would show nothing in a file before the end."""
    assert run(train.main, "trainer.log_every_n_steps=1") == 0
    steps = json.loads((tmp_path / "runs" / "test" / "result.json").read_text())["optimizer_steps"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    told = [line.partition(":")[0] for line in lines if "train/loss" in line and "tokens/s" in line]
    assert told == [f"step {step}/{steps}" for step in range(1, steps + 1)]
    assert run(train.main, "run_name=silent", "+trainer.enable_progress_bar=false") == 0
    assert f"step {steps}/{steps}: " not in capsys.readouterr().out
