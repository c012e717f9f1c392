"""The kernels of the driver's bookkeeping, see `record.py`, for a batch of B samples of D numbers.

No program reads what belongs to another sample than its own. Numbers that change from step to step are not
specialised on, so that nothing is compiled again during a solve.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..solution import Status

_STALLED = tl.constexpr(int(Status.STALLED))
_DIVERGED = tl.constexpr(int(Status.DIVERGED))
_CONVERGED = tl.constexpr(int(Status.CONVERGED))


@triton.jit
def measure(
    z,  # (B, D)
    fz,  # (B, D)
    difference,  # (B, D), written
    sums,  # (B, parts, 2), float64, written: squares of the difference and of the image
    width,
    HAS_DIFFERENCE: tl.constexpr,
    PART: tl.constexpr,  # numbers in a part
    BLOCK: tl.constexpr,
):
    """f(z) - z, and partial sums of squares. A program is a part of a sample."""
    sample = tl.program_id(0).to(tl.int64)
    # In float64, which holds the squares of all numbers of float32.
    residual = tl.zeros([BLOCK], tl.float64)
    scale = tl.zeros([BLOCK], tl.float64)
    own, start = sample * width, tl.program_id(1) * PART
    for block in range(0, PART, BLOCK):
        places = start + block + tl.arange(0, BLOCK)
        inside = places < width
        image = tl.load(fz + own + places, mask=inside, other=0)
        moved = image - tl.load(z + own + places, mask=inside, other=0)
        if HAS_DIFFERENCE:
            tl.store(difference + own + places, moved, mask=inside)
        residual += moved.to(tl.float64) * moved.to(tl.float64)
        scale += image.to(tl.float64) * image.to(tl.float64)
    sums += (sample * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(sums, tl.sum(residual))
    tl.store(sums + 1, tl.sum(scale))


@triton.jit
def root(
    sums,  # (parts, 2), float64
    num_parts,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The square root of a sample's squares, out of the sums over its parts."""
    squares = tl.zeros([TILE], tl.float64)
    for tile in range(NUM_TILES):
        places = tile * TILE + tl.arange(0, TILE)
        squares += tl.load(sums + 2 * places, mask=places < num_parts, other=0)
    return tl.sqrt(tl.sum(squares))


@triton.jit(do_not_specialize=["num_parts", "step", "oldest"])
def judge(
    sums,  # (B, parts, 2), float64
    constants,  # (3,): factors of the smallest residual, for improving on it and for a blow-up; rtol
    residual_out,  # (B,), written, as are the next four
    scale_out,
    lowest_out,
    floor_out,
    flags,  # (4, B), bool: at work now, at work before and not improved, improved, finished
    lowest,  # (B,)
    floor,  # (B,)
    begun,  # (B,), int64
    broken,  # (B,), bool, from here on read and written
    best_step,  # (B,), int64
    best_residual,  # (B,)
    best_scale,  # (B,)
    status,  # (B,), int64
    num_steps,  # (B,), int64
    num_parts,
    step,
    oldest,  # a best iterate that is no newer is too old; negative: none is
    MAY_RECOVER: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """What is known of every sample after an evaluation. A program is a sample."""
    sample, batch = tl.program_id(0), tl.num_programs(0)
    own = sums + sample.to(tl.int64) * num_parts * 2
    before, least = tl.load(lowest + sample), tl.load(floor + sample)
    residual = root(own, num_parts, NUM_TILES, TILE).to(before.dtype)
    scale = root(own + 1, num_parts, NUM_TILES, TILE).to(before.dtype)
    tl.store(residual_out + sample, residual)
    tl.store(scale_out + sample, scale)

    # Limits of a finished sample are minus infinity: nothing is within them, whatever is measured.
    is_first, at_work = step == 0, before != float("-inf")
    is_finite = residual < float("inf")
    met = (residual <= least + tl.load(constants + 2) * scale) & is_finite
    improved = (residual <= before * tl.load(constants)) | met
    is_sound = residual <= before * tl.load(constants + 1)
    is_broken = at_work & ~tl.where(is_first, is_finite, is_sound)
    lost = is_broken
    if MAY_RECOVER:
        lost = is_broken & (is_first | tl.load(broken + sample).to(tl.int1))
        tl.store(broken + sample, is_broken)
    kept = improved | (is_first & at_work)
    latest = tl.where(improved, step, tl.load(best_step + sample))
    is_stalled = at_work & (tl.maximum(latest, tl.load(begun + sample)) <= oldest)
    ended = met | lost | is_stalled
    now = tl.where(kept, residual, before)

    tl.store(best_step + sample, latest)
    tl.store(best_scale + sample, tl.where(kept, scale, tl.load(best_scale + sample)))
    tl.store(best_residual + sample, tl.where(ended, now, tl.load(best_residual + sample)))
    code = tl.where(is_stalled, _STALLED, tl.load(status + sample))
    code = tl.where(met, _CONVERGED, tl.where(lost, _DIVERGED, code))
    tl.store(status + sample, code)
    tl.store(num_steps + sample, tl.where(ended, step, tl.load(num_steps + sample)))
    tl.store(lowest_out + sample, tl.where(ended, float("-inf"), now))
    tl.store(floor_out + sample, tl.where(ended, float("-inf"), least))
    tl.store(flags + sample, at_work & ~ended)
    tl.store(flags + batch + sample, at_work & ~improved)
    tl.store(flags + 2 * batch + sample, improved)
    tl.store(flags + 3 * batch + sample, ended | ~at_work)


@triton.jit(do_not_specialize_on_alignment=["improved", "active"])  # which are parts of a tensor
def keep(
    z,  # (B, D), the last iterate
    z_next,  # (B, D), what the solver proposes
    best,  # (B, D)
    best_out,  # (B, D), written: `best` itself, or room for another
    held,  # (B, D), written
    improved,  # (B,), bool
    active,  # (B,), bool
    width,
    IN_PLACE: tl.constexpr,
    PART: tl.constexpr,  # numbers in a part
    BLOCK: tl.constexpr,
):
    """The best iterates, and the next points, finished samples at their best. A program is a part of one."""
    sample = tl.program_id(0).to(tl.int64)
    own, start = sample * width, tl.program_id(1) * PART
    is_new, is_active = tl.load(improved + sample).to(tl.int1), tl.load(active + sample).to(tl.int1)
    # Nothing is read or written that does not change: most samples need one of the first two alone.
    reads_old, writes = ~is_new & ~is_active, is_new
    if not IN_PLACE:
        reads_old, writes = ~is_new, is_new | ~is_new
    for block in range(0, PART, BLOCK):
        places = start + block + tl.arange(0, BLOCK)
        inside = places < width
        new = tl.load(z + own + places, mask=inside & is_new, other=0)
        moved = tl.load(z_next + own + places, mask=inside & is_active, other=0)
        old = tl.load(best + own + places, mask=inside & reads_old, other=0)
        now = tl.where(is_new, new, old)
        tl.store(best_out + own + places, now, mask=inside & writes)
        tl.store(held + own + places, tl.where(is_active, moved, now), mask=inside)
