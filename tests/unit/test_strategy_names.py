"""Shared code names no algorithm: neither in code, nor in strings, comments and docstrings."""

import re
from pathlib import Path

from lightning_dataflow.strategies.registry import available_strategies

PACKAGE = Path(__file__).parents[2] / "lightning_dataflow"
STRATEGIES = PACKAGE / "strategies"
# Folders of algorithms that are derived from another one.
DERIVED = {"dflash": {"domino"}}
# The one line that registers a built-in strategy, and the package's public names.
REGISTRATION = re.compile(r'^    "(\w+)": "lightning_dataflow\.strategies\.\1\.module:SPEC",$')
PUBLIC = re.compile(r"^    .*\bstrategies\.(\w+)\.module\b")
# An option of SGLang's server, which has such a value whatever is trained.
SGLANG_OPTION = 'CONVENTION = "DFLASH"'


def is_allowed(path: Path, line: str, name: str) -> bool:
    if path.is_relative_to(STRATEGIES):
        folder = path.relative_to(STRATEGIES).parts[0]
        if folder in {name} | DERIVED.get(name, set()):
            return True
    allowed = {STRATEGIES / "registry.py": REGISTRATION, PACKAGE / "__init__.py": PUBLIC}.get(path)
    return (allowed is not None and bool(allowed.match(line))) or line == SGLANG_OPTION


def test_an_algorithm_s_name_stands_only_in_its_own_folder():
    names = [name for name in available_strategies() if (STRATEGIES / name).is_dir()]
    assert len(names) >= 3
    offenders = [
        f"{path.relative_to(PACKAGE.parent)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for name in names
        if name in line.lower() and not is_allowed(path, line, name)
    ]
    assert not offenders, "only an algorithm's own folder may name it, StrategySpec tells the rest:\n" + "\n".join(
        offenders
    )


def test_each_algorithm_is_registered_in_one_line():
    lines = (STRATEGIES / "registry.py").read_text().splitlines()
    registered = [match[1] for line in lines if (match := REGISTRATION.match(line))]
    folders = sorted(path.parent.name for path in STRATEGIES.glob("*/export.py"))
    assert sorted(registered) == folders
