"""`python -m benchmarks SUITE`: measurements of deqlib and viar."""

from __future__ import annotations

import argparse

from .suites import gradients, memory, solvers, viar

SUITES = {"gradients": gradients, "memory": memory, "solvers": solvers, "viar": viar}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    subparsers = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name, suite in SUITES.items():
        assert suite.__doc__ is not None
        subparser = subparsers.add_parser(
            name,
            help=suite.__doc__.splitlines()[0],
            description=suite.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        suite.add_arguments(subparser)
    arguments = parser.parse_args()
    SUITES[arguments.suite].run(arguments)


if __name__ == "__main__":
    main()
