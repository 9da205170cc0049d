"""Imports point downwards, and nothing that answers `--help` waits for torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "LLMPruner"


def order() -> list[str]:
    """The units from what knows least to what knows most, as CLAUDE.md prints them: imports go from below to above only."""
    text = (PACKAGE.parent / "CLAUDE.md").read_text(encoding="utf-8")
    block = text.split("## Architecture")[1].split("##")[0]
    return re.findall(r"^    (\w+)(?:\.py|/) ", block, flags=re.M)


ORDER = order()
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
    assert len(ORDER) == len(set(ORDER))
    assert {module.split("/")[0] for module in MODULES} - {"__init__"} == set(ORDER)


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


ENTRIES = [*sorted(path.stem for path in PACKAGE.parent.glob("*.py")), "LLMPruner.stages.prune", "LLMPruner.stages.recover"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_answers_help_and_wrong_arguments_does_not_wait_for_torch(entry):
    code = f"import sys, {entry}\nprint(*sorted({HEAVY | {'numpy'}} & set(sys.modules)))"
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


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_are_of_a_size_to_hold_in_one_look(module):
    text = (PACKAGE / f"{module}.py").read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_a_layer_is_described_in_one_place():
    """Names of projections stand in the families' tables, and where formats have names of their own for them."""
    found = {module for module in MODULES if '_proj"' in (PACKAGE / f"{module}.py").read_text()}
    assert found == {"families/llama", "families/gguf", "export/modeling_pruned_llama"}
