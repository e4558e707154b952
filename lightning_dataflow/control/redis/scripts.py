"""Lua that runs in Redis: each change of a run is one script."""

import hashlib
from functools import cache
from importlib import resources

ALLOW_OOM, NO_WRITES = "allow-oom", "no-writes"
"""Scripts say in their first line that they may run while memory is full, or that they write nothing."""


class Script:
    """Lua that the server runs without anybody else in between.

    Args:
        flags: of Redis; ALLOW_OOM for what must work while memory is full, because it frees some.
    """

    def __init__(self, text: str, flags: str = ""):
        self.text = f"#!lua flags={flags}\n{text}" if flags else f"#!lua\n{text}"
        self.sha = hashlib.sha1(self.text.encode()).hexdigest()


@cache
def change_script(*names: str, package: str = __package__, flags: str = "") -> Script:
    """A script of operations for `RedisServer.change`: the log's, and those of the files `names` of `package`."""
    texts = [read_script("log.lua"), *(read_script(name, package) for name in names), read_script("tail.lua")]
    return Script("\n".join(texts), flags)


def read_script(name: str, package: str = __package__) -> str:
    """A Lua file of a package."""
    return (resources.files(package) / name).read_text()
