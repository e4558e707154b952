"""Producers: they run the target over prompts and put its features into a store."""

from lightning_dataflow.producers.colocated import ColocatedSource as ColocatedSource
from lightning_dataflow.producers.feeds import PromptFeed as PromptFeed
from lightning_dataflow.producers.offline import capture_to_folder as capture_to_folder
from lightning_dataflow.producers.online import OnlineSource as OnlineSource
from lightning_dataflow.producers.rollout import RolloutWorker as RolloutWorker
