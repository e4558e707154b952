"""Lua that runs in Redis: each change of a run is one script."""

import hashlib
from importlib import resources


class Script:
    """Lua that the server runs without any other command in between.

    Args:
        flags: of Redis, for example `allow-oom`.
    """

    def __init__(self, text: str, flags: str = ""):
        self.text = f"#!lua flags={flags}\n{text}" if flags else f"#!lua\n{text}"
        self.sha = hashlib.sha1(self.text.encode()).hexdigest()


def _read(*names: str) -> str:
    return "\n".join((resources.files(__package__) / name).read_text() for name in names)


_CHANGE = _read("log.lua", "ledger.lua", "run.lua", "change.lua")
GROWING = Script(_CHANGE)
"""All changes of a run, refused while the server's memory is full."""
ALWAYS = Script(_CHANGE, "allow-oom")
"""The same for what must work while memory is full, because it frees some or is needed to end."""
LEAVE = Script(_read("leave.lua"), "allow-oom")
READ = Script(_read("read.lua"), "no-writes")
"""A command that reads, with a bound on its reply. It works while memory is full, too."""
