"""The `show-mask` command: samples with their supervised tokens coloured."""

from lightning_dataflow.cli.hydra_command import command
from lightning_dataflow.config.schema import TrainConfig


def show_mask(config: TrainConfig) -> None:
    """Print training samples as the trainer sees them."""
    from lightning_dataflow.prompts.preview import render_mask
    from lightning_dataflow.run.builder import Builder

    builder, options = Builder(config), config.show_mask
    training, held_out = builder.prompts
    for prompt in training[options.start : options.start + options.count]:
        print(render_mask(prompt, builder.tokenizer, colour=options.colour), end="\n\n")
    skipped = ", ".join(f"{count} {reason}" for reason, count in training.skipped.items()) or "none"
    print(f"{len(training)} samples to train on, {len(held_out)} held out; records left out: {skipped}")


main = command(show_mask, keeps_folder=False)
