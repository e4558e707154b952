"""Which generation of a sample is valid, and how the others are removed."""

import ctypes
import re
from collections.abc import Sequence

from lightning_dataflow.contracts import CapacityError, SampleOrigin, SampleRef
from lightning_dataflow.stores.base import IsLive, StoreUnavailableError, attempt_of
from lightning_dataflow.stores.mooncake.admin import MooncakeAdmin
from lightning_dataflow.stores.mooncake.client import NO_SPACE, NOT_FOUND, OWNER_GONE, MooncakeClient, TransientError
from lightning_dataflow.stores.mooncake.transfer import stored_features

SUPERSEDED = "superseded"
MAX_OLDER_ATTEMPTS = 32
"""A put removes and marks this many attempts before its own."""


class Generations:
    """The objects of one store, by generation: `{store_id}/{sample_id}/g{generation}/{feature}`.

    Attempts order across processes: before a put of attempt n > 0 removes what is older, it leaves a one-byte object
    `{sample_id}/superseded/{k}` for every k < n, and a generation of attempt k is valid only while that mark is absent. So
    a late put of an older attempt is stale at once, in whatever order the puts come. The marks go, as the last step, with
    the generation that left them. Not promised: that two puts of the *same* attempt by different processes supersede each
    other; that a put supersedes an attempt more than 32 before its own; marks while the newest generation of a sample is
    freed and put again at the same moment. The control plane, which hands out attempts, prevents all three.
    """

    def __init__(self, store_id: str, client: MooncakeClient, admin: MooncakeAdmin | None):
        self._store_id, self._client, self._admin = store_id, client, admin

    def objects(self, ref: SampleRef) -> list[str]:
        """The keys of a generation."""
        prefix = f"{self._store_id}/{ref.sample_id}/g{ref.generation}"
        return [f"{prefix}/{spec.name}" for spec in stored_features(ref)]

    def are_valid(self, refs: Sequence[SampleRef]) -> list[bool]:
        """Whether all objects of each ref exist, and no mark says that it is superseded. Tries once."""
        keys = [(*self.objects(ref), self._mark(ref.sample_id, ref.origin.attempt)) for ref in refs]
        exists = iter(self._client.exist([key for group in keys for key in group]))
        found = [[next(exists) for _ in group] for group in keys]
        return [all(objects) and not superseded for *objects, superseded in found]

    def supersede(self, draft: SampleRef) -> None:
        """Remove what a put of `draft` supersedes, and mark its attempts."""
        self._remove_up_to(draft.sample_id, draft.origin.attempt)  # before the marks, which may need the room
        self._client.retry(lambda: self._leave_marks(draft))
        self._remove_up_to(draft.sample_id, draft.origin.attempt)

    def remove(self, refs: Sequence[SampleRef]) -> None:
        """Remove generations; those of attempt 0, which left no marks, in one round trip."""
        self._remove([key for ref in refs if ref.origin.attempt == 0 for key in self.objects(ref)])
        for ref in refs:
            if ref.origin.attempt:
                self._remove_with_marks(ref)

    def remove_sample(self, sample_id: str) -> None:
        """Remove every generation and mark of a sample."""
        self._remove_matching(f"{re.escape(sample_id)}/")

    def remove_store(self) -> None:
        """Remove everything."""
        self._remove_matching("")

    def remove_orphans(self, keys: Sequence[str], is_live: IsLive) -> int:
        """Of all `keys` of a Mooncake, remove the generations that are not live; returns how many."""
        generations, marks = self._sort(keys)
        orphans = [generation for generation in generations if not is_live(*generation)]
        live = {sample_id for sample_id, _ in generations.keys() - set(orphans)}
        objects = [key for generation in orphans for key in generations[generation]]
        self._remove(objects + [mark for mark in marks if mark.split("/")[1] not in live])
        return len(orphans)

    def num_valid(self, keys: Sequence[str]) -> int:
        """How many generations among all `keys` of a Mooncake are valid."""
        generations, marks = self._sort(keys)
        return sum(self._mark(name, attempt_of(generation)) not in marks for name, generation in generations)

    def _mark(self, sample_id: str, attempt: int) -> str:
        return f"{self._store_id}/{sample_id}/{SUPERSEDED}/{attempt}"

    def _marks(self, origin: SampleOrigin) -> list[str]:
        """What a put of `origin` leaves."""
        oldest = max(0, origin.attempt - MAX_OLDER_ATTEMPTS)
        return [self._mark(origin.sample_id, attempt) for attempt in range(oldest, origin.attempt)]

    def _leave_marks(self, draft: SampleRef) -> None:
        marks, byte = self._marks(draft.origin), self._client.lease(1)
        codes = self._client.put(marks, [ctypes.addressof(byte)] * len(marks), [1] * len(marks))
        if any(codes):
            raise refusal(draft, codes, self._admin)

    def _remove_with_marks(self, ref: SampleRef) -> None:
        objects = self.objects(ref)
        mark = self._mark(ref.sample_id, ref.origin.attempt)
        exists, superseded = self._client.retry(lambda: self._client.exist([objects[0], mark]))
        self._remove(objects)
        if exists and not superseded:
            self._remove_up_to(ref.sample_id, ref.origin.attempt - 1)  # late puts
            self._remove(self._marks(ref.origin))

    def _remove(self, keys: list[str]) -> None:
        if keys:
            self._client.retry(lambda: self._client.remove(keys))

    def _remove_up_to(self, sample_id: str, attempt: int) -> None:
        """Remove the generations of `attempt` and of those before it."""
        attempts = "|".join(map(str, range(max(0, attempt - MAX_OLDER_ATTEMPTS), attempt + 1)))
        self._remove_matching(f"{re.escape(sample_id)}/g(?:{attempts})-")

    def _remove_matching(self, pattern: str) -> None:
        """Remove what matches `pattern` behind the store_id."""
        whole = f"^{re.escape(self._store_id)}/{pattern}"
        self._client.retry(lambda: self._client.remove_matching(whole))

    def _sort(self, keys: Sequence[str]) -> tuple[dict[tuple[str, str], list[str]], set[str]]:
        """Of all `keys` of a Mooncake, those of each (sample_id, generation) of this store, and its marks."""
        generations: dict[tuple[str, str], list[str]] = {}
        marks: set[str] = set()
        for key in keys:
            if key.startswith(f"{self._store_id}/"):
                _, sample_id, part, _ = key.split("/")
                if part == SUPERSEDED:
                    marks.add(key)
                else:
                    generations.setdefault((sample_id, part.removeprefix("g")), []).append(key)
        return generations, marks


def refusal(ref: SampleRef, codes: list[int], admin: MooncakeAdmin | None) -> Exception:
    """The error for a put that Mooncake answered with `codes`."""
    if NO_SPACE not in codes and NOT_FOUND in codes:
        return TransientError(NOT_FOUND)
    if NO_SPACE not in codes:
        return StoreUnavailableError(
            f"Mooncake refused {ref.sample_id} ({ref.num_bytes} bytes, codes {codes}): see its logs"
        )
    room = ""
    if admin is not None:
        taken, capacity = (admin.gauge(f"master_{what}_bytes") for what in ("allocated", "total_capacity"))
        if not capacity:  # a master that was restarted has no storage process yet
            return TransientError(OWNER_GONE)
        check_fits(ref, capacity)
        room = f", {taken} of {capacity} are taken"
    return CapacityError(
        f"{ref.sample_id} needs {ref.num_bytes} bytes{room} and Mooncake found no room: release samples first, or give "
        "it more memory (store.capacity_bytes)"
    )


def check_fits(ref: SampleRef, capacity: int) -> None:
    """Raise CapacityError when `ref` is larger than the whole store."""
    if ref.num_bytes > capacity:
        raise CapacityError(
            f"{ref.sample_id} needs {ref.num_bytes} bytes, the whole store has {capacity}: it is too small for one sample, "
            "raise store.capacity_bytes"
        )
