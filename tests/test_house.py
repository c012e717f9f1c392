"""The house bars, read off the source: import circles, long functions, long files, what docstrings say.

Nothing is imported: modules are parsed.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"deqlib": ROOT / "deqlib", "viar": ROOT / "models/viar", "benchmarks": ROOT / "benchmarks"}
LONGEST_FUNCTION = 60  # lines of code: no blank lines, comments or docstrings
LONGEST_FILE = 400
# Names without an underscore in the `__all__` of these are what users are promised.
PROMISED = ("deqlib", "viar")

SPEAK_FOR_THEMSELVES = ("self", "cls", "config")  # a config's class says what it holds
SHAPE_SUFFIX = re.compile(r"_[A-Z]\w*$")  # x_BLC: the module's legend says what the letters are
SHAPE = r"\((?:[A-Z]\w*|batch|\.\.\.|\*)[,)][^)]*\)?|[Ss]hape|first axis"

# Rooms of a package from the top floor to the ground: a room uses rooms below it, never above.
ROOMS = {
    "viar": (
        "commands",
        "app",
        "evaluation",
        "training",
        "weights",
        "generation",
        "checkpoints",
        "data",
        "tokenizer",
        "model",
        "pretrained",
        "cards",
        "checksums",
        "files",
        "memory",
        "seeds",
        "screen",
    )
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef


@dataclass(frozen=True)
class Module:
    """One file, parsed."""

    name: str
    path: Path

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def source(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def imports(self) -> list[ast.Import | ast.ImportFrom]:
        """All of them, those in functions and under `TYPE_CHECKING` too."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom)]

    @cached_property
    def lines_of_code(self) -> set[int]:
        """Numbers of the lines that hold code, docstrings excepted."""
        nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
        lines = {
            line
            for token in tokenize.generate_tokens(io.StringIO(self.source).readline)
            if token.type not in nothing and token.string
            for line in range(token.start[0], token.end[0] + 1)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | Documented) and ast.get_docstring(node) is not None:
                lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        return lines

    def length(self, function: Function) -> int:
        """Lines of code from `def` to the end."""
        return len(self.lines_of_code & set(range(function.lineno, (function.end_lineno or 0) + 1)))

    def absolute(self, node: ast.ImportFrom) -> str:
        """The module that `from ... import` names."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *filter(None, [node.module])])


def modules_of(packages: dict[str, Path]) -> dict[str, Module]:
    found = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(name, path)
    return found


def definition_of(name: str, package: str, modules: dict[str, Module]) -> tuple[str, str]:
    """The module that defines what `from package import name` gives, and its name there.

    Re-exports by an `__init__` are followed; the name of a module gives that module and "".
    """
    if f"{package}.{name}" in modules:
        return f"{package}.{name}", ""
    for node in modules[package].imports:
        if isinstance(node, ast.ImportFrom):
            source = modules[package].absolute(node)
            for alias in node.names:
                if (alias.asname or alias.name) == name and source in modules:
                    return definition_of(alias.name, source, modules)
    return package, name


def exported(name: str, package: str, modules: dict[str, Module]) -> tuple[str, str]:
    """The module that defines what a package exports, and its name there.

    A function may have the name of its module, `deqlib.fixed_point`: what `__init__` imports comes first.
    """
    for node in modules[package].imports:
        if isinstance(node, ast.ImportFrom):
            source = modules[package].absolute(node)
            if source in modules and name in {alias.asname or alias.name for alias in node.names}:
                return definition_of(name, source, modules)
    return definition_of(name, package, modules)


def imports_of(module: Module, modules: dict[str, Module]) -> set[str]:
    """Modules of ours that a module imports, anywhere in it.

    `from package import name` counts as an import of the module that defines the name, unless the importing
    module is part of that package: then it imports an `__init__` that is not through with importing it.
    """
    found: set[str] = set()
    for node in module.imports:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        else:
            package = module.absolute(node)
            for alias in node.names if package in modules else []:
                if f"{package}.{alias.name}" not in modules and f"{module.name}.".startswith(f"{package}."):
                    found.add(package)
                else:
                    found.add(definition_of(alias.name, package, modules)[0])
    return found


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach one another, and modules that reach themselves."""
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = arrows[ahead.pop()] - seen
            seen |= new
            ahead.extend(new)
        reached[start] = seen
    rings = {
        frozenset(other for other in reached[start] if start in reached[other])
        for start in arrows
        if start in reached[start]
    }
    return [set(ring) for ring in rings]


def functions_of(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """All functions and methods with their qualified names; nested functions count in their outer one."""
    ahead: list[tuple[str, ast.AST]] = [("", tree)]
    while ahead:
        prefix, node = ahead.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield f"{prefix}{child.name}", child
            elif isinstance(child, ast.ClassDef):
                ahead.append((f"{prefix}{child.name}.", child))
            else:
                ahead.append((prefix, child))


def is_public(name: str) -> bool:
    return not any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def raised_by(function: Function) -> set[str]:
    """Names of what a function raises itself, functions within it excepted."""
    found, ahead = set(), list(ast.iter_child_nodes(function))
    while ahead:
        node = ahead.pop()
        if isinstance(node, Documented | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            found.add(ast.unparse(error).rpartition(".")[2])
        ahead.extend(ast.iter_child_nodes(node))
    return found - {"NotImplementedError"}


def promised(modules: dict[str, Module], by: tuple[str, ...]) -> set[tuple[str, str]]:
    """Module and name of every definition in an `__all__` of those packages and of public ones in them."""
    found = set()
    for module in modules.values():
        if not module.is_package or module.name.split(".")[0] not in by or not is_public(module.name):
            continue
        for node in module.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found |= {exported(name, module.name, modules) for name in ast.literal_eval(node.value)}
    return found


@dataclass(frozen=True)
class Page:
    """What is said about one public definition, and where else to look for it."""

    name: str  # with its module
    node: Documented
    text: str  # its docstring, that of its class, and those of the methods it overrides
    legend: str  # docstring of its module, where shape letters may be explained
    is_promised: bool

    def flaws(self, module: Module) -> Iterator[str]:
        """What the docstring leaves out, in a word and a name."""
        if not ast.get_docstring(self.node):
            yield "has none"
        named = words(self.text + self.legend)
        if isinstance(self.node, ast.ClassDef):
            missing = [name for name in self.fields(module) if name not in named] if self.is_promised else []
        else:
            raised = raised_by(self.node)
            if raised and not named & raised and not re.search(r"\b[Rr]aises?\b|\bError\b", self.text):
                yield "raises " + " ".join(sorted(raised))
            missing = []
            if self.is_promised:
                bare = [p for p in self.parameters() if not SHAPE_SUFFIX.search(p.arg)]
                missing = [p.arg for p in bare if p.arg not in named]
                tensors = [p.arg for p in bare if p.annotation and ast.unparse(p.annotation) == "Tensor"]
                if tensors and not re.search(SHAPE, self.text + self.legend):
                    yield "shape of " + " ".join(tensors)
        if missing:
            yield "says nothing of " + " ".join(missing)

    def parameters(self) -> list[ast.arg]:
        assert not isinstance(self.node, ast.ClassDef)
        signature = self.node.args
        given = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
        return [p for p in given if p.arg not in SPEAK_FOR_THEMSELVES and not p.arg.startswith("_")]

    def fields(self, module: Module) -> list[str]:
        """What its constructor takes, fields with a comment of their own excepted."""
        assert isinstance(self.node, ast.ClassDef)
        lines = module.source.splitlines()
        found = []
        is_data = any("dataclass" in ast.unparse(d) for d in self.node.decorator_list)
        for node in self.node.body:
            if isinstance(node, ast.AnnAssign) and is_data and isinstance(node.target, ast.Name):
                above, own = lines[node.lineno - 2].strip(), lines[(node.end_lineno or node.lineno) - 1]
                if not (above.startswith("#") or "#" in own or node.target.id.startswith("_")):
                    found.append(node.target.id)
            elif isinstance(node, Function) and node.name == "__init__":
                found += [p.arg for p in replace(self, node=node).parameters()]
        return found


def pages_of(
    modules: dict[str, Module], promised_by: tuple[str, ...] = PROMISED
) -> Iterator[tuple[Module, Page]]:
    """Every public class, function and method, overloads and tests excepted."""
    classes = {
        node.name: node
        for module in modules.values()
        for node in module.tree.body
        if isinstance(node, ast.ClassDef)
    }

    def inherited(owner: ast.ClassDef, name: str) -> str:
        """Docstrings that the bases of a class give themselves and a method of theirs."""
        text = ""
        for base in owner.bases:
            above = classes.get(ast.unparse(base).partition("[")[0].rpartition(".")[2])
            if above is not None:
                own = [node for node in above.body if isinstance(node, Function) and node.name == name]
                text += "\n".join(ast.get_docstring(node) or "" for node in [above, *own])
                text += inherited(above, name)
        return text

    promises = promised(modules, promised_by)
    for module in modules.values():
        if not is_public(module.name):
            continue
        legend = ast.get_docstring(module.tree) or ""
        for node in module.tree.body:
            if not isinstance(node, Documented) or node.name.startswith("_"):
                continue
            is_promised = (module.name, node.name) in promises
            text = ast.get_docstring(node) or ""
            own = [] if isinstance(node, Function) else [n for n in node.body if isinstance(n, Function)]
            if isinstance(node, ast.ClassDef):
                text += inherited(node, "")
            if not is_overload(node):
                yield module, Page(f"{module.name}.{node.name}", node, text, legend, is_promised)
            for method in own:
                if method.name.startswith(("_", "test_")) or is_overload(method):
                    continue
                said = "\n".join([text, ast.get_docstring(method) or "", inherited(node, method.name)])
                name = f"{module.name}.{node.name}.{method.name}"
                yield module, Page(name, method, said, legend, is_promised)


def is_overload(node: Documented) -> bool:
    return any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return modules_of(PACKAGES)


def hold(bar: str, broken: dict[str, str]) -> None:
    """Nothing breaks a bar; what does is told by name."""
    lines = [f"{name}: {how}" for name, how in sorted(broken.items())]
    assert not lines, f"{bar} past the bar:\n" + "\n".join(lines)


def test_no_modules_import_one_another_in_a_circle(modules: dict[str, Module]) -> None:
    arrows = {module.name: imports_of(module, modules) for module in modules.values()}
    hold("circles", {" ".join(sorted(circle)): f"{len(circle)} modules" for circle in circles(arrows)})


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_use_rooms_below_them(package: str, modules: dict[str, Module]) -> None:
    floors = {f"{package}.{room}": floor for floor, room in enumerate(ROOMS[package])}

    def floor_of(name: str) -> int | None:
        return floors.get(".".join(name.split(".")[:2]))

    upward, found = {}, set()
    for module in modules.values():
        here = floor_of(module.name)
        found |= set() if here is None else {here}
        for name in imports_of(module, modules) if here is not None else ():
            there = floor_of(name)
            if there is not None and there < here:
                upward[module.name] = f"uses {name}, which lies above it"
    hold("rooms", upward)
    assert found == set(floors.values())


def test_a_function_fits_on_a_screen(modules: dict[str, Module]) -> None:
    hold(
        "functions",
        {
            f"{module.name}.{name}": f"{length} lines"
            for module in modules.values()
            for name, node in functions_of(module.tree)
            if (length := module.length(node)) > LONGEST_FUNCTION
        },
    )


def test_a_file_has_one_subject(modules: dict[str, Module]) -> None:
    lengths = {name: len(module.lines_of_code) for name, module in modules.items()}
    hold("files", {name: f"{length} lines" for name, length in lengths.items() if length > LONGEST_FILE})


def test_docstrings_say_what_goes_in_what_shape_it_has_and_what_is_raised(modules: dict[str, Module]) -> None:
    flaws = {page.name: "; ".join(page.flaws(module)) for module, page in pages_of(modules)}
    hold("docstrings", {name: flaw for name, flaw in flaws.items() if flaw})


def written(folder: Path, files: dict[str, str]) -> dict[str, Module]:
    """A package `p` of files with that text, parsed."""
    for name, text in {"__init__": "", **files}.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return modules_of({"p": folder})


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a": "from .b import g", "b": "def g():\n    from .a import f"}, {"p.a", "p.b"}),
        ({"a": "if TYPE_CHECKING:\n    from p import b", "b": "import p.a"}, {"p.a", "p.b"}),
        ({"__init__": "from .a import f", "a": "from . import VERSION"}, {"p", "p.a"}),
        (
            {"b": "from .r import f", "r/__init__": "from .x import f", "r/x": "from ..b import g"},
            {"p.b", "p.r.x"},
        ),
        ({"__init__": "from .a import f", "a": "from . import b", "b": "import torch"}, set()),
        (
            {"b": "from .r import f", "r/__init__": "from .y import f", "r/y": "from .x import g", "r/x": ""},
            set(),
        ),
    ],
)
def test_a_circle_is_found_wherever_the_import_stands(
    files: dict[str, str], circle: set[str], tmp_path: Path
) -> None:
    modules = written(tmp_path, files)
    assert circles({m.name: imports_of(m, modules) for m in modules.values()}) == ([circle] if circle else [])


def test_docstrings_comments_and_blank_lines_are_no_code(tmp_path: Path) -> None:
    said = '"""Says.\n\n    More.\n    """'
    text = f'"""A module."""\n\n# why\ndef f():\n    {said}\n    # why\n\n    return """a\nb"""\n'
    module = written(tmp_path, {"a": text})["p.a"]
    ((name, function),) = functions_of(module.tree)
    assert (name, module.length(function), len(module.lines_of_code)) == ("f", 3, 3)


@pytest.mark.parametrize(
    ("code", "flaw"),
    [
        ('def f(z: Tensor):\n    """z: (B, D)."""', ""),
        ('def f(z: Tensor):\n    """z."""', "shape of z"),
        ('def f(z: int):\n    """It."""', "says nothing of z"),
        ('def f():\n    """It."""\n    raise ValueError(1)', "raises ValueError"),
        ('def f():\n    """It; a `ValueError` if not."""\n    raise ValueError(1)', ""),
        ('@dataclass\nclass f:\n    """It."""\n    a: int\n    b: int  # the other', "says nothing of a"),
        ('class f:\n    """It."""\n    def __init__(self, a):\n        pass', "says nothing of a"),
    ],
)
def test_what_a_docstring_leaves_out_is_named(code: str, flaw: str, tmp_path: Path) -> None:
    files = {"__init__": "from .a import f\n__all__ = ['f']", "a": code}
    modules = written(tmp_path, files)
    ((module, page),) = pages_of(modules, promised_by=("p",))
    assert "; ".join(page.flaws(module)) == flaw
