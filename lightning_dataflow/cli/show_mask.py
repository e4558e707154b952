"""The `show-mask` command: records with their supervised tokens marked."""

import json
from itertools import islice
from pathlib import Path

from lightning_dataflow.cli.hydra_command import command
from lightning_dataflow.config.schema import TrainConfig
from lightning_dataflow.contracts.foreign import printable


def show_mask(config: TrainConfig) -> None:
    """Print records as the trainer sees them, and count all of them."""
    from lightning_dataflow.prompts.encoding import Encoder
    from lightning_dataflow.prompts.loading import read_sources
    from lightning_dataflow.prompts.preview import preview_record
    from lightning_dataflow.prompts.template import ChatTemplate
    from lightning_dataflow.run.builder import Builder

    builder, data, options = Builder(config), config.data, config.show_mask
    encoder = Encoder(ChatTemplate(builder.tokenizer, **builder.rendering), data.turns)
    records = read_sources(data.path, data.weights, split=data.split, config=data.config, revision=data.revision)
    chosen = islice(records, options.start, options.start + options.count)
    previews = [preview_record(encoder, record, data.format) for record in chosen]
    for preview in previews:
        print(preview.as_text(builder.tokenizer, colour=options.colour), end="\n\n")
    if options.output is not None:
        rows = [row for preview in previews for row in preview.as_json()]
        Path(options.output).write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
    training, held_out = builder.prompts
    left_out = ", ".join(f"{count} {reason}" for reason, count in training.skipped.items()) or "none"
    print(
        printable(
            f"{len(training)} samples of {training.num_records} records to train on, {len(held_out)} held out; "
            f"left out: {left_out}"
        )
    )


main = command(show_mask, keeps_folder=False)
