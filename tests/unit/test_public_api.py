"""The names that users and other packages build on."""

import ast
from pathlib import Path

import lightning_dataflow


def test_every_public_name_can_be_imported():
    for name in lightning_dataflow.__all__:
        assert getattr(lightning_dataflow, name) is not None
    assert dir(lightning_dataflow) == lightning_dataflow.__all__


def test_type_checkers_see_the_names_that_are_loaded():
    """tests/typing_check.py is the other half: mypy reads it."""
    tree = ast.parse(Path(lightning_dataflow.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == {name: f"lightning_dataflow.{module}" for name, module in lightning_dataflow._NAMES.items()}


def test_the_vocabulary_of_the_system_stays():
    from lightning_dataflow.contracts import FeatureHandle, FeatureSpec, PromptTask, SampleRef, StepContext
    from lightning_dataflow.control import (
        MetadataStore,
        NoOpMetadataStore,
        reconcile_on_restart,
        resolve_control_plane,
    )
    from lightning_dataflow.control.log import StreamingRefChannel
    from lightning_dataflow.data import StreamingRefQueue
    from lightning_dataflow.producers import RolloutWorker
    from lightning_dataflow.stores import (
        FeatureStore,
        MemoryFeatureStore,
        MooncakeFeatureStore,
        SharedDirFeatureStore,
    )
    from lightning_dataflow.strategies.registry import available_strategies, register_strategy, resolve_strategy
    from lightning_dataflow.strategies.spec import StrategySpec
    from lightning_dataflow.targets import TargetEngine

    records = (FeatureHandle, FeatureSpec, PromptTask, SampleRef, StepContext, StrategySpec, RolloutWorker)
    calls = (reconcile_on_restart, resolve_control_plane, available_strategies, register_strategy, resolve_strategy)
    assert all(map(callable, records + calls))
    assert issubclass(NoOpMetadataStore, MetadataStore)
    for store in (FeatureStore, MemoryFeatureStore, SharedDirFeatureStore, MooncakeFeatureStore):
        assert all(hasattr(store, name) for name in ("put", "get", "release", "abort", "health", "sweep"))
    assert all(hasattr(StreamingRefChannel, name) for name in ("publish", "poll", "close", "stream"))
    assert all(hasattr(StreamingRefQueue, name) for name in ("get", "ack", "fail"))
    assert hasattr(TargetEngine, "capture")
    topologies = Path(__file__).parents[2] / "conf" / "topology"
    assert {path.stem for path in topologies.glob("*.yaml")} == {
        *("offline", "disagg_offline", "online", "interleaved", "disagg_online")
    }
