"""An implicit layer against explicit depth: memory, time and what is learnt, by the number of evaluations.

The same cell so many times: explicit with weights of its own at every step, with one set of weights, the same
with activation checkpointing, and as an implicit layer of as many solver steps with three backward modes.
"""

from . import digits, memory, parity, times

CASES = (memory.CASE, times.CASE, digits.CASE, parity.CASE)
