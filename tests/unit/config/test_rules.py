"""Every rule that refuses settings does so in one line with the value, the rule and the remedy, and loads nothing."""

import pytest

from lightning_dataflow.config.parsing import parse_config
from lightning_dataflow.config.rules import check_topology, check_training
from lightning_dataflow.contracts import UserError
from tests.unit.config.test_config import make

BY_HAND = ("topology=disagg_online", "store=shared_dir", "role=producer", "run_name=test")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+trainer.strategy.colour=red"], "trainer.strategy names no class, so nothing reads it"),
        (["+logger.colour=red"], "logger.colour names no class, so nothing reads it: set logger.colour._target_=…"),
        (["+logger.mine.colour=red"], "logger.mine names no class"),
        (["+callbacks.colour=red"], "callbacks.colour names no class, so nothing reads it"),
        (["+callbacks.mine.colour=red"], "callbacks.mine names no class"),
        (["trainer._target_=my.Trainer"], "trainer._target_=my.Trainer: the Trainer is always Lightning's, so leave light"),
        (
            ["trainer._target_=pytorch_lightning.Trainer"],
            "trainer._target_=pytorch_lightning.Trainer: the Trainer is always",
        ),
        (["topology.name=sideways"], "topology.name=sideways is unknown: available are online, interleaved, offline"),
        (["topology=offline", "store=memory"], "use store=shared_dir"),
        (
            ["topology=interleaved", "control=sqlite"],
            "topology=interleaved does not work with control=sqlite: use control=memory",
        ),
        (["topology=disagg_online", "store=memory"], "use store=mooncake or shared_dir"),
        (
            ["topology=disagg_online", "topology.high_refs=4"],
            "a window can have 8 refs, the high watermark is 4 refs",
        ),
        (["topology=disagg_online", "topology.low_refs=5000"], "the low watermark of 5000 refs is not below the high one"),
        (["topology=disagg_online", "topology.high_bytes=2000000000"], "is more than store.capacity_bytes=1073741824"),
        (
            ["topology=disagg_online", "topology.num_producers=0"],
            "topology.num_producers=0 is out of bounds: it must be",
        ),
        (["topology=disagg_online", "store.capacity_bytes=null"], "needs to know its size"),
        (["topology=disagg_online", "role=trainer"], "needs the address of a Mooncake master: store.address=host:port"),
        (["role=producer"], "topology=online runs in one process, so role=producer has no meaning"),
        (
            ["topology=disagg_online", "channel=redis"],
            "channel=redis does not work with control=sqlite: one transaction writes log and ledger, so set both to redis",
        ),
        (
            ["topology=disagg_online", "control=redis"],
            "channel=file does not work with control=redis: one transaction writes log and ledger, so set both to redis",
        ),
        ([*BY_HAND, "channel=redis", "control=redis"], "with channel=redis needs the address of a Redis"),
        (["target.engine=vllm"], "target.engine=vllm is unknown: available are hf, sglang, sglang_server"),
        (["target.engine=sglang_server"], "use target.engine=sglang or hf, or that topology"),
        ([*BY_HAND, "target.requests_in_flight=0"], "target.requests_in_flight=0 is out of bounds: it must be"),
        (["data.row_tokens=128", "data.rows_per_step=2"], "data.max_length=256 is more than data.row_tokens=128"),
        (
            ["data.row_tokens=512", "data.rows_per_step=2", "trainer.max_steps=null", "data.num_passes=1"],
            "data.num_passes=1 with data.row_tokens=512",
        ),
        (["trainer.max_steps=null"], "neither trainer.max_steps nor data.num_passes"),
        (["data.num_passes=2"], "both say when training ends"),
        (["trainer.max_steps=-1"], "trainer.max_steps=-1: a stream has no end"),
        (["data.path=???"], "no value for data.path"),
        (["+colour.of.it=red"], "there is no setting colour: available are strategy, topology,"),
        (
            ["+evaluate.vlm_args.x=1"],
            "there is no setting evaluate.vlm_args: did you mean evaluate.v",
        ),
        (["+optimizer.colour=red"], "there is no setting optimizer.colour: available are optimi"),
        (["+trainer.max_epochs=3"], "trainer.max_epochs=3: this follows from other settings, use trainer.max_steps"),
        (["+trainer.limit_train_batches=5"], "trainer.limit_train_batches=5: this follows"),
        (["+trainer.accumulate_grad_batches=2"], "use data.global_batch_size and data.micro_batch_size"),
        (["topology.release_at=durable"], "topology.release_at=durable has no meaning"),
        (
            ["topology=disagg_online", "store=shared_dir", "store.capacity_bytes=null", "topology.release_at=durable"],
            "must know how much the store may hold: set topology.high_bytes, or store.capacity_bytes",
        ),
        (["topology=disagg_online", "store.secret_file=x"], "store.secret_file guards store=shared_dir"),
        (["callbacks=best"], "callbacks.best follows val/acceptance_length, which is measured before and after"),
        (["store.capacity_bytes=0"], "store.capacity_bytes=0 is out of bounds: it must be at least 1"),
        (["topology.lease_s=0"], "topology.lease_s=0.0 is out of bounds: it must be above 0"),
        (["topology.idle_timeout_s=nan"], "topology.idle_timeout_s=nan is out of bounds: it must be at least 0"),
        (["seed=4294967296"], "seed=4294967296 is out of bounds: it must be at most 4294967295"),
        (["evaluate.backend=tpu"], "evaluate.backend=tpu is unknown: available are hf, vllm, sglang_server"),
    ],
)
def test_bad_settings_are_one_line(overrides, message):
    with pytest.raises(UserError) as refused:
        config = parse_config(make("experiment=tiny", "logger=none", "trainer.max_steps=2", *overrides))
        check_topology(config)
        check_training(config)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
