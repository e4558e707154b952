"""The import rules: dependencies point one way, and heavy libraries stay at the edges."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_dataflow"

# What each folder may import of this package, beside itself.
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
    "evaluation": {"contracts", "services", "targets", "strategies"},
    "strategies": {"contracts", "checkpoints", "data", "evaluation", "targets", "callbacks"},
    "export": {"contracts", "checkpoints", "strategies"},
    "callbacks": {"contracts", "stores", "data", "evaluation", "targets"},
    "config": {"contracts"},
    "run": None,
    "supervise": None,
    "cli": None,
}
# Which folders may import a library.
LIBRARIES = {
    "hydra": {"config", "run", "cli"},
    "omegaconf": {"config", "run", "cli"},
    "lightning": {"data", "checkpoints", "strategies", "callbacks", "run", "cli"},
    "sglang": {"sglang_plugin"},
    "mooncake": {"stores"},
    "redis": {"control"},
    "transformers": {"prompts", "targets", "run", "cli"},
    "matplotlib": {"cli"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path: Path):
    part = path.relative_to(PACKAGE).parts[0]
    assert part in ALLOWED, f"a new part: say in this test what {part} may import"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "lightning_dataflow" and ALLOWED[part] is not None and rest:
            assert rest[0] in ALLOWED[part] | {part}, f"{part} must not import {name}"
        if top in LIBRARIES:
            assert part in LIBRARIES[top], f"{part} must not import {top}"
        if top == "sglang":
            assert path.stem == "hook", "only the module that runs inside the server imports sglang"
        if part == "contracts":
            assert top == "lightning_dataflow" or top in sys.stdlib_module_names


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lightning_dataflow.control.local.log", ["torch", "redis"]),
        ("lightning_dataflow", ["torch", "lightning", "transformers", "hydra"]),
        ("lightning_dataflow.contracts", ["torch", "numpy"]),
        ("lightning_dataflow.prompts", ["torch", "transformers"]),
        ("lightning_dataflow.run.resume", ["torch", "lightning"]),
        ("lightning_dataflow.cli.status", ["torch", "lightning", "hydra"]),
        ("lightning_dataflow.stores", ["lightning", "hydra", "transformers"]),
        ("lightning_dataflow.sglang_plugin.wire", ["torch"]),
        ("lightning_dataflow.sglang_plugin.hook", ["lightning", "hydra", "transformers"]),
    ],
)
def test_what_an_import_does_not_load(module: str, absent: list[str]):
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["contracts", "control", "prompts"])
def test_a_folder_imports_neither_torch_nor_transformers(folder: str):
    """The folder, and the tests of it: these run within a second."""
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in (PACKAGE / folder).rglob("*.py")
    ]
    tests = str(Path(__file__).parent / folder)
    code = f"import sys, pytest, {', '.join(modules)}; status = pytest.main(['-qq', '--collect-only', {tests!r}])"
    loaded = "[name for name in ('torch', 'transformers', 'lightning') if name in sys.modules]"
    result = subprocess.run([sys.executable, "-c", f"{code}; print(status, {loaded})"], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "0 []", f"{folder} must stay light:\n{result.stdout[-500:]}{result.stderr}"
