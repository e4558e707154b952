"""Target engine `sglang_server`: stock SGLang servers whose plugin puts the features into a store."""

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_dataflow.contracts import (
    CapacityError,
    CaptureMismatchError,
    PeerGoneError,
    SampleOrigin,
    SampleRef,
    UserError,
)
from lightning_dataflow.contracts.waiting import said_if_long
from lightning_dataflow.sglang_plugin.wire import HIDDEN_STATES, CaptureRequest, start_advice
from lightning_dataflow.stores import FeatureStore
from lightning_dataflow.targets.base import TargetEngine
from lightning_dataflow.targets.info import read_target_info
from lightning_dataflow.targets.sglang_http import CaptureFailedError, CaptureServer, ServerRefusalError
from lightning_dataflow.targets.sglang_pool import Member, ServerPool

PROBE_TIMEOUT_S = 10.0
ABSENCE_S = 20.0
MAX_LOST_SERVERS = 10
"""After this many lost servers, blame the prompt."""


class SGLangServerTarget(TargetEngine):
    """Several servers of one target, each asked for several prompts at a time.

    Args:
        path: the target's folder here; the servers must have the same weights in theirs.
        urls: of the servers.
        store: where the servers put the features.
        store_id: names that store in requests.
        layer_ids: layers to capture; the servers' own flags must name the same.
        features: hidden states to store.
        in_flight: prompts at a time and server.
        absence_s: the run fails after no server has answered a request for this long.

    Attributes:
        num_requests: prompts that are captured at a time.

    Raises:
        UserError: a server cannot be reached, cannot capture, or has another target.
    """

    backend = "sglang_server"

    def __init__(
        self,
        path: str | Path,
        *,
        urls: Sequence[str],
        store: FeatureStore,
        store_id: str,
        layer_ids: Sequence[int],
        features: Sequence[str] = HIDDEN_STATES,
        api_key: str | None = None,
        in_flight: int = 4,
        timeout_s: float = 300.0,
        absence_s: float = ABSENCE_S,
    ):
        if not urls:
            raise UserError("target.engine=sglang_server needs target.urls=[http://HOST:PORT,...] or target.server_python")
        self.store_id = store_id
        self.num_requests = len(urls) * in_flight
        self.info = read_target_info(path)
        self._store, self.dtype = store, ""
        self.servers = [CaptureServer(url, api_key=api_key, timeout_s=timeout_s) for url in urls]
        probes = [CaptureServer(url, api_key=api_key, timeout_s=min(timeout_s, PROBE_TIMEOUT_S)) for url in urls]
        members = [Member(server, probe) for server, probe in zip(self.servers, probes, strict=True)]
        self._probe = probes[0]
        self._pool = ServerPool(members, admit=self._admit, in_flight=in_flight, absence_s=absence_s)
        self._executor = ThreadPoolExecutor(self.num_requests, thread_name_prefix="capture")
        self.set_capture_layers(layer_ids)
        self.features = tuple(features)
        if self.layer_ids[-1] == self.info.num_layers - 1:
            raise UserError(f"layers {list(self.layer_ids)}: SGLang does not capture the last layer: choose lower ones")
        self._check_servers()

    def capture(self, batch: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
        """Capture through the store; nothing stays there. SGLang forms batches of its own."""
        return list(self._executor.map(self._capture_and_read, batch))

    def capture_ref(
        self, token_ids: Sequence[int], loss_mask: Sequence[int], origin: SampleOrigin, *, keeps_broken: bool = False
    ) -> SampleRef:
        """Have one prompt captured and stored, and check the answer. Thread-safe.

        Args:
            keeps_broken: store features with NaN or infinity too.

        Raises:
            PeerGoneError: no answer. The features may be stored all the same: ask for the next attempt.
            PeerFailedError: no server has answered for too long.
            BrokenFeaturesError: the features hold NaN or infinity; nothing was stored.
            CapacityError: the store is full; nothing was stored.
            CaptureMismatchError: the features are not what this run was announced with.
        """
        member, lost = self._pool.take(), None
        try:
            return self._ask(member.server, token_ids, origin, loss_mask=loss_mask, keeps_broken=keeps_broken)
        except (PeerGoneError, ServerRefusalError) as error:
            lost = str(error)
            if origin.attempt >= MAX_LOST_SERVERS:
                raise CaptureFailedError(f"{origin.sample_id} lost {origin.attempt} servers in a row: {error}") from error
            raise PeerGoneError(lost) from error
        finally:
            self._pool.give_back(member, lost=lost)

    def logprobs_of(self, token_ids: Sequence[int]) -> tuple[torch.Tensor, list[float] | None]:
        """The last hidden state [S, H] of one prompt, and the log-probability of each token after the first by a server's
        own logits; None if it does not give them. Before other captures only."""
        features, self.features = self.features, ("last_hidden_state",)
        try:
            (captured,) = self.capture([token_ids])
        finally:
            self.features = features
        return captured["last_hidden_state"], self._probe.prompt_logprobs(token_ids)

    def stop_waiting(self) -> None:
        """The run is ending: all calls, running and later ones, raise PeerGoneError at once."""
        self._pool.stop_waiting()

    def _ask(self, server: CaptureServer, token_ids: Sequence[int], origin: SampleOrigin, **request: Any) -> SampleRef:
        """The server's reference under our own names, once it is what was asked for."""
        names: dict[str, Any] = {"store_id": self.store_id, "sample_id": origin.sample_id, "attempt": origin.attempt}
        ref = server.capture(token_ids, CaptureRequest(**names, features=self.features, **request))
        self._check_ref(ref, origin, server.url)
        return replace(ref, origin=origin)

    def _capture_and_read(self, token_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        origin = self._private_origin(len(token_ids))
        while True:
            try:
                ref = self.capture_ref(token_ids, [1] * len(token_ids), origin, keeps_broken=True)
                return self._read(ref, token_ids)
            except PeerGoneError:
                if origin.attempt >= MAX_LOST_SERVERS:
                    raise
                origin = replace(origin, attempt=origin.attempt + 1)

    def _private_origin(self, num_tokens: int) -> SampleOrigin:
        """Of features that are for this process alone."""
        name = f"capture-{secrets.token_hex(8)}"
        return SampleOrigin(
            sample_id=name,
            run_id=self.store_id,
            source_task_id=name,
            source_id=name,
            capture=self.capture_spec,
            target_model_version=self.info.model_version,
            tokenizer_version=self.info.tokenizer_version,
            num_tokens=num_tokens,
        )

    def _read(self, ref: SampleRef, token_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Take the features out of the store."""
        tensors, handle = self._store.get(ref)
        self._store.release(handle)
        if tensors["input_ids"].tolist() != list(token_ids):
            raise CaptureMismatchError(f"the store holds other tokens than the {len(token_ids)} that were sent")
        return {feature: tensors[feature] for feature in self.features}

    def _check_servers(self) -> None:
        for check, remedy in (
            (self._check_server, start_advice(self.info.path, self.layer_ids)),
            (self._check_store, "correct the server's file, or start what it names"),
        ):
            for server in self.servers:
                try:
                    with said_if_long(f"the server at {server.url} to answer"):
                        check(server)
                except PeerGoneError as error:
                    raise UserError(f"{error}: {remedy}") from error
        longest = min(self.info.max_position_embeddings, *(server.max_tokens for server in self.servers))
        self.info = replace(self.info, max_position_embeddings=longest)

    def _admit(self, server: CaptureServer) -> None:
        """Raise PeerGoneError or UserError unless a lost server is back and still the same."""
        self._check_server(server)
        if server.max_tokens < self.info.max_position_embeddings:
            raise UserError(
                f"the server at {server.url} came back and takes {server.max_tokens} tokens, this run may send "
                f"{self.info.max_position_embeddings}: start it with the --context-length that it had"
            )
        self._check_store(server)

    def _check_server(self, server: CaptureServer) -> None:
        """Raise PeerGoneError or UserError unless a server captures what this run trains on, into the store it reads."""
        server.check(self.info.path, self.layer_ids)
        self._capture_one(server, dry_run=True)

    def _check_store(self, server: CaptureServer) -> None:
        """Capture one token and read it back: two Mooncakes may hold stores of the same name.

        Raises:
            PeerGoneError: the server or its store does not answer.
            UserError: what the server stores is not found here.
        """
        try:
            ref = self._capture_one(server, dry_run=False)
        except CapacityError:
            return  # it may be full of this run's features, and the run waits for room
        try:
            self._read(ref, [0])
        except KeyError as error:
            raise UserError(
                f"the server at {server.url} stores into another {ref.uri} than this run reads (nothing arrived): give "
                "its file the address of this run's store"
            ) from error

    def _capture_one(self, server: CaptureServer, *, dry_run: bool) -> SampleRef:
        try:
            request = {"loss_mask": [1], "dry_run": dry_run, "keeps_broken": True}
            return self._ask(server, [0], self._private_origin(1), **request)
        except CaptureFailedError as error:
            raise PeerGoneError(str(error)) from error

    def _check_ref(self, ref: SampleRef, origin: SampleOrigin, url: str) -> None:
        """Raise CaptureMismatchError unless the server captures what it was asked for, as all servers do."""
        theirs, length = ref.origin, origin.num_tokens
        dtypes = {spec.dtype for name, spec in ref.features.items() if name in self.features}
        self.dtype = self.dtype or next(iter(dtypes), "")
        features = {
            "input_ids": ((length,), "int64"),
            "loss_mask": ((length,), "uint8"),
            **{name: ((length, width), self.dtype) for name, width in self.widths.items()},
        }
        advice, release = start_advice(self.info.path, self.layer_ids), "install one release on both sides"
        asked = (origin.sample_id, origin.attempt, length)
        for what, actual, expected, remedy in (
            ("another sample", (theirs.sample_id, theirs.attempt, theirs.num_tokens), asked, release),
            ("other layers, norm or width", theirs.capture, self.capture_spec, advice),
            ("other weights", theirs.target_model_version, self.info.model_version, "start it with the same model"),
            ("another store", ref.uri, self._store.uri, "correct the server's file"),
            ("another dtype", dtypes, {self.dtype}, "give all servers the same --dtype"),
            ("other features", {name: (spec.shape, spec.dtype) for name, spec in ref.features.items()}, features, release),
        ):
            if actual != expected:
                raise CaptureMismatchError(
                    f"the server at {url} has {what} ({actual}) than this run ({expected}): {remedy}"
                )
