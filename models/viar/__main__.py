"""`python -m viar` is the command `viar`, for launchers that want a module (`torchrun -m viar ...`)."""

from .commands.cli import main

if __name__ == "__main__":
    main()
