"""Target engine `sglang`: SGLang in this process's own engine, where target and trainer share a process.

The only module of the clients that imports sglang. The model runs in a child process even so; our plugin there puts
features into a folder in shared memory, from which they are read and removed at once.
"""

import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning_dataflow.contracts import CaptureMismatchError, SampleRef, UserError
from lightning_dataflow.contracts.validation import DTYPE_BYTES
from lightning_dataflow.sglang_plugin.wire import (
    CaptureRequest,
    check_version,
    flag_problems,
    longest_prompt,
    server_command,
)
from lightning_dataflow.targets.base import FeatureReader, TargetEngine
from lightning_dataflow.targets.info import read_target_info
from lightning_dataflow.targets.sglang_answer import generate_arguments, read_answer, read_description, read_ref

SHARED_MEMORY = Path("/dev/shm")
WHO = "the SGLang engine"
T = TypeVar("T")


class SGLangTarget(TargetEngine):
    """Prompts are read by an SGLang engine that ends with this process.

    Args:
        path: the target's folder.
        store: of a kind that both processes reach, made in the given folder; see `open_exchange`.
        arguments: further flags of SGLang.

    Raises:
        UserError: SGLang is not installed, not supported, or does not take these flags.
    """

    backend = "sglang"

    def __init__(self, path: str | Path, *, layer_ids: Sequence[int], store: FeatureReader, arguments: Sequence[str] = ()):
        try:
            import sglang
            from sglang.srt.server_args import prepare_server_args
        except ImportError as error:
            raise UserError(
                f"target.engine=sglang needs SGLang here ({error}): pip install 'lightning-dataflow[sglang]'"
            ) from error
        check_version(sglang.__version__)
        self.info = read_target_info(path)
        self._store = store
        self.set_capture_layers(layer_ids)
        command = server_command(str(Path(path).absolute()), self.layer_ids)[3:]
        try:
            self._engine: Any = sglang.Engine(
                server_args=prepare_server_args([*command, *arguments, "--log-level", "error"])
            )
        except SystemExit as error:  # of its command line parser, which has said why
            raise UserError(f"SGLang does not take target.server_args={list(arguments)}") from error
        handler = signal.getsignal(signal.SIGTERM)
        try:
            self._dtype = self._check(arguments)
        except BaseException:
            self.close()
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # the first request took it for SGLang, which heeds it in requests only

    @property
    def dtype(self) -> str:
        """See TargetEngine."""
        return self._dtype

    def capture(self, batch: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
        """See TargetEngine. SGLang forms batches of its own."""
        requests = [
            CaptureRequest(store_id="engine", sample_id=f"capture-{secrets.token_hex(8)}", loss_mask=(1,) * len(ids))
            for ids in batch
        ]
        return take_all(self._ask(batch, requests), batch, self._take)

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.shutdown()

    def _check(self, arguments: Sequence[str]) -> str:
        """The features' dtype; raises UserError unless the engine captures what it should."""
        args = self._engine.get_server_info()
        problems = flag_problems(args)
        if problems:
            raise UserError(f"target.server_args={list(arguments)} take away {', '.join(problems)}: leave those out")
        longest = min(self.info.max_position_embeddings, longest_prompt(args, WHO))
        self.info = replace(self.info, max_position_embeddings=longest)
        (output,) = self._ask([[0]], [CaptureRequest(store_id="engine", sample_id="describe")])
        description = read_description(read_answer(output, WHO))
        if description.capture != self.capture_spec or description.dtype not in DTYPE_BYTES:
            raise CaptureMismatchError(f"{WHO} captures {description.capture}, expected {self.capture_spec}")
        return description.dtype

    def _take(self, ref: SampleRef, token_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Out of the store."""
        tensors, handle = self._store.get(ref)
        self._store.release(handle)
        if ref.origin.capture != self.capture_spec or tensors["input_ids"].tolist() != list(token_ids):
            raise CaptureMismatchError(f"{WHO} captured something else than was asked for: {ref.origin.capture}")
        return {name: tensors[name] for name in ("aux_hidden_states", "last_hidden_state")}

    def _ask(self, batch: Sequence[Sequence[int]], requests: Sequence[CaptureRequest]) -> list[dict[str, Any]]:
        asked = [generate_arguments(ids, request) for ids, request in zip(batch, requests, strict=True)]
        outputs: list[dict[str, Any]] = self._engine.generate(
            input_ids=[one["input_ids"] for one in asked],
            sampling_params=[one["sampling_params"] for one in asked],
            rid=[one["rid"] for one in asked],
            return_hidden_states=True,
        )
        return outputs


def take_all(
    outputs: Sequence[Mapping[str, Any]], batch: Sequence[Sequence[int]], take: Callable[[SampleRef, Sequence[int]], T]
) -> list[T]:
    """`take` for each answer to `batch`, also where another prompt failed: what is not taken stays in memory. Raises the
    first error then."""
    found, errors = [], []
    for token_ids, output in zip(batch, outputs, strict=True):
        try:
            found.append(take(read_ref(read_answer(output, WHO), token_ids, WHO), token_ids))
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return found


def exchange_folder() -> tempfile.TemporaryDirectory[str]:
    """Where the engine's process leaves features for this one; in memory where the system has such a place."""
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="lightning-dataflow-", dir=parent)
