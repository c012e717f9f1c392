"""The kernels of a secant method's step, see `secant.py`, for a batch of B samples of D numbers.

A history is (B, slots, D), twice; the small matrix is (B, slots, slots). In what follows *row* b of any of
these belongs to sample b, and no program reads a row of another sample: what becomes of a sample depends on
nothing but that sample. Sums over D are made of blocks whose size and order depend on D alone, so they are
the same numbers in every run and in every batch.

Parameters in capitals are known when a kernel is compiled; one that is `None` is compiled away. Numbers that
change from step to step are not specialised on, so that nothing is compiled again while a history grows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .small_systems import add, begin_anew, bordered, coefficients, flag, newest, total


@triton.jit(
    do_not_specialize=["slots", "known", "count", "splits", "all_improved", "window_ends"],
    do_not_specialize_on_alignment=["residual", "before", "finished"],  # these may be parts of a tensor
)
def judge_kernel(
    residual,  # (B,), its norm now, or None: it is in `sums`
    sums,  # (B, splits, 2 * COLUMNS + 3), see `products_kernel`, or None
    before,  # (B,), the smallest before
    best,  # (B,)
    best_out,
    window_best,  # (B,)
    window_best_out,
    plain,  # (B,), bool, or None
    singular,  # (B,), bool, or None
    watched,  # (B,), bool, or None
    finished,  # (B,), bool, or None
    ended,  # (B,), int64, written to, or None
    valid,  # (B, slots), bool, written to
    matrix,  # (B, slots, slots), float64, written to
    rhs,  # (B, known), written to, or None
    refused_out,  # (B,), bool
    growth_count,  # (B,), int64, added to, as the two that follow, or None
    singular_count,
    stagnation_count,
    slots,
    known,
    count,  # columns made so far
    splits,
    all_improved,
    window_ends,
    GROWTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What `Safeguards.judge` does for one sample, and `History.freeze`."""
    row = tl.program_id(0).to(tl.int64)
    is_finished = flag(finished, row)
    spared = is_finished | flag(watched, row)
    smallest = tl.load(best + row)
    if residual is None:
        now = tl.sqrt(total(sums, row, splits, COLUMNS, 2)).to(smallest.dtype)
    else:
        now = tl.load(residual + row)
    limit = tl.full([], GROWTH, smallest.dtype) * tl.load(before + row)
    refused = (count > 0) & (all_improved == 0) & ((spared | flag(plain, row)) == 0)
    refused = refused & ((now <= limit) == 0)  # true for NaN
    # The smaller one, and of a number and NaN the number.
    is_lower = (now < smallest) | (smallest != smallest) | (all_improved != 0)
    smallest = tl.where(is_lower, now, smallest)
    window = tl.load(window_best + row)
    stagnated = (window_ends != 0) & (count > 0) & (spared == 0)
    stagnated = stagnated & (smallest >= window) & (smallest < float("inf"))
    was_singular = flag(singular, row) != 0
    tl.store(best_out + row, smallest)
    tl.store(window_best_out + row, tl.where(window_ends != 0, smallest, window))
    tl.store(refused_out + row, refused)
    add(growth_count, row, refused)
    add(singular_count, row, was_singular & (is_finished == 0))
    add(stagnation_count, row, stagnated)
    if ended is not None:
        since = tl.load(ended + row)
        tl.store(ended + row, tl.where((is_finished != 0) & (since == 0), count + 1, since))
    begin_anew(was_singular | stagnated, row, valid, matrix, rhs, slots, known)


@triton.jit(do_not_specialize=["slots", "slot", "size"], do_not_specialize_on_alignment=["finished"])
def products_kernel(
    z,  # (B, D)
    fz,  # (B, D)
    difference,  # (B, D), fz - z, or None
    df,  # (B, slots, D)
    left,  # (B, slots, D)
    valid,  # (B, slots), bool, or None
    refused,  # (B,), bool, or None
    finished,  # (B,), bool, or None
    sums,  # (B, splits, 2 * COLUMNS + 3), written: left^T r, the new row, and three numbers, see below
    width,  # D
    slots,
    slot,  # that of the column that is made now
    size,  # columns with it
    RESIDUALS: tl.constexpr,  # whether `left` is made of residuals
    SUBTRACTS: tl.constexpr,  # whether the row is (dF - dZ)^T dz, else it is dF^T dz
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # columns that are read at once
):
    """One block of D of one sample: its share of all inner products, the history read once.

    Nothing but `sums` is written: whether the step before is taken back may depend on the sum of r^2.
    """
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offsets = share * BLOCK + tl.arange(0, BLOCK)
    at_work = (flag(finished, row) | flag(refused, row)) == 0
    inside = offsets < tl.where(at_work, width, 0)
    here = row * width + offsets
    out = sums + (row * tl.num_programs(1) + share) * (2 * COLUMNS + 3)
    if difference is None:
        r = tl.load(fz + here, inside, 0) - tl.load(z + here, inside, 0)
    else:
        r = tl.load(difference + here, inside, 0)
    pending = (row * slots + slot) * width + offsets
    if RESIDUALS:
        new_left = tl.load(left + pending, inside, 0) - r
        new_df = new_left  # not used
        change = new_left
    else:
        new_left = tl.load(left + pending, inside, 0) - tl.load(z + here, inside, 0)
        new_df = tl.load(df + pending, inside, 0) - tl.load(fz + here, inside, 0)
        change = new_df - new_left
    tl.store(out + 2 * COLUMNS, tl.sum(new_left * change, 0))
    tl.store(out + 2 * COLUMNS + 1, tl.sum(new_left * new_left, 0))
    tl.store(out + 2 * COLUMNS + 2, tl.sum(r * r, 0))
    for first in range(0, tl.where(at_work, size, 0), GROUP):
        column = first + tl.arange(0, GROUP)
        has = (column < size) & (column != slot)
        if valid is not None:
            has = has & (tl.load(valid + row * slots + column, has, 0) != 0)
        place = ((row * slots + column) * width)[:, None] + offsets[None, :]
        mask, is_new = has[:, None] & inside[None, :], (column == slot)[:, None]
        lefts = tl.where(is_new, new_left[None, :], tl.load(left + place, mask, 0))
        tl.store(out + column, tl.sum(lefts * r[None, :], 1), column < size)
        if not RESIDUALS:
            rows = tl.where(is_new, new_df[None, :], tl.load(df + place, mask, 0))
            if SUBTRACTS:
                rows = rows - lefts
            tl.store(out + COLUMNS + column, tl.sum(rows * new_left[None, :], 1), column < size)


@triton.jit
def move(states, where, fate, gamma, RESIDUALS: tl.constexpr, REST: tl.constexpr, COLUMNS: tl.constexpr):
    """The step on one block of a sample: the next iterate, the newest column, and what is pending then."""
    z, fz, difference, df, left, z_next = states
    row, offsets, width, slots, slot, next_slot, size = where
    used, is_finished, is_refused = fate
    index, inside = tl.arange(0, COLUMNS), offsets < width
    here = row * width + offsets
    pending = (row * slots + slot) * width + offsets
    image = tl.load(fz + here, inside, 0)
    if RESIDUALS or REST != 0:
        if difference is None:
            r = image - tl.load(z + here, inside, 0)
        else:
            r = tl.load(difference + here, inside, 0)
    if RESIDUALS:
        source = r
    else:
        source = tl.load(z + here, inside, 0)
    old_df, old_left = tl.load(df + pending, inside, 0), tl.load(left + pending, inside, 0)
    new_df, new_left = old_df - image, old_left - source
    place = ((row * slots + index) * width)[:, None] + offsets[None, :]
    mask, is_new = (used & (index != slot))[:, None] & inside[None, :], (used & (index == slot))[:, None]
    columns = tl.where(is_new, new_df[None, :], tl.load(df + place, mask, 0))
    moved = image - tl.sum(gamma[:, None] * columns, 0)
    if REST != 0:
        lefts = tl.where(is_new, new_left[None, :], tl.load(left + place, mask, 0))
        if not RESIDUALS:
            lefts = columns - lefts
        moved -= tl.full([], REST, moved.dtype) * (r - tl.sum(gamma[:, None] * lefts, 0))
    if RESIDUALS:
        half = old_df - 0.5 * old_left
    else:
        half = old_left - 0.5 * (old_left - old_df)
    moved = tl.where(is_refused != 0, half, tl.where(is_finished != 0, image, moved))
    # Other threads may have read what this one writes.
    tl.debug_barrier()
    is_made = ((is_finished | is_refused) == 0) & (slot != next_slot)
    is_made = offsets < tl.where(is_made, width, 0)
    tl.store(df + pending, new_df, is_made)
    tl.store(left + pending, new_left, is_made)
    following = (row * slots + next_slot) * width + offsets
    # Finished samples keep their oldest column; a slot that is new holds nothing to be kept.
    is_put = offsets < tl.where((is_finished != 0) & (next_slot < size), 0, width)
    tl.store(df + following, tl.where(is_refused != 0, old_df, image), is_put)
    tl.store(left + following, tl.where(is_refused != 0, old_left, source), is_put)
    tl.store(z_next + here, moved, inside)


@triton.jit(
    do_not_specialize=["slots", "slot", "next_slot", "size", "known", "splits"],
    do_not_specialize_on_alignment=["finished"],
)
def advance_kernel(
    z,  # (B, D)
    fz,  # (B, D)
    difference,  # (B, D), fz - z, or None
    df,  # (B, slots, D), written to
    left,  # (B, slots, D), written to
    z_next,  # (B, D), written
    sums,  # (B, splits, 2 * COLUMNS + 3), see `products_kernel`
    matrix,  # (B, slots, slots), float64
    matrix_out,
    rhs,  # (B, known), or None
    rhs_out,  # (B, size)
    valid,  # (B, slots), bool
    valid_out,
    refused,  # (B,), bool, or None
    finished,  # (B,), bool, or None
    watched,  # (B,), bool, or None
    plain_out,  # (B,), bool
    singular_out,  # (B,), bool
    width,  # D
    slots,
    slot,  # that of the column that is made now
    next_slot,  # that of the values that are pending then
    size,  # columns with the one that is made now
    known,
    splits,
    RESIDUALS: tl.constexpr,
    RIDGE: tl.constexpr,
    LIMIT: tl.constexpr,  # on coefficients, of a system that is not singular
    REST: tl.constexpr,  # 1 - damping
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Solve the small system of a sample, and take the step on its part of D.

    All programs of a sample solve the system, which takes less time than to start another kernel. So nothing
    that they read for it may be written: what is small is written anew, by the first of them.
    """
    row, index = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    is_finished, is_refused, is_first = flag(finished, row), flag(refused, row), tl.program_id(1) == 0
    is_made = (is_finished | is_refused) == 0  # whether there is a new column
    made = tl.where(is_made, slot, COLUMNS)
    has = tl.load(valid + row * slots + index, index < tl.where(is_refused != 0, 0, slots), 0) != 0
    has = has | (index == made)
    at_work = has & (index < tl.where(is_made, size, 0))
    r, line, column = newest(sums, rhs, row, splits, known, slot, has, at_work, RESIDUALS, RIDGE, COLUMNS)
    place = (row * slots + index[:, None]) * slots + index[None, :]
    old = tl.load(matrix + place, (index < slots)[:, None] & (index < slots)[None, :], 0)
    new = bordered(old, line, column, made, size, is_refused, RESIDUALS, RIDGE, COLUMNS)
    gamma, solved = coefficients(new, r, size, LIMIT, COLUMNS)
    # What is written by the first program alone has no place in the others.
    slots_out, size_out = tl.where(is_first, slots, 0), tl.where(is_first, size, 0)
    tl.store(matrix_out + place, new, (index < slots_out)[:, None] & (index < slots_out)[None, :])
    tl.store(rhs_out + row * size + index, r, index < size_out)
    # The oldest column gives its slot away, but that of a finished sample does not.
    given = tl.where(is_finished != 0, COLUMNS, next_slot)
    tl.store(valid_out + row * slots + index, has & (index != given), index < slots_out)
    has_none = tl.sum((has & (index < size)).to(tl.int32), 0) == 0
    tl.store(plain_out + row, has_none | (solved == 0), is_first)
    is_singular = (solved == 0) & ((is_finished | flag(watched, row)) == 0)
    tl.store(singular_out + row, is_singular, is_first)
    states = (z, fz, difference, df, left, z_next)
    fate = (at_work & (index < tl.where(solved, size, 0)), is_finished, is_refused)
    gamma = gamma.to(z_next.dtype.element_ty)
    for block in range(tl.program_id(1), tl.cdiv(width, BLOCK), tl.num_programs(1)):
        where = (row, block * BLOCK + tl.arange(0, BLOCK), width, slots, slot, next_slot, size)
        move(states, where, fate, gamma, RESIDUALS, REST, COLUMNS)
