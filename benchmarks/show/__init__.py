"""What is shown of figures: tables, pictures, pages of the documentation, comparisons of files."""

from .pictures import COLORS, curve, draw, draw_all, legend_below, logarithmic, one_two_five
from .tables import listing, pivot

__all__ = [
    "COLORS",
    "curve",
    "draw",
    "draw_all",
    "legend_below",
    "listing",
    "logarithmic",
    "one_two_five",
    "pivot",
]
