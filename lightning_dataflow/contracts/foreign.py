"""Text from outside of this process: what of it may be printed, and how much of it is parsed."""

import json
import re
from pathlib import Path
from typing import Any

from lightning_dataflow.contracts.errors import UserError

MAX_JSON_BYTES = 64 << 20
MAX_SHOWN = 300
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks of the direction of text, and halves of characters that UTF-8 cannot hold."""
_SENTENCE = re.compile(r"(?<=[.!?;])\s+")
_UNSAFE = re.compile(r"trust[-_]remote[-_]code|weights_only|allow_pickle|safe_globals|trust the source", re.IGNORECASE)


def printable(text: object) -> str:
    """`text` with escapes for every character that a terminal would act on, or cannot show. New lines and tabs stay."""
    return _CONTROL.sub(lambda found: f"\\x{code:02x}" if (code := ord(found[0])) < 256 else f"\\u{code:04x}", str(text))


def one_line(text: object, limit: int = MAX_SHOWN) -> str:
    """`text`, printable, in one line of at most `limit` characters."""
    shown = " ".join(printable(text).split())
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def first_line(error: BaseException) -> str:
    """The first line of another library's message, `without_advice`; the name of the error's type where nothing is left."""
    lines = str(error).strip().splitlines()
    return without_advice(lines[0] if lines else "") or type(error).__name__


def without_advice(text: str) -> str:
    """`one_line`, without sentences that advise to run foreign code or to unpickle."""
    return one_line(" ".join(sentence for sentence in _SENTENCE.split(text) if not _UNSAFE.search(sentence)))


def read_bounded(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a file that parse_json gets with the same limit: at most one byte more, by which it is refused."""
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def parse_json(text: str | bytes, what: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What `text` says as JSON. Raises UserError, which names `what`, if it is none, too large, or nested too deeply."""
    if len(text) > max_bytes:
        raise UserError(f"{what} has {len(text)} bytes, the limit is {max_bytes}: it is damaged, or not ours")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise UserError(f"{what} is not valid JSON ({reason}): it is damaged, or not ours") from error
