"""Models that come with the package, and what makes them of finished trainings.

Each is a folder here with a `tokenizer` and a `transformer` as `save_pretrained` writes them, in bfloat16.
"""

from .making import ship
from .shipped import SHIPPED, load_shipped, shipped_folder

__all__ = ["SHIPPED", "load_shipped", "ship", "shipped_folder"]
