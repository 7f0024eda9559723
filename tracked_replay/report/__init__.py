"""Figures from plain arrays: scores, images, what happens along training, and how far scores can be trusted.

Knows no MLflow, torch or run.
"""

from ._canvas import figure_png_bytes
from ._curves import influence_over_training_figure, influence_share_over_training_figure, training_figure
from ._lds import counterfactual_figure, lds_by_drop_figure, lds_scatter_figure
from ._pictures import Picture, extremes_figure
from ._scores import score_histogram_figure
from ._text import plain_text

__all__ = [
    "Picture",
    "counterfactual_figure",
    "extremes_figure",
    "figure_png_bytes",
    "influence_over_training_figure",
    "influence_share_over_training_figure",
    "lds_by_drop_figure",
    "lds_scatter_figure",
    "plain_text",
    "score_histogram_figure",
    "training_figure",
]
