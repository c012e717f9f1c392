"""What programs of kernels do to a sample's small things: masks, counts, sums of blocks, its small system.

They are functions of `secant_kernels.py`, where it is said what the letters mean.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def flag(mask, row):
    """1 if a mask (B,) holds for a sample, else 0; no mask holds for nobody."""
    if mask is None:
        found = 0
    else:
        found = tl.load(mask + row).to(tl.int32)
    return found


@triton.jit
def total(sums, row, splits, COLUMNS: tl.constexpr, which: tl.constexpr):
    """One of the three numbers behind the columns, of all blocks of a sample, float64."""
    shares = tl.arange(0, 16)
    found = tl.zeros([16], tl.float64)
    for first in range(0, splits, 16):
        share = first + shares
        place = (row * splits + share) * (2 * COLUMNS + 3) + 2 * COLUMNS + which
        found += tl.load(sums + place, share < splits, 0).to(tl.float64)
    return tl.sum(found, 0)


@triton.jit
def totals(sums, row, splits, start: tl.constexpr, COLUMNS: tl.constexpr):
    """A number of each column, of all blocks of a sample, float64, (COLUMNS,)."""
    shares, columns = tl.arange(0, 16), tl.arange(0, COLUMNS)
    found = tl.zeros([16, COLUMNS], tl.float64)
    for first in range(0, splits, 16):
        share = first + shares
        place = ((row * splits + share) * (2 * COLUMNS + 3) + start)[:, None] + columns[None, :]
        found += tl.load(sums + place, (share < splits)[:, None], 0).to(tl.float64)
    return tl.sum(found, 0)


@triton.jit
def add(counts, row, happened):
    """Count an event of a sample; no counts, no counting."""
    if counts is not None:
        tl.store(counts + row, tl.load(counts + row) + happened.to(tl.int64))


@triton.jit
def begin_anew(lost, row, valid, matrix, rhs, slots, known):
    """Drop all columns of a sample if it lost them: the identity in the matrix, zero on the right side."""
    columns = tl.arange(0, 32)
    for first in range(0, tl.where(lost, slots, 0), 32):
        slot = first + columns
        tl.store(valid + row * slots + slot, slot < 0, slot < slots)
        if rhs is not None:
            tl.store(rhs + row * known + slot, tl.zeros([32], rhs.dtype.element_ty), slot < known)
        for i in range(slots):
            one = tl.where(slot == i, tl.full([32], 1, tl.float64), 0)
            tl.store(matrix + (row * slots + i) * slots + slot, one, slot < slots)


@triton.jit
def solution(matrix, rhs, size, COLUMNS: tl.constexpr):
    """The solution of a small system by Gauss and Jordan with pivots; not finite where there is none.

    Rows stay where they are: `owner` says which unknown each row was the pivot of.
    """
    index = tl.arange(0, COLUMNS)
    owner, pivots = tl.full([COLUMNS], -1, tl.int32), tl.full([COLUMNS], 1, tl.float64)
    for k in range(size):
        column = tl.sum(tl.where((index == k)[None, :], matrix, 0.0), 1)
        # A number that is not finite becomes the pivot, so that it shows in the solution.
        height = tl.where(column == column, tl.abs(column), float("inf"))
        is_pivot = index == tl.argmax(tl.where(owner < 0, height, -1.0), 0)
        line = tl.sum(tl.where(is_pivot[:, None], matrix, 0.0), 0)
        pivot, value = tl.sum(tl.where(is_pivot, column, 0.0), 0), tl.sum(tl.where(is_pivot, rhs, 0.0), 0)
        factor = column / pivot
        matrix = tl.where(is_pivot[:, None], matrix, matrix - factor[:, None] * line[None, :])
        rhs = tl.where(is_pivot, rhs, rhs - factor * value)
        owner, pivots = tl.where(is_pivot, k, owner), tl.where(is_pivot, pivot, pivots)
    found = tl.where(owner < 0, 0.0, rhs / pivots)
    return tl.sum(tl.where(owner[:, None] == index[None, :], found[:, None], 0.0), 0)


@triton.jit
def newest(
    sums,
    rhs,
    row,
    splits,
    known,
    slot,
    has,
    at_work,
    RESIDUALS: tl.constexpr,
    RIDGE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """left^T r, and the row and the column that the newest column of the history adds, (COLUMNS,) each.

    The column is the change of left^T r, as in `SmallSystem.column`, but for its entry on the diagonal.
    """
    index = tl.arange(0, COLUMNS)
    kind = sums.dtype.element_ty
    r = tl.where(at_work, totals(sums, row, splits, 0, COLUMNS).to(kind), 0)
    entry = total(sums, row, splits, COLUMNS, 0).to(kind)
    if RIDGE != 0 and not RESIDUALS:
        entry -= tl.full([], RIDGE, kind) * total(sums, row, splits, COLUMNS, 1).to(kind)
    column = -r
    if rhs is not None:
        column += tl.load(rhs + row * known + index, index < known, 0)
    column = tl.where(index == slot, entry, column)
    line = column
    if not RESIDUALS:
        line = tl.where(has, totals(sums, row, splits, COLUMNS, COLUMNS).to(kind), 0)
    return r, line, column


@triton.jit
def bordered(
    old,
    line,
    column,
    made,
    size,
    is_refused,
    RESIDUALS: tl.constexpr,
    RIDGE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The matrix with the row and the column of slot `made`, as `SmallSystem.write`; COLUMNS is no slot.

    A sample whose last step is refused loses all columns: it gets the identity.
    """
    index, line, column = tl.arange(0, COLUMNS), line.to(tl.float64), column.to(tl.float64)
    if RESIDUALS:
        column = tl.where(index == made, column * tl.full([], 1 + RIDGE, tl.float64), column)
    # Away from zero, for samples at rest: the smallest normal number.
    column = tl.where(index == made, column - tl.full([], 2.2250738585072014e-308, tl.float64), column)
    within = index < size
    new = tl.where((index == made)[:, None] & within[None, :], line[None, :], old)
    new = tl.where((index == made)[None, :] & within[:, None], column[:, None], new)
    identity = tl.where(index[:, None] == index[None, :], tl.full([], 1, tl.float64), 0)
    return tl.where(is_refused != 0, identity, new)


@triton.jit
def coefficients(matrix, rhs, size, LIMIT: tl.constexpr, COLUMNS: tl.constexpr):
    """gamma (COLUMNS,) of a sample, zero where its system is singular, and whether it is not."""
    gamma = solution(matrix, rhs.to(tl.float64), size, COLUMNS)
    is_small = tl.abs(gamma) < tl.full([], LIMIT, tl.float64)  # false for NaN
    solved = tl.sum(is_small.to(tl.int32), 0) == COLUMNS
    return tl.where(solved, gamma, 0.0), solved
