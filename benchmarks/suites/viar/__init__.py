"""viar: fidelity to the published programs, speed, memory, and what its promises are worth.

Models of real shape have random weights. The trained ones of 8 x 8 digits are in runs/benchmarks/digits,
those of MNIST in runs/recipes; if they are missing they are trained there by their recipes, which takes
minutes. With --quick untrained models stand in, so whatever hangs on training (differences between caches,
classes) is of no meaning and may fail its bar.
"""

from . import (
    app,
    attention,
    cache,
    convergence,
    digits,
    editing,
    executions,
    fidelity,
    frontier,
    identity,
    knob,
    paper,
    shards,
    speed,
    tokenizer,
    training,
    trunks,
)

CASES = (
    fidelity.CASE,
    cache.CASE,
    speed.CASE,
    trunks.CASE,
    attention.CASE,
    executions.CASE,
    training.CASE,
    tokenizer.CASE,
    shards.CASE,
    digits.CASE,
    identity.CASE,
    knob.CASE,
    frontier.CASE,
    convergence.CASE,
    editing.CASE,
    paper.CASE,
    app.CASE,
)
