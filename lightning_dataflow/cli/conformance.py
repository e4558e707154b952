"""The `conformance` command: whether target.engine captures what transformers does."""

from lightning_dataflow.cli.hydra_command import command
from lightning_dataflow.config.rules import check_topology
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts import CaptureMismatchError, UserError


def conformance(config: TrainConfig) -> None:
    """Print the differences of `target.engine` and `hf`, in float32. Raises CaptureMismatchError where they matter."""
    from lightning_dataflow.run.builder import Builder
    from lightning_dataflow.targets import HFTargetEngine
    from lightning_dataflow.targets.conformance import compare_engines, make_prompts, table

    check_topology(config)
    if config.target.engine == "hf":
        raise UserError("conformance compares another engine with hf: set target.engine")
    builder = Builder(config)
    with builder.resources:
        other = builder.target
        info = other.info
        every = range(info.num_layers)
        reference = HFTargetEngine(config.target.path, layer_ids=every, dtype="float32", device=config.target.device)
        other.features = reference.features  # all, whatever the strategy reads
        comparisons = compare_engines(reference, other, make_prompts(info.vocab_size, info.max_position_embeddings))
    print(table(comparisons))
    bad = sum(bool(comparison.problems) for comparison in comparisons)
    if bad:
        raise CaptureMismatchError(f"{bad} of {len(comparisons)} captures by {other.backend} are not what hf captures")


main = command(conformance, keeps_folder=False)
