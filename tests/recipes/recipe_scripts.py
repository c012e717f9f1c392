"""The scripts of docs/recipes as modules: they lie in no package, as those of a user do not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "docs/recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


def load(name: str) -> ModuleType:
    """The script docs/recipes/NAME.py, which does nothing before its `main` is called."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where classes and pickles look for it
    spec.loader.exec_module(module)
    return module
