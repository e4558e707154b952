"""Producers: they run the target over prompts and put its features into a store."""

from lightning_dataflow.producers.capture import capture_prompts
from lightning_dataflow.producers.offline import capture_to_folder
from lightning_dataflow.producers.online import OnlineSource

__all__ = ["OnlineSource", "capture_prompts", "capture_to_folder"]
