"""The step of a secant method in three kernels: the products, the judgement, the step itself.

They do what `SecantSolver.step` does by operations of PyTorch, to the same state and with the same results up
to rounding, so that steps of both kinds may follow one another:

1. `products_kernel` reads the history once and gives all inner products of the step;
2. `judge_kernel` says whose last step is taken back, and who begins a new history. In a solve to a tolerance
   it comes first: the solver is told the residuals by the driver;
3. `advance_kernel` solves the small systems, makes the newest column, and writes the next iterates and what
   is pending then.

With m columns of `left` and of `df`, 2 m states, the first reads m + 1 states and the third m + 3 (with
residuals in `left`, from the driver, and without damping) and writes 5: two columns, two pending values and
the iterate. No step can do with less than 2 m reads, since the coefficients depend on all of `left`.

A step is left to PyTorch where the history has nothing pending, as at the first one, or room for more than
`MOST_COLUMNS` columns: the small system is to fit into the registers of one program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers.base import Seen
from ..solvers.history import History
from ..solvers.safeguards import Safeguards
from ..solvers.secant_state import Judged, SecantState
from . import give_up, is_available, on_device_of

MOST_COLUMNS = 32
MOST_BLOCKS = 65535  # of a sample: a limit of the devices
BLOCK = 2048  # numbers of a sample that one program of the first kernel takes
NUM_PROGRAMS = 512  # that the third kernel has at least, if there is work for them: four on each processor


def observed(seen: Seen, state: SecantState) -> bool:
    """`SecantSolver.observe` by a kernel; returns whether it was done."""
    history, safeguards = state.history, state.safeguards
    tensors = (seen.residual, seen.before, safeguards.best, history.df, history.system.matrix)
    if not (is_available(*tensors) and fits(history)):
        return False
    counts = seen.counts("growth", "singular", "stagnation")
    if counts is None:
        return False
    before = history.finished, history.moving
    history.finished, history.moving = seen.finished, None
    if seen.finished is not None and history.ended is None:
        history.ended = torch.zeros_like(counts[0])
    try:
        refused = judge(seen.residual, None, seen.before, counts, history, safeguards, seen.all_improved)
    except Exception as error:
        give_up(error)
        history.finished, history.moving = before
        return False
    state.judged = Judged(seen.difference, refused)
    return True


def stepped(z: Tensor, fz: Tensor, damping: float, state: SecantState) -> Tensor | None:
    """The next iterates (B, D) of `SecantSolver.step` by kernels; `None`: it was not done.

    Args:
        z: iterates, (B, D).
        fz: their images, (B, D).
        damping: of the method.
        state: changed if the step was done, or if it was not but samples were judged.
    """
    history, safeguards, judged = state.history, state.safeguards, state.judged
    difference = None if judged is None else judged.difference
    kept = (history.df, history.left, history.system.matrix)  # written to
    tensors = (z, fz, *kept, *([] if difference is None else [difference]))
    if not (is_available(*tensors) and fits(history)) or any(tensor.requires_grad for tensor in kept):
        return None
    history.provide((history.count + 1) % history.memory)
    if history.df.shape[1] > MOST_COLUMNS:
        return None
    try:
        sums = products(z, fz, difference, None if judged is None else judged.refused, history)
        if judged is None:
            refused = judge(None, sums, safeguards.best, None, history, safeguards)
            state.judged = judged = Judged(None, refused)
        z_next = advance(z, fz, difference, judged.refused, sums, damping, history, safeguards)
    except Exception as error:
        give_up(error)
        return None
    state.judged = None
    return z_next


def fits(history: History) -> bool:
    """Whether the kernels can take the step that comes next."""
    batch, slots, width = history.df.shape
    blocks = -(-width // (BLOCK // 2))
    return history.pending and slots <= MOST_COLUMNS and batch > 0 and 0 < blocks <= MOST_BLOCKS


def judge(
    residual: Tensor | None,  # (B,), its norm; None: it is in `sums`
    sums: Tensor | None,  # (B, splits, ...), what `products` gave
    before: Tensor,  # (B,), the smallest before
    counts: tuple[Tensor, ...] | None,  # (B,) each, int64, of growth, singular and stagnation; added to
    history: History,
    safeguards: Safeguards,
    all_improved: bool = False,
) -> Tensor:
    """`Safeguards.judge`, and counts of what it finds: the samples that must undo their step, bool (B,)."""
    from . import secant_kernels as kernels  # loads Triton

    batch, slots, _ = history.df.shape
    valid, matrix, rhs = history.own_columns(), history.system.matrix, history.system.rhs
    best, window_best = (torch.empty_like(safeguards.best) for _ in range(2))
    refused = torch.empty(batch, dtype=torch.bool, device=best.device)
    window_ends = safeguards.restart is not None and safeguards.window + 1 >= safeguards.restart
    with on_device_of(best):
        kernels.judge_kernel[(batch,)](
            residual,
            sums,
            before,
            safeguards.best,
            best,
            safeguards.best_before_window,
            window_best,
            safeguards.plain,
            safeguards.singular,
            safeguards.watched,
            history.finished,
            history.ended,
            valid,
            matrix,
            rhs,
            refused,
            *(counts or (None, None, None)),
            slots=slots,
            known=0 if rhs is None else rhs.shape[1],
            count=history.count,
            splits=0 if sums is None else sums.shape[1],
            all_improved=int(all_improved),
            window_ends=int(window_ends),
            GROWTH=float(safeguards.growth),
            COLUMNS=num_columns(history),
            num_warps=1,
        )
    safeguards.best, safeguards.best_before_window = best, window_best
    safeguards.window = 0 if window_ends else safeguards.window + 1
    if safeguards.singular is not None or window_ends:
        history.dropped_at = history.count
    safeguards.singular = None
    return refused


def products(
    z: Tensor,  # (B, D)
    fz: Tensor,  # (B, D)
    difference: Tensor | None,  # (B, D), fz - z; None: it is to be computed
    refused: Tensor | None,  # (B,), bool, samples whose products are not wanted; None: all are
    history: History,
) -> Tensor:
    """All inner products of the step, as shares of blocks of D, see `products_kernel`."""
    from . import secant_kernels as kernels  # loads Triton

    batch, slots, width = history.df.shape
    columns, equations = num_columns(history), history.system.equations
    block = block_of(width, BLOCK, z.dtype)
    sums = z.new_empty(batch, -(-width // block), 2 * columns + 3)
    with on_device_of(z):
        kernels.products_kernel[(batch, sums.shape[1])](
            z,
            fz,
            difference,
            history.df,
            history.left,
            history.valid,
            refused,
            history.finished,
            sums,
            width=width,
            slots=slots,
            slot=history.slot,
            size=min(history.count + 1, history.memory),
            RESIDUALS=equations.uses_residuals,
            SUBTRACTS=equations.subtracts,
            COLUMNS=columns,
            BLOCK=block,
            GROUP=4,
            num_warps=8 if block == BLOCK else 4,
        )
    return sums


def advance(
    z: Tensor,  # (B, D)
    fz: Tensor,  # (B, D)
    difference: Tensor | None,  # (B, D), fz - z; None: it is to be computed
    refused: Tensor | None,  # (B,), bool, samples that undo their last step; None: nobody
    sums: Tensor,  # (B, splits, ...), what `products` gave
    damping: float,
    history: History,
    safeguards: Safeguards,
) -> Tensor:
    """The next iterates (B, D); the history has the newest column then, and the values here are pending."""
    from . import secant_kernels as kernels  # loads Triton

    count = history.count + 1
    next_slot, size = count % history.memory, min(count, history.memory)
    valid, system = history.own_columns(), history.system
    batch, slots, width = history.df.shape
    columns, equations = num_columns(history), system.equations
    # Of many columns of both sets, which damping reads, fewer numbers fit into registers.
    block = block_of(width, BLOCK // 8 if damping != 1 and columns > 16 else BLOCK // 4, z.dtype)
    programs = min(-(-width // block), max(NUM_PROGRAMS // batch, 1))
    z_next, matrix = torch.empty_like(z), torch.empty_like(system.matrix)
    rhs, valid_next = z.new_empty(batch, size), torch.empty_like(valid)
    plain, singular = (valid.new_empty(batch) for _ in range(2))
    with on_device_of(z):
        kernels.advance_kernel[(batch, programs)](
            z,
            fz,
            difference,
            history.df,
            history.left,
            z_next,
            sums,
            system.matrix,
            matrix,
            system.rhs,
            rhs,
            valid,
            valid_next,
            refused,
            history.finished,
            safeguards.watched,
            plain,
            singular,
            width=width,
            slots=slots,
            slot=history.slot,
            next_slot=next_slot,
            size=size,
            known=0 if system.rhs is None else system.rhs.shape[1],
            splits=sums.shape[1],
            RESIDUALS=equations.uses_residuals,
            RIDGE=equations.ridge,
            LIMIT=equations.largest_coefficient(z.dtype),
            REST=1 - damping,
            COLUMNS=columns,
            BLOCK=block,
            num_warps=8 if columns > 16 else 4,
        )
    history.count, history.valid, history.dropped_at = count, valid_next, count
    system.matrix, system.rhs = matrix, rhs
    safeguards.plain, safeguards.singular = plain, singular
    return z_next


def num_columns(history: History) -> int:
    """Columns that the kernels are compiled for: a power of two, the same for a whole solve."""
    return max(1 << (min(history.memory, MOST_COLUMNS) - 1).bit_length(), 4)


def block_of(width: int, most: int, dtype: torch.dtype) -> int:
    """Numbers of a sample that a program takes at once: a power of two; of float64 half as many."""
    most = most // 2 if dtype == torch.float64 else most
    return min(most, max(1 << (width - 1).bit_length(), 16))
