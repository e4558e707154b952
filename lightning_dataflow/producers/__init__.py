"""Producers: they run the target over prompts and put its features into a store."""

from lightning_dataflow.producers.capture import capture_prompts
from lightning_dataflow.producers.colocated import ColocatedSource
from lightning_dataflow.producers.feeds import Feed, FolderFeed, PromptFeed, ServedFeed
from lightning_dataflow.producers.offline import capture_to_folder
from lightning_dataflow.producers.online import OnlineSource
from lightning_dataflow.producers.rollout import RolloutWorker

__all__ = [
    "ColocatedSource",
    "Feed",
    "FolderFeed",
    "OnlineSource",
    "PromptFeed",
    "RolloutWorker",
    "ServedFeed",
    "capture_prompts",
    "capture_to_folder",
]
