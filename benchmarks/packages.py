"""What `python -m benchmarks gpu` cannot run without; this file imports none of it."""

from __future__ import annotations

import importlib.util

# By the names that they are imported by, those that they are installed by.
REQUIRED = {
    "torch": "torch",
    "numpy": "numpy",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}


def lacking() -> list[str]:
    """Names of the packages that are not installed."""
    return [name for module, name in REQUIRED.items() if importlib.util.find_spec(module) is None]
