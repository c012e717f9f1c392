"""A user's program, for `mypy --strict`: without types in the packages, the last line is no fault."""

import torch

import deqlib
import viar

found: deqlib.Solution = deqlib.ImplicitLayer(torch.nn.Linear(2, 2)).solve(torch.zeros(1, 2))
steps: torch.Tensor = found.num_steps
told: deqlib.Diagnosis = deqlib.diagnose(deqlib.ImplicitLayer(torch.nn.Linear(2, 2)), torch.zeros(1, 2))
images: torch.Tensor = viar.generate(*viar.load_shipped(), [0])
deqlib.Stopping(rtol="small")  # type: ignore[arg-type]
