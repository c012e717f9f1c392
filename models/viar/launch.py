"""What a launcher of several processes, such as torchrun, tells each of them by environment variables."""

from __future__ import annotations

import os

SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")  # 1 where they are not set
INDICES = ("RANK", "LOCAL_RANK")  # from 0


def launched(name: str) -> int:
    """What a variable says, or what it is for one process alone.

    Args:
        name: of `SIZES` or `INDICES`.

    Raises:
        ValueError: it is no whole number, or a size below 1.
    """
    text = os.environ.get(name, "1" if name in SIZES else "0")
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or (name in SIZES and value < 1):
        expected = "a whole number from 1 on" if name in SIZES else "a whole number"
        raise ValueError(
            f"{name}: expected {expected}, got {text!r}; unset this variable, or let a launcher such as "
            "torchrun set it"
        )
    return value


def check_launch() -> None:
    """Raise `ValueError` where one of the variables says no number, before packages stumble over it."""
    for name in (*SIZES, *INDICES):
        launched(name)
