"""Imports point downwards, and nothing that answers `--help` waits for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "LLMPruner"

# From what knows least to what knows most: a module imports from its own unit and from those before it.
ORDER = (
    "errors",
    "plan",
    "checkpoint",
    "config",
    "run",
    "data",
    "removed",
    "source",
    "model",
    "forward",
    "self_text",
    "methods",
    "importance",
    "evaluator",
    "trainer",
    "export",
    "job",
    "pipeline",
    "cli",
)
LIGHT = ("__init__", "errors", "plan", "checkpoint", "config", "run", "data", "source", "model", "cli", "job", "pipeline")
LIGHT += (
    "importance/allocation",
    "importance/criteria",
    "importance/database",
    "importance/layer_analyzer",
    "importance/search",
    "importance/search_state",
)
LIGHT += ("methods/gqa_aware", "methods/mlp", "methods/moments", "methods/obs", "methods/repair", "methods/sublayers")
HEAVY = {"torch", "transformers", "datasets", "peft", "safetensors", "matplotlib"}
MODULES = sorted(str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py"))
SCRIPTS = {"export/__main__"}  # run as `python -m LLMPruner.export`: like the scripts beside the package it may use all of it
SHIPPED = {"configuration_pruned_llama", "modeling_pruned_llama"}


def imports(source: str, *, lazy: bool) -> set[str]:
    """Imported module names, but for those under `if TYPE_CHECKING`; `lazy`: those inside functions as well."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or node.module in SHIPPED, "imports are absolute, but in the files that exports bring along"
            found.add(node.module)
            if node.module == "LLMPruner":
                found.update(f"LLMPruner.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def unit_of(name: str) -> str:
    """`LLMPruner.methods.repair` belongs to the unit `methods`."""
    return name.split(".")[1]


def test_every_module_has_its_place_in_the_order():
    assert {module.split("/")[0] for module in MODULES} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("module", sorted(set(MODULES) - SCRIPTS - {"__init__"}))
def test_imports_point_downwards(module):
    own = module.split("/")[0]
    used = {
        unit_of(name) for name in imports((PACKAGE / f"{module}.py").read_text(), lazy=True) if name.startswith("LLMPruner.")
    }
    upwards = {unit for unit in used if unit != own and ORDER.index(unit) > ORDER.index(own)}
    assert not upwards, f"{module} imports {upwards}, which know more than it does"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_a_script(module):
    scripts = {path.stem for path in PACKAGE.parent.glob("*.py")}
    assert len(scripts) >= 4 and not scripts & imports((PACKAGE / f"{module}.py").read_text(), lazy=True)


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_nothing_heavy_when_it_is_imported(module):
    assert not HEAVY & {name.split(".")[0] for name in imports((PACKAGE / f"{module}.py").read_text(), lazy=False)}


@pytest.mark.parametrize("names", ["LLMPruner, LLMPruner.cli", "LLMPruner.pipeline"])
def test_importing_the_command_line_does_not_load_torch(names):
    code = f"import sys, {names}\nprint(*sorted({HEAVY | {'numpy'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


def test_every_public_name_loads():
    import LLMPruner

    assert all(getattr(LLMPruner, name) for name in LLMPruner.__all__)
    with pytest.raises(AttributeError, match="no attribute 'surprise'"):
        _ = LLMPruner.surprise


def test_the_import_scanner_sees_what_it_must():
    """The checks above rest on it."""
    source = """
import torch.nn
from LLMPruner import plan
if TYPE_CHECKING:
    import a
else:
    import b
def f():
    from LLMPruner.methods.repair import x
class C:
    import c
try:
    import d
finally:
    pass
"""
    top = {"torch.nn", "LLMPruner", "LLMPruner.plan", "b", "c", "d"}
    assert imports(source, lazy=False) == top
    assert imports(source, lazy=True) == top | {"LLMPruner.methods.repair"}
