from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_scripts import load

recipe = load("monotone")


def test_no_prediction_changes_within_the_radius_and_some_do_not_far_beyond() -> None:
    torch.manual_seed(0)
    model = recipe.classifier(8)
    images = torch.randn(6, 64)
    with torch.no_grad():
        before, radius = model(images).argmax(1), recipe.certified_radius(model, images)
    assert (radius > 0).all()
    changed_at = torch.full((6,), torch.inf)
    for distance in (0.3, 0.99, 3.0, 10.0, 30.0, 100.0, 300.0):
        moved = images.clone()
        for _ in range(5):  # where the gap to the nearest other class falls
            moved.requires_grad_()
            logits = model(moved)
            others = logits.scatter(1, before[:, None], -torch.inf).amax(1)
            gap = logits.gather(1, before[:, None])[:, 0] - others
            (slope,) = torch.autograd.grad(gap.sum(), moved)
            with torch.no_grad():
                offset = (
                    moved - images - 0.5 * distance * radius[:, None] * torch.nn.functional.normalize(slope)
                )
                length = offset.norm(dim=1, keepdim=True)
                moved = images + offset * (distance * radius[:, None] / length).clamp(max=1)
        with torch.no_grad():
            changed = model(moved).argmax(1) != before
        changed_at = changed_at.minimum(torch.where(changed, distance, torch.inf))
    assert (changed_at > 1).all()
    assert changed_at.isfinite().any()


def test_it_runs_and_large_weights_stop_the_plain_cell_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.main(["--quick", "--out", str(tmp_path)])
    _, small, large, _, radius = (line.split() for line in capsys.readouterr().out.splitlines())
    assert small[1:4:2] == ["100%", "100%"]
    assert (large[1], large[3]) == ("0%", "100%")
    assert float(radius[4]) > 0
    assert (tmp_path / "monotone.png").stat().st_size > 5_000
