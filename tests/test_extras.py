"""What the extras declare is what the code imports, errors name the extra, and importing loads little."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OURS = {"deqlib", "viar", "benchmarks"}
# Imported by one name, installed by another.
INSTALLED_AS = {"PIL": "pillow", "sklearn": "scikit-learn", "torch_fidelity": "torch-fidelity"}
# Nothing declares these: PyTorch brings triton where it can be used, gradio is made of starlette, lpips wants
# a PyTorch of its choice.
UNDECLARED = {"triton", "starlette", "lpips"}
# Benchmarks of the page, without which they say that it is not measured.
OF_THE_PAGE = {"gradio", "playwright"}
# What is left out, without an error, where a package is missing.
DONE_WITHOUT = {("models/viar/training/curve.py", "matplotlib")}


def packages_of(extra: str) -> set[str]:
    """Names of all packages that an extra brings, those of extras in it too."""
    found = set()
    for requirement in DECLARED[extra]:
        inner = re.match(r"deqlib\[(\w+)\]", requirement)
        found |= packages_of(inner[1]) if inner else {re.match(r"[\w-]+", requirement)[0]}
    return found


def own_packages_of(extra: str) -> set[str]:
    """Those that it declares itself."""
    return {re.match(r"[\w-]+", text)[0] for text in DECLARED[extra] if not text.startswith("deqlib[")}


def modules_named_by(node: ast.AST) -> list[str]:
    """Modules that a statement imports, or a call of `import_module` with a name in quotes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [] if node.level else [node.module or ""]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [part.value for part in node.args[:1] if isinstance(part, ast.Constant)]
    return []


def packages_imported_by(nodes: Iterator[ast.AST]) -> set[str]:
    """Names, as they are installed, of what is neither ours nor Python's."""
    tops = {module.split(".")[0] for node in nodes for module in modules_named_by(node)}
    return {INSTALLED_AS.get(top, top) for top in tops - OURS - set(sys.stdlib_module_names) - {""}}


def imported_in(*places: str) -> set[str]:
    """By any file there, anywhere in it; without what is installed by hand."""
    files = [file for place in places for file in (ROOT / place).rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return packages_imported_by(nodes) - UNDECLARED


def test_deqlib_needs_torch_alone_and_its_extras_what_they_are_for() -> None:
    rooms = {"deqlib/diagnostics": "plot", "deqlib/testing": "testing"}
    for room, extra in rooms.items():
        assert imported_in(room) == {"torch"} | packages_of(extra), room
    others = [path.relative_to(ROOT) for path in (ROOT / "deqlib").iterdir() if path.is_dir()]
    assert imported_in(*(str(path) for path in others if str(path) not in rooms)) == {"torch"}
    top = (node for path in (ROOT / "deqlib").glob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    assert packages_imported_by(top) == {"torch"}


def test_viar_imports_what_its_extras_bring_and_all_of_it() -> None:
    assert imported_in("models/viar") == {"torch"}.union(*map(packages_of, ("viar", "app", "hub", "fid")))


def test_benchmarks_and_recipes_import_what_their_extras_bring() -> None:
    # Tests for a GPU, which benchmarks run, need the extra `testing`.
    brought = {"torch"} | packages_of("bench")
    assert imported_in("benchmarks") - OF_THE_PAGE <= brought
    assert own_packages_of("bench") <= imported_in("benchmarks")
    assert imported_in("docs/recipes") <= {"torch"} | packages_of("plot")


def lazy_imports(tree: ast.Module) -> set[str]:
    """Packages that are imported within functions; what only type checkers see is at the top."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return packages_imported_by(node for function in functions for node in ast.walk(function)) - {"torch"}


def extras_told(tree: ast.Module) -> set[str]:
    """Extras that errors raised for a missing package say to install."""
    handlers = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type and "Error" in ast.unparse(node.type)
    ]
    return {extra for text in handlers for extra in re.findall(r"pip install 'deqlib\[(\w+)\]'", text)}


def test_an_error_for_a_missing_package_names_an_extra_that_brings_it() -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for file in sorted([*(ROOT / "deqlib").rglob("*.py"), *(ROOT / "models/viar").rglob("*.py")]):
        tree, name = ast.parse(file.read_text()), str(file.relative_to(ROOT))
        extras = extras_told(tree)
        assert extras <= set(DECLARED), name
        brought = set().union(*map(packages_of, extras))
        for package in lazy_imports(tree) - UNDECLARED:
            if (name, package) not in DONE_WITHOUT:
                assert package in brought, f"{name}: no error says which extra brings {package}"
                seen[package].add(name)
    assert set(seen) >= {"matplotlib", "mlxtend", "scikit-learn", "datasets", "torch-fidelity", "gradio"}


def test_the_page_tells_every_extra() -> None:
    page = (ROOT / "docs/install.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(DECLARED)


LOADED = """
import json, sys
import torch
before, found = set(sys.modules), {}
for name in ("deqlib", "viar", "viar.commands.cli"):
    __import__(name)
    found[name] = sorted(set(sys.modules) - before)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Modules beside those of torch, when deqlib is imported, then viar, then its command."""
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    return {name: set(modules) for name, modules in json.loads(done.stdout).items()}


def tops_of(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_importing_deqlib_loads_python_and_torch_alone(loaded: dict[str, set[str]]) -> None:
    library = loaded["deqlib"]
    assert tops_of(library) - set(sys.stdlib_module_names) <= {"deqlib", "torch"}
    assert not {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp"} & library
    # What looks into a layer, what tests one and what compiles for a device are imported when asked for.
    assert not {"deqlib.diagnostics", "deqlib.testing", "deqlib.fused.record_kernels"} & library


def test_importing_viar_and_its_command_loads_nothing_that_takes_long(loaded: dict[str, set[str]]) -> None:
    slow = {"matplotlib", "scipy", "sklearn", "pandas", "sympy", "gradio", "datasets", "hypothesis", "pytest"}
    assert not slow & tops_of(loaded["viar.commands.cli"])
    assert not {"torch._dynamo", "torch.distributed.tensor"} & loaded["viar.commands.cli"]
    assert not {"viar.training", "viar.evaluation", "viar.commands", "tyro"} & loaded["viar"]


MISSING = """
import sys
sys.modules["huggingface_hub"] = None
import deqlib
try:
    import viar
except ModuleNotFoundError as error:
    print(error.name, error)
"""


def test_viar_without_its_extra_says_which_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("huggingface_hub ")
    assert done.stdout.strip().endswith("pip install 'deqlib[viar]'")


def test_what_is_imported_on_demand_is_there_like_the_rest() -> None:
    import deqlib

    assert {"Diagnosis", "ablate", "diagnose", "diagnostics"} <= set(dir(deqlib))
    assert deqlib.diagnose is deqlib.diagnostics.diagnose
    with pytest.raises(AttributeError, match="'deqlib' has no attribute 'diagnoze'"):
        _ = deqlib.diagnoze
