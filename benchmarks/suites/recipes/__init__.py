"""recipes: what training reaches, VIAR beside VAR, and which training gives the knob.

Tokenizers are those of runs/recipes, trained there by their own recipes, which takes minutes, if they are
missing. With --quick untrained ones stand in and few steps are made, so that no figure means anything.
"""

from . import knob, mnist

CASES = (mnist.CASE, knob.CASE)
