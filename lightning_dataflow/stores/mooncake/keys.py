"""How a Mooncake store names its objects."""

import re
from collections.abc import Iterable, Sequence

from lightning_dataflow.contracts import SampleOrigin, SampleRef

SUPERSEDED = "superseded"
MAX_MARKED_ATTEMPTS = 32


class KeyScheme:
    """`{store_id}/{sample_id}/g{generation}/{part}`, and marks `{store_id}/{sample_id}/superseded/{attempt}`."""

    def __init__(self, store_id: str):
        self._store_id = store_id

    def of(self, ref: SampleRef, parts: Sequence[str]) -> list[str]:
        """The keys of one generation."""
        prefix = f"{self._store_id}/{ref.sample_id}/g{ref.generation}"
        return [f"{prefix}/{part}" for part in parts]

    def mark(self, sample_id: str, attempt: int) -> str:
        """Says that generations of this attempt no longer count."""
        return f"{self._store_id}/{sample_id}/{SUPERSEDED}/{attempt}"

    def marks(self, origin: SampleOrigin) -> list[str]:
        """What a put of `origin` marks: the attempts before it."""
        oldest = max(0, origin.attempt - MAX_MARKED_ATTEMPTS)
        return [self.mark(origin.sample_id, attempt) for attempt in range(oldest, origin.attempt)]

    def pattern_of_store(self) -> str:
        """Matches everything of this store."""
        return f"^{re.escape(self._store_id)}/"

    def pattern_of_sample(self, sample_id: str) -> str:
        """Matches every generation and mark of a sample."""
        return f"{self.pattern_of_store()}{re.escape(sample_id)}/"

    def pattern_up_to(self, sample_id: str, attempt: int) -> str:
        """Matches the generations of attempts 0 to `attempt` of a sample."""
        return f"{self.pattern_of_sample(sample_id)}g(?:{_at_most(attempt)})-"

    def sort(self, keys: Iterable[str]) -> tuple[dict[tuple[str, str], list[str]], set[str]]:
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


def _at_most(number: int) -> str:
    """A pattern for the decimal numbers from 0 to `number`."""
    digits = str(number)
    shorter = [f"[0-9]{{1,{len(digits) - 1}}}"] if len(digits) > 1 else []
    smaller = [
        f"{digits[:index]}[0-{int(digit) - 1}][0-9]{{{len(digits) - index - 1}}}"
        for index, digit in enumerate(digits)
        if digit != "0"
    ]
    return "|".join([*shorter, *smaller, digits])
