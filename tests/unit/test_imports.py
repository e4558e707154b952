"""The import rules: dependencies point one way, and heavy libraries stay at the edges."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_dataflow"

# What each part may import of this package, beside itself.
ALLOWED = {
    "contracts": set(),
    "stores": {"contracts", "leash"},
    "channels": {"contracts", "leash"},
    "control": {"contracts", "channels", "stores"},
    "prompts": {"contracts"},
    "sglang_plugin": {"contracts", "stores"},
    "targets": {"contracts", "leash", "sglang_plugin"},
    "models": {"contracts"},
    "objectives": {"contracts", "models"},
    "data": {"contracts", "stores", "channels", "control"},
    "producers": {"contracts", "stores", "channels", "control", "prompts", "targets", "data"},
    "evaluation": {"contracts", "leash", "models", "targets"},
    "callbacks": {"contracts", "stores", "data", "evaluation", "targets"},
    "checkpoints": {"contracts", "data"},
    "formats": {"contracts", "models"},
    "strategies": {
        "contracts",
        "checkpoints",
        "models",
        "formats",
        "objectives",
        "data",
        "evaluation",
        "callbacks",
        "targets",
    },
    "exports": {"contracts", "checkpoints", "models", "formats", "strategies"},
    "app": None,
}
# Which parts may import a library.
LIBRARIES = {
    "hydra": {"app"},
    "omegaconf": {"app"},
    "lightning": {"data", "checkpoints", "strategies", "callbacks", "app"},
    "sglang": {"sglang_plugin", "targets"},
    "mooncake": {"stores"},
    "redis": {"channels"},
    "transformers": {"prompts", "targets", "app"},
    "matplotlib": {"app"},
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
            assert path.stem in ("hook", "sglang_engine"), "one place each for the server's side and the client's"
        if part == "contracts":
            assert top == "lightning_dataflow" or top in sys.stdlib_module_names


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lightning_dataflow.channels", ["torch", "redis"]),
        ("lightning_dataflow", ["torch", "lightning", "transformers", "hydra"]),
        ("lightning_dataflow.contracts", ["torch", "numpy"]),
        ("lightning_dataflow.app.checkpoints", ["torch", "lightning"]),
        ("lightning_dataflow.app.status", ["torch", "lightning", "hydra"]),
        ("lightning_dataflow.stores", ["lightning", "hydra", "transformers"]),
        ("lightning_dataflow.sglang_plugin.wire", ["torch"]),
        ("lightning_dataflow.sglang_plugin.hook", ["lightning", "hydra", "transformers"]),
    ],
)
def test_what_an_import_does_not_load(module: str, absent: list[str]):
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_exist():
    import lightning_dataflow

    for name in lightning_dataflow.__all__:
        assert getattr(lightning_dataflow, name) is not None
