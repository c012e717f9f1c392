"""`python -m benchmarks`: before anything else is imported, what a GPU's machine lacks is told in a line."""

from __future__ import annotations

import sys

from .packages import lacking


def main() -> None:
    """Run one command.

    Raises:
        SystemExit: the command ended with an error, which this holds.
    """
    if sys.argv[1:2] == ["gpu"] and (names := lacking()):
        way_out = "install them or put their wheels into wheels/"
        print(f"gpu: not installed: {', '.join(names)}; {way_out}", file=sys.stderr)
        raise SystemExit(2)
    from .command import main as run

    run()


if __name__ == "__main__":
    main()
