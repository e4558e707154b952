"""Fields of a ledger, which other processes wrote: input, not truth. Each error is one line that names the field."""

from collections.abc import Mapping
from typing import Any

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import one_line, parse_json
from lightning_dataflow.contracts.log import MAX_SEQ
from lightning_dataflow.contracts.validation import check_count
from lightning_dataflow.control.leases import RunPlan

MAX_FIELD_BYTES = 1 << 20
MAX_STATE = 2000
"""Characters that are kept of a text in a report."""
MAX_TIME, MAX_PID = 1e12, 1 << 31
PART = {"host": str, "pid": int, "pids": str, "state": str, "failed": bool, "fatal": bool}
"""What a process reports of itself, beside `seen`."""


def read_plan(text: str) -> RunPlan:
    """The plan of a run."""
    data = _object(text, "plan")
    if data.keys() != {"start", "stop", "window"}:
        raise damaged("plan", "it has other fields than start, stop and window")
    try:
        for name, lowest in (("start", 0), ("stop", data["start"]), ("window", 1)):
            check_count(data[name], lowest, MAX_SEQ + 1, f"{name} of the plan")
    except UserError as error:
        raise damaged("plan", error) from error
    return RunPlan(**data)


def read_part(name: str, text: str, now: float) -> dict[str, Any]:
    """What a process reported last."""
    what = f"report of {one_line(name, 80)}"
    part = _object(text, what)
    wrong = next((field for field, kind in PART.items() if type(part.get(field)) is not kind), None)
    seen: Any = part.get("seen")
    if wrong is not None or type(seen) not in (int, float) or not (0 <= seen < MAX_TIME and 0 <= part["pid"] < MAX_PID):
        raise damaged(what, f"its field {wrong or 'seen or pid'} is missing, of another type or out of range")
    known = {field: part[field][:MAX_STATE] if kind is str else part[field] for field, kind in PART.items()}
    return {"name": name, "seen_s_ago": now - float(seen), **known}


def read_sample(seq: str, text: str) -> tuple[str, int]:
    """(state, bytes) of a sample in flight."""
    what = f"row of sample {one_line(seq, 40)}"
    row = _object(text, what)
    if not (seq.isascii() and seq.isdigit() and len(seq) <= len(str(MAX_SEQ))):
        raise damaged(what, "this is no number of a sample")
    if row.get("state") not in ("leased", "wanted", "published") or type(row.get("bytes")) is not int:
        raise damaged(what, "its state or bytes are of another kind")
    return row["state"], row["bytes"]


def read_count(values: Mapping[str, Any], name: str) -> int:
    """A count of the run; 0 where it has none."""
    return int(read_number(values, name, whole=True))


def read_number(values: Mapping[str, Any], name: str, *, whole: bool = False) -> float:
    """A number of the run; 0 where it has none."""
    try:
        return (int if whole else float)(values.get(name, 0))
    except (ValueError, TypeError, OverflowError) as error:
        raise damaged(name, f"{one_line(values[name], 40)!r} is no number") from error


def damaged(what: str, reason: object) -> UserError:
    """The error of a field that no process of the run wrote."""
    return UserError(
        f"the ledger's {what} is damaged ({reason}): resume with ckpt_path=last, or start again under another run_name"
    )


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        data = parse_json(text, f"the {what}", MAX_FIELD_BYTES)
    except UserError as error:
        raise damaged(what, error) from error
    if not isinstance(data, dict):
        raise damaged(what, "it is not a JSON object")
    return data
