"""Seeds of draws that belong to one place of a run, such as a step or an epoch."""

from __future__ import annotations

STRIDE = 1_000_003
LARGEST_SEED = 2**32 - 1  # that NumPy takes


def seed_at(seed: int, index: int) -> int:
    """Seed of what the run of `seed` draws at step or epoch `index`: `seed * 1_000_003 + index`.

    A draw that depends on these two numbers alone is the same in every process, and the same again after an
    interruption.

    What coincides: from index 1,000,003 on, a run repeats the seeds that the run of `seed + 1` had at its
    start. Few runs are longer, and theirs are other models by then. Two purposes with the same `seed` and
    `index` get one seed; they draw different things from generators of their own.

    Why this number: a generator on a CPU keeps the low 32 bits of a seed only. An odd stride, and so any
    prime above 2, still gives different seeds different starts modulo 2 ** 32. Another stride would do as
    well, but every run would draw other numbers than before.

    Args:
        seed: of the run, 0 to `LARGEST_SEED`.
        index: counted from 0.

    Returns:
        A seed for `torch.Generator.manual_seed`, far below its limit of 2 ** 64 for any `index` to be met.
    """
    return seed * STRIDE + index
