"""The id of a run, which names its keys in stores and Redis."""

import hashlib
import re

MAX_LENGTH = 200
_PLAIN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_])?")


def run_id(run_name: str) -> str:
    """The name as an id: itself where its characters allow, else a readable form and a digest, so that no two names share
    an id. The id of an id is itself."""
    if _PLAIN.fullmatch(run_name) and ".." not in run_name and len(run_name) <= MAX_LENGTH:
        return run_name
    digest = hashlib.sha256(run_name.encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", run_name).strip("-_")[: MAX_LENGTH - 20]
    return f"{readable or 'run'}-{digest}"
