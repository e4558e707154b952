"""The import rules: dependencies point one way, and heavy libraries stay at the edges."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_dataflow"

# What each folder may import of this package, beside itself, from the bottom up. Two places differ from what their names
# suggest: services start servers with our plugin, so they stand above it; strategies name the callbacks that go with their
# modules, so callbacks stand below them.
ALLOWED = {
    "contracts": set(),
    "stores": {"contracts"},
    "prompts": {"contracts"},
    "control": {"contracts", "stores"},
    "sglang_plugin": {"contracts", "stores"},
    "services": {"contracts", "control", "stores", "sglang_plugin"},
    "targets": {"contracts", "stores", "sglang_plugin"},
    "data": {"contracts", "stores", "control"},
    "checkpoints": {"contracts", "data"},
    "producers": {"contracts", "stores", "control", "prompts", "targets", "data"},
    "evaluation": {"contracts", "services", "targets"},
    "callbacks": {"contracts", "stores", "data", "evaluation", "targets"},
    "strategies": {"contracts", "checkpoints", "data", "evaluation", "targets", "callbacks"},
    "export": {"contracts", "checkpoints", "strategies"},
    "config": {"contracts", "control"},
    "run": {
        "contracts",
        "stores",
        "prompts",
        "control",
        "services",
        "sglang_plugin",
        "targets",
        "data",
        "checkpoints",
        "producers",
        "callbacks",
        "strategies",
        "config",
    },
    "supervise": {"contracts", "control", "services", "checkpoints", "callbacks", "config", "run"},
    "cli": {
        "contracts",
        "prompts",
        "control",
        "services",
        "targets",
        "data",
        "checkpoints",
        "evaluation",
        "strategies",
        "export",
        "config",
        "run",
        "supervise",
    },
}
# Which folders may import a library.
LIBRARIES = {
    "hydra": {"config", "cli"},
    "omegaconf": {"config", "cli"},
    "lightning": {"data", "checkpoints", "strategies", "callbacks", "run", "cli"},
    "sglang": {"sglang_plugin"},
    "mooncake": {"stores"},
    "redis": {"control"},
    "transformers": {"prompts", "targets", "run", "cli"},
    "matplotlib": {"cli"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imports(path: Path) -> set[str]:
    """Names of what a file imports, at its top, within functions and for type checkers."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path: Path):
    part = path.relative_to(PACKAGE).parts[0]
    assert part in ALLOWED, f"a new folder: say in this test what {part} may import"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "lightning_dataflow":
            allowed = ALLOWED[part] | {part}
            assert rest[0] in allowed, f"{path.name} imports {name}; {part} may import {', '.join(sorted(allowed))}"
        if top in LIBRARIES:
            allowed = LIBRARIES[top]
            assert part in allowed, f"{path.name} imports {name}; only {', '.join(sorted(allowed))} may import {top}"
        if top == "sglang":
            assert path.stem == "hook", "only the module that runs inside the server imports sglang"
        if part == "contracts":
            assert top == "lightning_dataflow" or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_the_rules_themselves_have_no_circle():
    assert list(TopologicalSorter(ALLOWED).static_order())


def test_no_files_import_each_other_in_a_circle():
    """Not for type checkers or within functions either: in a circle no file can be read without the others."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {
        file: {name if name in files else name.rpartition(".")[0] for name in imports(path)} & files.keys() - {file}
        for file, path in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' ← '.join(error.args[1])}")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["contracts", "control"], ["torch", "numpy", "redis"]),
        (
            [
                "cli.status",
                "config.run_id",
                "config.files",
                "control.local.log",
                "prompts",
                "run.resume",
                "run.signals",
                "sglang_plugin.wire",
            ],
            ["torch", "lightning", "transformers", "hydra", "redis"],
        ),
        (
            ["config.instantiate", "config.parsing", "config.rules", "cli.train"],
            ["torch", "lightning", "transformers", "redis"],
        ),
        (["sglang_plugin.hook", "stores"], ["lightning", "transformers", "hydra"]),
    ],
)
def test_what_an_import_does_not_load(modules: list[str], absent: list[str]):
    imported = ", ".join(f"lightning_dataflow.{module}" for module in modules)
    code = f"import sys, {imported}; print([name for name in {absent} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]", f"one of {imported} loads a library that it must not load"


@pytest.mark.integration
def test_the_light_folders_and_their_tests_load_neither_torch_nor_transformers():
    """So that one file of these tests runs within a second."""
    folders = ("contracts", "control", "prompts")
    paths = [path.relative_to(PACKAGE.parent) for folder in folders for path in (PACKAGE / folder).rglob("*.py")]
    modules = ", ".join(".".join(path.with_suffix("").parts) for path in paths)
    tests = [str(Path(__file__).parent / folder) for folder in folders]
    loaded = "[name for name in ('torch', 'transformers', 'lightning') if name in sys.modules]"
    code = f"import sys, pytest, {modules}; print({loaded}, pytest.main(['-qq', '--collect-only', *{tests}]) + 0, {loaded})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[] 0 []", (
        f"{', '.join(folders)} (the first list) or their tests (the second) load a heavy library:\n"
        f"{result.stdout[-500:]}{result.stderr}"
    )
