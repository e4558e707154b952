"""Target engine `sglang_server`: stock SGLang servers with our plugin. Features go into the run's store without us."""

import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lightning_dataflow.contracts import (
    CaptureMismatchError,
    PeerFailedError,
    SampleOrigin,
    SampleRef,
    UserError,
)
from lightning_dataflow.contracts.validation import DTYPE_BYTES
from lightning_dataflow.sglang_plugin.wire import CaptureRequest, ServerDescription, start_advice
from lightning_dataflow.targets.base import FeatureReader, ReferenceEngine
from lightning_dataflow.targets.info import read_target_info
from lightning_dataflow.targets.sglang_answer import ServerGoneError
from lightning_dataflow.targets.sglang_http import CaptureServer

PROBE_S = 1.0
ABSENCE_S = 20.0
"""How long all servers may be gone before the run fails."""


@dataclass
class _Member:
    server: CaptureServer
    in_flight: int = 0
    gone: str | None = None
    last_look: float = 0.0


class SGLangServerTarget(ReferenceEngine):
    """Several servers of one target, each asked for several prompts at a time; a prompt of one that dies goes to another.

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
        self.store_id, self.in_flight, self.absence_s = store_id, in_flight, absence_s
        self.num_requests = len(urls) * in_flight
        self.info = read_target_info(path)
        self._path, self._store_uri, self._reader = path, store_uri, reader
        self._members = [_Member(CaptureServer(url, api_key=api_key, timeout_s=timeout_s)) for url in urls]
        self._changed = threading.Condition()
        self.set_capture_layers(layer_ids)
        if self.layer_ids[-1] == self.info.num_layers - 1:
            raise UserError(f"layers {list(self.layer_ids)}: SGLang does not capture the last layer: choose lower ones")
        descriptions = [self._describe(member) for member in self._members]
        self._dtype = descriptions[0].dtype
        for member, found in zip(self._members, descriptions, strict=True):
            self._check(member.server.url, found)
        longest = min(server.max_tokens for server in self.servers)
        self.info = replace(self.info, max_position_embeddings=min(self.info.max_position_embeddings, longest))

    @property
    def dtype(self) -> str:
        """See TargetEngine; the servers'."""
        return self._dtype

    @property
    def servers(self) -> list[CaptureServer]:
        """All servers, also those that are gone."""
        return [member.server for member in self._members]

    def capture(self, batch: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
        """See TargetEngine; by way of the store."""
        assert self._reader is not None, "an engine for references only"
        with ThreadPoolExecutor(self.num_requests) as pool:
            return list(pool.map(self._capture_and_read, batch))

    def capture_ref(self, token_ids: Sequence[int], loss_mask: Sequence[int], origin: SampleOrigin) -> SampleRef:
        """See ReferenceEngine."""
        request = CaptureRequest(
            store_id=self.store_id, sample_id=origin.sample_id, attempt=origin.attempt, loss_mask=tuple(loss_mask)
        )
        failing_since: float | None = None
        while True:
            member = self._take()
            try:
                ref = member.server.capture(token_ids, request)
            except ServerGoneError as error:
                self._give_back(member, gone=str(error))
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > self.absence_s:  # servers that come back and fail again
                    raise PeerFailedError(f"no capture server stored {origin.sample_id}: {error}") from error
                continue
            except BaseException:
                self._give_back(member)
                raise
            self._give_back(member)
            return self._verified(ref, origin, member.server.url)

    def _capture_and_read(self, token_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        assert self._reader is not None, "checked"
        name = f"capture-{secrets.token_hex(8)}"
        origin = SampleOrigin(
            sample_id=name,
            run_id=self.store_id,
            source_task_id=name,
            source_id=name,
            capture=self.capture_spec,
            target_model_version=self.info.model_version,
            tokenizer_version=self.info.tokenizer_version,
            num_tokens=len(token_ids),
        )
        ref = self.capture_ref(token_ids, [1] * len(token_ids), origin)
        tensors, handle = self._reader.get(ref)
        self._reader.release(handle)
        if tensors["input_ids"].tolist() != list(token_ids):
            raise CaptureMismatchError(f"the store holds other tokens than the {len(token_ids)} that were sent")
        return {feature: tensors[feature] for feature in ("aux_hidden_states", "last_hidden_state")}

    def _take(self) -> _Member:
        """The least busy server that is there; waits for a place, and looks after those that are gone."""
        gone_since: float | None = None
        while True:
            with self._changed:
                there = [member for member in self._members if member.gone is None]
                free = [member for member in there if member.in_flight < self.in_flight]
                if free:
                    member = min(free, key=lambda one: one.in_flight)
                    member.in_flight += 1
                    return member
                if there:
                    gone_since = None
                    self._changed.wait(PROBE_S)
            if len(there) < len(self._members):
                self._look_again()
            if not there:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > self.absence_s:
                    reasons = "; ".join(member.gone or "back" for member in self._members)
                    raise PeerFailedError(f"no capture server is left: {reasons}")
                time.sleep(PROBE_S / 10)

    def _give_back(self, member: _Member, gone: str | None = None) -> None:
        with self._changed:
            member.in_flight -= 1
            if gone is not None and member.gone is None:
                member.gone, member.last_look = gone, time.monotonic()
                print(f"lost a capture server: {gone}", flush=True)
            self._changed.notify_all()

    def _look_again(self) -> None:
        """Whether a server that was gone is back, and still the same."""
        with self._changed:
            due = [one for one in self._members if one.gone and time.monotonic() - one.last_look > PROBE_S]
            for member in due:
                member.last_look = time.monotonic()
        for member in due:
            try:
                found = member.server.check(self.store_id, self.info.path, self.layer_ids)
            except ServerGoneError:
                continue
            self._check(member.server.url, found)
            with self._changed:
                member.gone = None
                self._changed.notify_all()
            print(f"the capture server at {member.server.url} is back", flush=True)

    def _describe(self, member: _Member) -> ServerDescription:
        try:
            return member.server.check(self.store_id, str(self._path), self.layer_ids)
        except ServerGoneError as error:
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
