"""Lines of a log in a file: a checksum in each tells damage from a write that was cut short."""

import json
import re
import zlib

from lightning_dataflow.contracts import UserError

_CHECKSUM = re.compile(rb',"crc32":"([0-9a-f]{8})"\}$')
_LITERALS = ("true", "false", "null", "-")


def add_crc(line: bytes) -> bytes:
    """Add the checksum to a line, a JSON object, as its last field."""
    return b'%b,"crc32":"%08x"}' % (line[:-1], zlib.crc32(line))


def check_crc(line: bytes) -> bool:
    """False for a line, without its newline, that a killed writer left unfinished.

    Raises UserError for anything else whose checksum is missing or wrong: bytes that no writer wrote.
    """
    found = _CHECKSUM.search(line)
    if found is None:
        if _is_cut_short(line):
            return False
        raise UserError("it has no checksum")
    if int(found[1], 16) != zlib.crc32(line[: found.start()] + b"}"):
        raise UserError("its checksum does not match")
    return True


def _is_cut_short(line: bytes) -> bool:
    """Whether more bytes could make a JSON object of this."""
    if not line.startswith(b"{"):
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        rest = error.doc[error.pos :]
        at_end = not rest.strip() or any(literal.startswith(rest) for literal in _LITERALS)
        return at_end or error.msg.startswith(("Unterminated string", "Invalid \\"))
    except UnicodeDecodeError:
        return False
    return False
