"""Target engine `sglang_server`: stock SGLang servers with our plugin. Features go into the run's store without us."""

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from lightning_dataflow.contracts import (
    CapacityError,
    CaptureMismatchError,
    PeerGoneError,
    SampleOrigin,
    SampleRef,
    UserError,
)
from lightning_dataflow.contracts.validation import DTYPE_BYTES
from lightning_dataflow.sglang_plugin.wire import CaptureRequest, ServerDescription, start_advice
from lightning_dataflow.targets.base import FeatureReader, ReferenceEngine
from lightning_dataflow.targets.info import read_target_info
from lightning_dataflow.targets.sglang_answer import CaptureFailedError, ServerRefusalError
from lightning_dataflow.targets.sglang_http import CaptureServer
from lightning_dataflow.targets.sglang_pool import Member, ServerPool

PROBE_TIMEOUT_S = 10.0
ABSENCE_S = 20.0
"""How long all servers may be gone before the run fails."""
MAX_FREE_TRIES = 10
"""A prompt that loses so many servers is at fault itself."""


class SGLangServerTarget(ReferenceEngine):
    """Several servers of one target, each asked for several prompts at a time.

    Args:
        path: the target's folder here; the servers must have the same weights in theirs.
        urls: of the servers.
        store_id: the run; names the store on the servers' side.
        layer_ids: layers to capture; the servers' own flags must name the same.
        reader: of the store that the servers write to, for `capture`; None where only references are wanted.
        store_uri: of the store that this run reads; None where nobody reads.
        in_flight: prompts at a time and server.
        absence_s: how long all servers may be gone.

    Raises:
        UserError: a server cannot be reached, cannot capture, or has another target.
    """

    backend = "sglang_server"

    def __init__(
        self,
        path: str | Path,
        *,
        urls: Sequence[str],
        store_id: str,
        layer_ids: Sequence[int],
        store_uri: str | None = None,
        reader: FeatureReader | None = None,
        api_key: str | None = None,
        in_flight: int = 4,
        timeout_s: float = 300.0,
        absence_s: float = ABSENCE_S,
    ):
        if not urls:
            raise UserError("target.engine=sglang_server needs target.urls=[http://HOST:PORT,...] or target.server_python")
        if in_flight < 1:
            raise UserError(f"target.requests_in_flight={in_flight}: a server needs at least one")
        self.store_id = store_id
        self.num_requests = len(urls) * in_flight
        self.info = read_target_info(path)
        self._path, self._store_uri, self._reader = path, store_uri, reader
        members = [
            Member(
                CaptureServer(url, api_key=api_key, timeout_s=timeout_s),
                CaptureServer(url, api_key=api_key, timeout_s=min(timeout_s, PROBE_TIMEOUT_S)),
            )
            for url in urls
        ]
        self._pool = ServerPool(members, admit=self._admit, in_flight=in_flight, absence_s=absence_s)
        self.set_capture_layers(layer_ids)
        if self.layer_ids[-1] == self.info.num_layers - 1:
            raise UserError(f"layers {list(self.layer_ids)}: SGLang does not capture the last layer: choose lower ones")
        descriptions = [self._describe(server) for server in self.servers]
        self._dtype = descriptions[0].dtype
        for server, found in zip(self.servers, descriptions, strict=True):
            self._check(server.url, found)
        longest = min(server.max_tokens for server in self.servers)
        self.info = replace(self.info, max_position_embeddings=min(self.info.max_position_embeddings, longest))
        for server in self.servers:
            try:
                self._check_store(server)
            except PeerGoneError as error:
                raise UserError(f"{error}: correct the server's file, or start what it names") from error

    @property
    def dtype(self) -> str:
        """See TargetEngine; the servers'."""
        return self._dtype

    @property
    def servers(self) -> list[CaptureServer]:
        """All servers, also those that are gone."""
        return [member.server for member in self._pool.members]

    def capture(self, batch: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
        """See TargetEngine; by way of the store."""
        assert self._reader is not None, "an engine for references only"
        with ThreadPoolExecutor(self.num_requests) as pool:
            return list(pool.map(self._capture_and_read, batch))

    def capture_ref(self, token_ids: Sequence[int], loss_mask: Sequence[int], origin: SampleOrigin) -> SampleRef:
        """See ReferenceEngine."""
        member = self._pool.take()
        try:
            ref = self._capture_at(member.server, token_ids, loss_mask, origin)
        except (PeerGoneError, ServerRefusalError) as error:
            self._pool.give_back(member, lost=str(error))
            if origin.attempt >= MAX_FREE_TRIES:
                raise CaptureFailedError(f"{origin.sample_id} lost {origin.attempt} servers in a row: {error}") from error
            raise PeerGoneError(str(error)) from error
        except BaseException:
            self._pool.give_back(member)
            raise
        self._pool.give_back(member)
        return ref

    def stop_waiting(self) -> None:
        """See ReferenceEngine."""
        self._pool.stop_waiting()

    def _capture_at(
        self, server: CaptureServer, token_ids: Sequence[int], loss_mask: Sequence[int], origin: SampleOrigin
    ) -> SampleRef:
        request = CaptureRequest(
            store_id=self.store_id, sample_id=origin.sample_id, attempt=origin.attempt, loss_mask=tuple(loss_mask)
        )
        return self._verified(server.capture(token_ids, request), origin, server.url)

    def _capture_and_read(self, token_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        origin = self._own_origin(len(token_ids))
        while True:
            try:
                return self._read(self.capture_ref(token_ids, [1] * len(token_ids), origin), token_ids)
            except PeerGoneError:
                if origin.attempt >= MAX_FREE_TRIES:
                    raise
                origin = replace(origin, attempt=origin.attempt + 1)

    def _own_origin(self, num_tokens: int) -> SampleOrigin:
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
        """And free."""
        assert self._reader is not None, "an engine for references only"
        tensors, handle = self._reader.get(ref)
        self._reader.release(handle)
        if tensors["input_ids"].tolist() != list(token_ids):
            raise CaptureMismatchError(f"the store holds other tokens than the {len(token_ids)} that were sent")
        return {feature: tensors[feature] for feature in ("aux_hidden_states", "last_hidden_state")}

    def _admit(self, server: CaptureServer) -> None:
        """A server that was gone is back, and still the same. Raises PeerGoneError or UserError where it is not."""
        self._check(server.url, server.check(self.store_id, str(self._path), self.layer_ids))
        if server.max_tokens < self.info.max_position_embeddings:
            raise UserError(
                f"the server at {server.url} came back and takes {server.max_tokens} tokens, this run may send "
                f"{self.info.max_position_embeddings}: start it with the --context-length that it had"
            )
        self._check_store(server)

    def _check_store(self, server: CaptureServer) -> None:
        """Capture one token and read it back: the name of a store does not tell which Mooncake it is in.

        Raises:
            PeerGoneError: the server does not answer, or its store does not.
            UserError: what it stores is not found.
        """
        if self._reader is None:
            return
        try:
            ref = self._capture_at(server, [0], [1], self._own_origin(1))
        except CapacityError:
            return  # the run waits for room; what is full may be full of this run's features
        except CaptureFailedError as error:
            raise PeerGoneError(str(error)) from error
        try:
            self._read(ref, [0])
        except KeyError as error:
            raise UserError(
                f"the server at {server.url} stores into another {ref.uri} than this run reads (nothing arrived): give "
                "its file the address of this run's store"
            ) from error

    def _describe(self, server: CaptureServer) -> ServerDescription:
        try:
            return server.check(self.store_id, str(self._path), self.layer_ids)
        except PeerGoneError as error:
            raise UserError(f"{error}: {start_advice(str(self._path), self.layer_ids)}") from error

    def _check(self, url: str, found: ServerDescription) -> None:
        """Raise UserError unless a server captures what this run trains on, into the store that it reads."""
        if found.model_version != self.info.model_version:
            raise CaptureMismatchError(
                f"the server at {url} has other weights ({found.model_version}) than target.path={self._path} "
                f"({self.info.model_version}): start it with the same model"
            )
        if found.capture != self.capture_spec:
            raise CaptureMismatchError(
                f"the server at {url} captures layers {list(found.capture.layer_ids)} with norm {found.capture.norm}, this "
                f"run needs {list(self.layer_ids)} with norm post: {start_advice(str(self._path), self.layer_ids)}"
            )
        if found.dtype != self._dtype or found.dtype not in DTYPE_BYTES:
            raise CaptureMismatchError(
                f"the server at {url} computes in {found.dtype}, another one in {self._dtype}: give all the same --dtype"
            )
        if self._store_uri is not None and found.uri != self._store_uri:
            raise UserError(
                f"the server at {url} stores into {found.uri}, this run reads {self._store_uri}: correct the server's file"
            )

    def _verified(self, ref: SampleRef, origin: SampleOrigin, url: str) -> SampleRef:
        """The server's reference under our own names. Raises CaptureMismatchError unless it is what was asked for."""
        theirs, spec, length = ref.origin, self.capture_spec, origin.num_tokens
        expected = {
            "input_ids": ((length,), "int64"),
            "loss_mask": ((length,), "uint8"),
            "aux_hidden_states": ((length, len(spec.layer_ids) * spec.hidden_size), self._dtype),
            "last_hidden_state": ((length, spec.hidden_size), self._dtype),
        }
        for what, found, wanted in (
            ("sample", (theirs.sample_id, theirs.attempt, theirs.num_tokens), (origin.sample_id, origin.attempt, length)),
            ("layers, norm and width", theirs.capture, spec),
            ("weights", theirs.target_model_version, self.info.model_version),
            ("store", ref.uri, self._store_uri or ref.uri),
            ("features", {name: (one.shape, one.dtype) for name, one in ref.features.items()}, expected),
        ):
            if found != wanted:
                raise CaptureMismatchError(
                    f"the server at {url} captured other {what} ({found}) than was asked for ({wanted})"
                )
        return replace(ref, origin=origin)
